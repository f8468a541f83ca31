"""Compiles the train step for absent accelerators, and collects memory, FLOPs, traffic and time into one plan."""

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
from gigagan_jax.planning.hlo import HloModule
from gigagan_jax.planning.topology import Topology, topology_devices
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

# Rows of modules in the text report.
SLOWEST_SHOWN = 10
# From this effort on the compiler searches for the windows of matrix products (docs/planning.md, "Effort").
MIN_SEARCH_EFFORT = -0.25
# JAX writes a program for an absent device to its compilation cache, but cannot read it back.
NO_CACHE_OPTIONS = {"jax_persistent_cache_min_compile_time_secs": 1e9}
# Seconds between two lines of progress on stderr.
_PROGRESS_SECONDS = 30.0
# Frames of an operation. The module that it belongs to may be many callers up, and JAX keeps few by default.
_TRACEBACK_LIMIT = 60


@contextlib.contextmanager
def log_phase(name: str) -> Iterator[None]:
    """Reports on stderr the start of a slow phase, its elapsed time every 30 s, and its total time."""
    start = time.monotonic()
    note = lambda text: print(f"{name}{text}", file=sys.stderr, flush=True)
    note(" ...")
    done = threading.Event()

    def report_progress() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            note(f" ... {time.monotonic() - start:.0f} s")

    # A thread, because the compiler holds the main one for minutes; daemon, so that Ctrl-C ends the process.
    threading.Thread(target=report_progress, name="phase", daemon=True).start()
    try:
        yield
    finally:
        done.set()
    note(f": {time.monotonic() - start:.1f} s")


@dataclasses.dataclass(frozen=True)
class CompileSettings:
    """Options of the compiler and of the plan.

    Attributes:
      with_r1: whether the step with R1 (one of `r1_interval`) is compiled too; where each step has it, it always is.
      effort: compiler effort for a fast program, -1 (least) to 1; None keeps the compiler's default.
      memory_effort: compiler effort for a small program, with the same range.
    """

    with_r1: bool = False
    effort: float | None = -1.0
    memory_effort: float | None = None

    @property
    def searches_windows(self) -> bool:
        """Whether the compiler searches for the windows of matrix products (docs/planning.md)."""
        return self.effort is None or self.effort >= MIN_SEARCH_EFFORT


def plan_run(config: Config, topology: Topology, settings: CompileSettings) -> dict[str, Any]:
    """The plan of a run: sizes in bytes and times in seconds, of one chip unless a key names more.

    Raises:
      UserError: the mesh does not fit the chips, the batch does not divide, or no compiler is installed.
    """
    # --slices is a property of the machine, so it overrides the mesh of the config.
    if topology.is_tpu and topology.slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=topology.slices))
    if topology.is_tpu:
        where = topology_devices(topology)
        mesh: Any = _make_mesh(config, topology, where)
    else:
        mesh = sharding.abstract_mesh(config.mesh, topology.chips)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh, config.rules)
    networks = Networks(config)
    # The keys of the plan are read by docs/plans.jsonl, the reports and users' scripts.
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
        "bytes_of_chip": topology.usable_bytes,
    }
    kinds = dry_run.state_memory(networks, mesh) | {"batch": dry_run.batch_memory(config, mesh)}
    if not topology.is_tpu:
        return about | _without_compiler(networks, mesh, topology, kinds)
    about["libtpu"] = importlib.metadata.version("libtpu")
    about["effort"] = settings.effort
    steps = {}
    # A run with R1 in each step has no step without.
    if config.loss.r1_interval > 1:
        steps["without_r1"] = compile_step(networks, mesh, topology, settings, kinds, with_r1=False)
    if settings.with_r1 or config.loss.r1_interval == 1:
        steps["with_r1"] = compile_step(networks, mesh, topology, settings, kinds, with_r1=True)
    return about | {"compiled": True, "steps": steps} | _combine_steps(config, topology, steps)


def _make_mesh(config: Config, topology: Topology, where: Any) -> Mesh:
    # JAX refuses a layout with any of these exceptions; only the first line of a long message helps a user.
    try:
        return sharding.make_mesh(config.mesh, where)
    except (AssertionError, ValueError, NotImplementedError) as e:
        why = (str(e).splitlines() or [""])[0][:80]
        raise UserError(
            f"--topology={topology.title}: JAX cannot lay config.mesh ({config.mesh}) on these chips: "
            f"{type(e).__name__} {why}"
        ) from e


