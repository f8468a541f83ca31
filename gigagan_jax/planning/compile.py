"""Compiles the real train step for machines that are not here, and gathers what the compiler and the shapes say of it."""

import contextlib
import dataclasses
import importlib.metadata
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import sharding
from gigagan_jax.planning import collectives, dry_run, op_profile, roofline
from gigagan_jax.planning.hlo import Module
from gigagan_jax.planning.topology import Topology, devices
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

SLOWEST = 10
SEARCHES = -0.25  # the least effort with which the compiler searches for windows
# A program for a machine that is not here can be written to JAX's compilation cache, but not read back.
UNCACHED = {"jax_persistent_cache_min_compile_time_secs": 1e9}
_STILL = 30.0  # seconds between two signs of life
# All callers of an operation: the module that it is in may be far up.
_FRAMES = 60


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Says on stderr that something slow begins, every 30 s that it goes on, and how long it took."""
    start = time.monotonic()
    note = lambda text: print(f"{what}{text}", file=sys.stderr, flush=True)
    note(" ...")
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_STILL):
            note(f" ... {time.monotonic() - start:.0f} s")

    threading.Thread(target=watch, name="phase", daemon=True).start()
    try:
        yield
    finally:
        done.set()
    note(f": {time.monotonic() - start:.1f} s")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to plan.

    Attributes:
      with_r1: also compile the step with R1, one of `r1_interval`.
      effort: of the compiler to make the program fast, -1 (least) to 1; None leaves it at the compiler's own.
      memory_effort: of the compiler to make the program fit, likewise.
    """

    with_r1: bool = False
    effort: float | None = -1.0
    memory_effort: float | None = None

    @property
    def searched(self) -> bool:
        """Whether the compiler searches for windows (docs/planning.md)."""
        return self.effort is None or self.effort >= SEARCHES


def plan(config: Config, topology: Topology, settings: Settings) -> dict[str, Any]:
    """All that is known of a run without running it; sizes in bytes, times in seconds, of one chip where not said otherwise.

    Raises:
      UserError: the mesh does not fit the chips, the batch does not divide, no compiler for these chips.
    """
    if topology.tpu and topology.slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=topology.slices))
    if topology.tpu:
        where = devices(topology)
        mesh: Any = _mesh(config, topology, where)
    else:
        mesh = sharding.abstract_mesh(config.mesh, topology.chips)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh, config.rules)
    networks = Networks(config)
    about = {
        "config": config.name,
        "topology": topology.title,
        "chip": topology.kind,
        "chips": topology.chips,
        "slices": topology.slices,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "parameters": {"generator": networks.g.count(), "discriminator": networks.d.count()},
        "jax": jax.__version__,
        "bytes_of_chip": topology.usable,
    }
    kinds = dry_run.state_memory(networks, mesh) | {"batch": dry_run.batch_memory(config, mesh)}
    if not topology.tpu:
        return about | _without_compiler(networks, mesh, topology, kinds)
    about["libtpu"] = importlib.metadata.version("libtpu")
    about["effort"] = settings.effort
    steps = {"without_r1": compile_step(networks, mesh, topology, settings, kinds, with_r1=False)}
    if settings.with_r1:
        steps["with_r1"] = compile_step(networks, mesh, topology, settings, kinds, with_r1=True)
    return about | {"compiled": True, "steps": steps} | _together(config, topology, steps)


def _mesh(config: Config, topology: Topology, where: Any) -> Mesh:
    try:
        return sharding.make_mesh(config.mesh, where)
    except (AssertionError, ValueError, NotImplementedError) as e:
        why = (str(e).splitlines() or [""])[0][:80]
        raise UserError(
            f"--topology={topology.title}: JAX cannot lay config.mesh ({config.mesh}) on these chips: {type(e).__name__} {why}"
        ) from e


