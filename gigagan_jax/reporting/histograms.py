"""Draws histograms and bars as SVG without JavaScript; the page's style gives the colours."""

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gigagan_jax.core.formatting import format_percent

# Units of the viewBox; the page scales the drawing to its column.
_WIDTH, _HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 14, 40
_BINS = 40


@dataclasses.dataclass(frozen=True)
class Bins:
    """A histogram.

    edges: [K + 1] of the bins, ascending
    counts: [K] of the values in each bin
    """

    edges: np.ndarray
    counts: np.ndarray


def bins_of(values: Mapping[float, int], log: bool) -> Bins:
    """Puts counted values in about 40 bins, with round edges for few values and for whole numbers.

    Args:
      values: {value: count}, not empty; positive if `log`.
      log: whether the bins have equal ratios, for values over more than a decade.
    """
    x = np.array(sorted(values), np.float64)
    n = np.array([values[v] for v in sorted(values)], np.int64)
    low, high = float(x[0]), float(x[-1])
    edges: np.ndarray
    if log:
        # Equal values still need a bin with a width; the margin keeps rounding from dropping the extremes.
        width = max(math.log10(high / low), 0.02)
        margin = 0.01 * width
        edges = np.logspace(math.log10(low) - margin, math.log10(high) + margin, _BINS + 1)
    elif high == low:
        edges = np.array([low - 0.5, low + 0.5]) if low == round(low) else low * np.array([0.98, 1.02])
    elif np.all(x == np.round(x)):
        # Edges halfway between whole numbers: each value lies in the middle of its bin.
        whole = max(1, math.ceil((high - low + 1) / _BINS))
        edges = low - 0.5 + whole * np.arange(math.ceil((high - low + 1) / whole) + 1)
    else:
        step = nice_step((high - low) / _BINS)
        edges = np.arange(math.floor(low / step), math.floor(high / step) + 2) * step
    # Weighted: the values are distinct, and each stands for many examples.
    counts, edges = np.histogram(x, edges, weights=n)
    return Bins(edges, counts.astype(np.int64))


def draw_histogram(
    values: Mapping[float, int],
    *,
    label: str,
    log: bool = False,
    marks: Mapping[str, float] | None = None,
    form: Callable[[float], str] = lambda v: f"{v:g}",
) -> str:
    """Draws a histogram of counted values.

    Args:
      values: {value: count}.
      label: label of the horizontal axis, with its unit.
      log: whether the horizontal axis is logarithmic; it leaves out values that are not positive.
      marks: {name: value} of vertical lines, such as the median.
      form: formats a value.

    Returns:
      an svg element
    """
    values = {v: n for v, n in values.items() if n and (v > 0 or not log)}
    if not values:
        return '<p class="none">nothing to show</p>'
    bins = bins_of(values, log)
    scale = np.log10 if log else np.asarray
    first, last = float(scale(bins.edges[0])), float(scale(bins.edges[-1]))
    across = lambda v: _LEFT + (float(scale(v)) - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
    top = _axis_maximum(int(bins.counts.max()))
    up = lambda n: _HEIGHT - _BOTTOM - n / top * (_HEIGHT - _TOP - _BOTTOM)
    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for n in _count_ticks(top):
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(n):.1f}" y2="{up(n):.1f}"/>')
        out.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{up(n) + 4:.1f}" text-anchor="end">{abbreviate_number(n)}</text>'
        )
    total = int(bins.counts.sum())
    for left, right, n in zip(bins.edges[:-1], bins.edges[1:], bins.counts, strict=True):
        a, b = across(left), across(right)
        # A gap of 1.5 between bars; a single bin must not fill the whole frame.
        width = max(b - a - 1.5, 0.75) if b - a < 60 else 58.0
        a = (a + b - width) / 2
        if n:
            title = f"{_format_interval(left, right, form, values)}: {n:,} ({100 * n / total:.1f} %)"
            # A bin of few values among millions stays visible.
            height = max(up(0) - up(n), 1.0)
            out.append(
                f'<rect class="bar" x="{a:.1f}" y="{up(0) - height:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5">'
                f"<title>{html.escape(title)}</title></rect>"
            )
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(0):.1f}" y2="{up(0):.1f}"/>')
    for v in axis_ticks(float(bins.edges[0]), float(bins.edges[-1]), log):
        out.append(
            f'<line class="axis" x1="{across(v):.1f}" x2="{across(v):.1f}" y1="{up(0):.1f}" y2="{up(0) + 4:.1f}"/>'
        )
        out.append(f'<text class="tick" x="{across(v):.1f}" y="{up(0) + 16:.1f}" text-anchor="middle">{form(v)}</text>')
    # A name is left out where it would overlap the name before it.
    taken = -math.inf
    for name, v in sorted((marks or {}).items(), key=lambda pair: pair[1]):
        x = across(v)
        out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{up(0):.1f}"/>')
        if x - taken > 6.2 * len(name):
            # Near the right edge the name goes to the left of its line.
            anchor = "end" if x > _WIDTH - 90 else "start"
            shift = -4 if anchor == "end" else 4
            out.append(
                f'<text class="markname" x="{x + shift:.1f}" y="{_TOP - 3}" text-anchor="{anchor}">{name}</text>'
            )
            taken = x
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(
        f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(label)}</text>'
    )
    return "".join(out) + "</svg>"


