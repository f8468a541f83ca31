"""The train state, the two networks with their optimizers, and how all of it is born sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config import Config
from gigagan_jax.models.build import build_discriminator, build_generator, build_vision_aided
from gigagan_jax.models.network import Network, Params
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.parallel import sharding
from gigagan_jax.training.optimizer import make_optimizer


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
    v: the heads of the vision-aided discriminator; None where it is off
    """

    step: Any  # jax.Array, or what stands for one: a ShapeDtypeStruct, a NamedSharding
    images: Any
    g: Net
    d: Net
    g_ema: Params
    w_avg: Any
    v: Net | None = None


class Networks:
    """G, D, the vision-aided heads V where they are on, their optimizers and the frozen networks; holds no arrays."""

    def __init__(self, config: Config):
        self.config = config
        self.g = build_generator(config)
        self.d = build_discriminator(config)
        self.v = build_vision_aided(config) if config.loss.vision_aided else None
        self.frozen = FrozenNetworks(config)
        self.g_tx = make_optimizer(config.g_optimizer, self.g.specs)
        self.d_tx = make_optimizer(config.d_optimizer, self.d.specs, lazy_interval=config.loss.r1_interval)
        self.v_tx = None if self.v is None else make_optimizer(config.v_optimizer, self.v.specs)

    def trained(self) -> dict[str, tuple[Network, optax.GradientTransformation]]:
        """Every network that learns, with its optimizer, by its name in the state."""
        nets = {"g": (self.g, self.g_tx), "d": (self.d, self.d_tx)}
        return nets if self.v is None or self.v_tx is None else nets | {"v": (self.v, self.v_tx)}

    def abstract(self) -> GanState:
        """The state as ShapeDtypeStructs."""
        nets = {}
        for name, (module, tx) in self.trained().items():
            params = module.abstract()
            nets[name] = Net(params, jax.eval_shape(tx.init, params))
        return GanState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            images=jax.ShapeDtypeStruct((), jnp.uint32),
            g_ema=nets["g"].params,
            w_avg=jax.ShapeDtypeStruct((self.config.generator.w_dim,), jnp.float32),
            **nets,
        )

    def shardings(self, mesh: Any) -> GanState:
        """Shardings of the state; moments and EMA follow their parameter, and are cut further by `rules.optimizer`."""
        everywhere = NamedSharding(mesh, PartitionSpec())
        nets, cut = {}, {}
        for name, (module, tx) in self.trained().items():
            params = module.shardings(mesh, self.config.rules)
            spec = sharding.optimizer_spec if self.config.mesh.shard_optimizer else sharding.partition_spec
            # Moments and averages are read once a step: they may be cut further than their parameter (ZeRO-1).
            cut[name] = module.shardings(mesh, self.config.rules, spec)
            # Optax says which leaves of its state belong to a parameter; counters lie on all devices.
            opt = optax.tree_map_params(
                tx,
                lambda _, where: where,
                jax.eval_shape(tx.init, module.abstract()),
                cut[name],
                transform_non_params=lambda _: everywhere,
            )
            nets[name] = Net(params, opt)
        return GanState(everywhere, everywhere, g_ema=cut["g"], w_avg=everywhere, **nets)

    def state_of_arrays(
        self,
        params: dict[str, Params],
        average: Params,
        w_avg: np.ndarray,
        moments: dict[str, dict[str, Params]],
        counts: dict[str, int],
        step: int,
        images: int,
    ) -> GanState:
        """A state of NumPy arrays, as tools/convert_checkpoint.py has them; what is missing starts anew.

        Args:
          params: of the networks that are there, "g", "d" and "v".
          average: of G; also its parameters where they are missing.
          w_avg: float32 [w_dim].
          moments: {network: {"mu", "nu": tree}} of the optimizers that are there.
          counts: {network: steps of its optimizer}.
          step, images: of the run.
        """
        mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
        nets = {}
        for name, (module, tx) in self.trained().items():
            own = params.get(name, average if name == "g" else None)
            if own is None:
                own = jax.device_get(module.init(self.config.seed, module.shardings(mesh, self.config.rules)))
            empty = jax.eval_shape(tx.init, own)
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty)
            adam, *rest = zeros
            if name in moments:
                adam = adam._replace(count=np.asarray(counts[name], np.int32), **moments[name])
            nets[name] = Net(own, (adam, *rest))
        where = np.asarray(step, np.int32), np.asarray(images, np.uint32)
        return GanState(*where, g_ema=average, w_avg=w_avg, **nets)

    def init(self, mesh: Any) -> GanState:
        """The initial state, born sharded."""
        where = self.shardings(mesh)
        trained = self.trained()
        params = {k: module.init(self.config.seed, getattr(where, k).params) for k, (module, _) in trained.items()}
        copy = lambda tree: jax.tree.map(jnp.copy, tree)  # the state is donated: no two of its parts may be one array
        start = lambda params: ({k: tx.init(params[k]) for k, (_, tx) in trained.items()}, copy(params["g"]))
        opts = {k: getattr(where, k).opt for k in trained}
        # Made where it will lie: no device ever holds the whole optimizer state.
        opts, g_ema = jax.jit(start, out_shardings=(opts, where.g_ema))(params)
        # From the host to every device, also with several processes, where device_put would not do.
        put = lambda value: jax.make_array_from_callback(value.shape, where.step, lambda index: value[index])
        return GanState(
            step=put(np.zeros((), np.int32)),
            images=put(np.zeros((), np.uint32)),
            g_ema=g_ema,
            w_avg=put(np.zeros((self.config.generator.w_dim,), np.float32)),
            **{k: Net(params[k], opts[k]) for k in trained},
        )
