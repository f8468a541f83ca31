"""What the train step tells of a GAN's health, as one small vector: what is not finite, how varied the images are, what each
level adds to them, how large the updates are. The monitor judges it, on the host.

Everything comes from what the step computes anyway: sums over gradients for their norms, images and logits of both halves.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.models.discriminator import entry_levels, prediction_pairs
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.models.network import Params
from gigagan_jax.training.state import Networks

Metrics = dict[str, jax.Array]

INPUTS = ("image", "features", "clip_text")  # entries of a batch that can be of a floating-point type
MARK = "health/"  # in front of the measures, in the step's metrics and in the log
REAL_THUMBNAIL_SPREAD = "spread_low"  # a measure that the next half needs, and that is not logged
_THUMBNAIL = 8  # pixels: side of the averages that low-level features are compared on


def r1_measures(config: Config) -> tuple[str, ...]:
    """Names of what a step with R1 tells beside the others; NaN in a step without."""
    exits = collections.Counter(p.level for p in prediction_pairs(config.discriminator))
    # A level with one exit has no other that could pay for it.
    several = [config.resolutions[::-1][level] for level, count in exits.items() if count > 1]
    r2 = ("loss/r2",) if config.loss.r2 else ()
    v = ("loss/r1_v",) if config.loss.vision_aided and config.loss.vision_r1_gamma else ()
    return ("loss/r1", *r2, *v, "r1/last_exit", *(f"r1/cosine/{r}" for r in several))


def gap_measures(config: Config) -> tuple[str, ...]:
    """Names of `measure_gap` at D's last exit, one for each of `entry_levels`."""
    lower = (config.resolutions[::-1][i] for i in entry_levels(config.discriminator)[1:])
    return ("d_gap", *(f"d_gap/{r}" for r in lower))


# ---------------------------------------------------------------- in the two halves of the step


