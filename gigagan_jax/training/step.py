"""One training step, top to bottom as in the paper (sec. 3.3): the critics on real and generated images, then G, then averages.

What is trained is the objective's (objectives.py); the step has what every objective needs: gradients over micro-batches,
updates that leave out what is not finite, the layout of the optimizer, the averages.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gigagan_jax.config import Config, OptimizerConfig
from gigagan_jax.models.layers.scan import scan
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses
from gigagan_jax.training.batch import Batch, batch_axes
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.objectives import NO_FROZEN, GanObjective, LossReport, Metrics
from gigagan_jax.training.optimizer import learning_rate
from gigagan_jax.training.state import GanState, Net, Networks
from gigagan_jax.training.upsampler_objective import make_objective


class CriticGradients(NamedTuple):
    """Gradients of the critics, before their update.

    grads: {"d": of D, "v": of V where it is on}
    report: of the critics' losses
    checks: entries of the health vector that are known so far
    features: what frozen text encoders gave for the captions
    """

    grads: Params
    report: LossReport
    checks: Metrics
    features: Batch


class HalfStep(NamedTuple):
    """What the critics' half of a step hands to the generator's.

    features: what frozen text encoders gave for the captions
    report: of the critics' losses
    checks: entries of the health vector that are known so far
    norms, sizes: of gradients and updates, by network; see health/step_statistics.py
    """

    features: Batch
    report: LossReport
    checks: Metrics
    norms: dict[str, list[jax.Array]]
    sizes: dict[str, tuple[jax.Array, jax.Array]]

    def penalty_metrics(self, with_r1: bool) -> Metrics:
        """The metrics that only a step with R1 has. They travel in `checks`, so that both kinds of step hand on the same."""
        marks = ("loss/r", "r1/")
        return {name: x for name, x in self.checks.items() if name.startswith(marks)} if with_r1 else {}


class Updates(NamedTuple):
    """Networks after their update, and what is known of it.

    nets: by name
    applied: bool, whether anything was changed
    metrics: norms of the gradients
    norms, sizes: for the health vector
    """

    nets: dict[str, Net]
    applied: jax.Array
    metrics: Metrics
    norms: dict[str, list[jax.Array]]
    sizes: dict[str, tuple[jax.Array, jax.Array]]


class TrainStep:
    """The step of a config: pure functions of state, batch and key.

    Args:
      networks: the networks and their optimizers.
      objective: what is trained; None for what the config says.
    """

    def __init__(self, networks: Networks, objective: GanObjective | None = None):
        self.networks = networks
        self.config = networks.config
        self.objective = make_objective(networks) if objective is None else objective
        self.health_vector = step_statistics.HealthVector(networks)
        self.r1_metrics = step_statistics.r1_measures(self.config)

    def __call__(
        self,
        state: GanState,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NO_FROZEN,
        lr_scale: jax.Array | float = 1.0,
        *,
        with_r1: bool,
    ) -> tuple[GanState, Metrics]:
        """(state, global batch, the run's key, frozen networks, factor of all learning rates) -> (state, metrics)

        A value that is not finite changes nothing. In an input, the critics' loss or one of their gradients: only `step` and
        `images` move on. In G's: D and V have made their half of the step, and G and its averages stay. The metric
        "health" is the vector of `self.health_vector`. `with_r1` is static.
        """
        # Four parts, so that a CPU compiles them as programs of their own (compiled_step.py).
        critics = self.critic_gradients(state, batch, key, frozen)
        if with_r1:
            critics = self.add_r1(state, critics, batch, key, frozen)
        state, half = self.update_critics(state, critics, lr_scale)
        state, metrics = self.update_generator(state, half, batch, key, frozen, lr_scale)
        return state, metrics | half.penalty_metrics(with_r1)

    # -- the four parts

    def critic_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NO_FROZEN
    ) -> CriticGradients:
        """First part: gradients of D and V without R1. Reads of G its parameters only."""
        # Frozen encoders run once: the generator's half gets their output as `CriticGradients.features`.
        encoded = self.objective.encode_captions(batch, frozen)
        checks = step_statistics.count_bad_rows(encoded)
        grads, report = self.d_gradients(state, encoded, self.critics_key(state, key), frozen)
        # The vector has an entry for R1 in every step, so that both kinds of step share the parts after this one.
        checks |= {name: jnp.asarray(jnp.nan, jnp.float32) for name in self.r1_metrics}
        return CriticGradients(grads, report, checks, {k: x for k, x in encoded.items() if k not in batch})

    def add_r1(
        self, state: GanState, critics: CriticGradients, batch: Batch, key: jax.Array, frozen: Params = NO_FROZEN
    ) -> CriticGradients:
        """Second part, of a step with R1: the penalties' gradients are added to those of D and V."""
        grads, r1 = self.r1_gradients(state, batch | critics.features, self.critics_key(state, key), frozen)
        metrics = critics.report.metrics
        loss = metrics["loss/d"] + r1.metrics["loss/d"]
        return critics._replace(
            grads=jax.tree.map(jnp.add, critics.grads, grads),
            report=critics.report._replace(metrics=metrics | {"loss/d": loss}),
            checks=critics.checks | {name: r1.metrics[name] for name in self.r1_metrics},
        )

    def update_critics(
        self, state: GanState, critics: CriticGradients, lr_scale: jax.Array | float = 1.0
    ) -> tuple[GanState, HalfStep]:
        """Third part: updates of D and V -> (state with new D and V, what the last part needs)"""
        report, checks = critics.report, dict(critics.checks)
        # One NaN in a batch must not reach the moments: it would stay there for ever.
        sound = jnp.isfinite(report.metrics["loss/d"]) & ~step_statistics.any_bad(checks)
        # D and V are updated together or not at all: both saw the same images.
        updates = self.update_networks(state, critics.grads, sound, lr_scale)
        checks["applied/d"] = updates.applied
        state = state.replace(**updates.nets)  # type: ignore[attr-defined]
        report = report._replace(metrics=report.metrics | updates.metrics)
        return state, HalfStep(critics.features, report, checks, updates.norms, updates.sizes)

    def update_generator(
        self,
        state: GanState,
        half: HalfStep,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NO_FROZEN,
        lr_scale: jax.Array | float = 1.0,
    ) -> tuple[GanState, Metrics]:
        """Last part: G against the critics as they are now, and the averages -> (state of the next step, metrics)"""
        # The critics' half took the first of the two keys: each half draws its own z.
        _, key_g = jax.random.split(jax.random.fold_in(key, state.step))
        grads, report = self.g_gradients(state, batch | half.features, key_g, frozen)
        # Where the critics' half was left out G's is too: its gradient came through the same bad input.
        sound = half.checks["applied/d"] & jnp.isfinite(report.metrics["loss/g"])
        updates = self.update_networks(state, {"g": grads}, sound, lr_scale)
        checks = half.checks | {"applied/g": updates.applied}
        assert half.report.thumbnails is not None
        assert report.thumbnails is not None
        assert report.w is not None
        averages = self.averages(state, updates.nets["g"].params, report.w, self.objective.null_captions(batch))
        g_ema, w_avg = step_statistics.keep_if_sound(updates.applied, averages, (state.g_ema, state.w_avg))

        health = half.report.health | report.health
        health["health/diversity_z"] = step_statistics.diversity_within_captions(
            half.report.thumbnails, report.thumbnails, health[step_statistics.REAL_THUMBNAIL_SPREAD]
        )
        metrics = half.report.metrics | report.metrics | updates.metrics
        metrics["health"] = self.health_vector.pack(
            health, checks, half.norms | updates.norms, half.sizes | updates.sizes
        )
        images = state.images + jnp.uint32(self.config.batch_size)
        return GanState(state.step + 1, images, updates.nets["g"], state.d, g_ema, w_avg, state.v), metrics

    # -- gradients of the objective's losses

    def critics_key(self, state: GanState, key: jax.Array) -> jax.Array:
        """The key of the critics' half of this step."""
        return jax.random.split(jax.random.fold_in(key, state.step))[0]

    def d_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NO_FROZEN
    ) -> tuple[Params, LossReport]:
        """Gradient of the critics' loss without R1."""

        def loss(critics: Params, g_params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, LossReport]:
            return self.objective.d_loss(critics, g_params, batch, key, frozen)

        return self.gradients(loss, critic_params(state), batch, key, state.g.params)

    def r1_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NO_FROZEN
    ) -> tuple[Params, LossReport]:
        """Gradient of the penalties by the critics' parameters; `loss/d` is their weighted part of the critics' loss."""
        # By images and not by steps: a changed batch size keeps the schedule.
        gamma = losses.ramped_weight(self.config.loss.r1_gamma, self.ramp_progress(state))

        def loss(
            critics: Params, gamma: jax.Array, g_params: Params, batch: Batch, key: jax.Array
        ) -> tuple[jax.Array, LossReport]:
            return self.objective.r1_loss(critics, gamma, g_params, batch, key, frozen)

        return self.gradients(loss, critic_params(state), batch, key, gamma, state.g.params)

    def g_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NO_FROZEN
    ) -> tuple[Params, LossReport]:
        """Gradient of G's loss against the critics that are in the state."""
        # Negatives are the captions of the global batch, whatever micro-batch an image is in: gathered once.
        captions = sharding.constrain(batch["clip_text"], None, None) if "clip_text" in batch else None
        null, counted = self.objective.null_captions(batch), None
        if null is not None:
            # Of the global batch too: a micro-batch with more null captions than others weighs less.
            batch = batch | {"caption_weights": losses.caption_weights(null)}
            counted = sharding.constrain(~null, None)

        def loss(params: Params, critics: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, LossReport]:
            progress = self.ramp_progress(state)
            return self.objective.g_loss(params, critics, batch, key, frozen, captions, progress, counted)

        return self.gradients(loss, state.g.params, batch, key, critic_params(state))

    def gradients(
        self, loss: Callable, params: Params, batch: Batch, key: jax.Array, *args: Any
    ) -> tuple[Params, LossReport]:
        """Gradient and report of `loss(params, *args, batch, key)`, averaged over the micro-batches.

        Thumbnails are not averaged: they are stacked, one entry a micro-batch.
        """
        # Gradient accumulation: memory of one part, gradient of the whole batch.
        parts = self.config.micro_batches
        grad = jax.grad(loss, has_aux=True)
        if parts == 1:
            return grad(params, *args, batch, jax.random.fold_in(key, 0))

        def split(name: str, x: jax.Array) -> jax.Array:
            # Part as the minor factor: every device keeps its own examples.
            x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
            return sharding.constrain(x, None, *batch_axes(name))

        def gradient_of_part(part: tuple[Batch, jax.Array]) -> tuple[Any, jax.Array | None]:
            grads, report = grad(params, *args, part[0], jax.random.fold_in(key, part[1]))
            return (grads, report._replace(thumbnails=None)), report.thumbnails

        def add_part(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, jax.Array | None]:
            out, thumbnails = gradient_of_part(part)
            return jax.tree.map(lambda a, b: a + b / parts, total, out), thumbnails

        stacked = {k: split(k, x) for k, x in batch.items()}
        first = {k: x[0] for k, x in stacked.items()}
        # The accumulators' shapes are known only by tracing one part.
        shapes = jax.eval_shape(gradient_of_part, (first, jnp.int32(0)))[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, report), thumbnails = scan(add_part, zeros, (stacked, jnp.arange(parts)), parts)
        return grads, report._replace(thumbnails=thumbnails)

    # -- updates

    def update_networks(
        self, state: GanState, grads: Mapping[str, Params], sound: jax.Array, lr_scale: jax.Array | float
    ) -> Updates:
        """Updates networks by their gradients, all of them or none.

        Args:
          grads: by the network's name in the state
          sound: bool, whether what the gradients come from is finite; the gradients themselves are looked at here
          lr_scale: factor of the learning rates
        """
        # From here on each device works on the part of the moments that it keeps (ZeRO-1, docs/meshes.md).
        grads = {name: self.reduce_scatter(name, g) for name, g in grads.items()}
        norms = {name: step_statistics.squared_norms(g) for name, g in grads.items()}
        metrics = {f"grad_norm/{name}": jnp.sqrt(jnp.asarray(sum(each))) for name, each in norms.items()}
        # One gradient that is not finite makes its norm not finite: only the norms are looked at.
        applied = sound & jnp.isfinite(jnp.asarray(sum(metrics.values())))
        nets, sizes = {}, {}
        for name, g in grads.items():
            # Outside of Optax: the rate depends on images seen, which survive a change of the batch size.
            rate = self.learning_rate_of(name, state, lr_scale)
            net, sizes[name] = apply_update(self.networks.trained()[name][1], getattr(state, name), g, rate, applied)
            nets[name] = self.all_gather(name, net)
        return Updates(nets, applied, metrics, norms, sizes)

    def learning_rate_of(self, name: str, state: GanState, scale: jax.Array | float) -> jax.Array:
        """Learning rate of a network in this step."""
        c = self.config
        settings: OptimizerConfig = getattr(c, f"{name}_optimizer")
        # Only D has a lazy penalty.
        interval = c.loss.r1_interval if name == "d" else 0
        return scale * learning_rate(settings, state.images, c.total_kimg, lazy_interval=interval)

    def reduce_scatter(self, name: str, grads: Params) -> Params:
        """Gradients of a network, placed as its moments."""
        if not self.config.mesh.shard_optimizer:
            return grads
        return jax.tree.map(sharding.scatter_gradient, grads, self.networks.trained()[name][0].axes())

    def all_gather(self, name: str, net: Net) -> Net:
        """A network after its update, its parameters put together from the devices' parts."""
        if not self.config.mesh.shard_optimizer:
            return net
        # Parameters are whole again for the next step; their moments stay cut.
        axes = self.networks.trained()[name][0].axes()
        return Net(jax.tree.map(sharding.gather_update, net.params, axes), net.opt)

    def averages(
        self, state: GanState, g_params: Params, w: jax.Array, null: jax.Array | None = None
    ) -> tuple[Params, jax.Array]:
        """(moving average of G, moving average of w)

        Args:
          w: [w_dim] mean of w over the captions of the batch that are not null
          null: bool [N], rows of the global batch with the null caption; None where there are none
        """
        c = self.config
        # A half-life in images: the average means the same at any batch size.
        keep = ema_decay(c, state.images)
        g_ema = jax.tree.map(lambda e, p: p + (e - p) * keep, state.g_ema, g_params)
        # The first step has no average to mix in: it takes w as it is.
        keep_w = c.generator.w_avg_decay or keep
        first = state.step == 0
        if null is not None:
            # A batch of null captions alone has no mean w: a first one leaves the start to the next.
            first |= ~jnp.any(state.w_avg)
        w_avg = jnp.where(first, w, w + (state.w_avg - w) * keep_w)
        return g_ema, w_avg if null is None else jnp.where(jnp.all(null), state.w_avg, w_avg)

    def ramp_progress(self, state: GanState) -> jax.Array:
        """How far the weights that change are on their way, 0 to 1."""
        return losses.ramp_progress(self.config, state.images)


