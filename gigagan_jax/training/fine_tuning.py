"""A new run that starts from weights: what fits is taken by name and shape, the rest starts as in any run."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_percent
from gigagan_jax.interop.initial_weights import InitialWeights, open_initial_weights, path_in
from gigagan_jax.interop.weights import W_AVG
from gigagan_jax.models.network import path_name
from gigagan_jax.telemetry.history import record_event
from gigagan_jax.training.state import GanState, Net, Networks

_log = logging.getLogger(__name__)

# What --init_parts takes. V, the vision-aided heads, belongs to "d".
PARTS = ("g", "d", "averages", "optimizer")
DEFAULT_PARTS = ("g", "d", "averages")
# So many arrays of other shapes are named in a report.
_SHOWN = 3
_ABSENT = "not there"


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """What --init_from and --init_parts say.

    Attributes:
      path: as `open_initial_weights` takes it.
      parts: of PARTS.
    """

    path: str
    parts: tuple[str, ...] = DEFAULT_PARTS

    @classmethod
    def parse(cls, path: str, parts: str) -> InitFrom:
        """Of the texts of the flags. Raises UserError for an unknown part."""
        # "ema" is what users of other projects write.
        names = tuple(dict.fromkeys("averages" if p.strip() == "ema" else p.strip() for p in parts.split(",")))
        if unknown := [name for name in names if name not in PARTS]:
            raise UserError(f"--init_parts={parts}: unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
        return cls(path, names)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What was taken of one network, or of its average.

    Attributes:
      title: "G", "D", "V", "the average of G".
      arrays, parameters: numbers taken.
      all_arrays, all_parameters: numbers that the network has.
      missing: (path, why not) of the others.
      why: why nothing was taken, where it is one reason.
    """

    title: str
    arrays: int
    parameters: int
    all_arrays: int
    all_parameters: int
    missing: tuple[tuple[str, str], ...]
    why: str = ""

    def __str__(self) -> str:
        if not self.arrays:
            return f"{self.title}: starts anew ({self.why or self._reasons()})"
        # Of the parameters: a thousand biases weigh nothing.
        share = format_percent(self.parameters / self.all_parameters)
        line = f"{self.title}: {self.arrays} of {self.all_arrays} arrays ({share} of the parameters) taken"
        return f"{line}; not taken: {self._reasons()}" if self.missing else line

    def _reasons(self) -> str:
        """Why arrays were not taken: those that are not there by their number, other shapes one by one."""
        absent = [path for path, why in self.missing if why == _ABSENT]
        others = [f"{path} ({why})" for path, why in self.missing if why != _ABSENT]
        parts = others[:_SHOWN] + [f"{len(others) - _SHOWN} more of other shapes"] * (len(others) > _SHOWN)
        if absent:
            # All that a level lacks has its place in the name.
            names = ", ".join(absent[:2]) + (", ..." if len(absent) > 2 else "")
            parts.append(f"{len(absent)} that {'is' if len(absent) == 1 else 'are'} not there ({names})")
        return "; ".join(parts)


def start_from(
    init: InitFrom, config: Config, networks: Networks, mesh: Any, workdir: Path, identities: Mapping[str, str]
) -> GanState:
    """The state that a run starts with; its counters are those of any new run.

    Args:
      init: from what.
      config: of the run.
      networks: of the run.
      mesh: of the run.
      workdir: folder of the run on this machine, whose history gets what was taken.
      identities: {role: SHA-256} of the frozen networks of the run.

    Raises:
      UserError: there are no such weights, or nothing of them fits.
    """
    weights = open_initial_weights(init.path, config)
    try:
        state, taken, notes = _take(weights, init, config, networks, mesh)
    finally:
        weights.arrays.close()
    for line in (*map(str, taken), *notes, *_advice(weights, config, taken, identities)):
        _log.info("init from %s: %s", weights.place, line)
    # A misread --init_from must not cost a whole training.
    if not any(t.arrays for t in taken):
        raise UserError(
            f"--init_from={init.path}: nothing of it fits this config ({taken[0]}): is it a model of another kind or size?"
        )
    if jax.process_index() == 0:
        # What was not taken is in the log: it may be thousands of names.
        facts = {t.title: {"arrays": t.arrays, "of": t.all_arrays, "parameters": t.parameters} for t in taken}
        record_event(workdir, "init", step=0, images=0, source=weights.place, parts=list(init.parts), taken=facts)
    return state


def _take(
    weights: InitialWeights, init: InitFrom, config: Config, networks: Networks, mesh: Any
) -> tuple[GanState, list[Taken], list[str]]:
    # Whole, and then replaced in part: what does not fit starts as in any run.
    where, abstract, state = networks.shardings(mesh), networks.abstract(), networks.init(mesh)
    reader = _Reader(weights, config)
    new: dict[str, Any] = {}
    taken: list[Taken] = []
    notes: list[str] = []
    for name in networks.trained():
        # V judges images as D does: it goes with it.
        part = "g" if name == "g" else "d"
        if part not in init.parts:
            continue
        net = getattr(state, name)
        # Published weights have the average alone.
        source = "params" if weights.arrays.shapes(name, "params") else "average"
        params, found = reader.take(name.upper(), name, source, net.params, getattr(where, name).params)
        opt = net.opt
        if "optimizer" in init.parts:
            opt, note = _take_moments(reader, name, found, opt, getattr(where, name).opt)
            notes.append(note)
        new[name], taken = Net(params, opt), [*taken, found]
    if "g" in init.parts or "averages" in init.parts:
        # Whatever was taken of G: an average that begins elsewhere would show nothing of it for long.
        source = "average" if "averages" in init.parts or not weights.arrays.shapes("g", "params") else "params"
        g_ema, found = reader.take("the average of G", "g", source, state.g_ema, where.g_ema)
        new["g_ema"], taken = g_ema, [*taken, found]
    if "averages" in init.parts:
        wanted = jax.ShapeDtypeStruct(abstract.w_avg.shape, abstract.w_avg.dtype, sharding=where.w_avg)
        # Without it truncation by all prompts would pull towards zero until it has learnt.
        w_avg = weights.arrays.read_top(W_AVG, wanted)
        if w_avg is not None:
            new[W_AVG] = w_avg
        notes.append(f"the mean of w: {'starts anew' if w_avg is None else 'taken'}")
    return dataclasses.replace(state, **new), taken, notes


