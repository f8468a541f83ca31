"""Building blocks of the HTML pages. A page is one self-contained file with a light and a dark scheme, usable on a phone."""

import html
from collections.abc import Sequence
from typing import Any

# Every colour is a variable, so that the dark scheme replaces them in one place.
STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --card: #ffffff; --ink: #1d1d1b; --soft: #5d5c57; --line: #e3e1da;
  --rail: #f0eee8; --bar: #2f6fc4; --bad: #c2412f; --mark: #a5641a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --ink: #eeede8; --soft: #a3a19a;
  --line: #35342f; --rail: #2a2926; --bar: #5b9bea; --bad: #e8705d; --mark: #e0a458; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px; }
@media (max-width: 560px) { main { padding: 20px 12px 32px; } }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 10px; }
p.under { color: var(--soft); margin: 0 0 22px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 16px; }
@media (max-width: 560px) { .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; } }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.tile.bad b { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.card { padding: 16px 18px; min-width: 0; }
.card.wide { grid-column: 1 / -1; }
@media (max-width: 560px) { .card { padding: 12px; } }
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


def render_card(
    title: str, body: str, head: Sequence[str] = (), rows: Sequence[Sequence[Any]] = (), wide: bool = False
) -> str:
    """Renders a box with a title, a body and a table below it.

    Args:
      title: title of the box, as plain text.
      body: content of the box, as HTML.
      head: column names; empty for a table without a header.
      rows: rows of plain text; empty for no table.
      wide: whether the box spans the width of the page.
    """
    # The body is trusted HTML of our own functions, the rest may be text of a data set.
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{html.escape(title)}</h2>{body}{render_table(head, rows)}</section>'


def render_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Renders a table of plain text; an empty box without rows."""
    # Captions and paths come from data sets: each cell is escaped.
    cell = lambda tag, value: f"<{tag}>{html.escape(str(value))}</{tag}>"
    line = lambda tag, values: "<tr>" + "".join(cell(tag, v) for v in values) + "</tr>"
    inner = (
        f"<table>{line('th', head) if head else ''}{''.join(line('td', row) for row in rows)}</table>" if rows else ""
    )
    # A wide table scrolls in its box: the page itself must not be wider than a phone.
    return f'<div class="scroll">{inner}</div>'


def render_tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Renders a row of boxes.

    Args:
      values: (label, value, "" or "bad") of each box, as plain text.
    """
    render_one = lambda name, value, kind: (
        f'<div class="tile {kind}"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
    )
    return f'<div class="tiles">{"".join(render_one(*v) for v in values)}</div>'


def render_document(title: str, body: str, style: str = "", script: str = "") -> str:
    """Renders the whole page.

    Args:
      title: title of the page, as plain text.
      body: content of the page, as HTML.
      style: CSS that follows the shared style.
      script: JavaScript at the end of the page.
    """
    # The script comes last: it reads elements that must exist by then.
    code = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        # Without it a phone lays the page out as wide as a desktop's.
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body><main>{body}</main>{code}</body></html>\n"
    )
