"""The page of statistics: one HTML file that needs nothing else, light or dark as its reader's screen."""

import html
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gigagan_jax.data.prepare.measure import Measured, in_bytes, percent, quantiles
from gigagan_jax.data.prepare.plots import bars, histogram, short

_AT = {"smallest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "largest": 1.0}
_SIDES = (64, 128, 256, 512, 1024, 2048)
_LABELS = 15

_STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --card: #ffffff; --ink: #1d1d1b; --soft: #5d5c57; --line: #e3e1da;
  --rail: #f0eee8; --bar: #2f6fc4; --bad: #c2412f; --mark: #a5641a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --ink: #eeede8; --soft: #a3a19a;
  --line: #35342f; --rail: #2a2926; --bar: #5b9bea; --bad: #e8705d; --mark: #e0a458; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 10px; }
p.under { color: var(--soft); margin: 0 0 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.tile.bad b { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.card { padding: 16px 18px; min-width: 0; }
svg { width: 100%; height: auto; display: block; font-size: 12px; font-variant-numeric: tabular-nums; }
svg text { fill: var(--ink); } svg .tick, svg .label { fill: var(--soft); }
.bar { fill: var(--bar); } .bad { fill: var(--bad); } .rail { fill: var(--rail); }
rect.bar:hover { opacity: .75; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); } .mark { stroke: var(--mark); stroke-dasharray: 4 3; }
svg .markname { fill: var(--mark); }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 6px; border-top: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); } td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.none { color: var(--soft); }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
"""


def summary(found: Measured, about: dict[str, Any]) -> dict[str, Any]:
    """What the page shows, for programs.

    Args:
      found: the counts.
      about: {"title", "total", "identity", "decoded", "funnel"}: of the data set; see `stats.stats`.
    """
    describe = lambda counts: dict(zip(_AT, quantiles(counts, list(_AT.values())), strict=True)) if counts else {}
    sides = found.numbers["short_side"]
    return {
        **about,
        "examples": found.examples,
        "good": found.good,
        "bad": dict(found.bad.most_common()),
        "marks": dict(found.marks),
        "quantiles": {name: describe(counts) for name, counts in found.numbers.items()},
        "short_side_at_least": {str(s): sum(n for v, n in sides.items() if v >= s) for s in _SIDES},
        "histograms": {name: [[v, n] for v, n in sorted(counts.items())] for name, counts in found.numbers.items()},
        **{name + "s": dict(counts.most_common()) for name, counts in found.words.items()},
    }


def page(found: Measured, about: dict[str, Any]) -> str:
    """The HTML page; arguments as for `summary`."""
    number, medians = found.numbers, {name: quantiles(c, (0.5,))[0] for name, c in found.numbers.items() if c}
    bad = found.examples - found.good
    tiles = [("examples", f"{about['total']:,}", ""), ("looked at", f"{found.examples:,}", "")]
    tiles.append(("cannot be used", percent(bad / max(1, found.examples)), "bad" if bad else ""))
    if medians:
        tiles.append(("median shorter side", f"{medians['short_side']:g} px", ""))
        tiles.append(("median file", in_bytes(medians["bytes"]), ""))
        tiles.append(("captions per image", f"{_mean(number['captions']):.3g}", ""))
    cards = [_yields(found)]
    if about["funnel"]:
        cards.insert(0, _funnel(about["funnel"]))
    if found.good:
        cards += [_sides(found), _sizes("Shorter side", number["short_side"], "pixels, logarithmic")]
        cards += [_sizes("Width", number["width"], "pixels, logarithmic")]
        cards += [_sizes("Height", number["height"], "pixels, logarithmic")]
        cards.append(_numbers("Aspect ratio", number["aspect"], "width / height, logarithmic", log=True))
        cards.append(_numbers("File size", number["bytes"], "bytes, logarithmic", log=True, form=in_bytes))
        cards.append(_words("Formats", found.words["format"], found.good))
        cards.append(_words("Colour modes", found.words["mode"], found.good))
        cards.append(_numbers("Captions per image", number["captions"], "captions"))
    if number["characters"]:
        cards.append(_numbers("Caption length", number["characters"], "characters", clip=True))
        cards.append(_numbers("Caption length in words", number["words"], "words", clip=True))
    if found.words["label"]:
        cards.append(_labels(found.words["label"]))
    said = "every image was decoded" if about["decoded"] else "headers only: images that break off are not seen here"
    part = "all examples" if found.examples == about["total"] else f"a random sample of {found.examples:,} examples"
    title = html.escape(about["title"])
    shown = "".join(f'<div class="tile {kind}"><b>{value}</b><span>{name}</span></div>' for name, value, kind in tiles)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        f'<p class="under">{part}; {said}</p><div class="tiles">{shown}</div>'
        f'<div class="cards">{"".join(cards)}</div>'
        f"<footer>data set {html.escape(about['identity'])}. Values beyond 10,000 and fractions are counted to three digits; "
        "rest on a bar to read its numbers.</footer></main></body></html>\n"
    )


def _card(title: str, plot: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cell = lambda tag, value: f"<{tag}>{html.escape(str(value))}</{tag}>"
    line = lambda tag, values: "<tr>" + "".join(cell(tag, v) for v in values) + "</tr>"
    table = (
        f"<table>{line('th', head) if head else ''}{''.join(line('td', row) for row in rows)}</table>" if rows else ""
    )
    return f'<section class="card"><h2>{html.escape(title)}</h2>{plot}<div class="scroll">{table}</div></section>'


def _numbers(
    title: str,
    counts: Counter[float],
    label: str,
    log: bool = False,
    clip: bool = False,
    form: Callable[[float], str] = lambda v: f"{v:g}",
) -> str:
    at = quantiles(counts, list(_AT.values()))
    median = at[list(_AT).index("median")]
    shown: Counter[float] = counts
    (most,) = quantiles(counts, (0.995,))
    if clip and at[-1] > 2 * most:  # one very long caption would press all others into one bar
        shown = Counter({v: n for v, n in counts.items() if v <= most})
        label += f"; {percent(1 - shown.total() / counts.total())} are longer and not drawn"
    plot = histogram(shown, label=label, log=log, form=form, marks={f"median {form(median)}": median})
    return _card(title, plot, list(_AT), [[form(v) for v in at]])


def _sizes(title: str, counts: Counter[float], label: str) -> str:
    return _numbers(title, counts, label, log=True)


def _words(title: str, counts: Counter[str], total: int) -> str:
    return _card(title, bars(counts.most_common(12), total), [], [])


def _yields(found: Measured) -> str:
    rows = [("good", found.good), *found.bad.most_common()]
    names = {
        "without_caption": "without a caption",
        "rotated": "rotated by EXIF",
        "alpha": "with alpha",
        "animated": "animated",
    }
    marked = [
        [names.get(mark, mark), f"{n:,}", percent(n / max(1, found.good))] for mark, n in found.marks.most_common()
    ]
    plot = bars(rows, found.examples, ["bar", *["bad"] * len(found.bad)])
    return _card("Yield", plot, ["of the good ones", "examples", "share"] if marked else [], marked)


def _funnel(steps: list[list[Any]]) -> str:
    rows = [(str(title), int(n)) for title, n in steps]
    table = [
        [title, f"{n:,}", f"{before - n:,}"]
        for (title, n), before in zip(rows, [rows[0][1], *(n for _, n in rows[:-1])], strict=True)
    ]
    return _card("Filters", bars(rows, rows[0][1]), ["after", "left", "dropped"], table)


def _sides(found: Measured) -> str:
    sides = found.numbers["short_side"]
    rows = [(f"{s} px or more", sum(n for v, n in sides.items() if v >= s)) for s in _SIDES]
    common = found.numbers["width"], found.numbers["height"]
    at = [
        [name, *(f"{v:g}" for v in quantiles(c, (0, 0.5, 1)))]
        for name, c in zip(("width", "height"), common, strict=True)
    ]
    return _card(
        "Resolution: enough for training at", bars(rows, found.good), ["pixels", "smallest", "median", "largest"], at
    )


def _labels(counts: Counter[str]) -> str:
    sizes = Counter(float(n) for n in counts.values())
    rows = [(f"class {name}", n) for name, n in counts.most_common(_LABELS)]
    title = f"Classes: {len(counts):,}" + (f", the {_LABELS} largest" if len(counts) > _LABELS else "")
    low, middle, high = quantiles(sizes, (0, 0.5, 1))
    table = [["examples of a class", short(low), short(middle), short(high)]]
    return _card(title, bars(rows, sum(counts.values())), ["", "fewest", "median", "most"], table)


def _mean(counts: Counter[float]) -> float:
    return sum(v * n for v, n in counts.items()) / max(1, sum(counts.values()))
