"""What is trained: the losses of the base model, one line each (sec. 3.3), from networks, batch and key.

`critics` are the parameters of the networks that judge, by name: {"d": D} or {"d": D, "v": V}.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config
from gigagan_jax.config.augmentation import with_augmentations
from gigagan_jax.models.discriminator import Logits, entry_levels, prediction_pairs
from gigagan_jax.models.layers.resample import image_pyramid
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses, penalties
from gigagan_jax.training.batch import Batch, batch_axes
from gigagan_jax.training.diff_augment import augment
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.mismatched_captions import all_wrong_captions, draw_wrong_captions, masks_null_captions
from gigagan_jax.training.state import Networks

NO_FROZEN: Params = {}  # the frozen networks of a config that asks for none
# Names of sources of images that D sees; draws of the augmentation are by their number. Others are copies of real images.
_SOURCES = {"real": 0, "fake": 1}
Metrics = dict[str, jax.Array]


class LossReport(NamedTuple):
    """What a loss tells beside its value. Over micro-batches everything is averaged but thumbnails, which are stacked.

    metrics: scalars for the log
    health: scalars for the health vector (health/step_statistics.py)
    thumbnails: [N, 8, 8, 3] of the generated images; None in R1's part
    w: [w_dim] mean of w, over captions that are not null; None in the critics' half
    """

    metrics: Metrics
    health: Metrics
    thumbnails: jax.Array | None = None
    w: jax.Array | None = None


def generated_levels(images: list[jax.Array], config: Config) -> list[jax.Array]:
    """The levels of generated images (low to high) that D sees, output image first."""
    return images[::-1][: len(entry_levels(config.discriminator))]


def real_levels(batch: Batch, config: Config) -> list[jax.Array]:
    """The levels of the real images that D sees, float32 in [-1, 1], output size first."""
    # Uint8 until here: a quarter of the bytes over the host's link.
    real = batch["image"].astype(jnp.float32) / 127.5 - 1.0
    return image_pyramid(real, len(entry_levels(config.discriminator)))


class GanObjective:
    """The losses of G, D and V on one micro-batch.

    Args:
      networks: of the run.
    """

    def __init__(self, networks: Networks):
        self.networks, self.config, self.frozen = networks, networks.config, networks.frozen
        c = self.config
        self.weights_gan, self.weights_match = losses.pair_weights(c)
        self.weights_vision = (1.0 / len(c.vision_aided.layers),) * len(c.vision_aided.layers)
        # Weights of the matching-aware loss: nothing but a caption can be wrong.
        has_captions = c.condition == "text"
        self.match_d = c.loss.match_d if has_captions else 0.0
        self.match_g = c.loss.match_g if has_captions and c.loss.match_g_form != "off" else 0.0
        self.is_contrastive = c.loss.match_d_form == "contrastive"
        # A run has decided by its data. Without data, as in a dry run, all are planned for.
        self.augmentations = with_augmentations(c, None).discriminator.augment
        # Decided by the config: without null captions the program has no masks.
        self.null_text = text_spec(c.text) if masks_null_captions(c) else None

    # -- what the losses share

    def encode_captions(self, batch: Batch, frozen: Params) -> Batch:
        """The batch with the features of frozen text encoders, computed once for both halves of a step."""
        # The bytes encoder is part of each network: nothing is frozen then.
        if "text" not in self.frozen.users and "clip_text" not in self.frozen.users:
            return batch
        with jax.named_scope("text_encoder"):
            features = self.frozen.encode_captions(frozen, batch["tokens"], batch.get("clip_tokens"))
        # Placed as the batch is: each device keeps its own examples.
        return batch | {k: sharding.constrain(x, *batch_axes(k)) for k, x in features.items()}

    def null_captions(self, batch: Batch) -> jax.Array | None:
        """bool [N], rows of the batch with the null caption; None where the config has no such rows."""
        return None if self.null_text is None else self.null_text.is_null(batch["tokens"])

    def generate(self, params: Params, batch: Batch, key: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Generated pyramids for the captions of the batch -> (images low to high, w [N, w_dim])"""
        # Drawn for the global batch from one key: the same z on any mesh.
        z = jax.random.normal(key, (batch["image"].shape[0], self.config.generator.z_dim))
        z = sharding.constrain(z, "batch", None)
        return self.networks.g.bind(params)(z, batch.get("tokens"), batch["label"], batch.get("features"))

    def augmented(self, images: dict[str, list[jax.Array]], key: jax.Array) -> dict[str, list[jax.Array]]:
        """Images of each source as D sees them: each level of each image by a draw of its own (diff_augment.py).

        Args:
          images: {source: levels [N, R, R, 3]}. "noisy real" is drawn as "real": finite differences compare the two.
        """
        if not self.augmentations:
            return images
        out = {}
        for source, levels in images.items():
            number = _SOURCES.get(source.removeprefix("noisy "), _SOURCES["real"])
            source_key = jax.random.fold_in(jax.random.fold_in(key, 4), number)
            out[source] = [
                augment(jax.random.fold_in(source_key, i), x, self.augmentations) for i, x in enumerate(levels)
            ]
        return out

    def own_captions(self, disc: Any, batch: Batch) -> jax.Array | None:
        """t_D of each image's own caption or class, [N, D]; None without a condition."""
        return disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))

    def wrong_captions(self, own: jax.Array | None, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """t_D of wrong captions, and where there are any (mismatched_captions.py).

        Returns:
          (wrong [N, D], valid bool [N]); of the contrastive form ([N, M, D], bool [N, M])
        """
        assert own is not None
        loss, tokens, null = self.config.loss, batch["tokens"], self.null_captions(batch)
        labels = batch["label"] if loss.mask_same_labels else None
        if self.is_contrastive:
            wrong, valid = all_wrong_captions(own, tokens, labels, loss.mismatch_group, null)
            return sharding.constrain(wrong, "batch", None, None), valid
        wrong, valid = draw_wrong_captions(key, own, tokens, labels, loss.mismatch_group, null)
        return sharding.constrain(wrong, "batch", None), valid

    def vision_logits(
        self, params: Params, frozen: Params, images: jax.Array, batch: Batch, key: jax.Array
    ) -> list[jax.Array]:
        """V's logits for images [N, S, R, R, 3], each augmented by its own draw -> [N, S, h * w] a layer of the tower"""
        n, s = images.shape[:2]
        v, t, features = self.vision_inputs(params, frozen, images, batch, key)
        return [x.reshape(n, s, -1) for x in v(features, t)]

    def vision_inputs(
        self, params: Params, frozen: Params, images: jax.Array, batch: Batch, key: jax.Array
    ) -> tuple[Any, jax.Array | None, list[jax.Array]]:
        """(V, its captions [N * S, D], the projected features [N * S, h, w, C] a layer)"""
        n, s = images.shape[:2]
        assert self.networks.v is not None
        v = self.networks.v.bind(params)
        # Sources are rows of one batch here: each image is augmented by a draw of its own.
        flat = augment(key, images.reshape(n * s, *images.shape[2:]), self.config.vision_aided.augment)
        features = self.frozen.vision_features(frozen, sharding.constrain(flat, "batch", None, None, None))
        t = v.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        return v, None if t is None else jnp.repeat(t, s, axis=0), features

    # -- the losses

    def d_loss(
        self, critics: Params, g_params: Params, batch: Batch, key: jax.Array, frozen: Params = NO_FROZEN
    ) -> tuple[jax.Array, LossReport]:
        """Loss of D and V without R1: eq. 6 with eq. 8, and the vision-aided loss."""
        c = self.config
        key_z, key_wrong = jax.random.split(key)
        disc = self.networks.d.bind(critics["d"])
        reals = real_levels(batch, c)
        # D's half does not train G: no gradient flows back through the images.
        fakes = generated_levels(jax.lax.stop_gradient(self.generate(g_params, batch, key_z)[0]), c)
        own = self.own_captions(disc, batch)
        wrong, valid = self.wrong_captions(own, batch, key_wrong) if self.match_d else (None, None)
        logits = disc(self.augmented({"fake": fakes, "real": reals}, key), own, wrong)
        fake, real = logits["fake"], logits["real"]

        # eq. 6: the sum over levels and exits, weighted as Table A2 has it.
        gan_d = losses.gan_d if c.loss.pairing == "separate" else losses.relativistic_d
        metrics = {"loss/d_gan": losses.over_pairs(gan_d, self.weights_gan, fake.own, real.own)}
        loss = metrics["loss/d_gan"]
        if self.match_d:
            # eq. 8: an image with a wrong caption is a fake, a real one too.
            metrics["loss/d_match"] = self.match_d_loss(fake, real, valid)
            loss += self.match_d * metrics["loss/d_match"]
        if c.loss.centring:
            metrics["loss/centring"] = losses.over_pairs(losses.centring, self.weights_gan, fake.own, real.own)
            loss += c.loss.centring * metrics["loss/centring"]
        health, thumbnails = step_statistics.measure_discriminator(c, reals[0], fakes[0], real.own, fake.own)
        if "v" in critics:
            metrics["loss/v"], gap = self.vision_d_loss(critics["v"], frozen, fakes[0], reals[0], batch, key)
            loss += metrics["loss/v"]
            health["health/v_gap"] = gap
        metrics |= self.logged_logits(fake, real)
        return loss, LossReport(metrics | {"loss/d": loss}, health, thumbnails)

    def match_d_loss(self, fake: Logits, real: Logits, valid: jax.Array | None) -> jax.Array:
        """D's matching-aware loss (eq. 8)."""
        if self.is_contrastive:
            return self.contrastive_loss(real, valid)
        if not self.config.loss.match_relativistic:
            return losses.over_pairs(losses.match_d, self.weights_match, fake.wrong, real.wrong, valid=valid)
        logits = (fake.wrong, real.wrong, real.own)
        return losses.over_pairs(losses.match_d_relativistic, self.weights_match, *logits, valid=valid)

    def contrastive_loss(self, logits: Logits, valid: jax.Array | None) -> jax.Array:
        """The contrastive form of the matching-aware loss, of D by real images and of G by generated ones."""
        assert valid is not None
        loss = lambda own, others: losses.match_contrastive(own, others, valid)
        return losses.over_pairs(loss, self.weights_match, logits.own, logits.wrong)

    def vision_d_loss(
        self, params: Params, frozen: Params, fake: jax.Array, real: jax.Array, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """V's own loss, on the output images (sec. 3.3, "Vision-aided discriminator"), and its health measure."""
        with jax.named_scope("vision_aided"):
            both = jnp.stack([fake, real], axis=1)
            logits = self.vision_logits(params, frozen, both, batch, jax.random.fold_in(key, 2))
            fake_logits, real_logits = ([x[:, source] for x in logits] for source in (0, 1))
            smoothed = functools.partial(losses.smoothed_d, smoothing=self.config.loss.vision_smoothing)
            gap = step_statistics.measure_gap(real_logits, fake_logits)
            return losses.over_pairs(smoothed, self.weights_vision, fake_logits, real_logits), gap

    def logged_logits(self, fake: Logits, real: Logits) -> Metrics:
        """Mean logits of the output image at the last exit."""
        place = -len(entry_levels(self.config.discriminator))
        out = {"logits/real": real.own[place].mean(), "logits/fake": fake.own[place].mean()}
        if self.match_d:
            out["logits/wrong"] = real.wrong[place].mean()
        return out

    # -- R1

    def r1_loss(
        self,
        critics: Params,
        gamma: jax.Array,
        g_params: Params,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NO_FROZEN,
    ) -> tuple[jax.Array, LossReport]:
        """R1 of D with its weight (sec. 3.3; lazy, Karras et al., 2020), R2 where it is on, and R1 of V."""
        c = self.config
        reals = real_levels(batch, c)
        disc = self.networks.d.bind(critics["d"])
        own = self.own_captions(disc, batch)
        images = {"real": reals}
        if c.loss.r2:
            key_z, _ = jax.random.split(key)
            images["fake"] = generated_levels(jax.lax.stop_gradient(self.generate(g_params, batch, key_z)[0]), c)
        with jax.named_scope("r1"):
            paid = self.penalties(disc, images, own, jax.random.fold_in(key, 3))
            metrics = {f"loss/{'r1' if source == 'real' else 'r2'}": x for source, x in paid.items()}
            # Lazy: the penalty of all steps of an interval is paid in one.
            loss = 0.5 * gamma * c.loss.r1_interval * sum(paid.values())
            metrics |= self.measure_exits(jax.lax.stop_gradient(critics["d"]), reals, own)
        if "v" in critics and c.loss.vision_r1_gamma:
            metrics["loss/r1_v"] = self.vision_r1(critics["v"], frozen, reals[0], batch, key)
            loss += 0.5 * c.loss.vision_r1_gamma * c.loss.r1_interval * metrics["loss/r1_v"]
        return loss, LossReport(metrics | {"loss/d": loss}, {})

    def penalties(
        self, disc: Any, images: dict[str, list[jax.Array]], own: jax.Array | None, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The penalty on D's gradient by the images of each source (penalties.py)."""
        loss = self.config.loss
        key_signs, key_noise = jax.random.split(key)
        n, pairs = images["real"][0].shape[0], len(prediction_pairs(self.config.discriminator))
        in_loss = loss.r1_exits == "signs"
        keys = {source: jax.random.fold_in(key_signs, i) for i, source in enumerate(images)}
        signs = {source: penalties.draw_signs(k, n, pairs) if in_loss else None for source, k in keys.items()}
        count = len(self.penalty_weights())
        rest = {source: levels[count:] for source, levels in images.items()}
        first = {source: levels[:count] for source, levels in images.items()}

        def say(logits: Logits, source: str) -> list[jax.Array]:
            return penalties.sum_exits(self.config, logits.own, signs[source])[:count]

        if loss.r1_form == "gradient":

            def total(first: dict[str, list[jax.Array]]) -> jax.Array:
                out = disc(self.augmented({s: [*first[s], *rest[s]] for s in first}, key), own)
                return jnp.asarray(sum(x.sum() for source in out for x in say(out[source], source)))

            squares = penalties.squared_gradients(total, first)
        else:
            draw = lambda i, x: (
                x + loss.r1_sigma * jax.random.normal(jax.random.fold_in(key_noise, i), x.shape, x.dtype)
            )
            noisy = {
                source: [draw(len(levels) * k + i, x) for i, x in enumerate(levels)]
                for k, (source, levels) in enumerate(first.items())
            }
            # One call of D for all: the noisy images are sources of their own.
            both = images | {f"noisy {source}": [*noisy[source], *rest[source]] for source in images}
            out = disc(self.augmented(both, key), own)
            squares = {
                source: penalties.squared_differences(
                    say(out[source], source), say(out[f"noisy {source}"], source), loss.r1_sigma
                )
                for source in images
            }
        weights = self.penalty_weights()
        return {
            source: jnp.asarray(sum(w * s.mean() for w, s in zip(weights, each, strict=True)))
            for source, each in squares.items()
        }

    def penalty_weights(self) -> tuple[float, ...]:
        """Weight of each penalised level in the penalties, high to low."""
        loss, weights = self.config.loss, losses.level_weights(self.config)
        # By the levels' weights in the loss, so that gamma means the same at each of them.
        weights = weights if loss.r1_exits == "signs" else (1.0,) * len(weights)
        return weights[:1] if loss.r1_levels == "full" else weights

    def measure_exits(self, d_params: Params, reals: list[jax.Array], own: jax.Array | None) -> Metrics:
        """R1 of the last exit alone, and the cosine between its gradient and that of the other exits' sum, by level."""
        c = self.config
        own = None if own is None else jax.lax.stop_gradient(own)
        grads = self.exit_gradients(self.networks.d.bind(d_params), reals, own)
        squares = [jnp.sum(jnp.square(g)) / g.shape[0] for g in grads["last"]]
        # Of the levels that R1 penalises, by its weights: what R1 would be without the other exits.
        paid = zip(self.penalty_weights(), squares, strict=False)
        metrics = {"r1/last_exit": jnp.asarray(sum(w * s for w, s in paid))}
        resolutions = c.resolutions[::-1]
        for i, (last, others) in enumerate(zip(grads["last"], grads["others"], strict=True)):
            # The lowest level has one exit only.
            if f"r1/cosine/{resolutions[i]}" in step_statistics.r1_measures(c):
                metrics[f"r1/cosine/{resolutions[i]}"] = penalties.cosine(last, others)
        return metrics

    def exit_gradients(self, disc: Any, reals: list[jax.Array], own: jax.Array | None) -> dict[str, list[jax.Array]]:
        """Gradients by the real images of each level: of the "last" exit, and of the plain sum of the "others"."""

        def total(images: dict[str, list[jax.Array]]) -> jax.Array:
            out = disc(images, own)
            last, _ = penalties.split_exits(self.config, out["last"].own)
            _, others = penalties.split_exits(self.config, out["others"].own)
            return jnp.asarray(sum(x.sum() for x in (*last, *others)))

        # Twice the same images, as two sources: the gradients of both parts come from one backward pass.
        return penalties.gradients(total, {"last": reals, "others": reals})

    def vision_r1(self, params: Params, frozen: Params, real: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
        """R1 of V by its projected features: its heads are all that learns."""
        v, t, features = self.vision_inputs(params, frozen, real[:, None], batch, jax.random.fold_in(key, 2))
        total = lambda x: jnp.asarray(sum(y.mean(-1).sum() for y in v(x, t)))
        squares = penalties.squared_gradients(total, features)
        return jnp.asarray(sum(w * s.mean() for w, s in zip(self.weights_vision, squares, strict=True)))

    def g_loss(
        self,
        params: Params,
        critics: Params,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NO_FROZEN,
        captions: jax.Array | None = None,
        progress: jax.Array | float = 0.0,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, LossReport]:
        """Loss of G: GAN, matching-aware, CLIP and vision-aided.

        Args:
          batch: with "caption_weights" [N, 1] (losses.py) where captions may be null
          captions: [M, P] CLIP embeddings of all captions of the global batch, for eq. 9
          progress: share of the run that is done, for weights that change
          counted: bool [M], those of `captions` that are not null; None for all
        """
        c = self.config
        key_z, key_wrong = jax.random.split(key)
        images, w = self.generate(params, batch, key_z)
        disc = self.networks.d.bind(critics["d"])
        own = self.own_captions(disc, batch)
        wrong, valid = self.wrong_captions(own, batch, key_wrong) if self.match_g else (None, None)
        logits = disc(self.augmented({"fake": generated_levels(images, c)}, key), own, wrong)
        fake = logits["fake"]
        if c.loss.pairing == "relativistic":
            # Apart, though D takes both at once: nothing of G flows through the real images, so there is no way back.
            reals = self.augmented({"real": real_levels(batch, c)}, key)
            logits["real"] = jax.lax.stop_gradient(disc(reals, own)["real"])

        metrics = {"loss/g_gan": self.adversarial_g_loss(logits)}
        loss = metrics["loss/g_gan"]
        if self.match_g:
            metrics["loss/g_match"] = self.match_g_loss(fake, valid)
            loss += self.match_g * metrics["loss/g_match"]
        if captions is not None:
            metrics["loss/clip"] = self.clip_loss(frozen, images[-1], batch, captions, counted)
            # Table A2: the weight grows over the run.
            loss += losses.ramped_weight(c.loss.clip, progress) * metrics["loss/clip"]
        if "v" in critics:
            metrics["loss/g_v"] = self.vision_g_loss(critics["v"], frozen, images[-1], batch, key)
            loss += c.loss.vision_aided * metrics["loss/g_v"]
        for name, weight, value in self.reconstruction_losses(images, batch, frozen):
            metrics[f"loss/{name}"] = value
            loss += weight * value
        metrics["image/spread"] = jnp.std(images[-1], axis=0).mean()
        health, thumbnails = step_statistics.measure_generator(c, images)
        # Truncation pulls towards the w of captions: nobody samples the null caption.
        w = w if "caption_weights" not in batch else w * batch["caption_weights"]
        return loss, LossReport(metrics | {"loss/g": loss}, health, thumbnails, w.mean(0))

    def reconstruction_losses(
        self, images: list[jax.Array], batch: Batch, frozen: Params
    ) -> list[tuple[str, float, jax.Array]]:
        """(name, weight, value) of what compares generated images with real ones; the base model has none."""
        return []

    def match_g_loss(self, fake: Logits, valid: jax.Array | None) -> jax.Array:
        """G's matching-aware loss."""
        form = self.config.loss.match_g_form
        if form == "contrastive":
            return self.contrastive_loss(fake, valid)
        return losses.over_pairs(losses.MATCH_G[form], self.weights_match, fake.wrong, valid=valid)

    def adversarial_g_loss(self, logits: dict[str, Logits]) -> jax.Array:
        """The GAN loss of G, of what D says with the images' own captions."""
        fake = logits["fake"].own
        if self.config.loss.pairing == "relativistic":
            # The same function as D's with the sources in each other's place.
            return losses.over_pairs(losses.relativistic_d, self.weights_gan, logits["real"].own, fake)
        # Non-saturating: G's gradient stays large where D is sure.
        return losses.over_pairs(losses.gan_g, self.weights_gan, fake)

    def clip_loss(
        self, frozen: Params, image: jax.Array, batch: Batch, captions: jax.Array, counted: jax.Array | None
    ) -> jax.Array:
        """CLIP contrastive loss (eq. 9)."""
        with jax.named_scope("clip_loss"):
            # With CLIP's own logit scale, as it was trained.
            embedding, scale = self.frozen.embed_images(frozen, image)
            embedding = sharding.constrain(embedding, "batch", None)
            weights = batch.get("caption_weights")
            return losses.clip_contrastive(embedding, batch["clip_text"], captions, scale, weights, counted)

    def vision_g_loss(
        self, params: Params, frozen: Params, image: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """The vision-aided part of G's loss."""
        with jax.named_scope("vision_aided"):
            logits = self.vision_logits(params, frozen, image[:, None], batch, jax.random.fold_in(key, 2))
            return losses.over_pairs(losses.gan_g, self.weights_vision, [x[:, 0] for x in logits])
