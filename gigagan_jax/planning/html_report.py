"""A plan as one HTML page: memory against the chip's, the step's time by module, what is exchanged."""

import html
from collections.abc import Sequence
from typing import Any

from gigagan_jax.core.formatting import gib, milliseconds, percent
from gigagan_jax.planning.text_report import MEMORY
from gigagan_jax.reporting.html import card, document, tiles

_WIDTH, _WIDE, _LINE, _RIGHT = 520, 1100, 24, 120
_MODULES = 20
_STYLE = """
.part0 { fill: #2f6fc4; } .part1 { fill: #5fa052; } .part2 { fill: #c98a2b; } .part3 { fill: #8f62c0; }
.part4 { fill: #c2412f; } .part5 { fill: #3a9c9c; } .part6 { fill: #8a8880; } .part7 { fill: #b05a8c; }
.key { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; margin-top: 8px; }
.key svg { width: 11px; height: 11px; display: inline-block; margin-right: 5px; }
"""


def page(plan: dict[str, Any]) -> str:
    """The page of a plan; see compiling.plan."""
    title = f"{plan['config']} on {plan['chips']} {plan['chip']} chips"
    mesh = ", ".join(f"{k}={v}" for k, v in plan["mesh"].items())
    total = max((s["memory"]["total"] or 0 for s in plan["steps"].values()), default=0)
    shown = [("memory: " + ("fits" if plan["fits"] else "does not fit"), gib(total), "" if plan["fits"] else "bad")]
    if "seconds" in plan:
        shown += [
            ("a step", milliseconds(plan["seconds"]), ""),
            ("of peak", percent(plan["share_of_peak"]), ""),
            ("images/s a chip", f"{plan['images_per_second_per_chip']:.2f}", ""),
            ("images a day", f"{plan['images_per_day'] / 1e6:,.1f} M", ""),
        ]
    if "seconds_to_compile" in plan:
        shown.append(("to compile", f"{plan['seconds_to_compile'] / 60:.1f} min", ""))
    cards = []
    for name, step in plan["steps"].items():
        cards += _cards(plan, step, "" if name == "without_r1" else " with R1")
    versions = f"jax {plan['jax']}" + (f", libtpu {plan['libtpu']}" if "libtpu" in plan else "")
    body = (
        f"<h1>{html.escape(title)}</h1>"
        f'<p class="under">{html.escape(plan["topology"])}; mesh {html.escape(mesh)}; batch {plan["batch_size"]}</p>'
        f'{tiles(shown)}<div class="cards">{"".join(cards)}</div>'
        f"<footer>{versions}. Memory of the state is exact; every time is the compiler's estimate, not a measurement.</footer>"
    )
    return document(title, body, _STYLE)


