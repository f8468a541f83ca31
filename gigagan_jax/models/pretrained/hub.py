"""Finds the files of a pretrained network: in a folder, or in the cache of the Hugging Face hub.

A network is a folder in the layout of transformers: config.json, model.safetensors or its shards with an index, a
tokenizer. Or it is a hub id, `org/name` or `org/name@revision`. Every error is one line that names what is missing
and how to get it. Pickles are never opened, because they run code.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError

# File names of transformers.
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# One fixed list: the hub calls a snapshot incomplete if it is asked for by other patterns than it was stored by.
_HUB_PATTERNS = [
    CONFIG,
    SINGLE,
    INDEX,
    "model-*.safetensors",
    "*token*",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
]


@dataclasses.dataclass(frozen=True)
class Requirement:
    """The use of a network, for the error that says it is missing.

    field: config field that names the network, "config.text.path"
    instead: setting that does without it
    """

    field: str
    instead: str = ""


def is_hub_id(path: str) -> bool:
    """Whether a path has the form of a hub id and names no folder here."""
    # "./a/b" and "/a/b" look like hub ids to the pattern, but are meant as folders.
    return bool(_HUB_ID.fullmatch(path)) and not path.startswith((".", "/")) and not os.path.exists(path)


def find_folder(path: str, need: Requirement, *, config: bool = True) -> Path:
    """The folder of a network: a local one, or one in the hub's cache, after a download if needed.

    Args:
      path: folder or hub id.
      need: use of the network, for the error message.
      config: whether the network has a config.json; Inception, VGG and the LPIPS heads have none.

    Raises:
      UserError: there is no such network, or no safetensors file in it.
    """
    if not path:
        raise UserError(f"{need.field} is not set: give the folder or hub id of a network{_alternative_hint(need)}")
    # Path.expanduser raises for an unknown home; os.path.expanduser leaves such a path unchanged.
    folder = Path(os.path.expanduser(path))
    local = folder.exists()
    # A folder that the user named is not downloaded again, so its errors have no hint.
    hint = "" if local else _download_hint(path)
    if not local:
        if not is_hub_id(path):
            raise UserError(
                f"{need.field}={path}: there is no such folder, and it is no hub id (org/name){_alternative_hint(need)}"
            )
        folder = _from_hub(path, need)
    # A path to the weights themselves is a common mistake.
    if folder.is_file():
        if folder.suffix in _PICKLE_SUFFIXES:
            raise _pickle_error(need, folder, folder.parent)
        raise UserError(f"{need.field}={path} is a file: give the folder that holds {CONFIG} and {SINGLE}")
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        for file in sorted(folder.iterdir()):
            if file.suffix in _PICKLE_SUFFIXES:
                raise _pickle_error(need, file, folder)
        convert = "" if local else f"; if the hub has only a pickle, {_conversion_hint(path)}"
        raise UserError(
            f"{need.field}={path}: neither {SINGLE} nor {INDEX} in {folder}{hint}{convert}{_alternative_hint(need)}"
        )
    if config and not (folder / CONFIG).exists():
        raise UserError(f"{need.field}={path}: no {CONFIG} in {folder}{hint}{_alternative_hint(need)}")
    return folder


def find_cached(path: str) -> Path | None:
    """The folder of a hub id in the hub's cache; None without its weights there. Uses no network."""
    try:
        folder = _download_snapshot(path, local_files_only=True)
    except Exception:
        # The hub raises exceptions of many types for a missing snapshot.
        return None
    # An interrupted download leaves a snapshot without its weights.
    complete = (folder / CONFIG).exists() and ((folder / SINGLE).exists() or (folder / INDEX).exists())
    return folder if complete else None


def _from_hub(path: str, need: Requirement) -> Path:
    folder = find_cached(path)
    if folder is not None:
        return folder
    try:
        # 5 s instead of the hub's 10, so that a machine without a network fails soon.
        return _download_snapshot(path, etag_timeout=5)
    except Exception as e:
        # The hub raises exceptions of many types: no network, no such repository, no permission, a full disk.
        from huggingface_hub.constants import HF_HUB_CACHE

        why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:160]
        raise UserError(
            f"{need.field}={path}: {CONFIG}, {SINGLE} and the tokenizer's files are neither in a folder of that name "
            f"nor in the hub's cache {HF_HUB_CACHE}, and cannot be downloaded now ({why})"
            f"{_download_hint(path)}{_alternative_hint(need)}"
        ) from None


def _download_hint(path: str) -> str:
    name, revision = _hub_id(path)
    return (
        f"; get them with `hf download {name}{f' --revision {revision}' if revision else ''}` where there is a network"
    )


def _hub_id(path: str) -> tuple[str, str | None]:
    # "org/name@revision": the hub takes the two apart.
    name, _, revision = path.partition("@")
    return name, revision or None


def _download_snapshot(path: str, **options: Any) -> Path:
    """Downloads the files of a hub id that match `_HUB_PATTERNS`; returns their folder."""
    # Imported here: runs without frozen networks do not need the hub.
    import huggingface_hub as hub

    name, revision = _hub_id(path)
    return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS, **options))


def _alternative_hint(need: Requirement) -> str:
    return f"; {need.instead}" if need.instead else ""


def _pickle_error(need: Requirement, file: Path, folder: Path) -> UserError:
    return UserError(
        f"{need.field}: {file} is a pickle, which can run code and is not opened; "
        f"{_conversion_hint(str(folder))}{_alternative_hint(need)}"
    )


def _conversion_hint(name: str) -> str:
    return (
        "convert it once where you trust it, if transformers can read it: "
        f"python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{name}').save_pretrained('OUT')\" "
        "(with torch installed; copy the tokenizer's files too) and use OUT"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} cannot be read as JSON ({e}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; fetch it again")
    return value
