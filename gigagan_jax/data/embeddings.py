"""Text embeddings made ahead of time and kept beside the data, so that the step need not run the text encoder.

A folder made by `tools/prepare_data.py embed`: `index.json` says of which encoder and which data set, `null.safetensors`
holds the null caption, and each `part-NNNNN.safetensors` the captions of `part_size` consecutive examples:

    features        [rows, D], the tokens of all captions one after the other, each up to its end of text
    row_starts      int64 [K + 1], first row of each caption
    caption_starts  int64 [E + 1], first caption of each example
    clip_text       float32 [K, P], normalised embeddings for the contrastive loss; only where they were asked for
"""

import dataclasses
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.source import Source

INDEX, NULL = "index.json", "null.safetensors"
PART_SIZE = 1024


def part_name(i: int) -> str:
    """File of examples i * part_size and on."""
    return f"part-{i:05d}.safetensors"


def describe(config: Config, source: Source) -> dict[str, Any]:
    """What must agree between a folder and the run that reads it."""
    t = config.text
    return {
        "source": source.identity(),
        "examples": len(source),
        "encoder": t.encoder,
        "layer": t.layer if t.encoder == "clip" else "last",
        "final_norm": t.final_norm,
        "length": t.length,
        "dtype": config.dtype,
        "clip_loss": config.uses_clip_loss,
        "clean_captions": config.data.clean_captions,
    }


@dataclasses.dataclass(frozen=True)
class Said:
    """One caption's embeddings: features [tokens up to the end of text, D], clip_text [P] or None."""

    features: np.ndarray
    clip_text: np.ndarray | None


class Embeddings:
    """Reads such a folder; safe to use from several threads.

    Args:
      folder: made by `tools/prepare_data.py embed`.
      config: of the run.
      source: the run's data set.

    Attributes:
      identities: SHA-256 of the frozen networks that made it, by role.

    Raises:
      UserError: the folder is missing, unfinished, or of another encoder or data set.
    """

    def __init__(self, folder: Path, config: Config, source: Source):
        self.folder, self._length = folder, config.text.length
        self._parts: dict[int, Any] = {}
        self._lock = threading.Lock()
        make = f"make it with tools/prepare_data.py embed --out={folder}"
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            made, self.identities, self._part_size = index["of"], dict(index["identities"]), int(index["part_size"])
        except OSError:
            raise UserError(
                f"config.data.embeddings={folder}: there is no {INDEX} in it (unfinished?); {make}"
            ) from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder / INDEX} cannot be read ({e!r}); {make}") from None
        want = describe(config, source)
        # What was made for the contrastive loss too serves a run without it.
        enough = lambda k: made.get(k) == want[k] or (k == "clip_loss" and made.get(k))
        differ = [f"{k}: {made.get(k)} there, {want[k]} here" for k in want if not enough(k)]
        if differ:
            raise UserError(f"config.data.embeddings={folder} does not fit this run ({'; '.join(differ)}); {make}")
        self._clip = bool(want["clip_loss"])
        self._null = read_null(folder)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_parts": {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def of(self, example: int, caption: int | None) -> dict[str, np.ndarray]:
        """Embeddings of a caption of an example, None for the null caption.

        Returns:
          `features` [length, D], zeros after the end of text; `clip_text` float32 [P] where the contrastive loss is on
        """
        said = self._null if caption is None else self._read(example, caption)
        features = np.zeros((self._length, said.features.shape[1]), said.features.dtype)
        features[: len(said.features)] = said.features
        out = {"features": features}
        if self._clip:
            assert said.clip_text is not None
            out["clip_text"] = said.clip_text
        return out

    def _read(self, example: int, caption: int) -> Said:
        number, place = divmod(example, self._part_size)
        part = self._part(number)
        k = int(part["caption_starts"][place]) + caption
        if k >= part["caption_starts"][place + 1]:
            raise UserError(
                f"{self.folder / part_name(number)} lacks caption {caption} of example {example}: captions were added since "
                "it was made; make the embeddings again"
            )
        first, last = int(part["row_starts"][k]), int(part["row_starts"][k + 1])
        features = part["file"].get_slice("features")[first:last]
        clip = part["file"].get_slice("clip_text")[k : k + 1][0] if self._clip else None
        return Said(features, clip)

    def _part(self, number: int) -> Any:
        with self._lock:
            if number not in self._parts:
                file = _open(self.folder / part_name(number))
                self._parts[number] = {
                    "file": file,
                    **{k: file.get_tensor(k) for k in ("caption_starts", "row_starts")},
                }
            return self._parts[number]


def _open(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(file), framework="numpy")
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        why = "is missing" if not file.exists() else f"is damaged ({str(e).splitlines()[0]})"
        raise UserError(f"{file} {why}: make the embeddings again (remove the file first)") from None


def read_null(folder: Path) -> Said:
    """The null caption's embeddings."""
    file = _open(folder / NULL)
    return Said(file.get_tensor("features"), file.get_tensor("clip_text") if "clip_text" in file.keys() else None)  # noqa: SIM118


def write(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file and renames it into place."""
    import safetensors.numpy

    temporary = file.with_suffix(".tmp")
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, str(temporary))
    os.replace(temporary, file)


def write_part(file: Path, examples: Sequence[Sequence[Said]], width: int, dtype: Any) -> None:
    """Writes the captions of consecutive examples; `width` and `dtype` are those of the features."""
    said = [one for example in examples for one in example]
    starts = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    tensors = {
        "features": np.concatenate([one.features for one in said]) if said else np.zeros((0, width), dtype),
        "row_starts": starts([len(one.features) for one in said]),
        "caption_starts": starts([len(example) for example in examples]),
    }
    clips = [one.clip_text for one in said if one.clip_text is not None]
    if clips:
        tensors["clip_text"] = np.stack(clips)
    write(file, tensors)


def write_null(folder: Path, said: Said) -> None:
    """Writes the null caption's embeddings."""
    write(
        folder / NULL, {"features": said.features} | ({} if said.clip_text is None else {"clip_text": said.clip_text})
    )


def write_index(folder: Path, of: Mapping[str, Any], identities: Mapping[str, str]) -> None:
    """Finishes a folder: without its index it is not read."""
    text = json.dumps({"of": dict(of), "identities": dict(identities), "part_size": PART_SIZE}, indent=1)
    temporary = folder / "index.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / INDEX)
