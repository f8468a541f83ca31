"""Tensors of a PyTorch file (.pth, .pt), read without torch and without running what a pickle may hold.

A state dict needs five names of a pickle's vocabulary. `_Unpickler` knows these and refuses all others, so that a file can
name no code. Both layouts are read: the archive of torch 1.6 and later, and the stream of pickles before it.
"""

import collections
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained.weights import Weights

# Classes of storages, by the types that weights have.
_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}
# First pickle of the older layout.
_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    """A row of numbers in the file, by its name there."""

    key: str
    dtype: Any
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The arguments of torch's functions of these names; what follows says whether a tensor has a gradient.
def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *rest: Any) -> _Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    # Numbers and containers are built into a pickle's own code: these are all the names that a state dict adds.
    _known = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    } | {("torch", name): np.dtype(dtype) for name, dtype in _DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a state dict")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", class, name, device, elements, and in the older layout a view)
        _, dtype, key, _, count, *_ = pid
        return _Storage(str(key), dtype, int(count))


def _next_pickle(stream: Any) -> Any:
    return _Unpickler(stream).load()


class TorchFile(Weights):
    """The tensors of a PyTorch file, read one at a time.

    Raises:
      UserError: the file is no state dict, is damaged, or names anything else.
    """

    def __init__(self, file: Path):
        self.folder = file
        # {name of a storage: its first byte in the file}, for the older layout.
        self._starts: dict[str, int] = {}
        self._archive: zipfile.ZipFile | None = None
        try:
            content = self._open_archive() if zipfile.is_zipfile(file) else self._open_stream()
            # Checkpoints of trainers often hold the state dict beside other things.
            content = content.get("state_dict", content)
            self._tensors = {str(k): v for k, v in content.items() if isinstance(v, _Tensor)}
        # A damaged pickle raises exceptions of many types.
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} cannot be read as a state dict of PyTorch ({why}); fetch it again") from None

    def _open_archive(self) -> Any:
        # Stays open: each tensor is read when it is asked for.
        self._archive = zipfile.ZipFile(self.folder)
        pickled = next(name for name in self._archive.namelist() if name.endswith("/data.pkl"))
        self._root = pickled.removesuffix("data.pkl")
        with self._archive.open(pickled) as stream:
            return _next_pickle(stream)

    def _open_stream(self) -> Any:
        with open(self.folder, "rb") as stream:
            if _next_pickle(stream) != _MAGIC:
                raise ValueError("it does not begin as one")
            # The version of the layout, and the sizes of the writer's types.
            for _ in range(2):
                _next_pickle(stream)
            content = _next_pickle(stream)
            # The storages follow the pickle, each after its number of elements: what they hold is passed over here.
            sizes = {s.key: s.dtype.itemsize for s in (t.storage for t in _tensors_in(content))}
            for key in _next_pickle(stream):
                (count,) = struct.unpack("<q", stream.read(8))
                self._starts[str(key)] = stream.tell()
                stream.seek(count * sizes[str(key)], 1)
        return content

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return self._tensors[key].shape

    def read_tensor(self, key: str) -> np.ndarray:
        """One tensor, as stored."""
        storage, offset, shape, strides = self._tensors[key]
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # Strides come from the file: a view must not leave its storage.
        if offset < 0 or min(strides, default=0) < 0 or (0 not in shape and last >= storage.length):
            raise UserError(f"{self.folder} is damaged: {key} leaves its storage; fetch it again")
        try:
            if self._archive is not None:
                raw = self._archive.read(f"{self._root}data/{storage.key}")
                flat = np.frombuffer(raw, storage.dtype, storage.length)
            else:
                flat = np.fromfile(self.folder, storage.dtype, storage.length, offset=self._starts[storage.key])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.folder} is damaged or cut short ({error}); fetch it again") from None
        if len(flat) < storage.length:
            raise UserError(f"{self.folder} is cut short at {key}; fetch it again")
        bytes_ = tuple(step * storage.dtype.itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, bytes_, writeable=False)


def _tensors_in(content: Any) -> list[_Tensor]:
    """All tensors of nested dicts."""
    if isinstance(content, _Tensor):
        return [content]
    return [t for v in content.values() for t in _tensors_in(v)] if isinstance(content, dict) else []
