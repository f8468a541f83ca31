"""A plan as one HTML page: memory of a chip, time of the step by module, and collectives."""

import html
from collections.abc import Sequence
from typing import Any

from gigagan_jax.core.formatting import format_gib, format_milliseconds, format_percent
from gigagan_jax.planning.text_report import MEMORY
from gigagan_jax.reporting.html import render_card, render_document, render_tiles

# Pixels: width of a chart, width of a wide chart, height of a row, room for the figures on the right.
_WIDTH, _WIDE, _LINE, _RIGHT = 520, 1100, 24, 120
# Rows of modules; the JSON file has all of them.
_MODULES = 20
_STYLE = """
.part0 { fill: #2f6fc4; } .part1 { fill: #5fa052; } .part2 { fill: #c98a2b; } .part3 { fill: #8f62c0; }
.part4 { fill: #c2412f; } .part5 { fill: #3a9c9c; } .part6 { fill: #8a8880; } .part7 { fill: #b05a8c; }
.key { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; margin-top: 8px; }
.key svg { width: 11px; height: 11px; display: inline-block; margin-right: 5px; }
"""


def render_page(plan: dict[str, Any]) -> str:
    """The page of a plan, see `compile.plan_run`."""
    title = f"{plan['config']} on {plan['chips']} {plan['chip']} chips"
    mesh = ", ".join(f"{k}={v}" for k, v in plan["mesh"].items())
    # A step that did not compile may have no total: the message of the compiler names none.
    total = max((s["memory"]["total"] or 0 for s in plan["steps"].values()), default=0)
    shown = [
        ("memory: " + ("fits" if plan["fits"] else "does not fit"), format_gib(total), "" if plan["fits"] else "bad")
    ]
    if "seconds" in plan:
        shown += [
            ("a step", format_milliseconds(plan["seconds"]), ""),
            ("of peak", format_percent(plan["share_of_peak"]), ""),
            ("images/s a chip", f"{plan['images_per_second_per_chip']:.2f}", ""),
            ("images a day", f"{plan['images_per_day'] / 1e6:,.1f} M", ""),
        ]
    if "seconds_to_compile" in plan:
        shown.append(("to compile", f"{plan['seconds_to_compile'] / 60:.1f} min", ""))
    cards = []
    for name, step in plan["steps"].items():
        cards += _step_cards(plan, step, "" if name == "without_r1" else " with R1")
    # A plan for a GPU is made without libtpu.
    versions = f"jax {plan['jax']}" + (f", libtpu {plan['libtpu']}" if "libtpu" in plan else "")
    body = (
        f"<h1>{html.escape(title)}</h1>"
        f'<p class="under">{html.escape(plan["topology"])}; mesh {html.escape(mesh)}; batch {plan["batch_size"]}</p>'
        f'{render_tiles(shown)}<div class="cards">{"".join(cards)}</div>'
        f"<footer>{versions}. Memory of the state is exact; "
        "every time is the compiler's estimate, not a measurement.</footer>"
    )
    return render_document(title, body, _STYLE)


