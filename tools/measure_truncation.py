"""Measures accuracy and diversity of a trained model at several truncations, by the judge of its config.

    python tools/measure_truncation.py --workdir=runs/digits [--json=FILE] [--picture=FILE.png]

A row for each value, and each way to truncate: towards the mean of the prompt, of all prompts, and both as the paper has it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.evaluation.judges import make_judge
from gigagan_jax.inference.images import draw_grid
from gigagan_jax.inference.text_to_image import TextToImage

VALUES = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3)
# (name, truncation and global_truncation of a value)
WAYS: tuple[tuple[str, Callable[[float], tuple[float, float]]], ...] = (
    ("prompt", lambda psi: (psi, 1.0)),
    ("global", lambda psi: (1.0, psi)),
    ("both", lambda psi: (psi, psi)),
)
# Figures of the judges that are shown; --json has all.
COLUMNS = (
    *(
        "accuracy",
        "variance_ratio",
        "seen/pair",
        "held_out/pair",
        "position_variance",
        "radius_variance",
        "size_variance",
        "caption_variance",
    ),
    *("seen/concept", "seen/style", "held_out/concept", "held_out/style", "frechet"),
)
# Captions and columns of the picture.
_ROWS, _COLUMNS = 3, 8


def draw_truncations(model: TextToImage, captions: Sequence[str]) -> Image.Image:
    """A few captions (rows, three for each value) at several truncations towards the prompt."""
    chosen = list(dict.fromkeys(captions))[:: max(1, len(set(captions)) // _ROWS)][:_ROWS]
    rows, labels = [], []
    for caption in chosen:
        for psi in (1.0, 0.7, 0.3):
            rows.append(model([caption] * _COLUMNS, range(_COLUMNS), truncation=psi))
            labels.append(f"{caption}, {psi:g}")
    return draw_grid(np.stack(rows), labels)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=workdir_argument, required=True, help="of the training run")
    parser.add_argument("--json", type=Path, help="file for one JSON line a row")
    parser.add_argument("--picture", type=Path, help="PNG of a few captions at several truncations")
    args = parser.parse_args(argv)
    if args.picture is not None and args.picture.suffix != ".png":
        raise UserError(f"--picture={args.picture}: name a .png")
    cli.check_writable(args.picture)
    cli.check_writable(args.json)
    model = TextToImage.from_workdir(args.workdir, device_batch=100)
    if not model.config.evaluators:
        raise UserError(f"{args.workdir}: its config has no evaluators, which say what is right")
    judge = make_judge(model.config.evaluators[0], model.config)
    rows, lines = [], []
    cases = [(name, psi, pair(psi)) for name, pair in WAYS for psi in VALUES if psi < 1 or name == WAYS[0][0]]
    progress = ProgressBar("truncations", len(cases))
    for name, psi, (towards_prompt, towards_all) in cases:
        figures = judge.evaluate(functools.partial(model, truncation=towards_prompt, global_truncation=towards_all))
        shown = [column for column in COLUMNS if column in figures]
        rows.append(("none" if psi == 1 else name, f"{psi:g}", *(f"{figures[column]:.3f}" for column in shown)))
        lines.append({"run": model.config.name, "step": model.step, "way": name, "value": psi} | figures)
        progress.step()
    print(format_table(rows, ("towards the mean of", "value", *shown)))
    if args.json:
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.picture:
        draw_truncations(model, judge.captions).save(args.picture, optimize=True)
    return 0


if __name__ == "__main__":
    cli.main(verb)