def compile_step(
    networks: Networks, mesh: Mesh, topology: Topology, settings: Settings, kinds: dict[str, int], *, with_r1: bool
) -> dict[str, Any]:
    """Compiles one variant of the step and says what it needs; `fits` False where the compiler found no room."""
    step = CompiledStep(TrainStep(networks), mesh)
    name = "the step with R1" if with_r1 else "the step"
    chips = topology.chips
    start = time.monotonic()
    with phase(f"tracing {name}"), _options(jax_traceback_in_locations_limit=_FRAMES):
        lowered = step.lower(with_r1=with_r1)
        flops = step.flops(with_r1=with_r1) / chips
    traced = time.monotonic()
    out: dict[str, Any] = {"flops": flops, "seconds_at_peak": flops / topology.chip.flops}
    try:
        efforts = _efforts("exec_time_optimization", settings.effort) | _efforts(
            "memory_fitting", settings.memory_effort
        )
        with phase(f"compiling {name} for {topology.title}"), _options(**efforts, **UNCACHED):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        message = " ".join(str(e).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise UserError(f"the compiler gave up on {name} for {topology.title}: {message[:300]}") from e
        return out | {"fits": False, "memory": kinds | {"total": _wanted(message, kinds)}, "why": message[:500]}
    done = time.monotonic()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    with phase("reading the program"):
        module = Module(compiled.as_text())
        found = _read(
            module, topology, [getattr(d, "slice_index", 0) for d in mesh.devices.flat], out, settings.searched
        )
    need = _memory(memory, kinds)
    optimal = cost.get("optimal_seconds", -1.0)
    return out | {
        "seconds_to_trace": traced - start,
        "seconds_to_compile": done - traced,
        "memory": need,
        "fits": need["total"] <= topology.usable,
        **found,
        # Negative where the compiler met an operation that it cannot judge.
        "seconds_optimal": optimal if optimal > 0 else None,
        "bytes_accessed": cost.get("bytes accessed"),
        "compiler_flops": cost.get("flops"),
    }


def _memory(memory: Any, kinds: dict[str, int]) -> dict[str, int]:
    """Bytes by kind: the arguments as their shardings have them, then what the compiler adds."""
    arguments = memory.argument_size_in_bytes
    out = kinds | {
        "padding": max(0, arguments - sum(kinds.values())),  # of the arguments, to whole tiles; the key, the counters
        "outputs": max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "temporary": memory.temp_size_in_bytes,  # activations, gradients, and what stands between operations
        "program": memory.generated_code_size_in_bytes,
    }
    return out | {"total": sum(out.values())}


def _wanted(message: str, kinds: dict[str, int]) -> int | None:
    """Bytes that the compiler would have needed, by its own words, of which there are two kinds.

    'Used 120.50G of 94.75G hbm', and 'required for HLO temporaries (32.00G)' beside what stays, `kinds`.
    """
    found = re.search(r"[Uu]sed ([\d.]+)([KMG]) of|temporaries \(([\d.]+)([KMG])\)", message)
    if not found:
        return None
    amount, unit = found[1] or found[3], found[2] or found[4]
    beside = sum(kinds.values()) if found[3] else 0
    return int(float(amount) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]) + beside