def _step_cards(plan: dict[str, Any], step: dict[str, Any], which: str) -> list[str]:
    memory = {k: v for k, v in step["memory"].items() if v and k != "total"}
    chip = plan["bytes_of_chip"]
    rows = [[MEMORY[k], format_gib(v), format_percent(v / chip)] for k, v in memory.items()]
    parts = [(MEMORY[k], v, format_gib(v)) for k, v in memory.items()]
    cards = [
        render_card(
            f"Memory of a chip{which}", _stacked_bar(parts, chip, "free"), ["", "", f"of {format_gib(chip)}"], rows
        )
    ]
    # No time: the compiler found no room, or there is no compiler for this chip.
    if "seconds" not in step:
        why = step.get(
            "why", "Not known without the GPU: the compiler's temporaries, the step time, what is exchanged."
        )
        return [*cards, render_card(f"Time{which}", f"<p>{html.escape(why)}</p>")]
    # The three parts of the bar add up to the time of the step; hidden communication is in the table below it.
    exposed = step["seconds_of_communication"] - step["seconds_hidden"]
    matrix, operations = step["seconds_of_matrix_units"], step["seconds_of_operations"]
    times = [
        ("matrix units", matrix),
        ("other operations", operations - matrix),
        ("communication that nothing hides", exposed),
    ]
    rows = [
        [f"FLOPs at the chip's peak ({step['flops'] / 1e12:.2f} T)", format_milliseconds(step["seconds_at_peak"])],
        ["communication beside operations", format_milliseconds(step["seconds_hidden"])],
        ["optimal_seconds: a bound, loops counted once", format_milliseconds(step["seconds_optimal"])],
    ]
    of_time = [(name, s, format_milliseconds(s)) for name, s in times]
    cards.append(render_card(f"Time of a step{which}", _stacked_bar(of_time, step["seconds"]), ["also", ""], rows))
    slow = step["modules"][:_MODULES]
    bars = [
        (r["module"], r["share"], f"{format_milliseconds(r['seconds'])}, {format_percent(r['share'])}") for r in slow
    ]
    ways = ("forward", "recomputed", "backward")
    rows = [[r["module"], *(format_milliseconds(r[w]) for w in ways)] for r in slow]
    cards.append(render_card(f"Operations by module{which}", _bar_chart(bars, _WIDE), ["", *ways], rows, wide=True))
    exchanges = step["collectives"]
    # 1 avoids a division by zero on one chip, which sends nothing.
    total = sum(r["bytes_sent"] for r in exchanges) or 1.0
    bars = [
        (f"{r['kind']}, {r['network']}", r["bytes_sent"] / total, f"{r['bytes_sent'] / 1e6:,.0f} MB") for r in exchanges
    ]
    rows = [
        [
            r["kind"],
            r["exchanges"],
            r["largest_group"],
            format_milliseconds(r["seconds"]),
            format_milliseconds(r["seconds_overlapped"]),
        ]
        for r in exchanges
    ]
    head = ["", "times", "group", "time", "overlapped"]
    return [*cards, render_card(f"What a chip sends{which}", _bar_chart(bars), head, rows)]


def _stacked_bar(parts: Sequence[tuple[str, float, str]], whole: float, rest: str = "") -> str:
    """One stacked bar of (name, size, label) with its key; a mark at `whole` where the parts exceed it."""
    total = max(whole, sum(size for _, size, _ in parts)) or 1.0
    x, rectangles, key = 0.0, [], []
    for n, (name, size, shown) in enumerate(parts):
        # Half a pixel at least, so that a small part stays visible and keeps its tooltip.
        width = size / total * _WIDTH
        rectangles.append(
            f'<rect class="part{n % 8}" x="{x:.1f}" y="4" width="{max(width, 0.5):.1f}" height="30">'
            f"<title>{html.escape(f'{name}: {shown}')}</title></rect>"
        )
        key.append(
            f'<span><svg viewBox="0 0 11 11"><rect class="part{n % 8}" width="11" height="11" rx="2"/></svg>'
            f"{html.escape(f'{name} {shown}')}</span>"
        )
        x += width
    edge = whole / total * _WIDTH
    # Where everything fits, the end of the rail is the mark.
    mark = f'<line class="mark" x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="38"/>' if edge < _WIDTH - 0.5 else ""
    label = html.escape(", ".join(f"{name} {shown}" for name, _, shown in parts))
    left = f"<title>{html.escape(rest)}</title>" if rest else ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} 38" role="img" aria-label="{label}">'
        f'<rect class="rail" x="0" y="4" width="{_WIDTH}" height="30">{left}</rect>{"".join(rectangles)}{mark}</svg>'
        f'<div class="key">{"".join(key)}</div>'
    )


def _bar_chart(rows: Sequence[tuple[str, float, str]], width: int = _WIDTH) -> str:
    """Horizontal bars of (name, share of the whole, label)."""
    if not rows:
        return '<p class="none">nothing</p>'
    left = int(0.38 * width)
    room = width - left - _RIGHT
    # A letter of this font is about 7 px wide.
    max_letters = left // 7
    elements = [f'<svg viewBox="0 0 {width} {_LINE * len(rows) + 8}" role="img">']
    for n, (name, share, shown) in enumerate(rows):
        y = 4 + n * _LINE
        # The end of a module's path tells more than its start.
        short = name if len(name) <= max_letters else "…" + name[1 - max_letters :]
        elements.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(short)}'
            f"<title>{html.escape(name)}</title></text>"
            f'<rect class="rail" x="{left}" y="{y + 4}" width="{room}" height="15" rx="2"/>'
            f'<rect class="bar" x="{left}" y="{y + 4}" width="{max(share * room, 0.75):.1f}" height="15" rx="2"/>'
            f'<text class="tick" x="{left + room + 6}" y="{y + 15}">{html.escape(shown)}</text>'
        )
    return "".join(elements) + "</svg>"
