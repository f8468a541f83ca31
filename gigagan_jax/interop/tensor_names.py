"""The names and layouts in which a folder holds tensors: those of `torch_gigagan.py`, or this project's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.interop.torch_table import check_tensors, from_torch, to_torch_stream, torch_shapes
from gigagan_jax.models.network import Network


class TensorNames(NamedTuple):
    """One way to name tensors.

    Attributes:
      shapes: (network, config) -> (key, shape) in the order of `write`.
      write: (network, config, (path, parameter) in the order of the specs) -> (key, tensor), one in memory at a time.
      read: (network, config, {key: shape}, key -> tensor, where they come from) -> (path, float32 parameter); raises UserError
        where a tensor is missing, too many, or of another shape.
      moments: {moment in the state: prefix of its keys}.
    """

    shapes: Callable[[Network, Config], Iterator[tuple[str, tuple[int, ...]]]]
    write: Callable[[Network, Config, Iterable[tuple[str, Any]]], Iterator[tuple[str, np.ndarray]]]
    read: Callable[
        [Network, Config, Mapping[str, tuple[int, ...]], Callable[[str], np.ndarray], str],
        Iterator[tuple[str, np.ndarray]],
    ]
    moments: Mapping[str, str]

    def moments_of(self, config: Config, name: str) -> dict[str, str]:
        """`moments` of the optimizer of network `name`; without beta1 there is no mean."""
        has_mean = bool(getattr(config, f"{name}_optimizer").beta1)
        return {ours: prefix for ours, prefix in self.moments.items() if has_mean or ours != "mu"}


def _own_shapes(network: Network, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, spec in network.specs_by_path().items():
        yield path, tuple(spec.shape)


def _write_own(network: Network, config: Config, params: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    for path, x in params:
        yield path, np.ascontiguousarray(x)


def _read_own(
    network: Network, config: Config, keys: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], where: str
) -> Iterator[tuple[str, np.ndarray]]:
    check_tensors(dict(_own_shapes(network, config)), keys, where)
    for path in network.specs_by_path():
        yield path, np.asarray(read(path), np.float32)


TENSOR_NAMES = {
    "pytorch": TensorNames(torch_shapes, to_torch_stream, from_torch, {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    "safetensors": TensorNames(_own_shapes, _write_own, _read_own, {"mu": "mu", "nu": "nu"}),
}
