"""What the train step tells of a GAN's health, as one small vector: what is not finite, how varied the images are, what each
level adds to them, how large the updates are. `health.py` judges it, on the host.

All is measured on what the step has at hand: sums over gradients that their norm needs anyway, images and logits of both halves.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.config import Config, entry_levels
from gigagan_jax.models.discriminator import pairs
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.models.network import Params, is_spec, path_name
from gigagan_jax.training.state import Networks

Metrics = dict[str, jax.Array]

INPUTS = ("image", "features", "clip_text")  # entries of a batch that can be of a floating-point type
MARK = "health/"  # in front of the measures, in the step's metrics and in the log
_THUMBNAIL = 8  # pixels: side of the averages that low-level features are compared on


# ---------------------------------------------------------------- in the two halves of the step


def _thumbnails(images: jax.Array) -> jax.Array:
    """[N, R, R, 3] -> [N, 8, 8, 3], by area averaging"""
    n, r = images.shape[:2]
    return images.reshape(n, _THUMBNAIL, r // _THUMBNAIL, _THUMBNAIL, r // _THUMBNAIL, 3).mean((2, 4))


def _spread(images: jax.Array) -> jax.Array:
    return jnp.std(images, axis=0).mean()


def of_discriminator(
    config: Config, real: jax.Array, fake: jax.Array, real_logits: list[jax.Array], fake_logits: list[jax.Array]
) -> Metrics:
    """Measures of D's half on one micro-batch.

    Args:
      real, fake: output images [N, R, R, 3]
      real_logits, fake_logits: [N, h * w] for each of `pairs(config)`, with the image's own caption
    """
    small_real, small_fake = _thumbnails(real), _thumbnails(fake)
    spread, low = _spread(real), _spread(small_real)
    r, f = real_logits[-len(entry_levels(config))], fake_logits[-len(entry_levels(config))]
    out = {
        "health/d_gap": jax.nn.sigmoid(r).mean() - jax.nn.sigmoid(f).mean(),
        "health/d_right_real": (r > 0).mean(),
        "health/d_right_fake": (f < 0).mean(),
        "health/spread_real": spread,
        "health/diversity": _spread(fake) / spread,
        "health/diversity_low": _spread(small_fake) / low,
        "spread_low": low,
        "thumbnails": small_fake,
    }
    for pair, r, f in zip(pairs(config), real_logits, fake_logits, strict=True):
        if pair.level == 0:
            resolution = config.resolutions[::-1][pair.exit]
            out[f"health/exit/{resolution}"] = jnp.std(jnp.stack([r.mean(-1), f.mean(-1)]))
    return out


def of_generator(config: Config, images: list[jax.Array]) -> Metrics:
    """Measures of G's half on one micro-batch.

    Args:
      images: the pyramid, low to high
    """
    before = [None, *images[:-1]]
    added = [x if y is None else x - upsample(y) for x, y in zip(images, before, strict=True)]
    sizes = [jnp.sqrt(jnp.square(x).mean()) for x in added]
    out = {f"health/level/{r}": s / sum(sizes) for r, s in zip(config.resolutions, sizes, strict=True)}
    return out | {"thumbnails": _thumbnails(images[-1])}


def within_captions(metrics: Metrics, g_metrics: Metrics) -> jax.Array:
    """Deviation between two images of one caption, as a share of that of the real images over all captions.

    Both halves draw an image for each caption, from another z and with the same G: their difference is what z does. Takes
    what only this needs out of the metrics.
    """
    difference = metrics.pop("thumbnails") - g_metrics.pop("thumbnails")
    return jnp.sqrt(jnp.square(difference).mean() / 2) / metrics.pop("spread_low")


def update_sizes(updates: Params, params: Params, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(change of the parameters relative to their norm, root mean square of the update at learning rate 1)"""
    total = lambda tree: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
    squares = total(updates)
    size = float(sum(x.size for x in jax.tree.leaves(params)))  # more than an int32 in a model of billions
    return rate * jnp.sqrt(squares / total(params)), jnp.sqrt(squares / size)


# ---------------------------------------------------------------- what is not finite


def squares(grads: Params) -> list[jax.Array]:
    """Squared norm of each parameter's gradient, in the order of the leaves."""
    return [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)]


