"""The table and the picture of tools/ablate.py: means and spreads over seeds, and every seed as a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ablate_arms import Arm
from PIL import Image, ImageDraw, ImageFont

# (metric, title, decimals)
COLUMNS = (
    ("shapes/seen/shape", "shape", 2),
    ("shapes/seen/color", "color", 2),
    ("shapes/seen/size", "size", 2),
    ("shapes/seen/material", "material", 2),
    ("shapes/seen/pair", "shape and color", 2),
    ("shapes/held_out/pair", "held out", 2),
    ("shapes/seen_shuffled/pair", "shuffled", 2),
    ("shapes/position_variance", "variance of position", 2),
    ("shapes/caption_variance", "of one caption", 2),
    ("shapes/frechet", "Frechet", 1),
    ("grad_norm/g", "gradient norm of G", 1),
)
_DRAWN = ("shapes/seen/pair", "shapes/held_out/pair", "shapes/position_variance", "shapes/frechet")
# Fewer seeds do not tell two arms apart.
_SEEDS = 3
_INK, _FAINT, _LINE, _POINT = (38, 38, 42), (110, 110, 116), (222, 222, 218), (47, 111, 196)
_MEAN = (209, 103, 42)
_SCALE = 2
_ROW, _LABEL, _PANEL, _PAD, _HEAD = 24, 330, 170, 24, 40


def values_of(runs: Sequence[dict[str, Any]], arm: str, metric: str) -> np.ndarray:
    """[seeds], the metric of an arm's runs that have it."""
    found = [run["metrics"].get(metric) for run in runs if run["arm"] == arm]
    return np.array([x for x in found if x is not None], np.float64)


def format_cell(values: np.ndarray, decimals: int) -> str:
    """The mean, and the distance from the least to the greatest value where there are several."""
    if not len(values):
        return ""
    mean = f"{values.mean():.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ({np.ptp(values):.{decimals}f})"


def is_apart(values: np.ndarray, first: np.ndarray) -> bool:
    """Whether two arms of three seeds or more do not overlap: one in ten pairs of equal arms of three seeds does so."""
    enough = min(len(values), len(first)) >= _SEEDS
    return enough and bool(values.min() > first.max() or values.max() < first.min())


def format_tables(arms: Sequence[Arm], runs: Sequence[dict[str, Any]]) -> str:
    """Markdown, a heading and a table for each `table` of the arms; arms without a run are left out.

    What `is_apart` from the first row is bold.
    """
    parts = []
    for name in dict.fromkeys(arm.table for arm in arms):
        rows = [arm for arm in arms if arm.table == name and any(run["arm"] == arm.trained for run in runs)]
        if not rows:
            continue
        head = ["arm", "seeds", *(title for _, title, _ in COLUMNS)]
        lines = [f"### {name}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        # Without runs of the first arm nothing is bold.
        base = next(arm for arm in arms if arm.table == name)
        for arm in rows:
            seeds = sum(run["arm"] == arm.trained for run in runs)
            cells = []
            for metric, _, decimals in COLUMNS:
                values, first = (values_of(runs, a.trained, metric) for a in (arm, base))
                cell = format_cell(values, decimals)
                cells.append(f"**{cell}**" if is_apart(values, first) else cell)
            lines.append(f"| {arm.title} | {seeds} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw_picture(arms: Sequence[Arm], runs: Sequence[dict[str, Any]]) -> Image.Image:
    """A row for each arm, a panel for each of four metrics, a point for each seed and a bar for the mean."""
    rows = [arm for arm in arms if any(run["arm"] == arm.trained for run in runs)]
    panels = [column for column in COLUMNS if column[0] in _DRAWN]
    width = _LABEL + len(panels) * (_PANEL + _PAD) + _PAD
    height = _HEAD + _ROW * len(rows) + _PAD
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12 * _SCALE)
    at = lambda x, y: (x * _SCALE, y * _SCALE)
    for i, arm in enumerate(rows):
        y = _HEAD + i * _ROW + _ROW // 2
        draw.text(at(_PAD // 2, y), arm.title, _INK, font, anchor="lm")
        draw.line([at(_LABEL, y), at(width - _PAD, y)], _LINE, 1)
    for j, (metric, title, decimals) in enumerate(panels):
        left = _LABEL + j * (_PANEL + _PAD)
        everything = np.concatenate([values_of(runs, arm.trained, metric) for arm in rows])
        if not len(everything):
            continue
        low, high = float(everything.min()), float(everything.max())
        span = (high - low) or 1.0
        place = lambda value, left=left, low=low, span=span: left + 8 + (value - low) / span * (_PANEL - 16)
        draw.text(at(left + _PANEL // 2, 10), title, _INK, font, anchor="mm")
        for value, anchor in ((low, "lm"), (high, "rm")):
            x = left if anchor == "lm" else left + _PANEL
            draw.text(at(x, 28), f"{value:.{decimals}f}", _FAINT, font, anchor=anchor)
        for i, arm in enumerate(rows):
            y = _HEAD + i * _ROW + _ROW // 2
            values = values_of(runs, arm.trained, metric)
            for value in values:
                x = place(value)
                draw.ellipse([at(x - 3.5, y - 3.5), at(x + 3.5, y + 3.5)], _POINT)
            if len(values):
                x = place(values.mean())
                draw.line([at(x, y - 8), at(x, y + 8)], _MEAN, 2 * _SCALE)
    return image
