"""Arrays of a checkpoint, a few at a time: one of any size is read on a machine with little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.config.parameter_renames import path_at_format
from gigagan_jax.interop.torch_table import nest
from gigagan_jax.models.network import Network, is_spec, path_name

# Bytes that are read at once: a call of Orbax takes a third of a second, whatever it reads.
_AT_ONCE = 256 * 2**20
# Where the arrays of a network lie in a state: its parameters, their average, and the moments of its optimizer.
PARTS = ("params", "average", "mu", "nu")


class CheckpointArrays:
    """The arrays of one checkpoint.

    Args:
      checkpoints: of the workdir.
      step: of the checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, step: int):
        self._checkpoints, self.step = checkpoints, step
        self._format = checkpoints.format_of(step)
        self._where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(self, network: Network, name: str, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """(path, float32 array) of each parameter of a network, in the order of its specs.

        Args:
          network: G, D or V.
          name: of the state: "g", "d" or "v".
          part: of PARTS.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        leaves = jax.tree_util.tree_leaves_with_path(network.specs, is_leaf=is_spec)
        shapes = {path_name(path): spec.shape for path, spec in leaves}
        for group in _groups(shapes):
            stored = {path: path_at_format(network.name, path, self._format) for path in group}
            wanted = {stored[path]: self._leaf(shapes[path]) for path in group}
            found = _open(self._checkpoints.restore_stored(self.step, _wrap(nest(wanted), name, part)), name, part)
            values = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(found)}
            for path in group:
                yield path, np.asarray(values[stored[path]])

    def read_array(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """One array at the top of the state, such as "w_avg"."""
        return np.asarray(self._checkpoints.restore_stored(self.step, {name: self._leaf(shape, dtype)})[name])

    def read_count(self, name: str) -> int:
        """The steps that an optimizer has taken, by its own count."""
        found = self._checkpoints.restore_stored(self.step, {name: {"opt": [{"count": self._leaf((), np.int32)}, {}]}})
        return int(found[name]["opt"][0]["count"])

    def _leaf(self, shape: Sequence[int], dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._where)


def _groups(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Paths in their order, as many as fit into _AT_ONCE."""
    group: list[str] = []
    size = 0
    for path, shape in shapes.items():
        own = 4 * math.prod(shape)
        if group and size + own > _AT_ONCE:
            yield group
            group, size = [], 0
        group.append(path)
        size += own
    yield group


def _wrap(tree: dict[str, Any], name: str, part: str) -> dict[str, Any]:
    if part == "average":
        return {f"{name}_ema": tree}
    # The second element of the optimizer's chain, weight decay, has no state.
    return {name: {"params": tree} if part == "params" else {"opt": [{part: tree}, {}]}}


def _open(state: dict[str, Any], name: str, part: str) -> Any:
    if part == "average":
        return state[f"{name}_ema"]
    return state[name]["params"] if part == "params" else state[name]["opt"][0][part]
