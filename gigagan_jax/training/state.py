"""The train state, the two networks with their optimizers, and how all of it is born sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config import Config
from gigagan_jax.models.abstract import Module, Params
from gigagan_jax.models.discriminator import Discriminator
from gigagan_jax.models.generator import Generator
from gigagan_jax.training.optim import make_optimizer


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

    step: Any  # jax.Array, or what stands for one: a ShapeDtypeStruct, a NamedSharding
    images: Any
    g: Net
    d: Net
    g_ema: Params
    w_avg: Any


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
        opts = jax.jit(lambda a, b: (self.g_tx.init(a), self.d_tx.init(b)), out_shardings=(where.g.opt, where.d.opt))(
            pg, pd
        )
        put = lambda value: jax.make_array_from_callback(value.shape, where.step, lambda index: value[index])
        return GanState(
            step=put(np.zeros((), np.int32)),
            images=put(np.zeros((), np.uint32)),
            g=Net(pg, opts[0]),
            d=Net(pd, opts[1]),
            g_ema=jax.tree.map(jnp.copy, pg),
            w_avg=put(np.zeros((self.config.generator.w_dim,), np.float32)),
        )
