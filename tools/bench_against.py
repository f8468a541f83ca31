"""Compares the train step of this checkout with another's, in pairs of measurements that take turns.

Each checkout runs in a process of its own (tools/bench_runner.py), which compiles once. Both get the same config: a file of
this checkout. With `--pin` each process compiles on a core of its own, as if the machine had one; the two measurements of a
pair then run on one and the same core, one after the other, and the pairs go round the cores.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_output import Lines, commit_of, spread

from gigagan_jax.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "tools" / "bench_runner.py"


class Checkout:
    """A process that measures the step of one checkout.

    Args:
      name: "old" or "new".
      root: of the checkout.
      asked: what bench_runner.py takes.
    """

    def __init__(self, name: str, root: Path, asked: dict[str, Any]):
        self.name, self.root = name, root
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-P", str(RUNNER), json.dumps(asked)]
        self._process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict[str, Any]:
        """The next line that is meant for us."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@bench "):
                return json.loads(line.removeprefix("@bench "))
        code = self._process.wait()
        raise UserError(f"the step of the {self.name} checkout {self.root} ended with code {code}: see above")

    def measure(self, steps: int, core: int | None) -> dict[str, Any]:
        """Seconds and CPU seconds of one step, averaged over `steps`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"steps": steps, "core": core}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says how it ended
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was not sent to a process that has ended
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def absolute(config: str) -> str:
    """`FILE.py[:arg]` with the file's absolute path."""
    path, colon, arg = config.partition(":")
    return f"{Path(path).resolve()}{colon}{arg}"


def compare(
    other: Path,
    config: str,
    overrides: Sequence[str],
    lines: Lines,
    *,
    pairs: int,
    steps: int,
    with_r1: bool,
    pinned: bool,
) -> dict[str, Any]:
    """Runs the pairs and returns the summary.

    Args:
      other: root of the other checkout, the old one.
      config: `FILE.py[:arg]` of this checkout.
      overrides: `--config.key=value`.
      lines: where the results go.
      pairs: how many.
      steps: of one measurement.
      with_r1: measure the step with R1.
      pinned: on one core each.

    Raises:
      UserError: `other` is no checkout, or a process ended.
    """
    if not (other / "gigagan_jax" / "training" / "step.py").is_file():
        raise UserError(f"--against={other} is no checkout: make one with `git worktree add DIR COMMIT`")
    cores = sorted(os.sched_getaffinity(0)) if pinned else []
    asked = {"config": absolute(config), "overrides": list(overrides), "with_r1": with_r1, "core": None}
    roots = {"old": other.resolve(), "new": ROOT}
    sides: dict[str, Checkout] = {}
    try:
        for i, (name, root) in enumerate(roots.items()):
            core = cores[i % len(cores)] if cores else None
            sides[name] = Checkout(name, root, asked | {"core": core})
        print("compiling the step of both checkouts ...", flush=True)
        for name, side in sides.items():
            ready = side.answer()
            if Path(ready["package"]).resolve() != side.root:
                raise UserError(f"the {name} process imported {ready['package']} instead of {side.root}")
            lines.write({"job": f"against/{name}", **ready, "commit": commit_of(side.root)})
            print(f"  {name}: compiled, and one step done, in {ready['first_step_seconds']:.0f} s", flush=True)
        ratios: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
        found: dict[str, dict[str, list[float]]] = {name: {k: [] for k in ratios} for name in sides}
        for pair in range(pairs):
            core = cores[pair % len(cores)] if cores else None
            order = list(sides) if pair % 2 == 0 else list(sides)[::-1]
            took = {name: sides[name].measure(steps, core) for name in order}
            for k, values in ratios.items():
                values.append(took["old"][k] / took["new"][k])
                for name in sides:
                    found[name][k].append(took[name][k])
            lines.write({"job": "against/pair", "pair": pair + 1, "core": core, "first": order[0], **took})
            print(
                f"  pair {pair + 1} of {pairs}: old {took['old']['seconds']:.3f} s ({took['old']['cpu_seconds']:.3f} of CPU), "
                f"new {took['new']['seconds']:.3f} s ({took['new']['cpu_seconds']:.3f}): ratio {ratios['seconds'][-1]:.3f}, "
                f"of CPU {ratios['cpu_seconds'][-1]:.3f}",
                flush=True,
            )
    finally:
        for side in sides.values():
            side.close()
    out: dict[str, Any] = {"job": "against", "pairs": pairs, "steps": steps, "with_r1": with_r1, "cores": cores}
    out |= {name: {k: spread(v) for k, v in values.items()} for name, values in found.items()}
    out["ratio"] = {k: spread(v) for k, v in ratios.items()}
    lines.write(out)
    for k, words in (("seconds", "old / new"), ("cpu_seconds", "of CPU seconds")):
        v = ratios[k]
        print(f"{words}: median {statistics.median(v):.3f}, min {min(v):.3f}, max {max(v):.3f} of {pairs} pairs")
    return out
