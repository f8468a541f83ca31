"""Draws curves of metrics as SVG with a few lines of JavaScript. Curves are thinned, and keep their extremes."""

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gigagan_jax.reporting.histograms import axis_ticks, nice_step

# Points of a curve: about two for each unit of _WIDTH.
MAX_POINTS = 1000
# Curves of a chart: STYLE has eight colours.
MAX_CURVES = 8
# Units of the viewBox; the page scales the drawing to its column.
_WIDTH, _HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 38
# Window of the moving average, as a fraction of the curve.
_MEAN_WINDOW = 0.02
# A curve with this many points is drawn faint, with its moving average over it.
_NOISY_POINTS = 60

STYLE = """
:root { --c0: #2f6fc4; --c1: #d1672a; --c2: #2a9468; --c3: #9a4fb0; --c4: #a8842a; --c5: #c23f6d; --c6: #3b8ea5; --c7: #6b6f7a; }
@media (prefers-color-scheme: dark) { :root { --c0: #62a0ee; --c1: #ee8f58; --c2: #55c79b; --c3: #c48fd8; --c4: #d8b45c;
  --c5: #ef7fa6; --c6: #6cc0d6; --c7: #a6abb8; } }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.curve.faint { stroke-width: 1; opacity: .28; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft); margin: 0 0 6px; }
.legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend em { font-style: normal; }
figure.chart { margin: 0; touch-action: pan-y; }
.restart { stroke: var(--soft); stroke-dasharray: 2 3; } .rollback { stroke: var(--bad); stroke-dasharray: 2 3; }
.cross { stroke: var(--soft); visibility: hidden; }
@media (max-width: 560px) { figure.chart svg { font-size: 15px; } }
"""

