"""The page of statistics: one HTML file that needs nothing else, light or dark as its reader's screen."""

import html
from collections import Counter
from collections.abc import Callable
from typing import Any

from gigagan_jax.core.formatting import in_bytes, percent
from gigagan_jax.preparation.measure import Measured, quantiles
from gigagan_jax.reporting.histograms import bars, histogram, short
from gigagan_jax.reporting.html import card, document, tiles

_AT = {"smallest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "largest": 1.0}
_SIDES = (64, 128, 256, 512, 1024, 2048)
_LABELS = 15


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
    shown = [("examples", f"{about['total']:,}", ""), ("looked at", f"{found.examples:,}", "")]
    shown.append(("cannot be used", percent(bad / max(1, found.examples)), "bad" if bad else ""))
    if medians:
        shown.append(("median shorter side", f"{medians['short_side']:g} px", ""))
        shown.append(("median file", in_bytes(medians["bytes"]), ""))
        shown.append(("captions per image", f"{_mean(number['captions']):.3g}", ""))
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
    body = (
        f'<h1>{html.escape(about["title"])}</h1><p class="under">{part}; {said}</p>{tiles(shown)}'
        f'<div class="cards">{"".join(cards)}</div>'
        f"<footer>data set {html.escape(about['identity'])}. Values beyond 10,000 and fractions are counted to three digits; "
        "rest on a bar to read its numbers.</footer>"
    )
    return document(about["title"], body)


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
    return card(title, plot, list(_AT), [[form(v) for v in at]])


def _sizes(title: str, counts: Counter[float], label: str) -> str:
    return _numbers(title, counts, label, log=True)


def _words(title: str, counts: Counter[str], total: int) -> str:
    return card(title, bars(counts.most_common(12), total), [], [])


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
    return card("Yield", plot, ["of the good ones", "examples", "share"] if marked else [], marked)


def _funnel(steps: list[list[Any]]) -> str:
    rows = [(str(title), int(n)) for title, n in steps]
    table = [
        [title, f"{n:,}", f"{before - n:,}"]
        for (title, n), before in zip(rows, [rows[0][1], *(n for _, n in rows[:-1])], strict=True)
    ]
    return card("Filters", bars(rows, rows[0][1]), ["after", "left", "dropped"], table)


def _sides(found: Measured) -> str:
    sides = found.numbers["short_side"]
    rows = [(f"{s} px or more", sum(n for v, n in sides.items() if v >= s)) for s in _SIDES]
    common = found.numbers["width"], found.numbers["height"]
    at = [
        [name, *(f"{v:g}" for v in quantiles(c, (0, 0.5, 1)))]
        for name, c in zip(("width", "height"), common, strict=True)
    ]
    return card(
        "Resolution: enough for training at", bars(rows, found.good), ["pixels", "smallest", "median", "largest"], at
    )


def _labels(counts: Counter[str]) -> str:
    sizes = Counter(float(n) for n in counts.values())
    rows = [(f"class {name}", n) for name, n in counts.most_common(_LABELS)]
    title = f"Classes: {len(counts):,}" + (f", the {_LABELS} largest" if len(counts) > _LABELS else "")
    low, middle, high = quantiles(sizes, (0, 0.5, 1))
    table = [["examples of a class", short(low), short(middle), short(high)]]
    return card(title, bars(rows, sum(counts.values())), ["", "fewest", "median", "most"], table)


def _mean(counts: Counter[float]) -> float:
    return sum(v * n for v, n in counts.items()) / max(1, sum(counts.values()))
