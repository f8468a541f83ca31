"""Text embeddings computed ahead of time and stored beside the data. The training step then skips the text encoder.

`tools/prepare_data.py embed` writes the folder. `index.json` names the encoder and the data set, `null.safetensors`
holds the null caption, and each `part-NNNNN.safetensors` holds the captions of `part_size` consecutive examples:

    features        [rows, D], the tokens of all captions one after the other, each up to its end of text
    row_starts      int64 [K + 1], first row of each caption
    caption_starts  int64 [E + 1], first caption of each example
    clip_text       float32 [K, P], normalised embeddings for the contrastive loss; only where that loss is on
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
# Examples in a part. Readers take it from index.json, so folders of another size stay readable.
PART_SIZE = 1024


def part_name(i: int) -> str:
    """File of the examples from i * part_size on."""
    return f"part-{i:05d}.safetensors"


def expected_metadata(config: Config, source: Source) -> dict[str, Any]:
    """Settings in which a folder of embeddings must agree with the run that reads it."""
    t = config.text
    return {
        "source": source.identity(),
        "examples": len(source),
        "encoder": t.encoder,
        # Only CLIP offers a choice of layer: for another encoder the setting must not make folders differ.
        "layer": t.layer if t.encoder == "clip" else "last",
        "final_norm": t.final_norm,
        "length": t.length,
        "dtype": config.dtype,
        "clip_loss": config.uses_clip_loss,
        "clean_captions": config.data.clean_captions,
    }


@dataclasses.dataclass(frozen=True)
class CaptionEmbedding:
    """One caption's embeddings: features [tokens up to the end of text, D], clip_text [P] or None."""

    features: np.ndarray
    clip_text: np.ndarray | None


class Embeddings:
    """Reads a folder of stored embeddings; safe to use from several threads.

    Args:
      folder: written by `tools/prepare_data.py embed`.
      config: of the run.
      source: the run's data set.

    Attributes:
      identities: SHA-256 of the frozen networks that computed the embeddings, by role.

    Raises:
      UserError: the folder is missing or unfinished, or belongs to another encoder or data set.
    """

    def __init__(self, folder: Path, config: Config, source: Source):
        self.folder, self._length = folder, config.text.length
        self._parts: dict[int, Any] = {}
        self._lock = threading.Lock()
        remedy = f"make it with tools/prepare_data.py embed --out={folder}"
        # `embed` writes the index last: its absence means an unfinished folder.
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            stored, self.identities, self._part_size = index["of"], dict(index["identities"]), int(index["part_size"])
        except OSError:
            raise UserError(
                f"config.data.embeddings={folder}: there is no {INDEX} in it (unfinished?); {remedy}"
            ) from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder / INDEX} cannot be read ({e!r}); {remedy}") from None
        expected = expected_metadata(config, source)
        # A folder with embeddings for the contrastive loss also serves a run without that loss.
        fits = lambda k: stored.get(k) == expected[k] or (k == "clip_loss" and stored.get(k))
        differences = [f"{k}: {stored.get(k)} there, {expected[k]} here" for k in expected if not fits(k)]
        if differences:
            raise UserError(
                f"config.data.embeddings={folder} does not fit this run ({'; '.join(differences)}); {remedy}"
            )
        self._has_clip = bool(expected["clip_loss"])
        self._null = read_null(folder)

    # Locks and memory maps cannot be pickled. Each worker process opens the parts itself.
    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_parts": {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def caption_embedding(self, example: int, caption: int | None) -> dict[str, np.ndarray]:
        """Embeddings of one caption of an example; `caption` None stands for the null caption.

        Returns:
          `features` [length, D], zeros after the end of text; `clip_text` float32 [P] where the contrastive loss is on.

        Raises:
          UserError: the example has more captions than it had when the folder was written.
        """
        embedding = self._null if caption is None else self._read_caption(example, caption)
        # Captions differ in length, the rows of a batch do not.
        features = np.zeros((self._length, embedding.features.shape[1]), embedding.features.dtype)
        features[: len(embedding.features)] = embedding.features
        arrays = {"features": features}
        if self._has_clip:
            # expected_metadata has checked that the folder holds clip_text.
            assert embedding.clip_text is not None
            arrays["clip_text"] = embedding.clip_text
        return arrays

    def _read_caption(self, example: int, caption: int) -> CaptionEmbedding:
        number, place = divmod(example, self._part_size)
        part = self._open_part(number)
        k = int(part["caption_starts"][place]) + caption
        # Without this check, the embedding of the next example's caption would be returned.
        if k >= part["caption_starts"][place + 1]:
            raise UserError(
                f"{self.folder / part_name(number)} lacks caption {caption} of example {example}: captions were "
                "added since it was made; make the embeddings again"
            )
        # Rows of the ragged array: captions lie one after the other without padding.
        first, last = int(part["row_starts"][k]), int(part["row_starts"][k + 1])
        # get_slice reads these rows only, not the whole tensor.
        features = part["file"].get_slice("features")[first:last]
        clip = part["file"].get_slice("clip_text")[k : k + 1][0] if self._has_clip else None
        return CaptionEmbedding(features, clip)

    def _open_part(self, number: int) -> Any:
        # One thread opens a part. The others wait rather than map the file again.
        with self._lock:
            if number not in self._parts:
                file = _open_tensors(self.folder / part_name(number))
                # The two index arrays are small and stay in memory. Features stay on disk.
                self._parts[number] = {
                    "file": file,
                    **{k: file.get_tensor(k) for k in ("caption_starts", "row_starts")},
                }
            return self._parts[number]