# The values under the pointer replace the last values in the legend. The script reads the points back from the paths,
# so that the page holds each number once.
SCRIPT = """
for (const figure of document.querySelectorAll('figure.chart')) {
  const svg = figure.querySelector('svg'), cross = svg.querySelector('.cross'), d = svg.dataset;
  const values = [...figure.querySelectorAll('.legend b')], last = values.map(v => v.textContent);
  const at = figure.querySelector('.legend em'), rest = at.textContent;
  let curves = null;
  const read = p => [...p.getAttribute('d').matchAll(/[ML]([-\\d.]+),([-\\d.]+)/g)].map(m => [+m[1], +m[2]]);
  const show = v => v === 0 ? '0' : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
  const value = y => { const v = +d.y0 + (+d.bottom - y) / (d.bottom - d.top) * (d.y1 - d.y0); return d.log ? 10 ** v : v; };
  const leave = () => {
    cross.style.visibility = 'hidden'; at.textContent = rest; values.forEach((v, i) => v.textContent = last[i]);
  };
  figure.addEventListener('pointermove', e => {
    curves = curves || [...svg.querySelectorAll('.raw')].map(read);
    const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let found = null;
    curves.forEach((points, i) => {
      let a = 0, b = points.length - 1;
      while (b - a > 1) { const m = (a + b) >> 1; if (points[m][0] < x) a = m; else b = m; }
      const p = points[b] && Math.abs(points[b][0] - x) < Math.abs(points[a][0] - x) ? points[b] : points[a];
      if (p) { values[i].textContent = show(value(p[1])); if (!found || Math.abs(p[0] - x) < Math.abs(found - x)) found = p[0]; }
    });
    if (found === null) return;
    cross.setAttribute('x1', found); cross.setAttribute('x2', found); cross.style.visibility = 'visible';
    const k = +d.x0 + (found - d.left) / (d.right - d.left) * (d.x1 - d.x0);
    at.textContent = 'at ' + +k.toPrecision(5) + ' kimg';
  });
  figure.addEventListener('pointerleave', leave);
}
"""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over thousands of images.

    name: name of the metric
    kimg: [K] thousands of images
    values: [K]; NaN where the metric was not finite
    """

    name: str
    kimg: np.ndarray
    values: np.ndarray


def thin_curve(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Selects at most `max_points` of the points (x [K], y [K]), in order.

    Each interval keeps its lowest and its highest point, and a NaN if it has one: spikes and gaps stay visible.
    """
    n = len(x)
    if n <= max_points:
        return x, y
    keep = []
    # Three points an interval: a minimum, a maximum and a gap.
    edges = np.linspace(0, n, max_points // 3 + 1).astype(np.int64)
    for a, b in itertools.pairwise(edges.tolist()):
        part = y[a:b]
        known = np.flatnonzero(np.isfinite(part))
        places = set() if len(known) == len(part) else {a + int(np.flatnonzero(~np.isfinite(part))[0])}
        if len(known):
            places |= {a + int(known[part[known].argmin()]), a + int(known[part[known].argmax()])}
        keep += sorted(places)
    return x[keep], y[keep]


def moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean [K] of y [K] over `window` points; NaN is left out of the means, and stays NaN."""
    known = np.isfinite(y)
    # Differences of cumulative sums: linear in K for any window.
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(y))
    # A symmetric window, shorter at the ends: a one-sided one would tilt the curve there.
    half = np.minimum(np.minimum(at, len(y) - 1 - at), window // 2)
    low, high = at - half, at + half + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(known, mean, np.nan)


def draw_chart(curves: Sequence[Curve], marks: Sequence[tuple[float, str, str]] = (), log: bool | None = None) -> str:
    """Draws curves in one frame, with their last values above it.

    Args:
      curves: curves to draw, the first MAX_CURVES of them.
      marks: (kimg, title, "restart" or "rollback") of vertical lines.
      log: whether the vertical axis is logarithmic; None: if all values are positive and span more than a factor of 30.

    Returns:
      the chart as HTML
    """
    curves = [c for c in curves if np.isfinite(c.values).any()][:MAX_CURVES]
    if not curves:
        return '<p class="none">no finite value</p>'
    known = np.concatenate([c.values[np.isfinite(c.values)] for c in curves])
    # Quantiles: one spike must not make the axis logarithmic.
    if log is None:
        log = bool(known.min() > 0 and np.quantile(known, 0.98) > 30 * np.quantile(known, 0.02))
    if log:
        known = np.log10(known[known > 0]) if (known > 0).any() else np.zeros(1)
    low, high = _axis_range(known)
    first = min(float(c.kimg.min()) for c in curves)
    last = max(float(c.kimg.max()) for c in curves)
    # A single point, or points of one moment, still needs an axis with a width.
    if last <= first:
        first, last = first - 0.5, last + 0.5
    across: Any = lambda x: _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
    bottom = _HEIGHT - _BOTTOM
    # Clipped: values outside the frame are drawn at its edge and counted in the label.
    up = lambda y: bottom - (np.clip(y, low, high) - low) / (high - low) * (bottom - _TOP)

    names = ", ".join(c.name for c in curves)
    numbers = {"x0": first, "x1": last, "y0": low, "y1": high, "left": _LEFT, "right": _WIDTH - _RIGHT}
    numbers |= {"top": _TOP, "bottom": bottom}
    # The script converts pixels back to values with these.
    data = " ".join(f'data-{k}="{v:.10g}"' for k, v in numbers.items()) + (' data-log="1"' if log else "")
    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(names)}" {data}>']
    for v, text in _value_ticks(low, high, log):
        at = float(up(v))
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    unit, units = (1000.0, "millions") if last >= 10_000 else (1.0, "thousands")
    for v in _linear_ticks(first, last, 6):
        x = across(v)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_format_kimg(v / unit)}</text>'
        )
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for kimg, title, kind in marks:
        if first <= kimg <= last:
            x = across(kimg)
            line = f'class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"'
            out.append(f"<line {line}><title>{html.escape(title)}</title></line>")
    legend = []
    outside = 0
    for i, c in enumerate(curves):
        with np.errstate(invalid="ignore", divide="ignore"):
            y: np.ndarray = np.asarray(np.where(c.values > 0, np.log10(c.values), np.nan) if log else c.values)
        outside += int(((y < low) | (y > high)).sum())
        noisy = len(y) >= _NOISY_POINTS
        x, thinned = thin_curve(c.kimg, y)
        out.append(_svg_path(across(x), up(thinned), f"curve raw s{i}{' faint' if noisy else ''}"))
        if noisy:
            mean = moving_average(y, max(5, round(len(y) * _MEAN_WINDOW)))
            # A smooth line needs fewer points than the raw curve.
            step = max(1, len(y) // 400)
            out.append(_svg_path(across(c.kimg[::step]), up(mean[::step]), f"curve s{i}"))
        shown = _format_number(float(c.values[np.isfinite(c.values)][-1]))
        short = html.escape(c.name.split("/", 1)[-1])
        legend.append(f'<span><i style="background:var(--c{i})"></i>{short} <b>{shown}</b></span>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    note = f"; {outside:,} beyond the frame" if outside else ""
    nulls = sum(int((~np.isfinite(c.values)).sum()) for c in curves)
    note += f"; {nulls:,} not finite" if nulls else ""
    label = f"{units} of images{', logarithmic upwards' if log else ''}{note}"
    out.append(f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{label}</text>')
    out.append(f'<line class="cross" y1="{_TOP}" y2="{bottom}"/></svg>')
    return f'<figure class="chart"><div class="legend">{"".join(legend)}<em>last</em></div>{"".join(out)}</figure>'


def _svg_path(x: np.ndarray, y: np.ndarray, kind: str) -> str:
    parts = []
    pen = "M"
    for a, b, known in zip(x.tolist(), y.tolist(), np.isfinite(y).tolist(), strict=True):
        if not known:
            pen = "M"
            continue
        parts.append(f"{pen}{a:.2f},{b:.2f}")
        if pen == "M":
            # A line of no length: a point between two gaps becomes a dot.
            parts.append(f"L{a:.2f},{b:.2f}")
        pen = "L"
    return f'<path class="{kind}" d="{"".join(parts)}"/>'


def _axis_range(known: np.ndarray) -> tuple[float, float]:
    """Returns (low, high) of the vertical axis; outliers are left outside the frame."""
    low, high = float(known.min()), float(known.max())
    # Below 100 values the quantiles are the extremes themselves.
    if len(known) >= 100:
        a, b = (float(q) for q in np.quantile(known, (0.005, 0.995)))
        if high - low > 3 * (b - a) > 0:
            low, high = max(low, a - 0.2 * (b - a)), min(high, b + 0.2 * (b - a))
    # Equal values have no span: the margin comes from their size, or is 0.5 around 0.
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    step = nice_step((high - low) / count)
    # Rounded: 3 * 0.1 would be written as 0.30000000000000004.
    return [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _value_ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    if not log:
        return [(v, _format_number(v)) for v in _linear_ticks(low, high, 5)]
    values = axis_ticks(10**low, 10**high, True)
    # Six labels at most, or they would overlap.
    return [(math.log10(v), _format_number(v)) for v in values[:: math.ceil(len(values) / 6)] if v > 0]


def _format_number(v: float) -> str:
    # "1e+05" as "1e5": the margin left of the axis is narrow.
    if v and (abs(v) >= 1e5 or abs(v) < 1e-3):
        return f"{v:.2g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{v:.4g}"


def _format_kimg(v: float) -> str:
    return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}"
