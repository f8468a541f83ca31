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
from gigagan_jax.core.files import is_lfs_pointer, lfs_hint

# File names of transformers.
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# File names of open_clip; hub folders of its models may hold nothing else.
OPEN_CLIP_CONFIG, OPEN_CLIP_SINGLE = "open_clip_config.json", "open_clip_model.safetensors"
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
    folder, local = locate(path, need)
    # A path to the weights themselves is a common mistake.
    if folder.is_file():
        raise file_error(path, folder, need)
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        raise weights_error(path, folder, need, local)
    if config and not (folder / CONFIG).exists():
        raise config_error(path, folder, need, local)
    return folder


def locate(path: str, need: Requirement) -> tuple[Path, bool]:
    """(the folder or file that a path means, whether it was on this machine's disk under that name)

    A hub id is looked up in the hub's cache, and downloaded if needed. A folder of that cache, `models--org--name`, means
    its snapshot.

    Raises:
      UserError: there is no such folder, or it cannot be downloaded.
    """
    if not path:
        raise UserError(f"{need.field} is not set: give the folder or hub id of a network{_alternative_hint(need)}")
    # Path.expanduser raises for an unknown home; os.path.expanduser leaves such a path unchanged.
    place = Path(os.path.expanduser(path))
    if place.exists():
        return _snapshot_of(path, place, need), True
    if not is_hub_id(path):
        raise UserError(
            f"{need.field}={path}: there is no such folder, and it is no hub id (org/name){_alternative_hint(need)}"
        )
    return _from_hub(path, need), False


def _snapshot_of(path: str, folder: Path, need: Requirement) -> Path:
    """The snapshot that `models--org--name` of the hub's cache names as its main; any other folder as it is."""
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    # The cache keeps every revision that was downloaded; refs/main names the one that the hub id stands for.
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    found = sorted(f for f in snapshots.iterdir() if f.is_dir())
    if len(found) == 1:
        return found[0]
    names = ", ".join(f.name for f in found) or "none"
    raise UserError(
        f"{need.field}={path} is a folder of the hub's cache without a main: give one of snapshots/ ({names})"
    )


def file_error(path: str, file: Path, need: Requirement) -> UserError:
    """The error of a path that is a file, where a folder is needed."""
    if file.suffix in _PICKLE_SUFFIXES:
        return _pickle_error(need, file, file.parent)
    return UserError(f"{need.field}={path} is a file: give the folder that holds {CONFIG} and {SINGLE}")


def weights_error(path: str, folder: Path, need: Requirement, local: bool) -> UserError:
    """The error of a folder without weights in safetensors."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLE_SUFFIXES:
            return _pickle_error(need, file, folder)
    # A folder that the user named is not downloaded again, so its errors have no hint.
    hint = "" if local else f"{_download_hint(path)}; if the hub has only a pickle, {_conversion_hint(path)}"
    inside = sorted(f.name for f in folder.iterdir() if f.is_dir() and any(f.glob("*.safetensors")))
    inside_hint = f"; {', '.join(inside[:3])} in it {'has' if len(inside) == 1 else 'have'} some" if inside else ""
    return UserError(
        f"{need.field}={path}: neither {SINGLE} nor {INDEX} in {folder}{inside_hint}{hint}{_alternative_hint(need)}"
    )


def config_error(path: str, folder: Path, need: Requirement, local: bool) -> UserError:
    """The error of a folder without a config.json."""
    hint = "" if local else _download_hint(path)
    return UserError(f"{need.field}={path}: no {CONFIG} in {folder}{hint}{_alternative_hint(need)}")


def find_cached(path: str) -> Path | None:
    """The folder of a hub id in the hub's cache; None without its weights there. Uses no network."""
    try:
        folder = _download_snapshot(path, local_files_only=True)
    except Exception:
        # The hub raises exceptions of many types for a missing snapshot.
        return None
    # An interrupted download leaves a snapshot without its weights.
    complete = (folder / CONFIG).exists() and ((folder / SINGLE).exists() or (folder / INDEX).exists())
    # Not among the patterns: most repositories of open_clip's have transformers' files too, which are enough.
    open_clip = (folder / OPEN_CLIP_CONFIG).exists() and (folder / OPEN_CLIP_SINGLE).exists()
    return folder if complete or open_clip else None


def find_cached_tokenizer(name: str) -> Path | None:
    """The folder with the tokenizer.json of a hub id in the hub's cache; None without it. Uses no network."""
    import huggingface_hub as hub

    file = hub.try_to_load_from_cache(name, "tokenizer.json")
    return Path(file).parent if isinstance(file, str) else None


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
    if is_lfs_pointer(file):
        raise UserError(lfs_hint(file))
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} cannot be read as JSON ({e}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; fetch it again")
    return value