def compile_step(
    networks: Networks,
    mesh: Mesh,
    topology: Topology,
    settings: CompileSettings,
    kinds: dict[str, int],
    *,
    with_r1: bool,
) -> dict[str, Any]:
    """Compiles one variant of the step and reports its needs; `fits` is False where the compiler runs out of memory."""
    step = CompiledStep(TrainStep(networks), mesh)
    name = "the step with R1" if with_r1 else "the step"
    chips = topology.chips
    start = time.monotonic()
    with log_phase(f"tracing {name}"), _jax_options(jax_traceback_in_locations_limit=_TRACEBACK_LIMIT):
        lowered = step.lower(with_r1=with_r1)
        # The trace counts the whole step; every figure of a plan is of one chip.
        flops = step.flops(with_r1=with_r1) / chips
    traced = time.monotonic() - start
    return {"seconds_to_trace": traced} | compile_lowered(name, lowered, flops, mesh, topology, settings, kinds)


def compile_lowered(
    name: str,
    lowered: Any,
    flops: float,
    mesh: Mesh,
    topology: Topology,
    settings: CompileSettings,
    kinds: dict[str, int],
) -> dict[str, Any]:
    """Compiles a program and reports its needs.

    Args:
      name: of the program, in messages.
      lowered: of `jax.jit(...).lower(...)`.
      flops: of one chip.
      mesh: what it was lowered for.
      topology: the chips.
      settings: of the compiler.
      kinds: bytes of the arguments of one chip, by kind.
    """
    start = time.monotonic()
    known: dict[str, Any] = {"flops": flops, "seconds_at_peak": flops / topology.chip.flops}
    try:
        efforts = _effort_option("exec_time_optimization", settings.effort) | _effort_option(
            "memory_fitting", settings.memory_effort
        )
        with log_phase(f"compiling {name} for {topology.title}"), _jax_options(**efforts, **NO_CACHE_OPTIONS):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        message = " ".join(str(e).split())
        # A program without room is an answer of the plan; any other failure of the compiler is an error.
        if "RESOURCE_EXHAUSTED" not in message:
            raise UserError(f"the compiler gave up on {name} for {topology.title}: {message[:300]}") from e
        return known | {
            "fits": False,
            "memory": kinds | {"total": _required_bytes(message, kinds)},
            "why": message[:500],
        }
    done = time.monotonic()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    # Device i of the program is device i of the flattened mesh, hence the list of slices in this order.
    with log_phase("reading the program"):
        module = HloModule(compiled.as_text())
        found = _analyze_program(
            module,
            topology,
            [getattr(d, "slice_index", 0) for d in mesh.devices.flat],
            known,
            settings.searches_windows,
        )
    need = _memory_by_kind(memory, kinds)
    optimal = cost.get("optimal_seconds", -1.0)
    return known | {
        "seconds_to_compile": done - start,
        "memory": need,
        "fits": need["total"] <= topology.usable_bytes,
        **found,
        # The value is negative where the compiler has no estimate for an operation.
        "seconds_optimal": optimal if optimal > 0 else None,
        "bytes_accessed": cost.get("bytes accessed"),
        "compiler_flops": cost.get("flops"),
    }


def _memory_by_kind(memory: Any, kinds: dict[str, int]) -> dict[str, int]:
    """Bytes by kind: the arguments by their shardings, then the additions of the compiler."""
    arguments = memory.argument_size_in_bytes
    memory_by_kind = kinds | {
        # Arguments are padded to whole tiles. The random key and the counters of the step are counted here too.
        "padding": max(0, arguments - sum(kinds.values())),
        # The step donates its state: outputs that alias an argument take no memory of their own.
        "outputs": max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        # Activations, gradients and values between operations; the compiler does not tell them apart.
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return memory_by_kind | {"total": sum(memory_by_kind.values())}


def _required_bytes(message: str, kinds: dict[str, int]) -> int | None:
    """Bytes that the compiler needs, parsed from its error message; None for an unknown message.

    Messages have two forms: 'Used 120.50G of 94.75G hbm' is the total. 'required for HLO temporaries (32.00G)'
    excludes the arguments, `kinds`.
    """
    found = re.search(r"[Uu]sed ([\d.]+)([KMG]) of|temporaries \(([\d.]+)([KMG])\)", message)
    if not found:
        return None
    amount, unit = found[1] or found[3], found[2] or found[4]
    beside = sum(kinds.values()) if found[3] else 0
    return int(float(amount) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]) + beside


