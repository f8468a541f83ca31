"""The page of statistics: one self-contained HTML file, light or dark after the reader's setting."""

import html
from collections import Counter
from collections.abc import Callable
from typing import Any

from gigagan_jax.core.formatting import format_bytes, format_percent
from gigagan_jax.preparation.measure import Measurements, count_quantiles
from gigagan_jax.reporting.histograms import abbreviate_number, draw_bars, draw_histogram
from gigagan_jax.reporting.html import render_card, render_document, render_tiles

# {column of the tables: share of the examples}
_QUANTILES = {"smallest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "largest": 1.0}
# Resolutions at which models train, in pixels.
_RESOLUTIONS = (64, 128, 256, 512, 1024, 2048)
# Bars of a card. The JSON file holds all values.
_SHOWN_CLASSES, _SHOWN_WORDS = 15, 12


def summary_data(found: Measurements, about: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the page, ready for JSON.

    Args:
      found: the counts.
      about: {"title", "total", "identity", "decoded", "funnel"}: of the data set; see `stats.write_stats`.
    """
    # Without values, quantiles are NaN, which is no JSON.
    shares = list(_QUANTILES.values())
    describe = lambda counts: dict(zip(_QUANTILES, count_quantiles(counts, shares), strict=True)) if counts else {}
    sides = found.numbers["short_side"]
    # These keys are the format of the JSON file.
    return {
        **about,
        "examples": found.examples,
        "good": found.good,
        "bad": dict(found.bad.most_common()),
        "marks": dict(found.marks),
        "quantiles": {name: describe(counts) for name, counts in found.numbers.items()},
        "short_side_at_least": {str(s): sum(n for v, n in sides.items() if v >= s) for s in _RESOLUTIONS},
        "histograms": {name: [[v, n] for v, n in sorted(counts.items())] for name, counts in found.numbers.items()},
        # "formats", "modes" and "labels".
        **{name + "s": dict(counts.most_common()) for name, counts in found.words.items()},
    }


def render_page(found: Measurements, about: dict[str, Any]) -> str:
    """Renders the HTML page. Arguments are those of `summary_data`."""
    number, medians = found.numbers, {name: count_quantiles(c, (0.5,))[0] for name, c in found.numbers.items() if c}
    bad = found.examples - found.good
    shown = [("examples", f"{about['total']:,}", ""), ("looked at", f"{found.examples:,}", "")]
    shown.append(("cannot be used", format_percent(bad / max(1, found.examples)), "bad" if bad else ""))
    if medians:
        shown.append(("median shorter side", f"{medians['short_side']:g} px", ""))
        shown.append(("median file", format_bytes(medians["bytes"]), ""))
        shown.append(("captions per image", f"{_count_mean(number['captions']):.3g}", ""))
    cards = [_yield_card(found)]
    # Filters come first: all other cards count what they left.
    if about["funnel"]:
        cards.insert(0, _filter_card(about["funnel"]))
    # Bad examples have no size, format or captions.
    if found.good:
        cards += [_resolution_card(found), _size_card("Shorter side", number["short_side"], "pixels, logarithmic")]
        cards += [_size_card("Width", number["width"], "pixels, logarithmic")]
        cards += [_size_card("Height", number["height"], "pixels, logarithmic")]
        cards.append(_number_card("Aspect ratio", number["aspect"], "width / height, logarithmic", log=True))
        cards.append(_number_card("File size", number["bytes"], "bytes, logarithmic", log=True, form=format_bytes))
        cards.append(_word_card("Formats", found.words["format"], found.good))
        cards.append(_word_card("Colour modes", found.words["mode"], found.good))
        cards.append(_number_card("Captions per image", number["captions"], "captions"))
    if number["characters"]:
        cards.append(_number_card("Caption length", number["characters"], "characters", clip=True))
        cards.append(_number_card("Caption length in words", number["words"], "words", clip=True))
    if found.words["label"]:
        cards.append(_class_card(found.words["label"]))
    method = "every image was decoded" if about["decoded"] else "headers only: truncated images are not detected"
    part = "all examples" if found.examples == about["total"] else f"a random sample of {found.examples:,} examples"
    body = (
        f'<h1>{html.escape(about["title"])}</h1><p class="under">{part}; {method}</p>{render_tiles(shown)}'
        f'<div class="cards">{"".join(cards)}</div>'
        f"<footer>data set {html.escape(about['identity'])}. Values beyond 10,000 and fractions are counted to three "
        "digits; rest on a bar to read its numbers.</footer>"
    )
    return render_document(about["title"], body)


def _number_card(
    title: str,
    counts: Counter[float],
    label: str,
    log: bool = False,
    clip: bool = False,
    form: Callable[[float], str] = lambda v: f"{v:g}",
) -> str:
    values = count_quantiles(counts, list(_QUANTILES.values()))
    median = values[list(_QUANTILES).index("median")]
    # Quantiles in the table are of all values, drawn or not.
    shown: Counter[float] = counts
    # Cut at 99.5 %: the axis then ends near the longest usual captions.
    (most,) = count_quantiles(counts, (0.995,))
    # One very long caption would compress all others into one bar.
    if clip and values[-1] > 2 * most:
        shown = Counter({v: n for v, n in counts.items() if v <= most})
        label += f"; {format_percent(1 - shown.total() / counts.total())} are longer and not drawn"
    plot = draw_histogram(shown, label=label, log=log, form=form, marks={f"median {form(median)}": median})
    return render_card(title, plot, list(_QUANTILES), [[form(v) for v in values]])


def _size_card(title: str, counts: Counter[float], label: str) -> str:
    return _number_card(title, counts, label, log=True)


def _word_card(title: str, counts: Counter[str], total: int) -> str:
    return render_card(title, draw_bars(counts.most_common(_SHOWN_WORDS), total), [], [])


def _yield_card(found: Measurements) -> str:
    # Bars are shares of all examples, the table's shares are of the good ones.
    rows = [("good", found.good), *found.bad.most_common()]
    names = {
        "without_caption": "without a caption",
        "rotated": "rotated by EXIF",
        "alpha": "with alpha",
        "animated": "animated",
    }
    marked = [
        [names.get(mark, mark), f"{n:,}", format_percent(n / max(1, found.good))]
        for mark, n in found.marks.most_common()
    ]
    plot = draw_bars(rows, found.examples, ["bar", *["bad"] * len(found.bad)])
    return render_card("Yield", plot, ["of the good ones", "examples", "share"] if marked else [], marked)


def _filter_card(steps: list[list[Any]]) -> str:
    rows = [(str(title), int(n)) for title, n in steps]
    # Each row is compared with the one before it. The first row, all examples, drops none.
    table = [
        [title, f"{n:,}", f"{before - n:,}"]
        for (title, n), before in zip(rows, [rows[0][1], *(n for _, n in rows[:-1])], strict=True)
    ]
    return render_card("Filters", draw_bars(rows, rows[0][1]), ["after", "left", "dropped"], table)


def _resolution_card(found: Measurements) -> str:
    sides = found.numbers["short_side"]
    rows = [(f"{s} px or more", sum(n for v, n in sides.items() if v >= s)) for s in _RESOLUTIONS]
    axes = found.numbers["width"], found.numbers["height"]
    table = [
        [name, *(f"{v:g}" for v in count_quantiles(c, (0, 0.5, 1)))]
        for name, c in zip(("width", "height"), axes, strict=True)
    ]
    return render_card(
        "Resolution: enough for training at",
        draw_bars(rows, found.good),
        ["pixels", "smallest", "median", "largest"],
        table,
    )


def _class_card(counts: Counter[str]) -> str:
    # Counts of counts: how many classes have how many examples.
    sizes = Counter(float(n) for n in counts.values())
    rows = [(f"class {name}", n) for name, n in counts.most_common(_SHOWN_CLASSES)]
    title = f"Classes: {len(counts):,}" + (f", the {_SHOWN_CLASSES} largest" if len(counts) > _SHOWN_CLASSES else "")
    low, middle, high = count_quantiles(sizes, (0, 0.5, 1))
    table = [["examples of a class", abbreviate_number(low), abbreviate_number(middle), abbreviate_number(high)]]
    return render_card(title, draw_bars(rows, sum(counts.values())), ["", "fewest", "median", "most"], table)


def _count_mean(counts: Counter[float]) -> float:
    return sum(v * n for v, n in counts.items()) / max(1, sum(counts.values()))