def _open_tensors(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(file), framework="numpy")
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        why = "is missing" if not file.exists() else f"is damaged ({str(e).splitlines()[0]})"
        # `embed` keeps every part that exists, a damaged one too.
        raise UserError(f"{file} {why}: make the embeddings again (remove the file first)") from None


def read_null(folder: Path) -> CaptionEmbedding:
    """Reads the null caption's embeddings. Raises UserError where the file is missing or damaged."""
    file = _open_tensors(folder / NULL)
    # safe_open returns no mapping: `in` works on its keys() only.
    clip_text = file.get_tensor("clip_text") if "clip_text" in file.keys() else None  # noqa: SIM118
    return CaptionEmbedding(file.get_tensor("features"), clip_text)


def save_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file and renames it into place."""
    import safetensors.numpy

    # A killed run leaves a .tmp file, never half a part: `embed` keeps parts that exist.
    temporary = file.with_suffix(".tmp")
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, str(temporary))
    os.replace(temporary, file)


def write_part(file: Path, examples: Sequence[Sequence[CaptionEmbedding]], width: int, dtype: Any) -> None:
    """Writes the captions of consecutive examples; `width` and `dtype` are those of the features."""
    captions = [caption for example in examples for caption in example]
    starts = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # A part may hold no caption at all. np.concatenate refuses an empty list.
    empty = np.zeros((0, width), dtype)
    tensors = {
        "features": np.concatenate([caption.features for caption in captions]) if captions else empty,
        "row_starts": starts([len(caption.features) for caption in captions]),
        "caption_starts": starts([len(example) for example in examples]),
    }
    clips = [caption.clip_text for caption in captions if caption.clip_text is not None]
    if clips:
        tensors["clip_text"] = np.stack(clips)
    save_tensors(file, tensors)


def write_null(folder: Path, null: CaptionEmbedding) -> None:
    """Writes the null caption's embeddings."""
    clip = {} if null.clip_text is None else {"clip_text": null.clip_text}
    save_tensors(folder / NULL, {"features": null.features} | clip)


def write_index(folder: Path, of: Mapping[str, Any], identities: Mapping[str, str]) -> None:
    """Completes a folder. Readers refuse a folder without an index."""
    # "of" and the other keys are the format of folders that exist.
    text = json.dumps({"of": dict(of), "identities": dict(identities), "part_size": PART_SIZE}, indent=1)
    temporary = folder / "index.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / INDEX)
