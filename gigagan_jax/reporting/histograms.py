"""Histograms and bars as SVG text: no JavaScript, no files beside them, colours from the page's style."""

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gigagan_jax.core.formatting import percent

_WIDTH, _HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 14, 40
_BINS = 40


@dataclasses.dataclass(frozen=True)
class Bins:
    """Counts between neighbouring edges: edges [K + 1], counts [K]."""

    edges: np.ndarray
    counts: np.ndarray


def bins_of(values: Mapping[float, int], log: bool) -> Bins:
    """At most 40 bins over counted values, with edges that read well where the values are few or whole numbers.

    Args:
      values: {value: how many}, not empty; positive where `log`.
      log: bins of equal ratio, for values over more than a decade.
    """
    x = np.array(sorted(values), np.float64)
    n = np.array([values[v] for v in sorted(values)], np.int64)
    low, high = float(x[0]), float(x[-1])
    edges: np.ndarray
    if log:
        width = max(math.log10(high / low), 0.02)
        margin = 0.01 * width
        edges = np.logspace(math.log10(low) - margin, math.log10(high) + margin, _BINS + 1)
    elif high == low:
        edges = np.array([low - 0.5, low + 0.5]) if low == round(low) else low * np.array([0.98, 1.02])
    elif np.all(x == np.round(x)):
        whole = max(1, math.ceil((high - low + 1) / _BINS))
        edges = low - 0.5 + whole * np.arange(math.ceil((high - low + 1) / whole) + 1)
    else:
        step = nice((high - low) / _BINS)
        edges = np.arange(math.floor(low / step), math.floor(high / step) + 2) * step
    counts, edges = np.histogram(x, edges, weights=n)
    return Bins(edges, counts.astype(np.int64))


def histogram(
    values: Mapping[float, int],
    *,
    label: str,
    log: bool = False,
    marks: Mapping[str, float] | None = None,
    form: Callable[[float], str] = lambda v: f"{v:g}",
) -> str:
    """A histogram of counted values.

    Args:
      values: {value: how many}.
      label: of the horizontal axis, with its unit.
      log: a logarithmic horizontal axis; values that are not positive are left out.
      marks: {name: value} of vertical lines, such as the median.
      form: how a value is written.

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
    top = _ceiling(int(bins.counts.max()))
    up = lambda n: _HEIGHT - _BOTTOM - n / top * (_HEIGHT - _TOP - _BOTTOM)
    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for n in _steps(top):
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(n):.1f}" y2="{up(n):.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 6}" y="{up(n) + 4:.1f}" text-anchor="end">{short(n)}</text>')
    total = int(bins.counts.sum())
    for left, right, n in zip(bins.edges[:-1], bins.edges[1:], bins.counts, strict=True):
        a, b = across(left), across(right)
        width = max(b - a - 1.5, 0.75) if b - a < 60 else 58.0
        a = (a + b - width) / 2
        if n:
            said = f"{_span(left, right, form, values)}: {n:,} ({100 * n / total:.1f} %)"
            height = max(up(0) - up(n), 1.0)  # a few among many are still there
            out.append(
                f'<rect class="bar" x="{a:.1f}" y="{up(0) - height:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5">'
                f"<title>{html.escape(said)}</title></rect>"
            )
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(0):.1f}" y2="{up(0):.1f}"/>')
    for v in ticks(float(bins.edges[0]), float(bins.edges[-1]), log):
        out.append(
            f'<line class="axis" x1="{across(v):.1f}" x2="{across(v):.1f}" y1="{up(0):.1f}" y2="{up(0) + 4:.1f}"/>'
        )
        out.append(f'<text class="tick" x="{across(v):.1f}" y="{up(0) + 16:.1f}" text-anchor="middle">{form(v)}</text>')
    # Names of lines that stand close beside each other would cover each other.
    taken = -math.inf
    for name, v in sorted((marks or {}).items(), key=lambda pair: pair[1]):
        x = across(v)
        out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{up(0):.1f}"/>')
        if x - taken > 6.2 * len(name):
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


def bars(rows: Sequence[tuple[str, int]], total: int, kinds: Sequence[str] | None = None) -> str:
    """Horizontal bars with their numbers and their shares of `total`.

    Args:
      rows: (name, how many).
      total: what a full bar stands for.
      kinds: of each bar "bar" or "bad"; None: all "bar".

    Returns:
      an svg element
    """
    if not rows:
        return '<p class="none">nothing to show</p>'
    line, left, right = 24, 168, 80 + 7 * max(len(f"{n:,}") for _, n in rows)
    height = line * len(rows) + 8
    out = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">']
    for i, (name, n) in enumerate(rows):
        y = 4 + i * line
        width = n / max(total, 1) * (_WIDTH - left - right)
        kind = kinds[i] if kinds else "bar"
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
        share = percent(n / max(total, 1))
        out.append(
            f'<text class="value" x="{_WIDTH - 66}" y="{y + 15}" text-anchor="end">{n:,}</text>'
            f'<text class="tick" x="{_WIDTH - 2}" y="{y + 15}" text-anchor="end">{share}</text>'
        )
    return "".join(out) + "</svg>"


def short(n: float) -> str:
    """1200 as 1.2k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:g}{unit}"
    return f"{n:g}"


def _span(left: float, right: float, form: Callable[[float], str], values: Mapping[float, int]) -> str:
    inside = [v for v in values if left <= v < right]
    if len(inside) == 1:
        return form(inside[0])
    return f"{form(min(inside))} to {form(max(inside))}" if inside else f"{form(left)} to {form(right)}"


def nice(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _ceiling(most: int) -> float:
    step = max(1.0, nice(most / 4))
    return math.ceil(most / step) * step


def _steps(top: float) -> list[float]:
    step = max(1.0, nice(top / 4))
    return [step * i for i in range(round(top / step) + 1)]


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Values to write at an axis from `low` to `high`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
            if len(found) >= 4:
                return found[:: math.ceil(len(found) / 10)]
        if len(found) >= 2:
            return found
    step = nice((high - low) / 7)
    if not log and float(low + 0.5).is_integer():
        step = max(step, 1.0)
    first = math.ceil(low / step)
    found = [round(step * k, 12) for k in range(first, math.floor(high / step) + 1)]
    return found or [(low + high) / 2]