def bad_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """For each of INPUTS how many examples of the batch are not finite, and which is the first (-1: none)."""
    out: Metrics = {}
    for name in INPUTS:
        count, first = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
        if name in batch and jnp.issubdtype(batch[name].dtype, jnp.floating):
            x = batch[name]
            bad = ~jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
            count = bad.sum()
            first = jnp.where(count > 0, jnp.argmax(bad), -1)
        out |= {f"bad/{name}": count, f"first/{name}": first}
    return out


def any_bad(rows: Metrics) -> jax.Array:
    """Is any of what `bad_rows` found not finite?"""
    return jnp.asarray(sum(rows[f"bad/{name}"] for name in INPUTS)) > 0


def guarded(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step is sound, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


# ---------------------------------------------------------------- the vector


class Probe:
    """The vector that a step gives of its health, float32: what it holds, and how it is put together.

    Args:
      networks: of the run.

    Attributes:
      modules: names of the parts that gradients are watched by ("discriminator/stages/1"), by network.
      measures: names of the measures ("health/d_gap").
      names: of all entries, in order.
    """

    def __init__(self, networks: Networks):
        config = networks.config
        self.modules: dict[str, list[str]] = {}
        self._part_of: dict[str, list[int]] = {}  # of each leaf
        for net, (module, _) in networks.trained().items():
            leaves = jax.tree_util.tree_leaves_with_path(module.specs, is_leaf=is_spec)
            parts = ["/".join([module.name, *path_name(path).split("/")[:2]]) for path, _ in leaves]
            self.modules[net] = list(dict.fromkeys(parts))
            self._part_of[net] = [self.modules[net].index(part) for part in parts]
        exits = [config.resolutions[::-1][p.exit] for p in pairs(config) if p.level == 0]
        self.measures = tuple(
            f"{MARK}{name}"
            for name in (
                *("d_gap", "d_right_real", "d_right_fake"),
                *("spread_real", "diversity", "diversity_low", "diversity_z"),
                *(f"level/{r}" for r in config.resolutions),
                *(f"exit/{r}" for r in exits),
                *(f"{what}/{net}" for net in self.modules for what in ("update", "direction")),
            )
        )
        self.names = (
            *("applied/d", "applied/g"),
            *(f"{what}/{name}" for name in INPUTS for what in ("bad", "first")),
            "loss/r1",
            *self.measures,
            *(name for modules in self.modules.values() for name in modules),
        )

    def pack(
        self,
        metrics: Metrics,
        seen: Metrics,
        squares: dict[str, list[jax.Array]],
        sizes: dict[str, tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """The vector [len(names)]; the measures are taken out of the metrics.

        Args:
          metrics: of the step
          seen: further entries, by name
          squares, sizes: what `squares` and `update_sizes` gave for each network
        """
        values = {k: metrics.pop(k) for k in self.measures if k in metrics} | seen
        for net, each in squares.items():
            for part, value in zip(self._part_of[net], each, strict=True):
                name = self.modules[net][part]
                values[name] = values[name] + value if name in values else value
            values[f"{MARK}update/{net}"], values[f"{MARK}direction/{net}"] = sizes[net]
        return jnp.stack([jnp.asarray(values[name], jnp.float32) for name in self.names])

    def read(self, vector: Any) -> "Reading":
        """The vector as it came to the host."""
        return Reading(self, dict(zip(self.names, np.asarray(vector).tolist(), strict=True)))


class Reading:
    """What one step said of its health.

    Attributes:
      values: every entry of the vector by its name.
    """

    def __init__(self, probe: Probe, values: dict[str, float]):
        self._probe, self.values = probe, values

    @property
    def applied(self) -> bool:
        """Did both halves change their networks?"""
        return bool(self.values["applied/d"] and self.values["applied/g"])

    def measures(self) -> dict[str, float]:
        """The measures under the names that they are logged by."""
        return {k: self.values[k] for k in self._probe.measures}

    def bad_inputs(self) -> dict[str, tuple[int, int]]:
        """{entry of the batch: (how many examples are not finite, row of the first)}"""
        bad = {name: (int(self.values[f"bad/{name}"]), int(self.values[f"first/{name}"])) for name in INPUTS}
        return {name: found for name, found in bad.items() if found[0]}

    def bad_modules(self) -> dict[str, tuple[list[str], int]]:
        """{network: (its modules whose gradient is not finite, how many modules it has)}"""
        out = {}
        for names in self._probe.modules.values():
            bad = [name for name in names if not math.isfinite(self.values[name])]
            if bad:
                out[bad[0].partition("/")[0]] = (bad, len(names))
        return out
