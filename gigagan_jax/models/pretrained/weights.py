"""Weights of frozen networks: reads safetensors files by a key table, and places the tensors as sharded arrays.

hub.py finds the folder of a network. Every error is one line that names the file and the remedy.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import is_lfs_pointer, lfs_hint
from gigagan_jax.models.network import Network, Params, path_name
from gigagan_jax.models.pretrained.hub import CONFIG, SINGLE, read_json


class Row(NamedTuple):
    """One row of a key table: a parameter, the tensor that it is read from, and a transform.

    path: path of the parameter, "encoder/blocks/layer/up/weight"; below "layer" it is stacked over the blocks
    key: name in the file; "{}" stands for the number of the block
    transform: applied to one tensor, before stacking
    """

    path: str
    key: str
    transform: Callable[[np.ndarray], np.ndarray] = lambda x: x


def transpose_linear(x: np.ndarray) -> np.ndarray:
    """Weights of a linear layer, [out, in] -> [in, out]."""
    return x.T


def conv_to_hwio(x: np.ndarray) -> np.ndarray:
    """Weights of a convolution, [out, in, h, w] -> [h, w, in, out]."""
    return x.transpose(2, 3, 1, 0)


# ---------------------------------------------------------------- files


class Weights:
    """The tensors of a folder, in a single file or in shards; read one at a time.

    Args:
      folder: that holds the files.
      single: the single file, or the index of the shards (.json). Without the single file, its index is looked for.

    Raises:
      UserError: a file is missing, truncated, or no safetensors file.
    """

    def __init__(self, folder: Path, *, single: str = SINGLE):
        self.folder = folder
        # {name of a tensor: its file}
        self._where: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        if (folder / single).exists() and not single.endswith(".json"):
            files: Iterable[Path] = [folder / single]
        else:
            index = folder / (single if single.endswith(".json") else f"{single}.index.json")
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index} names no shards (weight_map); fetch it again")
            files = sorted({folder / str(name) for name in shards.values()})
        for file in files:
            for key in self._open_file(file).keys():  # noqa: SIM118  (no mapping)
                self._where[key] = file

    def _open_file(self, file: Path) -> Any:
        # Imported here: runs without frozen networks do not need safetensors.
        import safetensors

        # Files are memory-mapped and stay open: a shard is opened once for all of its tensors.
        if file in self._opened:
            return self._opened[file]
        try:
            self._opened[file] = safetensors.safe_open(str(file), framework="numpy")
            return self._opened[file]
        except (OSError, ValueError, safetensors.SafetensorError) as e:
            if not file.exists():
                raise UserError(f"{file} is missing: the index names it; fetch it again") from None
            if is_lfs_pointer(file):
                raise UserError(lfs_hint(file)) from None
            raise UserError(
                f"{file} is damaged or cut short "
                f"({file.stat().st_size} bytes; {str(e).splitlines()[0]}); fetch it again"
            ) from None

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def metadata(self) -> dict[str, str]:
        """What the single file says of itself; of shards, what the first says."""
        return next(iter(self._opened.values())).metadata() or {}

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._open_file(self._where[key]).get_slice(key).get_shape())

    def read_tensor(self, key: str) -> np.ndarray:
        """One tensor, as stored."""
        opened = self._open_file(self._where[key])
        kind = opened.get_slice(key).get_dtype()
        # NumPy has no float8, and the package asks it for one.
        return _read_float8(self._where[key], key, kind) if kind in _FLOAT8 else opened.get_tensor(key)


# Kinds of safetensors, read as JAX's types.
_FLOAT8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}


def _read_float8(file: Path, key: str, kind: str) -> np.ndarray:
    with file.open("rb") as opened:
        # Eight bytes of the header's length, the header, and the tensors.
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size))[key]
        start, end = entry["data_offsets"]
        opened.seek(8 + size + start)
        return np.frombuffer(opened.read(end - start), _FLOAT8[kind]).reshape(entry["shape"])


class RenamedWeights(Weights):
    """Tensors of a file under other names.

    Args:
      weights: the file.
      table: {name: (name in the file, transform)}; tensors that are not in it are left out.
    """

    def __init__(self, weights: Weights, table: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]):
        self.folder = weights.folder
        self._weights, self._table = weights, table

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._table)

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return self._weights.metadata()

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.read_tensor(key).shape

    def read_tensor(self, key: str) -> np.ndarray:
        """One tensor, transformed."""
        stored, transform = self._table[key]
        return transform(self._weights.read_tensor(stored))


def load_params(
    module: Network,
    rows: Sequence[Row],
    weights: Weights,
    *,
    shardings: Params,
    dtype_of: Callable[[Any], Any],
    ours: Callable[[str], bool] = lambda key: True,
    ignore: Callable[[str], bool] = lambda key: False,
) -> tuple[Params, str]:
    """Reads the parameters of a network into their shards, and computes their identity.

    Args:
      module: the network.
      rows: key table, with one row for each parameter.
      weights: files to read from.
      shardings: shardings of the parameters.
      dtype_of: precision of a parameter, by its Spec.
      ours: predicate of the tensors of this network; the others belong to other towers.
      ignore: predicate of tensors without learned values, such as position numbers.

    Returns:
      (parameters, SHA-256 over names, shapes and stored values, in hex)

    Raises:
      UserError: a tensor is missing, left over, or of another shape.
    """
    table = {row.path: row for row in rows}
    specs = module.specs_by_path()
    # A mistake of the code, not of the user: hence ValueError.
    if table.keys() != specs.keys():
        raise ValueError(f"{module.name}: the key table and the network differ: {sorted(table.keys() ^ specs.keys())}")
    # "{}" in a key stands for the number of a block: such a parameter has the blocks as its first axis.
    stacked = {path: "{}" in row.key for path, row in table.items()}
    names = {
        path: [row.key.format(i) for i in range(specs[path].shape[0])] if stacked[path] else [row.key]
        for path, row in table.items()
    }
    required = {key for keys in names.values() for key in keys}
    present = {key for key in sorted(weights.keys()) if ours(key) and not ignore(key)}
    _check_keys(module.name, required, present, weights.folder)
    digest = dict.fromkeys(required, b"")

    def read_param(path: tuple, where: Any) -> jax.Array:
        name = path_name(path)
        shape = specs[name].shape
        dtype = jnp.dtype(dtype_of(specs[name]))
        parts = []
        for key in names[name]:
            raw = weights.read_tensor(key)
            # The hash is of the stored bytes, so an identity does not depend on the precision of a run.
            digest[key] = hashlib.sha256(f"{key}{raw.shape}{raw.dtype}".encode() + _contiguous_bytes(raw)).digest()
            expected = shape[1:] if stacked[name] else shape
            try:
                part = table[name].transform(raw)
            except ValueError:
                # The tensor has another number of dimensions.
                part = None
            if part is None or part.shape != expected:
                raise UserError(
                    f"{weights.folder}: {key} has shape {raw.shape}, "
                    f"which does not give {expected} for {module.name}/{name}: "
                    f"{CONFIG} is of another architecture than the weights"
                )
            parts.append(part.astype(dtype))
        value = np.stack(parts) if stacked[name] else parts[0]
        # Each process places only the shards of its own devices.
        return jax.make_array_from_callback(shape, where, lambda index: value[index])

    params = jax.tree_util.tree_map_with_path(read_param, shardings)
    # Sorted, so that the order of reading does not change the identity.
    return params, hashlib.sha256(b"".join(digest[key] for key in sorted(digest))).hexdigest()


def _contiguous_bytes(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def _check_keys(name: str, required: set[str], present: set[str], folder: Path) -> None:
    missing, unexpected = sorted(required - present), sorted(present - required)
    if missing or unexpected:
        # Three names are enough to recognise a network of another kind.
        describe = lambda keys: f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        parts = [f"{describe(missing)} missing"] * bool(missing) + [f"{describe(unexpected)} left over"] * bool(
            unexpected
        )
        if any(k.endswith(("scale_weight", "scale_input", "scaled_fp8")) for k in unexpected):
            raise UserError(f"{folder}: float8 weights with scales of their own are not read: take the file in float16")
        raise UserError(
            f"{folder}: the weights do not fit {name} as {CONFIG} describes it: tensors {'; '.join(parts)}; "
            f"is it a network of another architecture? Take {CONFIG} and the weights of one network"
        )


def require_type(values: Mapping[str, Any], key: str, kind: type, file: Path) -> Any:
    """values[key]; UserError if it has another type."""
    value = values.get(key)
    # bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{file}: {key}={value!r} is not {kind.__name__}: take the {file.name} of the network again")
    return value
