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

from gigagan_jax.config.parameter_renames import path_at_format
from gigagan_jax.parallel import sharding

Params = dict[str, Any]


class Spec(struct.PyTreeNode):
    """One parameter: shape, logical axes, initial distribution, and whether it belongs to an attention layer."""

    shape: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    mean: float = struct.field(pytree_node=False)
    std: float = struct.field(pytree_node=False)
    attention: bool = struct.field(pytree_node=False, default=False)


def is_spec(x: Any) -> bool:
    """For tree_map's is_leaf."""
    return isinstance(x, Spec)


def path_name(path: tuple) -> str:
    """'levels/0/entry/conv0/filters'"""
    return "/".join(str(getattr(k, "key", k)) for k in path)


class Network:
    """One network without its parameters: its graph, and what each parameter looks like."""

    def __init__(self, name: str, make: Callable[[nnx.Rngs], nnx.Module]):
        self.name = name
        # Traced, not run: a network of billions of parameters costs no memory here.
        self.graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

        def read(variable: Any) -> Spec:
            # `layers.equalized.declare_parameter` writes these: the network itself says where each parameter lies and how it
            # starts.
            m = variable.get_metadata()
            return Spec(tuple(variable.shape), m["logical_axes"], m["init_mean"], m["init_std"], m["attention"])

        # Variables are leaves here: their metadata is what is read.
        specs = jax.tree.map(read, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        # Plain dicts carry no nnx bookkeeping, which costs host time in every step at thousands of leaves.
        self.specs: Any = nnx.to_pure_dict(specs)

    def specs_by_path(self) -> dict[str, Spec]:
        """{path, such as "levels/0/entry/conv0/filters": what the parameter looks like}, in the order of the specs."""
        return {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(self.specs, is_leaf=is_spec)}

    def bind(self, params: Params) -> Any:
        """The module with `params` in it."""
        return nnx.merge(self.graph, params)

    def abstract(self) -> Params:
        """ShapeDtypeStructs of the parameters."""
        # Parameters are float32 whatever the computation is in: Adam's small updates vanish in bfloat16.
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), self.specs, is_leaf=is_spec)

    def axes(self) -> Params:
        """Logical axis names of the parameters."""
        return jax.tree.map(lambda s: s.axes, self.specs, is_leaf=is_spec)

    def shardings(self, mesh: Any, rules: Any, spec: Callable[..., PartitionSpec] = sharding.partition_spec) -> Params:
        """NamedSharding of each parameter, or by `spec` of what belongs to it; raises UserError where the mesh does not fit."""

        def one(path: tuple, s: Spec) -> NamedSharding:
            # The path names the parameter in the error of a mesh that does not fit.
            where = f"{self.name}/{path_name(path)}"
            return NamedSharding(mesh, spec(s.axes, s.shape, mesh, rules, where))

        return jax.tree_util.tree_map_with_path(one, self.specs, is_leaf=is_spec)

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.specs, is_leaf=is_spec))

    def init(self, seed: int, shardings: Params) -> Params:
        """Initial parameters, each drawn by name and placed in shards: the same on any mesh, and never whole on a device."""

        def one(path: tuple, s: Spec, where: NamedSharding) -> jax.Array:
            # NumPy on the host: there is nothing to compile.
            value = np.full(s.shape, s.mean, np.float32)
            if s.std:
                # A stream of its own for each name: neither the order of parameters nor the mesh changes a value.
                # The name is the first one that the parameter ever had, so that a moved parameter starts as before.
                stream = zlib.crc32(f"{self.name}/{path_at_format(self.name, path_name(path))}".encode())
                # Philox takes any key without warm-up; the seed may be negative, its low 64 bits are used.
                noise = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), stream]))
                value += np.float32(s.std) * noise.standard_normal(s.shape, np.float32)
            # Each device gets its own slice: the whole array exists on the host only.
            return jax.make_array_from_callback(s.shape, where, lambda index: value[index])

        return jax.tree_util.tree_map_with_path(one, self.specs, shardings, is_leaf=is_spec)