def _read(
    module: Module, topology: Topology, slices: list[int], known: dict[str, Any], searched: bool
) -> dict[str, Any]:
    """What the program says; `searched`: did the compiler look for the windows of matrix products? See roofline.py."""
    runs = list(module.runs())
    unknown = list(module.unknown_loops)
    clock, network = topology.chip.clock, topology.network
    by_cycles = [(r, (r.instruction.cycles or 0) * r.times / clock) for r in runs if r.instruction.cycles]
    timed = by_cycles
    if not searched:
        roof = lambda r: roofline.seconds(module, r, clock, topology.chip.flops, network.memory)
        timed = [(r, roof(r)) for r, _ in by_cycles]
    seconds = lambda some: sum(s for _, s in some)
    exchanges = collectives.summary(collectives.collectives(module, slices))
    at = {"inside a slice": network.links, "between slices": network.outside}
    for row in exchanges:
        speed = at[row["network"]]
        row["seconds"] = row["bytes_sent"] / speed if speed else None
        row["seconds_overlapped"] = row["bytes_overlapped"] / speed if speed else None
    compute = seconds(timed)
    talk = sum(row["seconds"] or 0.0 for row in exchanges)
    hidden = min(compute, sum(row["seconds_overlapped"] or 0.0 for row in exchanges))
    total = compute + talk - hidden
    return {
        "seconds": total,
        "seconds_of_operations": compute,
        "seconds_by_cycles": seconds(by_cycles),
        "seconds_of_matrix_units": seconds((r, s) for r, s in timed if r.instruction.matrix),
        "seconds_of_communication": talk,
        "seconds_hidden": hidden,
        "share_of_peak": known["seconds_at_peak"] / total if total else None,
        "collectives": exchanges,
        "modules": op_profile.by_module(module, timed),
        "parts": op_profile.by_part(timed),
        "loops_of_unknown_length": len(unknown),
    }


def _together(config: Config, topology: Topology, steps: dict[str, Any]) -> dict[str, Any]:
    """What a user asks first, of all steps in their proportion."""
    rare = config.loss.r1_interval
    plain, penalised = steps["without_r1"], steps.get("with_r1")
    fits = all(s["fits"] for s in steps.values())
    out: dict[str, Any] = {"fits": fits, "r1_interval": rare}
    if not all("seconds" in s for s in steps.values()):
        return out
    mean = lambda key: plain[key] if penalised is None else ((rare - 1) * plain[key] + penalised[key]) / rare
    seconds = mean("seconds")
    return out | {
        "seconds": seconds,
        "share_of_peak": mean("seconds_at_peak") / seconds,
        "images_per_second": config.batch_size / seconds,
        "images_per_second_per_chip": config.batch_size / seconds / topology.chips,
        "images_per_day": config.batch_size / seconds * 86400,
        "bytes_sent": sum(row["bytes_sent"] for row in plain["collectives"]),
        "seconds_to_compile": sum(s["seconds_to_compile"] for s in steps.values()),
    }


def _without_compiler(networks: Networks, mesh: AbstractMesh, topology: Topology, kinds: dict[str, int]) -> dict:
    """Of a GPU: shapes and FLOPs. The compiler for it needs the GPU itself."""
    config = networks.config
    with phase("tracing the step"):
        step = CompiledStep(TrainStep(networks), mesh)
        flops = step.flops(with_r1=False) / topology.chips
        need = dry_run.memory(networks, mesh)
    memory = kinds | {k: need[k] for k in ("gradients", "activations")}
    memory["total"] = sum(memory.values())
    at_peak = flops / topology.chip.flops
    return {
        "compiled": False,
        "steps": {"without_r1": {"flops": flops, "seconds_at_peak": at_peak, "memory": memory}},
        "fits": memory["total"] <= topology.usable,
        "r1_interval": config.loss.r1_interval,
    }


def _efforts(kind: str, effort: float | None) -> dict[str, Any]:
    """The setting of JAX for an effort from -1 to 1: a number in jax 0.10, one of a few levels from 0.11 on."""
    number, level = f"jax_{kind}_effort", f"jax_{kind.removeprefix('exec_time_')}_level"
    if hasattr(jax.config, number):
        return {number: effort}
    if effort is None or not hasattr(jax.config, level):
        return {}
    # O0 and O1 do not search for windows, O2 and O3 do: as `Settings.searched` takes it.
    return {level: "O0" if effort <= -0.5 else "O1" if effort < SEARCHES else "O2" if effort <= 0 else "O3"}


@contextlib.contextmanager
def _options(**values: Any) -> Iterator[None]:
    """Within it, JAX's settings have these values; None leaves one as it is."""
    before = {name: jax.config.values[name] for name, value in values.items() if value is not None}
    for name in before:
        jax.config.update(name, values[name])
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