def _cards(plan: dict[str, Any], step: dict[str, Any], which: str) -> list[str]:
    memory = {k: v for k, v in step["memory"].items() if v and k != "total"}
    chip = plan["bytes_of_chip"]
    rows = [[MEMORY[k], gib(v), percent(v / chip)] for k, v in memory.items()]
    parts = [(MEMORY[k], v, gib(v)) for k, v in memory.items()]
    cards = [card(f"Memory of a chip{which}", _stack(parts, chip, "free"), ["", "", f"of {gib(chip)}"], rows)]
    if "seconds" not in step:
        why = step.get(
            "why", "Not known without the GPU: the compiler's temporaries, the step time, what is exchanged."
        )
        return [*cards, card(f"Time{which}", f"<p>{html.escape(why)}</p>")]
    shown = step["seconds_of_communication"] - step["seconds_hidden"]
    matrix, operations = step["seconds_of_matrix_units"], step["seconds_of_operations"]
    times = [
        ("matrix units", matrix),
        ("other operations", operations - matrix),
        ("communication that nothing hides", shown),
    ]
    rows = [
        [f"FLOPs at the chip's peak ({step['flops'] / 1e12:.2f} T)", milliseconds(step["seconds_at_peak"])],
        ["communication beside operations", milliseconds(step["seconds_hidden"])],
        ["optimal_seconds: a bound, loops counted once", milliseconds(step["seconds_optimal"])],
    ]
    of_time = [(name, s, milliseconds(s)) for name, s in times]
    cards.append(card(f"Time of a step{which}", _stack(of_time, step["seconds"]), ["also", ""], rows))
    slow = step["modules"][:_MODULES]
    bars = [(r["module"], r["share"], f"{milliseconds(r['seconds'])}, {percent(r['share'])}") for r in slow]
    ways = ("forward", "recomputed", "backward")
    rows = [[r["module"], *(milliseconds(r[w]) for w in ways)] for r in slow]
    cards.append(card(f"Operations by module{which}", _bars(bars, _WIDE), ["", *ways], rows, wide=True))
    exchanges = step["collectives"]
    most = sum(r["bytes_sent"] for r in exchanges) or 1.0
    bars = [
        (f"{r['kind']}, {r['network']}", r["bytes_sent"] / most, f"{r['bytes_sent'] / 1e6:,.0f} MB") for r in exchanges
    ]
    rows = [
        [
            r["kind"],
            r["exchanges"],
            r["largest_group"],
            milliseconds(r["seconds"]),
            milliseconds(r["seconds_overlapped"]),
        ]
        for r in exchanges
    ]
    head = ["", "times", "group", "time", "overlapped"]
    return [*cards, card(f"What a chip sends{which}", _bars(bars), head, rows)]


def _stack(parts: Sequence[tuple[str, float, str]], whole: float, rest: str = "") -> str:
    """One bar of (name, size, how it is written) against `whole`, longer than it where they do not fit; with a key."""
    total = max(whole, sum(size for _, size, _ in parts)) or 1.0
    x, out, key = 0.0, [], []
    for n, (name, size, shown) in enumerate(parts):
        width = size / total * _WIDTH
        out.append(
            f'<rect class="part{n % 8}" x="{x:.1f}" y="4" width="{max(width, 0.5):.1f}" height="30">'
            f"<title>{html.escape(f'{name}: {shown}')}</title></rect>"
        )
        key.append(
            f'<span><svg viewBox="0 0 11 11"><rect class="part{n % 8}" width="11" height="11" rx="2"/></svg>'
            f"{html.escape(f'{name} {shown}')}</span>"
        )
        x += width
    edge = whole / total * _WIDTH
    mark = f'<line class="mark" x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="38"/>' if edge < _WIDTH - 0.5 else ""
    label = html.escape(", ".join(f"{name} {shown}" for name, _, shown in parts))
    left = f"<title>{html.escape(rest)}</title>" if rest else ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} 38" role="img" aria-label="{label}">'
        f'<rect class="rail" x="0" y="4" width="{_WIDTH}" height="30">{left}</rect>{"".join(out)}{mark}</svg>'
        f'<div class="key">{"".join(key)}</div>'
    )


def _bars(rows: Sequence[tuple[str, float, str]], width: int = _WIDTH) -> str:
    """Horizontal bars of (name, share of the whole, how it is written)."""
    if not rows:
        return '<p class="none">nothing</p>'
    left = int(0.38 * width)
    room = width - left - _RIGHT
    most = left // 7  # letters
    out = [f'<svg viewBox="0 0 {width} {_LINE * len(rows) + 8}" role="img">']
    for n, (name, share, shown) in enumerate(rows):
        y = 4 + n * _LINE
        short = name if len(name) <= most else "…" + name[1 - most :]
        out.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(short)}<title>{html.escape(name)}</title></text>'
            f'<rect class="rail" x="{left}" y="{y + 4}" width="{room}" height="15" rx="2"/>'
            f'<rect class="bar" x="{left}" y="{y + 4}" width="{max(share * room, 0.75):.1f}" height="15" rx="2"/>'
            f'<text class="tick" x="{left + room + 6}" y="{y + 15}">{html.escape(shown)}</text>'
        )
    return "".join(out) + "</svg>"
