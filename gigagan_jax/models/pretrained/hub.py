"""Where the files of a pretrained network are: a folder, or the hub's cache.

A network is a folder as transformers writes it (config.json, model.safetensors or its shards with an index, a tokenizer), or
the hub id of one, `org/name` or `org/name@revision`. Everything that can be wrong with it is one line that says what is
missing and how to get it. Pickles are never opened: they run code.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WANTED = [
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
class Need:
    """Why a network is wanted, for the line that says it is missing.

    field: config field that names it, "config.text.path"
    instead: what can be done without it
    """

    field: str
    instead: str = ""


def find(path: str, need: Need, *, config: bool = True) -> Path:
    """The folder of a network: a local one, or the hub's cache (which is filled if the network can be reached).

    Args:
      path: folder or hub id.
      need: for the line that says it is missing.
      config: does the network have a config.json (Inception, VGG and the LPIPS heads have none)?

    Raises:
      UserError: there is none, or no safetensors file in it; with the files, the place, and how to get them.
    """
    if not path:
        raise UserError(f"{need.field} is not set: give the folder or hub id of a network{_or(need)}")
    folder = Path(os.path.expanduser(path))  # Path.expanduser raises for a home that is not there
    local = folder.exists()
    get = "" if local else _get(path)
    if not local:
        if not _HUB_ID.fullmatch(path) or path.startswith((".", "/")):
            raise UserError(f"{need.field}={path}: there is no such folder, and it is no hub id (org/name){_or(need)}")
        folder = _from_hub(path, need)
    if folder.is_file():
        if folder.suffix in _PICKLES:
            raise _pickle(need, folder, folder.parent)
        raise UserError(f"{need.field}={path} is a file: give the folder that holds {CONFIG} and {SINGLE}")
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        for file in sorted(folder.iterdir()):
            if file.suffix in _PICKLES:
                raise _pickle(need, file, folder)
        convert = "" if local else f"; if the hub has only a pickle, {_convert(path)}"
        raise UserError(f"{need.field}={path}: neither {SINGLE} nor {INDEX} in {folder}{get}{convert}{_or(need)}")
    if config and not (folder / CONFIG).exists():
        raise UserError(f"{need.field}={path}: no {CONFIG} in {folder}{get}{_or(need)}")
    return folder


def cached(path: str) -> Path | None:
    """The folder of a hub id in the hub's cache, with its weights in it; None where it is not there. No network."""
    try:
        folder = _snapshot(path, local_files_only=True)
    except Exception:
        return None  # whatever the hub raises for what it does not have
    whole = (folder / CONFIG).exists() and ((folder / SINGLE).exists() or (folder / INDEX).exists())
    return folder if whole else None


def _from_hub(path: str, need: Need) -> Path:
    folder = cached(path)
    if folder is not None:
        return folder
    try:
        return _snapshot(path, etag_timeout=5)
    except Exception as e:
        # Whatever the hub raises: no network, no such repository, no permission, a full disk.
        from huggingface_hub.constants import HF_HUB_CACHE

        why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:160]
        raise UserError(
            f"{need.field}={path}: {CONFIG}, {SINGLE} and the tokenizer's files are neither in a folder of that name nor in "
            f"the hub's cache {HF_HUB_CACHE}, and cannot be downloaded now ({why}){_get(path)}{_or(need)}"
        ) from None


def _get(path: str) -> str:
    name, revision = _hub_id(path)
    return (
        f"; get them with `hf download {name}{f' --revision {revision}' if revision else ''}` where there is a network"
    )


def _hub_id(path: str) -> tuple[str, str | None]:
    name, _, revision = path.partition("@")
    return name, revision or None


def _snapshot(path: str, **options: Any) -> Path:
    """What we want of a hub id; always by the same patterns, or the hub calls what is in its cache incomplete."""
    import huggingface_hub as hub

    name, revision = _hub_id(path)
    return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_WANTED, **options))


def _or(need: Need) -> str:
    return f"; {need.instead}" if need.instead else ""


def _pickle(need: Need, file: Path, folder: Path) -> UserError:
    return UserError(
        f"{need.field}: {file} is a pickle, which can run code and is not opened; {_convert(str(folder))}{_or(need)}"
    )


def _convert(name: str) -> str:
    return (
        "convert it once where you trust it, if transformers can read it: "
        f"python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{name}').save_pretrained('OUT')\" "
        "(with torch installed; copy the tokenizer's files too) and use OUT"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} cannot be read as JSON ({e}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; fetch it again")
    return value
