"""What is trained: the losses of the base model, one line each (sec. 3.3), from networks, batch and key.

`critics` are the parameters of the networks that judge, by name: {"d": D} or {"d": D, "v": V}.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config
from gigagan_jax.models.discriminator import Logits, entry_levels
from gigagan_jax.models.layers.resample import image_pyramid
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses
from gigagan_jax.training.batch import Batch, batch_axes
from gigagan_jax.training.diff_augment import augment
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.mismatched_captions import draw_wrong_captions
from gigagan_jax.training.state import Networks

NO_FROZEN: Params = {}  # the frozen networks of a config that asks for none
Metrics = dict[str, jax.Array]


class LossReport(NamedTuple):
    """What a loss tells beside its value. Over micro-batches everything is averaged but thumbnails, which are stacked.

    metrics: scalars for the log
    health: scalars for the health vector (health/step_statistics.py)
    thumbnails: [N, 8, 8, 3] of the generated images; None in R1's part
    w: [w_dim] mean of w; None in the critics' half
    """

    metrics: Metrics
    health: Metrics
    thumbnails: jax.Array | None = None
    w: jax.Array | None = None


def generated_levels(images: list[jax.Array], config: Config) -> list[jax.Array]:
    """The levels of generated images (low to high) that D sees, output image first."""
    return images[::-1] if config.discriminator.multi_scale_input else images[-1:]


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
        self.uses_wrong_captions = c.condition == "text" and (c.loss.match_d > 0 or c.loss.match_g > 0)

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

    def generate(self, params: Params, batch: Batch, key: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Generated pyramids for the captions of the batch -> (images low to high, w [N, w_dim])"""
        # Drawn for the global batch from one key: the same z on any mesh.
        z = jax.random.normal(key, (batch["image"].shape[0], self.config.generator.z_dim))
        z = sharding.constrain(z, "batch", None)
        return self.networks.g.bind(params)(z, batch.get("tokens"), batch["label"], batch.get("features"))

    def own_and_wrong_captions(
        self, disc: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        """t_D of each image's own caption, of a wrong one, and where there is a wrong one (mismatched_captions.py).

        Returns:
          (own [N, D], wrong [N, D], valid bool [N]); None for what the config does not have
        """
        own = disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        if own is None or not self.uses_wrong_captions:
            return own, None, None
        wrong, valid = draw_wrong_captions(key, own, batch["tokens"], batch["label"], self.config.loss.mismatch_group)
        return own, sharding.constrain(wrong, "batch", None), valid

    def vision_logits(
        self, params: Params, frozen: Params, images: jax.Array, batch: Batch, key: jax.Array
    ) -> list[jax.Array]:
        """V's logits for images [N, S, R, R, 3], each augmented by its own draw -> [N, S, h * w] a layer of the tower"""
        n, s = images.shape[:2]
        assert self.networks.v is not None
        v = self.networks.v.bind(params)
        # Sources are rows of one batch here: each image is augmented by a draw of its own.
        flat = augment(key, images.reshape(n * s, *images.shape[2:]), self.config.vision_aided.augment)
        features = self.frozen.vision_features(frozen, sharding.constrain(flat, "batch", None, None, None))
        t = v.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        logits = v(features, None if t is None else jnp.repeat(t, s, axis=0))
        return [x.reshape(n, s, -1) for x in logits]

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
        own, wrong, valid = self.own_and_wrong_captions(disc, batch, key_wrong)
        logits = disc({"fake": fakes, "real": reals}, own, wrong)
        fake, real = logits["fake"], logits["real"]

        # eq. 6: the sum over levels and exits, weighted as Table A2 has it.
        metrics = {"loss/d_gan": losses.over_pairs(losses.gan_d, self.weights_gan, fake.own, real.own)}
        loss = metrics["loss/d_gan"]
        if self.uses_wrong_captions and c.loss.match_d:
            metrics["loss/d_match"] = losses.over_pairs(
                losses.match_d, self.weights_match, fake.wrong, real.wrong, valid=valid
            )
            # eq. 8: an image with a wrong caption is a fake, a real one too.
            loss += c.loss.match_d * metrics["loss/d_match"]
        if "v" in critics:
            metrics["loss/v"] = self.vision_d_loss(critics["v"], frozen, fakes[0], reals[0], batch, key)
            loss += metrics["loss/v"]
        metrics |= self.logged_logits(fake, real)
        health, thumbnails = step_statistics.measure_discriminator(c, reals[0], fakes[0], real.own, fake.own)
        return loss, LossReport(metrics | {"loss/d": loss}, health, thumbnails)

    def vision_d_loss(
        self, params: Params, frozen: Params, fake: jax.Array, real: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """V's own loss, on the output images (sec. 3.3, "Vision-aided discriminator")."""
        with jax.named_scope("vision_aided"):
            both = jnp.stack([fake, real], axis=1)
            logits = self.vision_logits(params, frozen, both, batch, jax.random.fold_in(key, 2))
            fake_logits, real_logits = ([x[:, source] for x in logits] for source in (0, 1))
            return losses.over_pairs(losses.gan_d, self.weights_vision, fake_logits, real_logits)

    def logged_logits(self, fake: Logits, real: Logits) -> Metrics:
        """Mean logits of the output image at the last exit."""
        place = -len(entry_levels(self.config.discriminator))
        out = {"logits/real": real.own[place].mean(), "logits/fake": fake.own[place].mean()}
        if self.uses_wrong_captions and self.config.loss.match_d:
            out["logits/wrong"] = real.wrong[place].mean()
        return out

    def r1_loss(self, d_params: Params, gamma: jax.Array, batch: Batch, key: jax.Array) -> tuple[jax.Array, LossReport]:
        """R1 of D with its weight (sec. 3.3; lazy, Karras et al., 2020). `key` is not used: real images only."""
        c = self.config
        disc = self.networks.d.bind(d_params)
        reals = real_levels(batch, c)
        own = disc.condition(batch.get("tokens"), batch["label"], batch.get("features"))
        differentiated = 1 if c.loss.r1_levels == "full" else len(reals)

        def logit_sum(images: list[jax.Array]) -> jax.Array:
            out = disc({"real": [*images, *reals[differentiated:]]}, own)["real"].own
            return jnp.asarray(sum(x.mean(-1).sum() for x in out))

        with jax.named_scope("r1"):
            penalty = losses.r1_penalty(logit_sum, reals[:differentiated])
        # Lazy: the penalty of all steps of an interval is paid in one.
        loss = 0.5 * gamma * c.loss.r1_interval * penalty
        return loss, LossReport({"loss/r1": penalty, "loss/d": loss}, {})

    def g_loss(
        self,
        params: Params,
        critics: Params,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NO_FROZEN,
        captions: jax.Array | None = None,
        progress: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, LossReport]:
        """Loss of G: GAN, matching-aware, CLIP and vision-aided.

        Args:
          captions: [M, P] CLIP embeddings of all captions of the global batch, for eq. 9
          progress: share of the run that is done, for weights that change
        """
        c = self.config
        key_z, key_wrong = jax.random.split(key)
        images, w = self.generate(params, batch, key_z)
        disc = self.networks.d.bind(critics["d"])
        own, wrong, valid = self.own_and_wrong_captions(disc, batch, key_wrong)
        fake = disc({"fake": generated_levels(images, c)}, own, wrong)["fake"]

        # Non-saturating: G's gradient stays large where D is sure.
        metrics = {"loss/g_gan": losses.over_pairs(losses.gan_g, self.weights_gan, fake.own)}
        loss = metrics["loss/g_gan"]
        if self.uses_wrong_captions and c.loss.match_g:
            metrics["loss/g_match"] = losses.over_pairs(losses.match_g, self.weights_match, fake.wrong, valid=valid)
            loss += c.loss.match_g * metrics["loss/g_match"]
        if captions is not None:
            metrics["loss/clip"] = self.clip_loss(frozen, images[-1], batch, captions)
            # Table A2: the weight grows over the run.
            loss += losses.ramped_weight(c.loss.clip, progress) * metrics["loss/clip"]
        if "v" in critics:
            metrics["loss/g_v"] = self.vision_g_loss(critics["v"], frozen, images[-1], batch, key)
            loss += c.loss.vision_aided * metrics["loss/g_v"]
        metrics["image/spread"] = jnp.std(images[-1], axis=0).mean()
        health, thumbnails = step_statistics.measure_generator(c, images)
        return loss, LossReport(metrics | {"loss/g": loss}, health, thumbnails, w.mean(0))

    def clip_loss(self, frozen: Params, image: jax.Array, batch: Batch, captions: jax.Array) -> jax.Array:
        """CLIP contrastive loss (eq. 9)."""
        with jax.named_scope("clip_loss"):
            # With CLIP's own logit scale, as it was trained.
            embedding, scale = self.frozen.embed_images(frozen, image)
            embedding = sharding.constrain(embedding, "batch", None)
            return losses.clip_contrastive(embedding, batch["clip_text"], captions, scale)

    def vision_g_loss(
        self, params: Params, frozen: Params, image: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """The vision-aided part of G's loss."""
        with jax.named_scope("vision_aided"):
            logits = self.vision_logits(params, frozen, image[:, None], batch, jax.random.fold_in(key, 2))
            return losses.over_pairs(losses.gan_g, self.weights_vision, [x[:, 0] for x in logits])
