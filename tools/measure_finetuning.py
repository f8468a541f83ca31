"""How many images a run needs on digits with inverted colours: from scratch, from published weights of G, from a whole run.

    python -m gigagan_jax.train --config=configs/digits.py --workdir=runs/digits
    python tools/measure_finetuning.py --workdir=DIR --results=docs/finetuning.jsonl --run=runs/digits [--arm=NAME] [--seed=N]
    python tools/measure_finetuning.py --results=docs/finetuning.jsonl --table

The pictures, black on white, are a folder with caption files in DIR. Each arm is a run of configs/digits.py on it. The judge of
docs/digits.md sees pictures of every checkpoint, inverted back, and a line is written for each. The same command goes on.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import append_text
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.evaluation.digits import MIN_ACCURACY
from gigagan_jax.evaluation.judges import make_judge
from gigagan_jax.inference.text_to_image import TextToImage

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "docs" / "weights" / "digits"
# Rates do not fall: configs/digits.py keeps them until 40 kimg.
_STEADY = ["--config.g_optimizer.decay_kimg=0", "--config.d_optimizer.decay_kimg=0"]
# Flags of each arm.
ARMS = {
    "scratch": ["--config.total_kimg=16", *_STEADY],
    "weights": [f"--init_from={WEIGHTS}", "--config.total_kimg=4", *_STEADY],
    "run": ["--config.total_kimg=4", *_STEADY],  # and --init_from of the run that is named
}


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(prog="measure_finetuning.py", description=__doc__)
    parser.add_argument("--workdir", type=cli.local_folder, help="for the pictures and the runs")
    parser.add_argument("--results", type=cli.local_folder, required=True, help="a .jsonl file: a line a checkpoint")
    parser.add_argument("--arm", action="append", choices=tuple(ARMS), help="one of them; all without it")
    parser.add_argument(
        "--run", type=cli.local_folder, help="workdir of configs/digits.py, which the arm `run` starts from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kimg", type=float, default=0.5, help="between two checkpoints (0.5)")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    args = parser.parse_args(argv)
    if args.table:
        print(format_table(read_results(args.results)))
        return 0
    if args.workdir is None:
        raise UserError("--workdir=DIR is needed: the pictures and the runs go there")
    arms = args.arm or list(ARMS)
    if "run" in arms and args.run is None:
        raise UserError("--run=WORKDIR is needed: a run of configs/digits.py, which the arm `run` starts from")
    pictures = write_pictures(args.workdir / "inverted")
    for arm in arms:
        run = args.workdir / f"{arm}-{args.seed}"
        flags = [*ARMS[arm], *([f"--init_from={args.run}"] if arm == "run" else [])]
        train(pictures, run, [*flags, f"--config.seed={args.seed}", f"--config.checkpoint_kimg={args.kimg:g}"])
        judge_checkpoints(arm, args.seed, run, args.results)
    print(format_table(read_results(args.results)))
    return 0


def write_pictures(folder: Path) -> Path:
    """Writes the digits, black on white, as 8x8 PNG files with their eight captions each."""
    source = DigitsSource()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(source)):
        record = source.read(i)
        Image.fromarray(255 - np.asarray(record.image)).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text("\n".join(record.captions))
    return folder


def train(pictures: Path, workdir: Path, flags: Sequence[str]) -> None:
    """Runs configs/digits.py on the folder; all checkpoints are kept."""
    command = [sys.executable, "-m", "gigagan_jax.train", f"--config={ROOT / 'configs' / 'digits.py'}"]
    command += [f"--workdir={workdir}", "--config.data.source=folder", f"--config.data.path={pictures}"]
    command += ["--config.checkpoint.keep=1000", "--config.snapshot_kimg=1000", "--config.evaluators=()", *flags]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        raise UserError(f"the run in {workdir} ended with code {code}: its log is above")


def judge_checkpoints(arm: str, seed: int, workdir: Path, results: Path) -> None:
    """Appends a line for each checkpoint that has none."""
    known = {(line["arm"], line["seed"], line["step"]) for line in read_results(results)}
    for step in Checkpoints(workdir).all_steps():
        if (arm, seed, step) in known:
            continue
        model = TextToImage.from_workdir(workdir, step=step, device_batch=50)
        judge = make_judge("digits", model.config)
        figures = judge.evaluate(functools.partial(draw_inverted, model))
        line = {"arm": arm, "seed": seed, "step": step, "kimg": step * model.config.batch_size / 1000, **figures}
        append_text(results, json.dumps(line) + "\n")
        print(f"{arm} {line['kimg']:.1f} kimg: accuracy {figures['accuracy']:.3f}", flush=True)


def draw_inverted(model: TextToImage, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Pictures back in white on black, as the judge has learnt digits: uint8 [N, R, R, 3]."""
    return 255 - model(captions, seeds)


def read_results(results: Path) -> list[dict]:
    """The lines of a file of results; none where there is no file."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def format_table(lines: Sequence[dict]) -> str:
    """A row a run: where it first reaches the accuracy, and its last figures."""
    rows = ["| arm | seed | kimg to accuracy 0.98 | accuracy there | last kimg | accuracy | variance ratio | Frechet |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for arm, seed in dict.fromkeys((line["arm"], line["seed"]) for line in lines):
        run = sorted((x for x in lines if (x["arm"], x["seed"]) == (arm, seed)), key=lambda x: x["kimg"])
        first = next((x for x in run if x["accuracy"] >= MIN_ACCURACY), None)
        reached = f"{first['kimg']:.1f} | {first['accuracy']:.3f}" if first else "never | "
        last = run[-1]
        figures = f"{last['accuracy']:.3f} | {last['variance_ratio']:.2f} | {last['frechet']:.1f}"
        rows.append(f"| {arm} | {seed} | {reached} | {last['kimg']:.1f} | {figures} |")
    return "\n".join(rows)


if __name__ == "__main__":
    cli.main(verb)