def _take_moments(reader: _Reader, name: str, params: Taken, opt: Any, where: Any) -> tuple[Any, str]:
    """(optimizer state, what to say of it)"""
    adam, *rest = opt
    title = f"the moments of {params.title}"
    # Without beta1 there is no first moment.
    fields = [field for field in ("mu", "nu") if hasattr(adam, field)]
    if params.missing:
        # One count corrects the bias of all: an array whose moments begin at zero would take steps many times too large.
        return opt, f"{title}: start anew, since {len(params.missing)} of its arrays do"
    if absent := [field for field in fields if not reader.weights.arrays.shapes(name, field)]:
        return opt, f"{title}: start anew, since {reader.weights.place} has no {absent[0]}"
    found = {f: reader.take(title, name, f, getattr(adam, f), getattr(where[0], f))[0] for f in fields}
    count = jax.ShapeDtypeStruct(adam.count.shape, adam.count.dtype, sharding=where[0].count)
    steps = reader.weights.arrays.read_top(f"{name}/count", count)
    return (adam._replace(count=steps, **found), *rest), f"{title}: taken"


class _Reader:
    """Takes the arrays of one network after the other."""

    def __init__(self, weights: InitialWeights, config: Config):
        self.weights, self._config = weights, config

    def take(self, title: str, name: str, part: str, tree: Any, shardings: Any) -> tuple[Any, Taken]:
        """A tree with what fits in it; what is replaced is freed first.

        Args:
          title: for the report.
          name, part: of the arrays that are read.
          tree: of the new run.
          shardings: of the tree.
        """
        shapes = self.weights.arrays.shapes(name, part)
        leaves = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        places = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(shardings)}
        sources, missing = self._match(name, leaves, shapes)
        # Into the shards of the new run, whatever mesh the weights are from.
        wanted = {
            source: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype, sharding=places[path])
            for path, source in sources.items()
        }
        # Before they are freed.
        sizes = {path: math.prod(x.shape) for path, x in leaves.items()}
        for path in sources:
            # Devices may not hold both.
            leaves[path].delete()
        read = self.weights.arrays.read(name, part, wanted) if wanted else {}
        replace = lambda path, x: read[sources[path_name(path)]] if path_name(path) in sources else x
        found = Taken(
            title,
            len(sources),
            sum(sizes[path] for path in sources),
            len(leaves),
            sum(sizes.values()),
            tuple(missing),
            "" if len(shapes) else f"{self.weights.place} has none",
        )
        return jax.tree_util.tree_map_with_path(replace, tree), found

    def _match(
        self, name: str, leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, str], list[tuple[str, str]]]:
        """({path: path there} of what fits, (path, why not) of the rest)"""
        sources: dict[str, str] = {}
        missing: list[tuple[str, str]] = []
        for path, x in leaves.items():
            # By its resolution: another output size shifts the numbers of D's levels.
            source = path_in(self.weights.config, self._config, name, path)
            there = None if source is None else shapes.get(source)
            if there is None:
                missing.append((path, _ABSENT))
            elif tuple(there) != tuple(x.shape):
                missing.append((path, f"{list(there)} there, {list(x.shape)} here"))
            else:
                assert source is not None
                sources[path] = source
        return sources, missing


def _advice(weights: InitialWeights, config: Config, taken: list[Taken], identities: Mapping[str, str]) -> list[str]:
    """What a user of these weights should know of this config."""
    lines = []
    if {"text"} <= weights.frozen.keys() & identities.keys() and weights.frozen["text"] != identities["text"]:
        lines.append("they were trained with another frozen text encoder, and must learn to read this one first")
    by_title = {t.title: t for t in taken}
    g = by_title.get("G")
    if g is not None and 0 < g.parameters < 0.5 * g.all_parameters:
        lines.append("less than half of G was taken: is it the config that the weights were made with?")
    # The first gradients of a D that knows nothing would spoil what G can do.
    d = by_title.get("D")
    if (d is None or not d.arrays) and not config.g_optimizer.warmup_kimg:
        lines.append(
            "D knows nothing yet: --config.g_optimizer.warmup_kimg=N lets it learn before G moves far from these weights"
        )
    # With a ramp-up it follows G at once: at the start G is what was loaded.
    if not config.ema.rampup and config.ema.half_life_kimg > config.total_kimg / 4:
        lines.append(
            f"the average of G forgets these weights with a half-life of {config.ema.half_life_kimg:g} of the run's "
            f"{config.total_kimg:g} kimg: --config.ema.rampup=0.05 lets it follow G from the start"
        )
    return lines
