"""One training step, top to bottom as in the paper (sec. 3.3): D (and V) on real and generated images, then G, then averages.

`critics` are the parameters of what judges: of D alone, or {"d": ..., "v": ...} with the vision-aided heads V.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config, OptimizerConfig
from gigagan_jax.models.layers.resample import pyramid
from gigagan_jax.models.layers.scan import scan
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses
from gigagan_jax.training.batch import Batch, batch_axes
from gigagan_jax.training.diff_augment import augment
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.mismatched_captions import wrong_captions
from gigagan_jax.training.optimizer import learning_rate
from gigagan_jax.training.state import GanState, Net, Networks

NOTHING: Params = {}  # the frozen networks of a config that asks for none
Metrics = dict[str, jax.Array]


class CriticGradients(NamedTuple):
    """Gradients of the critics, before their update.

    grads: of all critics, as `TrainStep.critics` has their parameters
    metrics: so far
    seen: further entries of the health vector
    features: what frozen encoders said of the captions
    """

    grads: Params
    metrics: Metrics
    seen: Metrics
    features: Batch


class HalfStep(NamedTuple):
    """What the critics' half of a step hands to the generator's.

    features: what frozen encoders said of the captions
    metrics: so far
    seen: further entries of the health vector
    squares, sizes: of gradients and updates, by network; see health/step_statistics.py
    """

    features: Batch
    metrics: Metrics
    seen: Metrics
    squares: dict[str, list[jax.Array]]
    sizes: dict[str, tuple[jax.Array, jax.Array]]

    def penalty(self, with_r1: bool) -> Metrics:
        """The metric that only a step with R1 has. It travels in `seen`, so that both kinds of step hand on the same."""
        return {"loss/r1": self.seen["loss/r1"]} if with_r1 else {}


def high_to_low(images: list[jax.Array], config: Config) -> list[jax.Array]:
    """The levels of generated images that D sees, output image first."""
    return images[::-1] if config.discriminator.multi_scale_input else images[-1:]


def real_images(batch: Batch, config: Config) -> list[jax.Array]:
    """The levels of the real images, float32 in [-1, 1], output size first."""
    real = batch["image"].astype(jnp.float32) / 127.5 - 1.0
    return pyramid(real, len(config.resolutions) if config.discriminator.multi_scale_input else 1)


class TrainStep:
    """The step of a config: pure functions of state, batch and key.

    Args:
      networks: G, D and their optimizers.
    """

    def __init__(self, networks: Networks):
        self.networks = networks
        self.config = networks.config
        self.probe = step_statistics.Probe(networks)
        self.weights_gan, self.weights_match = losses.pair_weights(self.config)
        self.matches = self.config.condition == "text" and (
            self.config.loss.match_d > 0 or self.config.loss.match_g > 0
        )
        self.frozen = networks.frozen
        self.weights_vision = (1.0 / len(self.config.vision_aided.layers),) * len(self.config.vision_aided.layers)

    # -- what both halves share

    def encode(self, batch: Batch, frozen: Params) -> Batch:
        """The batch with what frozen encoders say of its captions, once for both halves."""
        if "text" not in self.frozen.users and "clip_text" not in self.frozen.users:
            return batch
        with jax.named_scope("text_encoder"):
            said = self.frozen.encode(frozen, batch["tokens"], batch.get("clip_tokens"))
        return batch | {k: sharding.constrain(x, *batch_axes(k)) for k, x in said.items()}

    def critics(self, state: GanState) -> Params:
        """Parameters of what judges."""
        return state.d.params if state.v is None else {"d": state.d.params, "v": state.v.params}

    def split(self, critics: Params) -> tuple[Params, Params | None]:
        """(of D, of V or None)"""
        return (critics, None) if self.networks.v is None else (critics["d"], critics["v"])

    def vision_logits(
        self, params: Params, frozen: Params, images: jax.Array, batch: Batch, key: jax.Array
    ) -> list[jax.Array]:
        """What V says of images [N, S, R, R, 3], augmented by one draw an image -> [N, S, h * w] a layer"""
        n, s = images.shape[:2]
        c = self.config.vision_aided
        assert self.networks.v is not None
        v = self.networks.v.bind(params)
        flat = augment(key, images.reshape(n * s, *images.shape[2:]), c.augment)
        features = self.frozen.vision_features(frozen, sharding.constrain(flat, "batch", None, None, None))
        t = v.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        logits = v(features, None if t is None else jnp.repeat(t, s, axis=0))
        return [x.reshape(n, s, -1) for x in logits]

    def fakes(self, params: Params, batch: Batch, key: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Generated pyramids for the captions of the batch -> (images low to high, w [N, w_dim])"""
        z = jax.random.normal(key, (batch["image"].shape[0], self.config.generator.z_dim))
        z = sharding.constrain(z, "batch", None)
        return self.networks.g.bind(params)(z, batch.get("tokens"), batch["label"], batch.get("features"))

    def captions(self, disc: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """t_D of each image's own caption and of a wrong one -> (t [N, 2, D], valid [N]); see mismatched_captions.py"""
        t = disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        if t is None:
            return None, None
        if not self.matches:
            return t[:, None], None
        wrong, valid = wrong_captions(key, t, batch["tokens"], batch["label"], self.config.loss.mismatch_group)
        return jnp.stack([t, sharding.constrain(wrong, "batch", None)], axis=1), valid

    # -- the two losses

    def d_loss(
        self,
        critics: Params,
        g_params: Params,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NOTHING,
    ) -> tuple[jax.Array, Metrics]:
        """Loss of D (and of V) on one micro-batch, without R1; eq. 6 with eq. 8."""
        c = self.config
        params, v_params = self.split(critics)
        key_z, key_wrong = jax.random.split(key)
        disc = self.networks.d.bind(params)
        reals = real_images(batch, c)
        fakes = high_to_low(jax.lax.stop_gradient(self.fakes(g_params, batch, key_z)[0]), c)
        t, valid = self.captions(disc, batch, key_wrong)

        logits = disc([jnp.stack([f, r], axis=1) for f, r in zip(fakes, reals, strict=True)], t)
        fake, real_ = ([x[:, source, 0] for x in logits] for source in (0, 1))
        metrics = {"loss/d_gan": losses.over_pairs(losses.gan_d, self.weights_gan, fake, real_)}
        loss = metrics["loss/d_gan"]
        if self.matches and c.loss.match_d:
            wrong_fake, wrong_real = ([x[:, source, 1] for x in logits] for source in (0, 1))
            metrics["loss/d_match"] = losses.over_pairs(
                losses.match_d, self.weights_match, wrong_fake, wrong_real, valid=valid
            )
            loss += c.loss.match_d * metrics["loss/d_match"]
            metrics["logits/wrong"] = wrong_real[-len(reals)].mean()
        metrics |= {"logits/real": real_[-len(reals)].mean(), "logits/fake": fake[-len(reals)].mean()}
        metrics |= step_statistics.of_discriminator(c, reals[0], fakes[0], real_, fake)

        if v_params is not None:
            with jax.named_scope("vision_aided"):
                both = jnp.stack([fakes[0], reals[0]], axis=1)
                seen = self.vision_logits(v_params, frozen, both, batch, jax.random.fold_in(key, 2))
                fake_v, real_v = ([x[:, source] for x in seen] for source in (0, 1))
                metrics["loss/v"] = losses.over_pairs(losses.gan_d, self.weights_vision, fake_v, real_v)
            loss += metrics["loss/v"]

        return loss, metrics | {"loss/d": loss}

    def r1_loss(self, d_params: Params, gamma: jax.Array, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """R1 of D on one micro-batch, with its weight (sec. 3.3; lazy, Karras et al., 2020)."""
        c = self.config
        disc = self.networks.d.bind(d_params)
        reals = real_images(batch, c)
        t = disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        own = None if t is None else t[:, None]
        by = 1 if c.loss.r1_levels == "full" else len(reals)

        def logit(images: list[jax.Array]) -> jax.Array:
            out = disc([x[:, None] for x in (*images, *reals[by:])], own)
            return jnp.asarray(sum(x.mean(-1).sum() for x in out))

        with jax.named_scope("r1"):
            penalty = losses.r1(logit, reals[:by])
        loss = 0.5 * gamma * c.loss.r1_interval * penalty
        return loss, {"loss/r1": penalty, "loss/d": loss}

    def g_loss(
        self,
        params: Params,
        critics: Params,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NOTHING,
        captions: jax.Array | None = None,
        progress: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, Metrics]:
        """Loss of G on one micro-batch.

        Args:
          captions: [M, P] embeddings of all captions of the global batch, for eq. 9
          progress: share of the run that is done, for what is ramped
        """
        c = self.config
        d_params, v_params = self.split(critics)
        key_z, key_wrong = jax.random.split(key)
        images, w = self.fakes(params, batch, key_z)
        disc = self.networks.d.bind(d_params)
        t, valid = self.captions(disc, batch, key_wrong)
        logits = disc([x[:, None] for x in high_to_low(images, c)], t)
        own = [x[:, 0, 0] for x in logits]
        metrics = {"loss/g_gan": losses.over_pairs(losses.gan_g, self.weights_gan, own)}
        loss = metrics["loss/g_gan"]
        if self.matches and c.loss.match_g:
            wrong = [x[:, 0, 1] for x in logits]
            metrics["loss/g_match"] = losses.over_pairs(losses.match_g, self.weights_match, wrong, valid=valid)
            loss += c.loss.match_g * metrics["loss/g_match"]
        out = images[-1]
        if captions is not None:
            with jax.named_scope("clip_loss"):
                embedding, scale = self.frozen.clip_image(frozen, out)
                embedding = sharding.constrain(embedding, "batch", None)
                metrics["loss/clip"] = losses.clip_contrastive(embedding, batch["clip_text"], captions, scale)
            loss += losses.ramp(c.loss.clip, progress) * metrics["loss/clip"]
        if v_params is not None:
            with jax.named_scope("vision_aided"):
                seen = self.vision_logits(v_params, frozen, out[:, None], batch, jax.random.fold_in(key, 2))
                own_v = [x[:, 0] for x in seen]
                metrics["loss/g_v"] = losses.over_pairs(losses.gan_g, self.weights_vision, own_v)
            loss += c.loss.vision_aided * metrics["loss/g_v"]
        metrics["image/spread"] = jnp.std(out, axis=0).mean()
        metrics |= step_statistics.of_generator(c, images)
        return loss, metrics | {"loss/g": loss, "w": w.mean(0)}

    # -- the step

    def gradients(
        self, loss: Callable, params: Params, batch: Batch, key: jax.Array, *args: Any
    ) -> tuple[Params, Metrics]:
        """Gradient and metrics of `loss(params, *args, batch, key)`, averaged over the micro-batches.

        The metric "thumbnails" is not averaged: it is stacked, one entry a micro-batch.
        """
        parts = self.config.micro_batches
        grad = jax.grad(loss, has_aux=True)
        if parts == 1:
            return grad(params, *args, batch, jax.random.fold_in(key, 0))

        def split(name: str, x: jax.Array) -> jax.Array:
            # Part as the minor factor: every device keeps its own examples.
            x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
            return sharding.constrain(x, None, *batch_axes(name))

        def one(part: tuple[Batch, jax.Array]) -> tuple[Any, Metrics]:
            grads, metrics = grad(params, *args, part[0], jax.random.fold_in(key, part[1]))
            kept = {k: metrics.pop(k) for k in ("thumbnails",) if k in metrics}
            return (grads, metrics), kept

        def body(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, Metrics]:
            out, kept = one(part)
            return jax.tree.map(lambda a, b: a + b / parts, total, out), kept

        stacked = {k: split(k, x) for k, x in batch.items()}
        first = {k: x[0] for k, x in stacked.items()}
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, (first, jnp.int32(0)))[0])
        (grads, metrics), kept = scan(body, zeros, (stacked, jnp.arange(parts)), parts)
        return grads, metrics | kept

    def progress(self, state: GanState) -> jax.Array:
        """Share of the run that is done, 0 to 1."""
        return jnp.minimum(1.0, state.images.astype(jnp.float32) / (self.config.total_kimg * 1000.0))

    def d_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NOTHING
    ) -> tuple[Params, Metrics]:
        """Gradient of the critics' loss without R1."""

        def loss(critics: Params, g_params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            return self.d_loss(critics, g_params, batch, key, frozen)

        return self.gradients(loss, self.critics(state), batch, key, state.g.params)

    def r1_gradients(self, state: GanState, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        """Gradient of R1 by D's parameters, and the metrics `loss/r1` and its weighted part of `loss/d`."""
        gamma = losses.ramp(self.config.loss.r1_gamma, self.progress(state))
        return self.gradients(self.r1_loss, state.d.params, batch, key, gamma)

    def g_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NOTHING
    ) -> tuple[Params, Metrics]:
        """Gradient of G's loss, by the critics that are in the state."""
        # Negatives are the captions of the global batch, whatever micro-batch an image is in: gathered once.
        captions = sharding.constrain(batch["clip_text"], None, None) if "clip_text" in batch else None

        def loss(params: Params, critics: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            return self.g_loss(params, critics, batch, key, frozen, captions, self.progress(state))

        return self.gradients(loss, state.g.params, batch, key, self.critics(state))

    def cut(self, name: str, grads: Any) -> Any:
        """Gradients of a network (or None), placed as its moments: from here each device works out the part it keeps."""
        if grads is None or not self.config.mesh.shard_optimizer:
            return grads
        return jax.tree.map(sharding.to_optimizer, grads, self.networks.trained()[name][0].axes())

    def whole(self, name: str, net: Net) -> Net:
        """A network after its update, its parameters put together from those parts."""
        if not self.config.mesh.shard_optimizer:
            return net
        axes = self.networks.trained()[name][0].axes()
        return Net(jax.tree.map(sharding.from_optimizer, net.params, axes), net.opt)

    def __call__(
        self,
        state: GanState,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NOTHING,
        lr_scale: jax.Array | float = 1.0,
        *,
        with_r1: bool,
    ) -> tuple[GanState, Metrics]:
        """(state, global batch, the run's key, frozen networks, factor of all learning rates) -> (state, metrics)

        What is not finite changes nothing: where an input, the critics' loss or a gradient of theirs is not, only `step` and
        `images` move on; where it is G's, D and V have made their half of the step, and G and its averages stay. The metric
        "health" is the vector of `self.probe`. `with_r1` is static.
        """
        critics = self.critic_gradients(state, batch, key, frozen)
        if with_r1:
            critics = self.add_r1(state, critics, batch, key)
        state, half = self.update_critics(state, critics, lr_scale)
        state, metrics = self.update_generator(state, half, batch, key, frozen, lr_scale)
        return state, metrics | half.penalty(with_r1)

    def rate(self, config: OptimizerConfig, state: GanState, scale: jax.Array | float, lazy: int = 0) -> jax.Array:
        """Learning rate of a network in this step."""
        return scale * learning_rate(config, state.images, self.config.total_kimg, lazy_interval=lazy)

    def critic_gradients(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params = NOTHING
    ) -> CriticGradients:
        """First part of a step: gradients of D and V without R1. Reads of G its parameters only."""
        encoded = self.encode(batch, frozen)
        seen = step_statistics.bad_rows(encoded)
        grads, metrics = self.d_gradients(state, encoded, self.key_of_critics(state, key), frozen)
        seen["loss/r1"] = jnp.asarray(jnp.nan, jnp.float32)  # not in this step
        return CriticGradients(grads, metrics, seen, {k: x for k, x in encoded.items() if k not in batch})

    def add_r1(self, state: GanState, critics: CriticGradients, batch: Batch, key: jax.Array) -> CriticGradients:
        """Second part, of a step with R1: the penalty's gradient comes on top of D's."""
        grads, metrics = self.r1_gradients(state, batch | critics.features, self.key_of_critics(state, key))
        of_d, of_v = self.split(critics.grads)
        of_d = jax.tree.map(jnp.add, of_d, grads)
        return critics._replace(
            grads=of_d if of_v is None else {"d": of_d, "v": of_v},
            metrics=critics.metrics | {"loss/d": critics.metrics["loss/d"] + metrics["loss/d"]},
            seen=critics.seen | {"loss/r1": metrics["loss/r1"]},
        )

    def key_of_critics(self, state: GanState, key: jax.Array) -> jax.Array:
        """The key of the critics' half in this step."""
        return jax.random.split(jax.random.fold_in(key, state.step))[0]

    def update_critics(
        self, state: GanState, critics: CriticGradients, lr_scale: jax.Array | float = 1.0
    ) -> tuple[GanState, HalfStep]:
        """Third part: updates of D and V -> (state with new D and V, what is known)"""
        c, nets = self.config, self.networks
        metrics, seen = dict(critics.metrics), dict(critics.seen)
        d_grads, v_grads = self.split(critics.grads)
        d_grads, v_grads = self.cut("d", d_grads), self.cut("v", v_grads)
        squares = {"d": step_statistics.squares(d_grads)} | (
            {} if v_grads is None else {"v": step_statistics.squares(v_grads)}
        )
        metrics |= {f"grad_norm/{net}": jnp.sqrt(sum(each)) for net, each in squares.items()}
        finite = jnp.isfinite(metrics["loss/d"] + sum(metrics[f"grad_norm/{net}"] for net in squares))
        ok = seen["applied/d"] = finite & ~step_statistics.any_bad(seen)
        d, v, sizes = state.d, state.v, {}
        d_rate = self.rate(c.d_optimizer, state, lr_scale, c.loss.r1_interval)
        d, sizes["d"] = _update(nets.d_tx, d, d_grads, d_rate, ok)
        if v is not None:
            v, sizes["v"] = _update(nets.v_tx, v, v_grads or {}, self.rate(c.v_optimizer, state, lr_scale), ok)
        d, v = self.whole("d", d), None if v is None else self.whole("v", v)
        state = state.replace(d=d, v=v)  # type: ignore[attr-defined]
        return state, HalfStep(critics.features, metrics, seen, squares, sizes)

    def update_generator(
        self,
        state: GanState,
        half: HalfStep,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NOTHING,
        lr_scale: jax.Array | float = 1.0,
    ) -> tuple[GanState, Metrics]:
        """Last part: G by the critics as they are now, and the averages -> (state of the next step, metrics)"""
        c, nets = self.config, self.networks
        _, key_g = jax.random.split(jax.random.fold_in(key, state.step))
        metrics, seen, squares, sizes = dict(half.metrics), dict(half.seen), dict(half.squares), dict(half.sizes)

        grads, g_metrics = self.g_gradients(state, batch | half.features, key_g, frozen)
        grads = self.cut("g", grads)
        squares["g"] = step_statistics.squares(grads)
        g_metrics["grad_norm/g"] = jnp.sqrt(sum(squares["g"]))
        ok = seen["applied/g"] = seen["applied/d"] & jnp.isfinite(g_metrics["loss/g"] + g_metrics["grad_norm/g"])
        g, sizes["g"] = _update(nets.g_tx, state.g, grads, self.rate(c.g_optimizer, state, lr_scale), ok)
        g = self.whole("g", g)
        seen["health/diversity_z"] = step_statistics.within_captions(metrics, g_metrics)
        w = g_metrics.pop("w")

        images = state.images + jnp.uint32(c.batch_size)
        keep = ema_decay(c, state.images)
        g_ema = jax.tree.map(lambda e, p: p + (e - p) * keep, state.g_ema, g.params)
        w_avg = jnp.where(state.step == 0, w, w + (state.w_avg - w) * c.generator.w_avg_decay)
        g_ema, w_avg = step_statistics.guarded(ok, (g_ema, w_avg), (state.g_ema, state.w_avg))
        metrics |= g_metrics
        metrics["health"] = self.probe.pack(metrics, seen, squares, sizes)
        return GanState(state.step + 1, images, g, state.d, g_ema, w_avg, state.v), metrics


def ema_decay(config: Config, images: jax.Array) -> jax.Array:
    """Decay of G's moving average for one step: 0.5 ^ (batch / half-life), both in images."""
    half = jnp.asarray(config.ema.half_life_kimg * 1000.0, jnp.float32)
    if config.ema.rampup:
        half = jnp.minimum(half, images.astype(jnp.float32) * config.ema.rampup)
    return 0.5 ** (config.batch_size / jnp.maximum(half, 1e-6))


def _update(
    tx: Any, net: Net, grads: Params, rate: jax.Array, ok: jax.Array
) -> tuple[Net, tuple[jax.Array, jax.Array]]:
    """(the network after its step, or as it was where that is not `ok`; sizes of the update)"""
    updates, opt = tx.update(grads, net.opt, net.params)
    params = jax.tree.map(lambda p, u: p - rate * u, net.params, updates)
    sizes = step_statistics.update_sizes(updates, net.params, rate)
    return step_statistics.guarded(ok, Net(params, opt), net), sizes
