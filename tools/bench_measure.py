"""Measuring: programs compiled with their seconds split up, runs that take turns, and what happens when memory runs out."""

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from bench_output import spread

_PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
RUN_SECONDS, MOST_CALLS = 1.0, 20
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY")


class Budget:
    """Seconds that a bench may take.

    Args:
      seconds: in all; None for as many as it needs.
      clock: seconds that do not go back.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        self.seconds, self._clock = seconds, clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """Seconds since the bench began."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a budget."""
        return float("inf") if self.seconds is None else self.seconds - self.spent

    def fits(self, expected: float) -> bool:
        """Is a job that is expected to take so long likely to end in time?"""
        return expected <= self.left


@dataclasses.dataclass(eq=False)
class Program:
    """A compiled program that can be run again and again.

    Attributes:
      name: such as "step_with_r1".
      run: calls it once; gives arrays to wait for.
      images: of one call.
      flops: of one call, over all devices.
      compiled: what it runs, one after the other; for their text and memory.
      seconds: of compiling: `tracing`, `lowering`, `compiling`.
    """

    name: str
    run: Callable[[], Any]
    images: int
    flops: int
    compiled: Sequence[Any]
    seconds: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """What is known of it without running it."""
        memory = [program.memory_analysis() for program in self.compiled]
        # The programs of a step run one after the other: what the larger needs is what it needs.
        part = lambda name: max(int(getattr(m, f"{name}_size_in_bytes", 0) or 0) for m in memory)
        return {
            "batch": self.images,
            "flops": self.flops,
            "programs": len(self.compiled),
            "compile_seconds": self.seconds | {"all": sum(self.seconds.values())},
            "program_bytes": {
                "arguments": part("argument"),
                "temporaries": part("temp"),
                "outputs": part("output"),
                "aliased": part("alias"),
                "code": part("generated_code"),
            },
        }


def compile_split(compile_all: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Calls what traces, lowers and compiles, and nothing else.

    Returns:
      (what it returned, seconds of `tracing`, `lowering` and `compiling`, as JAX reports them)
    """
    seconds = dict.fromkeys(_PHASES.values(), 0.0)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _PHASES:
            seconds[_PHASES[event]] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return compile_all(), seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def calls_of_a_run(program: Program) -> int:
    """As many calls as take about a second, from 1 to 20; the program is called twice to find out."""
    jax.block_until_ready(program.run())
    start = time.perf_counter()
    jax.block_until_ready(program.run())
    return max(1, min(MOST_CALLS, round(RUN_SECONDS / max(time.perf_counter() - start, 1e-9))))


def take_turns(
    programs: Mapping[Program, int], repeats: int, enough: Callable[[float], bool] = lambda longest: False
) -> dict[str, list[float]]:
    """Seconds of one call of each program: A B C A B C ..., after one call of each to warm up.

    Args:
      programs: each with its calls of a run, which is one measurement.
      repeats: runs of each program.
      enough: called before each turn but the first with the seconds that the longest took; True ends the measurement.
    """
    for program in programs:
        jax.block_until_ready(program.run())
    times: dict[str, list[float]] = {program.name: [] for program in programs}
    longest = 0.0
    for turn in range(repeats):
        if turn and enough(longest):
            break
        begun = time.perf_counter()
        for program, calls in programs.items():
            start = time.perf_counter()
            out = None
            for _ in range(calls):
                out = program.run()
            jax.block_until_ready(out)
            times[program.name].append((time.perf_counter() - start) / calls)
        longest = max(longest, time.perf_counter() - begun)
    return times


def figures(
    program: Program, calls: int, times: Sequence[float], peak: float | None, ceiling: float | None, devices: int
) -> dict[str, Any]:
    """Of one program: seconds with their spread, images/s, shares of the peak and of the measured ceiling.

    Args:
      program: which.
      calls: of a run.
      times: seconds of a call, one a run.
      peak: FLOP/s of all devices by their maker; None where it is not known.
      ceiling: FLOP/s of one device as measured; None where it was not.
      devices: how many.
    """
    seconds = spread(times)
    rate = program.flops / seconds["median"]
    return {
        "batch": program.images,
        "calls_of_a_run": calls,
        "seconds": seconds,
        "images_per_second": program.images / seconds["median"],
        "flops": program.flops,
        "flops_per_second": rate,
        "share_of_peak": rate / peak if peak else None,
        "share_of_ceiling": rate / (ceiling * devices) if ceiling else None,
    }


def peak_bytes() -> dict[str, int] | None:
    """Most bytes in use on the first device since the process began, and its limit; None where it does not say."""
    stats: Mapping[str, int] = jax.devices()[0].memory_stats() or {}
    found = {k: int(stats[k]) for k in ("peak_bytes_in_use", "bytes_limit") if k in stats}
    return found or None


def out_of_memory(error: BaseException) -> bool:
    """Is it that the device's memory, or the host's, is full?"""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of a job.

    Attributes:
      result: what it returned; None where memory ran out twice.
      batch: that it was done with.
      notes: what went wrong on the way, one line each.
    """

    result: Any
    batch: int
    notes: tuple[str, ...] = ()


def with_memory(job: Callable[[int], Any], batch: int, least: int, clean: Callable[[], None]) -> Attempt:
    """Runs a job; where memory runs out, once more with half of the batch, and then no more.

    Args:
      job: takes the batch.
      batch: to begin with.
      least: the batch is a multiple of it.
      clean: frees what a failed job left, before the next attempt and at the end.
    """
    notes: list[str] = []
    for size in (batch, batch // 2):
        if size < least or size % least:
            notes.append(f"batch {size} does not divide over the devices")
            break
        try:
            return Attempt(job(size), size, tuple(notes))
        except Exception as e:
            if not out_of_memory(e):
                raise
            lines = str(e).strip().splitlines()
            notes.append(f"out of memory at batch {size}: {(lines or [type(e).__name__])[0][:200]}")
            # The frames of the traceback hold the arrays.
            e.__traceback__ = None
        gc.collect()
        clean()
    return Attempt(None, batch, tuple(notes))
