"""Weights of frozen networks: where they are, what is in them, and how they become sharded arrays.

A network is a folder as transformers writes it (config.json, model.safetensors or its shards with an index, a tokenizer), or
the hub id of one, `org/name` or `org/name@revision`. Everything that can be wrong with it is one line that says what is
missing and how to get it. Pickles are never opened: they run code.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Module, Params, is_spec, path_name
from gigagan_jax.models.pretrained.hub import CONFIG, INDEX, SINGLE, read_json


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
