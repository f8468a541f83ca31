"""Weights of frozen networks: where they are, what is in them, and how they become sharded arrays.

A network is a folder as transformers writes it (config.json, model.safetensors or its shards with an index, a tokenizer), or
the hub id of one, `org/name` or `org/name@revision`. Everything that can be wrong with it is one line that says what is
missing and how to get it. Pickles are never opened: they run code.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.errors import UserError
from gigagan_jax.models.abstract import Module, Params, is_spec, path_name

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


class Row(NamedTuple):
    """One row of a key table: a parameter of ours, the tensor it is read from, and what is done to it.

    path: of the parameter, "encoder/blocks/layer/up/weight"; below "layer" it is stacked over the blocks
    key: in the file; "{}" stands for the number of the block
    transform: of one tensor, before stacking
    """

    path: str
    key: str
    transform: Callable[[np.ndarray], np.ndarray] = lambda x: x


def transposed(x: np.ndarray) -> np.ndarray:
    """Weights of a linear layer, [out, in] -> [in, out]."""
    return x.T


def hwio(x: np.ndarray) -> np.ndarray:
    """Weights of a convolution, [out, in, h, w] -> [h, w, in, out]."""
    return x.transpose(2, 3, 1, 0)


# ---------------------------------------------------------------- where


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


# ---------------------------------------------------------------- what


class Weights:
    """The tensors of a folder, single file or shards; read one at a time.

    Raises:
      UserError: a file is missing, cut short, or no safetensors file.
    """

    def __init__(self, folder: Path, *, single: str = SINGLE):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        index = folder / INDEX
        if (folder / single).exists():
            files: Iterable[Path] = [folder / single]
        else:
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index} names no shards (weight_map); fetch it again")
            files = sorted({folder / str(name) for name in shards.values()})
        for file in files:
            for key in self._open(file).keys():  # noqa: SIM118  (no mapping)
                self._where[key] = file

    def _open(self, file: Path) -> Any:
        import safetensors

        if file in self._opened:
            return self._opened[file]
        try:
            self._opened[file] = safetensors.safe_open(str(file), framework="numpy")
            return self._opened[file]
        except (OSError, ValueError, safetensors.SafetensorError) as e:
            if not file.exists():
                raise UserError(f"{file} is missing: the index names it; fetch it again") from None
            raise UserError(
                f"{file} is damaged or cut short ({file.stat().st_size} bytes; {str(e).splitlines()[0]}); fetch it again"
            ) from None

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def read(self, key: str) -> np.ndarray:
        """One tensor, as stored."""
        return self._open(self._where[key]).get_tensor(key)


def load(
    module: Module,
    rows: Sequence[Row],
    weights: Weights,
    *,
    shardings: Params,
    dtype_of: Callable[[Any], Any],
    ours: Callable[[str], bool] = lambda key: True,
    ignore: Callable[[str], bool] = lambda key: False,
) -> tuple[Params, str]:
    """Reads a network's parameters, each placed in shards, and their identity.

    Args:
      module: the network.
      rows: one for each of its parameters.
      weights: to read from.
      shardings: of the parameters.
      dtype_of: precision of a parameter, by its Spec.
      ours: is a tensor of the file part of this network? The others belong to other towers.
      ignore: tensors of this network that hold nothing learned (position numbers).

    Returns:
      (parameters, SHA-256 over names, shapes and values as stored, in hex)

    Raises:
      UserError: a tensor is missing, left over or of another shape.
    """
    table = {row.path: row for row in rows}
    specs = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(module.specs, is_leaf=is_spec)}
    if table.keys() != specs.keys():
        raise ValueError(f"{module.name}: the key table and the network differ: {sorted(table.keys() ^ specs.keys())}")
    stacked = {path: "{}" in row.key for path, row in table.items()}
    names = {
        path: [row.key.format(i) for i in range(specs[path].shape[0])] if stacked[path] else [row.key]
        for path, row in table.items()
    }
    wanted = {key for keys in names.values() for key in keys}
    there = {key for key in sorted(weights.keys()) if ours(key) and not ignore(key)}
    _compare(module.name, wanted, there, weights.folder)
    digest = dict.fromkeys(wanted, b"")

    def one(path: tuple, where: Any) -> jax.Array:
        name = path_name(path)
        shape = specs[name].shape
        dtype = jnp.dtype(dtype_of(specs[name]))
        parts = []
        for key in names[name]:
            raw = weights.read(key)
            digest[key] = hashlib.sha256(f"{key}{raw.shape}{raw.dtype}".encode() + _bytes(raw)).digest()
            expected = shape[1:] if stacked[name] else shape
            try:
                part = table[name].transform(raw)
            except ValueError:  # not even of as many dimensions
                part = None
            if part is None or part.shape != expected:
                raise UserError(
                    f"{weights.folder}: {key} has shape {raw.shape}, which does not give {expected} for {module.name}/{name}: "
                    f"{CONFIG} is of another architecture than the weights"
                )
            parts.append(part.astype(dtype))
        value = np.stack(parts) if stacked[name] else parts[0]
        return jax.make_array_from_callback(shape, where, lambda index: value[index])

    params = jax.tree_util.tree_map_with_path(one, shardings)
    return params, hashlib.sha256(b"".join(digest[key] for key in sorted(digest))).hexdigest()


def _bytes(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def _compare(name: str, wanted: set[str], there: set[str], folder: Path) -> None:
    missing, left = sorted(wanted - there), sorted(there - wanted)
    if missing or left:
        say = lambda keys: f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        parts = [f"{say(missing)} missing"] * bool(missing) + [f"{say(left)} left over"] * bool(left)
        raise UserError(
            f"{folder}: the weights do not fit {name} as {CONFIG} describes it: tensors {'; '.join(parts)}; "
            "is it a network of another architecture?"
        )


def require(values: Mapping[str, Any], key: str, kind: type, file: Path) -> Any:
    """values[key], checked to be of a type."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{file}: {key}={value!r} is not {kind.__name__}; is it the config of this network?")
    return value
