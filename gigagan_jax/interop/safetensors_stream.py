"""Writes safetensors files tensor by tensor, in shards: the package's own writer needs all tensors of a file in memory.

The format is eight bytes of the header's length, a header in JSON, and the tensors one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from gigagan_jax.models.pretrained.hub import INDEX, SINGLE

NAMES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}
T = TypeVar("T")
# As transformers and diffusers cut them.
SHARD_BYTES = 5 * 10**9


class Tensor(NamedTuple):
    """A tensor to come.

    Attributes:
      key: its name.
      shape: its shape.
      dtype: of NAMES.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def cut_by_size(items: Iterable[T], size_of: Callable[[T], int], most: int) -> list[list[T]]:
    """Items in their order, in groups of at most so many bytes; one that is larger has a group of its own."""
    groups: list[list[T]] = [[]]
    size = 0
    for item in items:
        own = size_of(item)
        if groups[-1] and size + own > most:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += own
    return groups


def write_tensors(
    folder: Path,
    tensors: list[Tensor],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    name: str = SINGLE,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[int]:
    """Writes model.safetensors, or shards and their index; yields the bytes of each tensor that was written.

    Args:
      folder: that exists.
      tensors: all that will come, in their order.
      arrays: (key, array) in the same order.
      name: of the file; shards are named after it.
      metadata: of the header.
      shard_bytes: most of one file.

    Raises:
      ValueError: another tensor came than was announced.
      OSError: the disk is full, or the folder cannot be written.
    """
    shards = cut_by_size(tensors, lambda tensor: tensor.size, shard_bytes)
    stem = name.removesuffix(".safetensors")
    several = len(shards) > 1
    label = lambda i: f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" if several else name
    source = iter(arrays)
    for i, shard in enumerate(shards):
        with (folder / label(i)).open("wb") as file:
            _write_header(file, shard, metadata or {})
            for tensor in shard:
                key, array = next(source)
                if (key, array.shape, array.dtype.name) != tuple(tensor):
                    raise ValueError(f"{tensor} was announced, {key} {array.shape} {array.dtype} came")
                # The buffer itself: no copy is made of a large tensor.
                file.write(np.ascontiguousarray(array).data)
                yield tensor.size
    if several:
        where = {t.key: label(i) for i, shard in enumerate(shards) for t in shard}
        index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": where}
        (folder / (INDEX if name == SINGLE else f"{name}.index.json")).write_text(json.dumps(index, indent=2) + "\n")


def _write_header(file: BinaryIO, tensors: list[Tensor], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for t in tensors:
        header[t.key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.size]}
        start += t.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
