"""Trains arms of settings with several seeds, and compares them in a table and a picture.

    python tools/ablate.py run --workdir=DIR [--only=NAME,...]
    python tools/ablate.py table
    python tools/ablate.py picture

`run` trains what `--results` lacks, one run after another, and appends one JSON line for each that has ended. Stop it at
any time: the same command goes on, within a run too. A second process on the same folder takes other runs. The arms are
tools/ablations.toml. `table` prints means and spreads over seeds as Markdown, bold where no seed of the table's first row
reaches; `picture` draws every seed as a point.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ablate_checkout
import ablate_report
import bench_output
import numpy as np
from ablate_arms import ARMS, Arm, read_arms

from gigagan_jax import cli
from gigagan_jax.cli.config_file import load_config
from gigagan_jax.core import files
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import hold_file_lock
from gigagan_jax.core.workdir_files import COMPILATION_CACHE_FOLDER, METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "ablations.jsonl"
# Share of a run, at its end, over which training metrics are averaged.
_LAST = 1 / 6
_TRAINING = ("grad_norm/g", "grad_norm/d", "r1/last_exit", "loss/r1", "image/spread", "health/diversity")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished runs. Raises UserError where a line is none; a file that is not there has none."""
    if not path.exists():
        return []
    runs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--results={path} cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            run["arm"], run["seed"], run["metrics"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no result of a run; remove it") from error
        runs.append(run)
    return runs


def missing_runs(arms: Sequence[Arm], seeds: Sequence[int], results: Path) -> Iterator[tuple[Arm, int]]:
    """Runs without a result, the first seed of every arm first. The results are read again before each."""
    for seed in seeds:
        for arm in arms:
            if not arm.results_of and not has_result(results, arm, seed):
                yield arm, seed


def has_result(results: Path, arm: Arm, seed: int) -> bool:
    """Whether a run has a line among the results."""
    return any(run["arm"] == arm.name and run["seed"] == seed for run in read_results(results))


def run_arm(arm: Arm, seed: int, workdir: Path) -> dict[str, Any]:
    """Trains one run to its end and returns its result.

    Raises:
      UserError: the training command failed.
    """
    start = time.time()
    command = [sys.executable, "-m", "gigagan_jax.train", f"--workdir={workdir}", f"--config.seed={seed}"]
    root = ROOT
    if arm.checkout:
        root, file = ablate_checkout.prepare(arm, load_config(arm.config, arm.flags), workdir.parent, ROOT)
        command.append(f"--config={file}")
    else:
        command += [f"--config={arm.config}", *arm.flags]
    # Names of arms have dots in them.
    log = workdir.with_name(f"{workdir.name}.log")
    # The seeds of an arm run the same program: they share what is compiled.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / COMPILATION_CACHE_FOLDER)}
    with log.open("ab") as out:
        code = subprocess.run(
            command, cwd=root, env=cache | os.environ | {"PYTHONPATH": str(root)}, stdout=out, stderr=out, check=False
        ).returncode
    if code:
        raise UserError(f"the run {workdir.name} ended with code {code}; see {log}")
    metrics = read_metrics(workdir)
    if arm.checkout:
        metrics |= ablate_checkout.judge(workdir, load_config(arm.config, arm.flags))
    return {
        "arm": arm.name,
        "seed": seed,
        "commit": arm.checkout or commit(),
        "config": arm.config,
        "flags": list(arm.flags),
        "seconds": round(time.time() - start, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "metrics": metrics,
    }


def read_metrics(workdir: Path) -> dict[str, float]:
    """The judge's figures of a finished run, and means over the last sixth of its training metrics."""
    lines = list(files.read_json_lines(workdir / METRICS_FILE))
    judged = {k: v for line in lines for k, v in line.items() if k.startswith("shapes/")}
    end = max(line["kimg"] for line in lines)
    late = [line for line in lines if line["kimg"] > end * (1 - _LAST)]
    figures = {}
    for name in _TRAINING:
        values = [line[name] for line in late if line.get(name) is not None]
        if values:
            figures[name] = float(np.mean(values))
    rates = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    if rates:
        figures["images_per_second"] = float(np.median(rates))
    return {name: round(value, 5) for name, value in (figures | judged).items()}


def commit() -> str:
    """The commit of the checkout, with a plus sign where files differ from it."""
    return (bench_output.commit_of(ROOT) or "unknown")[:8] + ("+" if bench_output.is_dirty() else "")


class _Taken(Exception):
    """Another process trains this run."""


def _raise_taken() -> None:
    raise _Taken


def train_missing(arms: Sequence[Arm], seeds: Sequence[int], results: Path, folder: Path) -> None:
    """Trains what is missing; skips runs that another process trains."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {arm.name for arm in arms if not arm.results_of}
    total = len(trained) * len(seeds)
    for arm, seed in missing_runs(arms, seeds, results):
        name = f"{arm.name}-{seed}"
        try:
            with hold_file_lock(folder / f"{name}.lock", _raise_taken):
                # It may have ended between the look at the results and the lock.
                if has_result(results, arm, seed):
                    continue
                print(f"{name}: training, log in {folder / name}.log", flush=True)
                result = run_arm(arm, seed, folder / name)
                files.append_text(results, json.dumps(result) + "\n")
        except _Taken:
            print(f"{name}: another process trains it", flush=True)
            continue
        done = sum(run["arm"] in trained for run in read_results(results))
        print(f"{name}: {result['seconds']:.0f} s; {done} of {total} runs are done", flush=True)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "picture"))
    parser.add_argument("--arms", type=Path, default=ARMS, help="file of the arms (tools/ablations.toml)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines (docs/ablations.jsonl)")
    parser.add_argument("--workdir", type=Path, help="run: folder for the workdirs of all runs")
    parser.add_argument("--only", default="", help="run: names of arms, with commas between")
    parser.add_argument("--out", type=Path, help="picture: PNG (docs/ablations.png)")
    args = parser.parse_args(argv)
    arms, seeds = read_arms(args.arms)
    if args.action == "run":
        if args.workdir is None:
            raise UserError("run needs --workdir=DIR: a folder for the workdirs of all runs")
        args.results.parent.mkdir(parents=True, exist_ok=True)
        cli.check_writable(args.results)
        wanted = [name for name in args.only.split(",") if name]
        unknown = set(wanted) - {arm.name for arm in arms}
        if unknown:
            raise UserError(
                f"--only: there is no arm {', '.join(sorted(unknown))}; known: {', '.join(a.name for a in arms)}"
            )
        chosen = {arm.trained for arm in arms if not wanted or arm.name in wanted}
        train_missing([arm for arm in arms if arm.name in chosen], seeds, args.results, args.workdir.resolve())
        return 0
    names = {arm.name for arm in arms}
    runs = [run for run in read_results(args.results) if run["arm"] in names]
    if not runs:
        raise UserError(f"{args.results} has no results of these arms: python tools/ablate.py run makes them")
    if args.action == "table":
        print(ablate_report.format_tables(arms, runs))
    else:
        out = args.out or args.results.with_suffix(".png")
        if out.suffix != ".png":
            raise UserError(f"--out={out}: name a .png")
        cli.check_writable(out)
        ablate_report.draw_picture(arms, runs).save(out)
        print(out)
    return 0


if __name__ == "__main__":
    cli.main(verb)
