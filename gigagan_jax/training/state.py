"""The train state, the two networks as pure functions of their parameters, and how both are born sharded."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax import sharding
from gigagan_jax.config import Config
from gigagan_jax.models.discriminator import Discriminator
from gigagan_jax.models.generator import Generator
from gigagan_jax.training.optim import make_optimizer

Params = dict[str, Any]


@struct.dataclass
class Net:
    """Parameters of one network and the state of its optimizer."""

    params: Params
    opt: Any


@struct.dataclass
class GanState:
    """All that changes during training.

    step: int32, steps taken; its remainder is the phase of lazy R1
    images: uint32, real images seen
    g, d: both networks
    g_ema: moving average of g.params
    w_avg: float32 [w_dim], moving average of w, for truncation
    """

    step: jax.Array
    images: jax.Array
    g: Net
    d: Net
    g_ema: Params
    w_avg: jax.Array


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

    def shardings(self, mesh: Any, rules: Any) -> Params:
        """NamedSharding of each parameter; raises UserError where the mesh does not fit."""

        def one(path: tuple, s: Spec) -> NamedSharding:
            where = f"{self.name}/{path_name(path)}"
            return NamedSharding(mesh, sharding.spec(s.axes, s.shape, mesh, rules, where))

        return jax.tree_util.tree_map_with_path(one, self.specs, is_leaf=is_spec)

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.specs, is_leaf=is_spec))

    def init(self, seed: int, shardings: Params) -> Params:
        """Initial parameters, each drawn by name and placed in shards: the same on any mesh, and never whole on a device."""

        def one(path: tuple, s: Spec, where: NamedSharding) -> jax.Array:
            value = np.full(s.shape, s.mean, np.float32)
            if s.std:
                stream = zlib.crc32(f"{self.name}/{path_name(path)}".encode())
                noise = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), stream]))
                value += np.float32(s.std) * noise.standard_normal(s.shape, np.float32)
            return jax.make_array_from_callback(s.shape, where, lambda index: value[index])

        return jax.tree_util.tree_map_with_path(one, self.specs, shardings, is_leaf=is_spec)


class Networks:
    """G, D and their optimizers for a config; holds no arrays."""

    def __init__(self, config: Config):
        self.config = config
        self.g = Module("generator", lambda rngs: Generator(config, rngs=rngs))
        self.d = Module("discriminator", lambda rngs: Discriminator(config, rngs=rngs))
        self.g_tx = make_optimizer(config.g_optimizer, self.g.axes())
        self.d_tx = make_optimizer(config.d_optimizer, self.d.axes(), lazy_interval=config.loss.r1_interval)

    def abstract(self) -> GanState:
        """The state as ShapeDtypeStructs."""
        pg, pd = self.g.abstract(), self.d.abstract()
        return GanState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            images=jax.ShapeDtypeStruct((), jnp.uint32),
            g=Net(pg, jax.eval_shape(self.g_tx.init, pg)),
            d=Net(pd, jax.eval_shape(self.d_tx.init, pd)),
            g_ema=pg,
            w_avg=jax.ShapeDtypeStruct((self.config.generator.w_dim,), jnp.float32),
        )

    def shardings(self, mesh: Any) -> GanState:
        """Shardings of the state; optimizer moments and EMA follow their parameter."""
        rules = self.config.rules
        everywhere = NamedSharding(mesh, PartitionSpec())
        nets = []
        for module, tx in ((self.g, self.g_tx), (self.d, self.d_tx)):
            params = module.shardings(mesh, rules)
            opt = optax.tree_map_params(
                tx,
                lambda _, where: where,
                jax.eval_shape(tx.init, module.abstract()),
                params,
                transform_non_params=lambda _: everywhere,
            )
            nets.append(Net(params, opt))
        return GanState(everywhere, everywhere, nets[0], nets[1], nets[0].params, everywhere)

    def init(self, mesh: Any) -> GanState:
        """The initial state, born sharded."""
        where = self.shardings(mesh)
        seed = self.config.seed
        pg, pd = self.g.init(seed, where.g.params), self.d.init(seed, where.d.params)
        opts = jax.jit(lambda a, b: (self.g_tx.init(a), self.d_tx.init(b)), out_shardings=(where.g.opt, where.d.opt))(pg, pd)
        put = lambda value: jax.make_array_from_callback(value.shape, where.step, lambda index: value[index])
        return GanState(
            step=put(np.zeros((), np.int32)),
            images=put(np.zeros((), np.uint32)),
            g=Net(pg, opts[0]),
            d=Net(pd, opts[1]),
            g_ema=jax.tree.map(jnp.copy, pg),
            w_avg=put(np.zeros((self.config.generator.w_dim,), np.float32)),
        )