def _analyze_program(
    module: HloModule, topology: Topology, slices: list[int], known: dict[str, Any], searched: bool
) -> dict[str, Any]:
    """Time, traffic and time by module; `searched`: whether the compiler searched for windows, see roofline.py."""
    runs = list(module.executed_instructions())
    # The walk above fills this list.
    unknown = list(module.unknown_loops)
    clock, bandwidths = topology.chip.clock, topology.bandwidths
    # Instructions without an estimate are free in the compiler's model: tuples, bitcasts, constants.
    by_cycles = [
        (r, (r.instruction.estimated_cycles or 0) * r.times / clock) for r in runs if r.instruction.estimated_cycles
    ]
    timed = by_cycles
    # Without the search, cycles of matrix products are up to twelve times too many (docs/planning.md, "Effort").
    if not searched:
        roof = lambda r: roofline.expected_seconds(module, r, clock, topology.chip.flops, bandwidths.memory)
        timed = [(r, roof(r)) for r, _ in by_cycles]
    seconds = lambda some: sum(s for _, s in some)
    exchanges = collectives.summarize_collectives(collectives.find_collectives(module, slices))
    at = {"inside a slice": bandwidths.links, "between slices": bandwidths.outside}
    for row in exchanges:
        speed = at[row["network"]]
        row["seconds"] = row["bytes_sent"] / speed if speed else None
        row["seconds_overlapped"] = row["bytes_overlapped"] / speed if speed else None
    compute = seconds(timed)
    communication = sum(row["seconds"] or 0.0 for row in exchanges)
    # Overlapped exchanges hide behind operations, but not for longer than these last.
    hidden = min(compute, sum(row["seconds_overlapped"] or 0.0 for row in exchanges))
    total = compute + communication - hidden
    return {
        "seconds": total,
        "seconds_of_operations": compute,
        "seconds_by_cycles": seconds(by_cycles),
        "seconds_of_matrix_units": seconds((r, s) for r, s in timed if r.instruction.uses_matrix_units),
        "seconds_of_communication": communication,
        "seconds_hidden": hidden,
        "share_of_peak": known["seconds_at_peak"] / total if total else None,
        "collectives": exchanges,
        "modules": op_profile.seconds_by_module(module, timed),
        "parts": op_profile.seconds_by_loss(timed),
        "loops_of_unknown_length": len(unknown),
    }


def _combine_steps(config: Config, topology: Topology, steps: dict[str, Any]) -> dict[str, Any]:
    """The headline figures: means over steps with and without R1, weighted by their frequency."""
    interval = config.loss.r1_interval
    penalised = steps.get("with_r1")
    plain = steps["without_r1"] if "without_r1" in steps else steps["with_r1"]
    fits = all(s["fits"] for s in steps.values())
    headline: dict[str, Any] = {"fits": fits, "r1_interval": interval}
    if not all("seconds" in s for s in steps.values()):
        return headline
    # One step of `interval` has the penalty; without --with-r1 its cost is left out, and the report says so.
    mean = lambda key: plain[key] if penalised is None else ((interval - 1) * plain[key] + penalised[key]) / interval
    seconds = mean("seconds")
    return headline | {
        "seconds": seconds,
        "share_of_peak": mean("seconds_at_peak") / seconds,
        "images_per_second": config.batch_size / seconds,
        "images_per_second_per_chip": config.batch_size / seconds / topology.chips,
        "images_per_day": config.batch_size / seconds * 86400,
        "bytes_sent": sum(row["bytes_sent"] for row in plain["collectives"]),
        "seconds_to_compile": sum(s["seconds_to_compile"] for s in steps.values()),
    }


def _without_compiler(networks: Networks, mesh: AbstractMesh, topology: Topology, kinds: dict[str, int]) -> dict:
    """The plan for a GPU, from shapes and the trace: XLA compiles for a GPU only where there is one."""
    config = networks.config
    with log_phase("tracing the step"):
        step = CompiledStep(TrainStep(networks), mesh)
        flops = step.flops(with_r1=False) / topology.chips
        need = dry_run.memory_per_device(networks, mesh)
    memory = kinds | {k: need[k] for k in ("gradients", "activations")}
    # A lower bound: the temporaries of the compiler are unknown.
    memory["total"] = sum(memory.values())
    at_peak = flops / topology.chip.flops
    return {
        "compiled": False,
        "steps": {"without_r1": {"flops": flops, "seconds_at_peak": at_peak, "memory": memory}},
        "fits": memory["total"] <= topology.usable_bytes,
        "r1_interval": config.loss.r1_interval,
    }


def _effort_option(kind: str, effort: float | None) -> dict[str, Any]:
    """{JAX option: value} for an effort from -1 to 1: a number in jax 0.10, one of four levels from 0.11 on."""
    number, level = f"jax_{kind}_effort", f"jax_{kind.removeprefix('exec_time_')}_level"
    if hasattr(jax.config, number):
        return {number: effort}
    if effort is None or not hasattr(jax.config, level):
        return {}
    # O2 and O3 search for windows, O0 and O1 do not: the same boundary as `CompileSettings.searches_windows`.
    return {level: "O0" if effort <= -0.5 else "O1" if effort < MIN_SEARCH_EFFORT else "O2" if effort <= 0 else "O3"}


@contextlib.contextmanager
def _jax_options(**values: Any) -> Iterator[None]:
    """Sets JAX options inside the context and restores them after it; None leaves an option unchanged."""
    before = {name: jax.config.values[name] for name, value in values.items() if value is not None}
    for name in before:
        jax.config.update(name, values[name])
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
