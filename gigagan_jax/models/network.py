"""A network as a pure function of its parameters: what each parameter looks like, where it lives, how it starts."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config.parameter_renames import place_at
from gigagan_jax.parallel import sharding

Params = dict[str, Any]


class Spec(struct.PyTreeNode):
    """Shape, logical axes and initial distribution of one parameter."""

    shape: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    mean: float = struct.field(pytree_node=False)
    std: float = struct.field(pytree_node=False)


def is_spec(x: Any) -> bool:
    """For tree_map's is_leaf."""
    return isinstance(x, Spec)


def path_name(path: tuple) -> str:
    """'entry/0/conv0/filters'"""
    return "/".join(str(getattr(k, "key", k)) for k in path)


class Module:
    """One network without its parameters: its graph, and what each parameter looks like."""

    def __init__(self, name: str, make: Callable[[nnx.Rngs], nnx.Module]):
        self.name = name
        self.graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

        def read(variable: Any) -> Spec:
            m = variable.get_metadata()
            return Spec(tuple(variable.shape), m["logical_axes"], m["init_mean"], m["init_std"])

        specs = jax.tree.map(read, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        self.specs: Any = nnx.to_pure_dict(specs)

    def bind(self, params: Params) -> Any:
        """The module with `params` in it."""
        return nnx.merge(self.graph, params)

    def abstract(self) -> Params:
        """ShapeDtypeStructs of the parameters."""
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), self.specs, is_leaf=is_spec)

    def axes(self) -> Params:
        """Logical axis names of the parameters."""
        return jax.tree.map(lambda s: s.axes, self.specs, is_leaf=is_spec)

    def shardings(self, mesh: Any, rules: Any, spec: Callable[..., PartitionSpec] = sharding.spec) -> Params:
        """NamedSharding of each parameter, or by `spec` of what belongs to it; raises UserError where the mesh does not fit."""

        def one(path: tuple, s: Spec) -> NamedSharding:
            where = f"{self.name}/{path_name(path)}"
            return NamedSharding(mesh, spec(s.axes, s.shape, mesh, rules, where))

        return jax.tree_util.tree_map_with_path(one, self.specs, is_leaf=is_spec)

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.specs, is_leaf=is_spec))

    def init(self, seed: int, shardings: Params) -> Params:
        """Initial parameters, each drawn by name and placed in shards: the same on any mesh, and never whole on a device."""

        def one(path: tuple, s: Spec, where: NamedSharding) -> jax.Array:
            value = np.full(s.shape, s.mean, np.float32)
            if s.std:
                stream = zlib.crc32(f"{self.name}/{place_at(self.name, path_name(path))}".encode())
                noise = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), stream]))
                value += np.float32(s.std) * noise.standard_normal(s.shape, np.float32)
            return jax.make_array_from_callback(s.shape, where, lambda index: value[index])

        return jax.tree_util.tree_map_with_path(one, self.specs, shardings, is_leaf=is_spec)