def apply_update(
    tx: optax.GradientTransformation, net: Net, grads: Params, rate: jax.Array, applied: jax.Array
) -> tuple[Net, tuple[jax.Array, jax.Array]]:
    """(the network after its update, or as it was where that is not `applied`; sizes of the update)"""
    # Optax gives the direction at learning rate one.
    direction, opt = tx.update(grads, net.opt, net.params)
    params = jax.tree.map(lambda p, u: p - rate * u, net.params, direction)
    sizes = step_statistics.update_sizes(direction, net.params, rate)
    return step_statistics.keep_if_sound(applied, Net(params, opt), net), sizes


def critic_params(state: GanState) -> Params:
    """Parameters of the networks that judge, by name."""
    return {"d": state.d.params} | ({} if state.v is None else {"v": state.v.params})


def ema_decay(config: Config, images: jax.Array) -> jax.Array:
    """Decay of G's moving average for one step: 0.5 ^ (batch / half-life), both in images."""
    half = jnp.asarray(config.ema.half_life_kimg * 1000.0, jnp.float32)
    if config.ema.rampup:
        # Early in a run the half-life grows with the images seen: the random start is forgotten.
        half = jnp.minimum(half, images.astype(jnp.float32) * config.ema.rampup)
    return 0.5 ** (config.batch_size / jnp.maximum(half, 1e-6))