def shrink_to_thumbnails(images: jax.Array) -> jax.Array:
    """[N, R, R, 3] -> [N, 8, 8, 3], by area averaging"""
    # Area averages keep the low frequencies: noise between two images does not count as variety.
    n, r = images.shape[:2]
    return images.reshape(n, _THUMBNAIL, r // _THUMBNAIL, _THUMBNAIL, r // _THUMBNAIL, 3).mean((2, 4))


def deviation_over_batch(images: jax.Array) -> jax.Array:
    return jnp.std(images, axis=0).mean()


def measure_gap(real: Sequence[jax.Array], fake: Sequence[jax.Array], *, is_relativistic: bool = False) -> jax.Array:
    """How far a critic tells real from generated images; 0: not at all, 1: it is sure of all.

    Args:
      real, fake: logits [N, h * w] of each prediction, which all count alike
      is_relativistic: whether only the difference of the two logits has a meaning (R3GAN)
    """
    # sigmoid(a) - sigmoid(-a) of the difference a: the same range as that of two sigmoids.
    paired = lambda r, f: jnp.tanh((r - f) / 2).mean()
    alone = lambda r, f: jax.nn.sigmoid(r).mean() - jax.nn.sigmoid(f).mean()
    gaps = [(paired if is_relativistic else alone)(r, f) for r, f in zip(real, fake, strict=True)]
    return jnp.asarray(sum(gaps)) / len(gaps)


def measure_discriminator(
    config: Config, real: jax.Array, fake: jax.Array, real_logits: list[jax.Array], fake_logits: list[jax.Array]
) -> tuple[Metrics, jax.Array]:
    """Measures of D's half on one micro-batch.

    Args:
      real, fake: output images [N, R, R, 3]
      real_logits, fake_logits: [N, h * w] for each of `prediction_pairs`, with the image's own caption

    Returns:
      (measures, thumbnails [N, 8, 8, 3] of the generated images)
    """
    small_real, small_fake = shrink_to_thumbnails(real), shrink_to_thumbnails(fake)
    spread, low = deviation_over_batch(real), deviation_over_batch(small_real)
    # The last exit has a prediction for each level. That of the output image is what a D without scales would have.
    count = len(entry_levels(config.discriminator))
    r, f = real_logits[-count], fake_logits[-count]
    is_relativistic = config.loss.pairing == "relativistic"
    gaps = [
        measure_gap([r], [f], is_relativistic=is_relativistic)
        for r, f in zip(real_logits[-count:], fake_logits[-count:], strict=True)
    ]
    measures = {
        **{f"{MARK}{name}": gap for name, gap in zip(gap_measures(config), gaps, strict=True)},
        "health/d_right_real": (r > 0).mean(),
        "health/d_right_fake": (f < 0).mean(),
        "health/spread_real": spread,
        "health/diversity": deviation_over_batch(fake) / spread,
        "health/diversity_low": deviation_over_batch(small_fake) / low,
        REAL_THUMBNAIL_SPREAD: low,
    }
    for pair, r, f in zip(prediction_pairs(config.discriminator), real_logits, fake_logits, strict=True):
        if pair.level == 0:
            resolution = config.resolutions[::-1][pair.exit]
            measures[f"health/exit/{resolution}"] = jnp.std(jnp.stack([r.mean(-1), f.mean(-1)]))
    return measures, small_fake


def measure_generator(config: Config, images: list[jax.Array]) -> tuple[Metrics, jax.Array]:
    """Measures of G's half on one micro-batch.

    Args:
      images: the pyramid, low to high

    Returns:
      (measures, thumbnails [N, 8, 8, 3])
    """
    before = [None, *images[:-1]]
    added = [x if y is None else x - upsample(y) for x, y in zip(images, before, strict=True)]
    # What a level adds to the upsampled one below: near zero, the level does nothing.
    sizes = [jnp.sqrt(jnp.square(x).mean()) for x in added]
    measures = {f"health/level/{r}": s / sum(sizes) for r, s in zip(config.image_resolutions, sizes, strict=True)}
    return measures, shrink_to_thumbnails(images[-1])


def diversity_within_captions(first: jax.Array, second: jax.Array, spread: jax.Array) -> jax.Array:
    """Deviation between two images of one caption, as a share of that of the real images over all captions.

    Both halves of a step draw an image for each caption, from another z and with the same G: their difference is what z does.

    Args:
      first, second: thumbnails of the two halves
      spread: deviation of the real images' thumbnails over the batch
    """
    return jnp.sqrt(jnp.square(first - second).mean() / 2) / spread


def update_sizes(updates: Params, params: Params, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(change of the parameters relative to their norm, root mean square of the update at learning rate 1)"""
    # Over all leaves at once: one number a network, whatever its depth.
    total = lambda tree: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
    squares = total(updates)
    size = float(sum(x.size for x in jax.tree.leaves(params)))  # more than an int32 in a model of billions
    return rate * jnp.sqrt(squares / total(params)), jnp.sqrt(squares / size)


# ---------------------------------------------------------------- what is not finite


def squared_norms(grads: Params) -> list[jax.Array]:
    """Squared norm of each parameter's gradient, in the order of the leaves."""
    return [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)]


def count_bad_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """For each of INPUTS how many examples of the batch are not finite, and which is the first (-1: none)."""
    out: Metrics = {}
    for name in INPUTS:
        count, first = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
        if name in batch and jnp.issubdtype(batch[name].dtype, jnp.floating):
            x = batch[name]
            # By example: the log can name the image that brought it.
            bad = ~jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
            count = bad.sum()
            first = jnp.where(count > 0, jnp.argmax(bad), -1)
        out |= {f"bad/{name}": count, f"first/{name}": first}
    return out


def any_bad(rows: Metrics) -> jax.Array:
    """Is any of what `count_bad_rows` found not finite?"""
    return jnp.asarray(sum(rows[f"bad/{name}"] for name in INPUTS)) > 0


def keep_if_sound(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step is sound, else `old`, leaf by leaf."""
    # A select and no branch: both sides are computed anyway, and a branch would keep the old state alive.
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


# ---------------------------------------------------------------- the vector


def _part_name(path: str) -> str:
    """'levels/1/down/conv0/weight' -> 'levels/1/down'; elsewhere two parts say enough."""
    parts = path.split("/")
    return "/".join(parts[: 3 if parts[0] == "levels" else 2])


class HealthVector:
    """The vector that a step gives of its health, float32: what it holds, and how it is put together.

    Args:
      networks: of the run.

    Attributes:
      modules: names of the parts that gradients are watched by ("discriminator/levels/1/down"), by network.
      measures: names of the measures ("health/d_gap").
      names: of all entries, in order.
    """

    def __init__(self, networks: Networks):
        config = networks.config
        self.modules: dict[str, list[str]] = {}
        self._part_of: dict[str, list[int]] = {}  # of each leaf
        # Gradients are summed by module: names of single parameters would make the vector thousands long.
        for net, (module, _) in networks.trained().items():
            parts = [f"{module.name}/{_part_name(path)}" for path in module.specs_by_path()]
            self.modules[net] = list(dict.fromkeys(parts))
            self._part_of[net] = [self.modules[net].index(part) for part in parts]
        exits = [config.resolutions[::-1][p.exit] for p in prediction_pairs(config.discriminator) if p.level == 0]
        self.measures = tuple(
            f"{MARK}{name}"
            for name in (
                *gap_measures(config),
                *(("v_gap",) if "v" in self.modules else ()),
                *("d_right_real", "d_right_fake"),
                *("spread_real", "diversity", "diversity_low", "diversity_z"),
                *(f"level/{r}" for r in config.image_resolutions),
                *(f"exit/{r}" for r in exits),
                *(f"{what}/{net}" for net in self.modules for what in ("update", "direction")),
            )
        )
        self.names = (
            *("applied/d", "applied/g"),
            *(f"{what}/{name}" for name in INPUTS for what in ("bad", "first")),
            *r1_measures(config),
            *self.measures,
            *(name for modules in self.modules.values() for name in modules),
        )

    def pack(
        self,
        measures: Metrics,
        checks: Metrics,
        norms: dict[str, list[jax.Array]],
        sizes: dict[str, tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """The vector [len(names)].

        Args:
          measures: of both halves of the step; those that have no place in the vector are left out
          checks: the entries in front of the measures, by name
          norms, sizes: what `squared_norms` and `update_sizes` gave for each network
        """
        values = {k: measures[k] for k in self.measures if k in measures} | checks
        for net, each in norms.items():
            for part, value in zip(self._part_of[net], each, strict=True):
                name = self.modules[net][part]
                # Squared norms of a module's parameters add up to the module's.
                values[name] = values[name] + value if name in values else value
            values[f"{MARK}update/{net}"], values[f"{MARK}direction/{net}"] = sizes[net]
        # One vector is one transfer: the host fetches it while later steps run.
        return jnp.stack([jnp.asarray(values[name], jnp.float32) for name in self.names])

    def read(self, vector: Any) -> "StepStatistics":
        """The vector as it came to the host."""
        return StepStatistics(self, dict(zip(self.names, np.asarray(vector).tolist(), strict=True)))


class StepStatistics:
    """What one step said of its health.

    Attributes:
      values: every entry of the vector by its name.
    """

    def __init__(self, vector: HealthVector, values: dict[str, float]):
        self._vector, self.values = vector, values

    @property
    def applied(self) -> bool:
        """Did both halves change their networks?"""
        return bool(self.values["applied/d"] and self.values["applied/g"])

    def measures(self) -> dict[str, float]:
        """The measures under the names that they are logged by."""
        return {k: self.values[k] for k in self._vector.measures}

    @property
    def has_r1(self) -> bool:
        """Was R1 part of the step?"""
        return math.isfinite(self.values["loss/r1"])

    def gradient_norms(self) -> dict[str, float]:
        """{network: norm of its gradient}"""
        # The squares of modules add up in float64.
        modules = self._vector.modules
        return {net: math.sqrt(sum(self.values[name] for name in names)) for net, names in modules.items()}

    def bad_inputs(self) -> dict[str, tuple[int, int]]:
        """{entry of the batch: (how many examples are not finite, row of the first)}"""
        bad = {name: (int(self.values[f"bad/{name}"]), int(self.values[f"first/{name}"])) for name in INPUTS}
        return {name: found for name, found in bad.items() if found[0]}

    def bad_modules(self) -> dict[str, tuple[list[str], int]]:
        """{network: (its modules whose gradient is not finite, how many modules it has)}"""
        out = {}
        for names in self._vector.modules.values():
            bad = [name for name in names if not math.isfinite(self.values[name])]
            if bad:
                out[bad[0].partition("/")[0]] = (bad, len(names))
        return out
