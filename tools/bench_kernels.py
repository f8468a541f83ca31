"""Where the time of a program went: a trace of some steps, summed over kernels and over modules of the model."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.planning.hlo import HloModule, Instruction
from gigagan_jax.planning.op_profile import module_name, pass_direction

MOST = 40  # rows of a table
_NUMBER = re.compile(r"[._]\d+$")


def trace(run: Callable[[], Any], steps: int, folder: Path) -> list[Path]:
    """Traces `steps` calls of `run` into a folder; returns the files of the trace."""
    with jax.profiler.trace(folder):
        out = None
        for _ in range(steps):
            out = run()
        jax.block_until_ready(out)
    return sorted(folder.rglob("*.xplane.pb"))


Kernel = tuple[str, str]  # its name, and that of its program where the trace has it


def device_seconds(file: Path) -> tuple[dict[Kernel, float], dict[Kernel, int]]:
    """Seconds and runs of each kernel in a trace, by the name of its HLO operation, or by its own where that is not noted.

    Kernels are on the planes of the devices; on a CPU they are on threads of the host. A loop is left out where what it runs
    is there too.
    """
    seconds: dict[Kernel, float] = defaultdict(float)
    runs: dict[Kernel, int] = defaultdict(int)
    data = jax.profiler.ProfileData.from_file(str(file))
    planes = [p for p in data.planes if p.name.startswith("/device:")]
    device = bool(planes)
    for plane in planes or data.planes:
        for line in plane.lines:
            if device and (line.name or "") in ("Steps", "XLA Modules", "XLA TraceMe", "Framework Ops", "Source code"):
                continue
            for event in line.events:
                # Pairs by hand: what `dict()` does to them warns of JAX's own type.
                stats = {pair[0]: pair[1] for pair in event.stats}
                name = stats.get("hlo_op")
                if name is None and not device:
                    continue
                name = str(name or event.name)
                if name.startswith(("while", "call", "conditional")):
                    continue
                kernel = (name, str(stats.get("hlo_module", "")))
                seconds[kernel] += event.duration_ns * 1e-9
                runs[kernel] += 1
    return dict(seconds), dict(runs)


class Names:
    """From the name of a kernel to the instruction that it was made from.

    Args:
      texts: of the compiled programs of a step, by the names of their HLO modules where several share names.
    """

    def __init__(self, texts: Sequence[str]):
        self._programs = {_program(text): _Table(text) for text in texts}

    def place(self, kernel: str, program: str) -> tuple[str, str]:
        """(module of the model, forward, recomputed or backward) of a kernel.

        Args:
          kernel: name in the trace.
          program: name of its HLO module; empty where the trace has none.
        """
        tables = [self._programs[program]] if program in self._programs else list(self._programs.values())
        for table in tables:
            if found := table.place(kernel):
                return found
        return f"unknown: {_NUMBER.sub('', kernel)[:60]}", "forward"


def _program(text: str) -> str:
    """Name of the HLO module."""
    found = re.match(r"HloModule ([\w.\-]+)", text)
    return found[1] if found else ""


class _Table:
    """The instructions of one program."""

    def __init__(self, text: str):
        self.module = HloModule(text)
        self._exact: dict[str, Instruction] = {}
        for lines in self.module.computations.values():
            self._exact |= {i.name: i for i in lines}
        # Kernels are named as their instruction with "_" for what is no letter.
        self._plain = {re.sub(r"\W", "_", name): i for name, i in self._exact.items()}

    def place(self, kernel: str) -> tuple[str, str] | None:
        """As `Names.place`; None for a kernel of a library."""
        instruction = self._exact.get(kernel) or self._plain.get(re.sub(r"\W", "_", kernel))
        if instruction is None:
            return None
        name = instruction.op_name
        if not name and instruction.opcode == "fusion":
            inside = self.module.computations.get(instruction.read_attribute("calls"), [])
            name = next((i.op_name for i in reversed(inside) if i.op_name), "")
        return module_name(name, self.module.call_stack(instruction.stack_frame)), pass_direction(name)


def tables(seconds: dict[Kernel, float], runs: dict[Kernel, int], names: Names, steps: int) -> dict[str, Any]:
    """Seconds of one step by module and by kernel, slowest first.

    Returns:
      `device_seconds` of a step, summed over devices and, on a CPU, over threads; `known`: the share whose module is known;
      `modules`; `kernels`
    """
    total = sum(seconds.values())
    if not total:
        return {"device_seconds": 0.0, "known": 0.0, "modules": [], "kernels": []}
    modules: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    kernels, known = [], 0.0
    for key, spent in seconds.items():
        kernel = key[0]
        module, direction = names.place(*key)
        known += 0.0 if module.startswith("unknown: ") else spent
        modules[module][direction] += spent / steps
        row = {"kernel": kernel, "module": module, "way": direction, "seconds": spent / steps}
        kernels.append(row | {"share": spent / total, "runs": runs[key] / steps})
    rows: Iterable[dict[str, Any]] = (
        {"module": name, "seconds": sum(ways.values()), "share": sum(ways.values()) * steps / total, **ways}
        for name, ways in modules.items()
    )
    slowest = lambda rows: sorted(rows, key=lambda row: -row["seconds"])[:MOST]
    return {
        "device_seconds": total / steps,
        "known": known / total,
        "modules": slowest(rows),
        "kernels": slowest(kernels),
    }


def profile(run: Callable[[], Any], texts: Sequence[str], steps: int) -> dict[str, Any]:
    """The tables of a program, or {"missing": why} where this JAX or this device gives no trace that can be read."""
    if not hasattr(jax.profiler, "ProfileData"):
        return {"missing": "this JAX cannot read a trace (jax.profiler.ProfileData)"}
    with tempfile.TemporaryDirectory() as place:
        try:
            found = trace(run, steps, Path(place))
            if not found:
                return {"missing": "the profiler wrote no trace"}
            seconds, runs = device_seconds(found[0])
        except (RuntimeError, ValueError, OSError) as e:
            return {"missing": f"no trace: {(str(e).splitlines() or [type(e).__name__])[0][:200]}"}
    if not seconds:
        return {"missing": "the trace has no kernels"}
    return tables(seconds, runs, Names(texts), steps) | {"steps": steps}