def draw_bars(rows: Sequence[tuple[str, int]], total: int, kinds: Sequence[str] | None = None) -> str:
    """Draws horizontal bars with their counts and their shares of `total`.

    Args:
      rows: (name, count) of each bar.
      total: count of a full bar.
      kinds: "bar" or "bad" for each bar; None: all "bar".

    Returns:
      an svg element
    """
    if not rows:
        return '<p class="none">nothing to show</p>'
    # SVG has no layout: the column of counts is reserved by the number of digits, 7 units each.
    line, left, right = 24, 168, 80 + 7 * max(len(f"{n:,}") for _, n in rows)
    height = line * len(rows) + 8
    out = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">']
    for i, (name, n) in enumerate(rows):
        y = 4 + i * line
        width = n / max(total, 1) * (_WIDTH - left - right)
        kind = kinds[i] if kinds else "bar"
        # The whole name is the title, which the browser shows under the pointer.
        # 27 letters fit in the 160 units left of the bars.
        shown = name if len(name) <= 27 else name[:26] + "…"
        out.append(
            f'<text class="name" x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(shown)}'
            f"<title>{html.escape(name)}</title></text>"
        )
        out.append(f'<rect class="rail" x="{left}" y="{y + 4}" width="{_WIDTH - left - right}" height="15" rx="2"/>')
        if n:
            out.append(
                f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{max(width, 1.5):.1f}" height="15" rx="2"/>'
            )
        share = format_percent(n / max(total, 1))
        out.append(
            f'<text class="value" x="{_WIDTH - 66}" y="{y + 15}" text-anchor="end">{n:,}</text>'
            f'<text class="tick" x="{_WIDTH - 2}" y="{y + 15}" text-anchor="end">{share}</text>'
        )
    return "".join(out) + "</svg>"


def abbreviate_number(n: float) -> str:
    """Formats 1200 as 1.2k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:g}{unit}"
    return f"{n:g}"


def _format_interval(left: float, right: float, form: Callable[[float], str], values: Mapping[float, int]) -> str:
    # The values say more than the edges: "3" for a bin from 2.5 to 3.5.
    inside = [v for v in values if left <= v < right]
    if len(inside) == 1:
        return form(inside[0])
    return f"{form(min(inside))} to {form(max(inside))}" if inside else f"{form(left)} to {form(right)}"


def nice_step(step: float) -> float:
    """Rounds a step up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    # The tolerance keeps a step that is a nice one up to rounding.
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _axis_maximum(highest: int) -> float:
    # Counts are whole numbers: a step below 1 would label fractions of an image.
    step = max(1.0, nice_step(highest / 4))
    return math.ceil(highest / step) * step


def _count_ticks(top: float) -> list[float]:
    step = max(1.0, nice_step(top / 4))
    return [step * i for i in range(round(top / step) + 1)]


def axis_ticks(low: float, high: float, log: bool) -> list[float]:
    """Returns the values to label on an axis from `low` to `high`."""
    if log:
        # The coarsest set of factors that gives at least four labels.
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
            if len(found) >= 4:
                # Ten labels at most, or they would overlap.
                return found[:: math.ceil(len(found) / 10)]
        if len(found) >= 2:
            return found
    step = nice_step((high - low) / 7)
    # Edges at halves are those of whole numbers (`bins_of`): no labels between these.
    if not log and float(low + 0.5).is_integer():
        step = max(step, 1.0)
    first = math.ceil(low / step)
    found = [round(step * k, 12) for k in range(first, math.floor(high / step) + 1)]
    # A range without a nice value gets its middle.
    return found or [(low + high) / 2]
