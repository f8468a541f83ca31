"""Gradients of a trained model: what D's exits do to R1, and what the computation's precision does to all of them."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.config import Config, MeshConfig
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.training import penalties
from gigagan_jax.training.batch import Batch, batch_shardings
from gigagan_jax.training.input_pipeline import make_pipeline
from gigagan_jax.training.objectives import NO_FROZEN, GanObjective, real_levels
from gigagan_jax.training.state import GanState, Net, Networks
from gigagan_jax.training.step import TrainStep


class ExitGradients(NamedTuple):
    """Gradients of D's exits by the real images of one level.

    resolution: of the level, pixels
    last: mean over images of the squared norm of the last exit's gradient
    others: the same of the plain sum of all other exits; 0 where there is none
    plain_sum: the same of the sum of all exits, a penalty that can be evaded
    cosine: between the gradients of `last` and `others`
    """

    resolution: int
    last: float
    others: float
    plain_sum: float
    cosine: float


def restore_parameters(workdir: Path, mesh: Any) -> tuple[Networks, GanState]:
    """The parameters of a run's newest intact checkpoint: of G, D and V, without optimizers.

    Raises:
      UserError: there is no finished checkpoint, or it is damaged.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.require_valid_step()
    networks = Networks(checkpoints.read_config(step))
    abstract, where = networks.abstract(), networks.shardings(mesh)
    names = ("g", "d") if networks.v is None else ("g", "d", "v")
    fields = {name: (getattr(abstract, name), getattr(where, name)) for name in names}
    wanted: dict[str, Any] = {name: {"params": with_shardings(a.params, s.params)} for name, (a, s) in fields.items()}
    wanted |= {name: with_shardings(getattr(abstract, name), getattr(where, name)) for name in ("step", "images")}
    state = checkpoints.restore_partial(step, wanted)
    nets = {name: Net(state[name]["params"], ()) for name in names}
    return networks, GanState(state["step"], state["images"], g_ema={}, w_avg=None, **nets)


def measure_exits(objective: GanObjective, d_params: Params, batch: Batch) -> list[ExitGradients]:
    """The gradients of D's exits by the real images of a batch, level by level, output size first."""
    c = objective.config

    @jax.jit
    def compute(d_params: Params, batch: Batch) -> dict[str, list[jax.Array]]:
        disc = objective.networks.d.bind(d_params)
        own = disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        return objective.exit_gradients(disc, real_levels(batch, c), own)

    grads = compute(d_params, batch)
    mean_square = lambda g: float(jnp.square(g).sum() / g.shape[0])
    return [
        ExitGradients(
            c.resolutions[::-1][i],
            mean_square(last),
            mean_square(others),
            mean_square(last + others),
            float(penalties.cosine(last, others)),
        )
        for i, (last, others) in enumerate(zip(grads["last"], grads["others"], strict=True))
    ]


def mean_penalty(objective: GanObjective, d_params: Params, batch: Batch, key: jax.Array, draws: int = 8) -> float:
    """R1 as the run pays it, over some draws of its signs."""

    @jax.jit
    def penalty(d_params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        disc = objective.networks.d.bind(d_params)
        own = disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        return objective.penalties(disc, {"real": real_levels(batch, objective.config)}, own, key)["real"]

    return float(np.mean([penalty(d_params, batch, k) for k in jax.random.split(key, draws)]))


def compare_precisions(
    config: Config,
    state: GanState,
    batch: Batch,
    key: jax.Array,
    frozen: Params = NO_FROZEN,
    *,
    with_r1: bool = True,
) -> dict[str, float]:
    """Cosine between the gradients in bfloat16 and in float32 of each network, on one batch and the same draws.

    Args:
      config: of the run; its dtype is not used.
      state: parameters of G, D and V.
      frozen: parameters of the frozen networks; cast to both precisions.
      with_r1: compare the penalty's gradient by D too, which takes as long to compile as the others.

    Returns:
      {"g": ..., "d": ..., "v" where the config has it, "r1" where it is asked for}
    """
    found = {dtype: _gradients(config, dtype, state, batch, key, frozen, with_r1) for dtype in ("bfloat16", "float32")}
    return {name: _cosine_of_trees(found["bfloat16"][name], found["float32"][name]) for name in found["float32"]}


def _gradients(
    config: Config, dtype: str, state: GanState, batch: Batch, key: jax.Array, frozen: Params, with_r1: bool
) -> Any:
    step = TrainStep(Networks(dataclasses.replace(config, dtype=dtype)))
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    frozen = jax.tree.map(cast, frozen)

    @jax.jit
    def compute(state: GanState, batch: Batch, frozen: Params) -> dict[str, Params]:
        encoded = step.objective.encode_captions(batch, frozen)
        # One half after the other on the same parameters: no update comes between them.
        critics, _ = step.d_gradients(state, encoded, key, frozen)
        g, _ = step.g_gradients(state, encoded, key, frozen)
        if not with_r1:
            return critics | {"g": g}
        r1, _ = step.r1_gradients(state, encoded, key, frozen)
        return critics | {"g": g, "r1": r1["d"]}

    return compute(state, batch, frozen)


def _cosine_of_trees(a: Params, b: Params) -> float:
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    x, y = flat(a), flat(b)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def read_batch(config: Config, mesh: Any) -> Batch:
    """The first batch of the run's data."""
    with make_pipeline(config, None) as data:
        rows = next(data)
    return {k: jax.device_put(rows[k], where) for k, where in batch_shardings(config, mesh).items()}


def last_exit_penalty(objective: GanObjective, exits: list[ExitGradients]) -> float:
    """What the run's penalty would be if D had its last exit only."""
    # Levels that are not penalised come last and have no weight.
    return sum(w * e.last for w, e in zip(objective.penalty_weights(), exits, strict=False))


def single_device_mesh() -> Any:
    """A mesh of the first device: a measurement needs no more."""
    return sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
