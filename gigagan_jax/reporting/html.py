"""What pages share: one HTML file that needs nothing else, light or dark as its reader's screen, readable on a phone."""

import html
from collections.abc import Sequence
from typing import Any

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


def card(
    title: str, body: str, head: Sequence[str] = (), rows: Sequence[Sequence[Any]] = (), wide: bool = False
) -> str:
    """A box with a title, HTML, and a table under it.

    Args:
      title: of the box; plain text, as are the cells of the table.
      body: HTML.
      head: names of the columns; none for a table without.
      rows: of the table; none for no table.
      wide: over the whole width of the page.
    """
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{html.escape(title)}</h2>{body}{table(head, rows)}</section>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain text; nothing without rows."""
    cell = lambda tag, value: f"<{tag}>{html.escape(str(value))}</{tag}>"
    line = lambda tag, values: "<tr>" + "".join(cell(tag, v) for v in values) + "</tr>"
    inner = (
        f"<table>{line('th', head) if head else ''}{''.join(line('td', row) for row in rows)}</table>" if rows else ""
    )
    return f'<div class="scroll">{inner}</div>'


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """(what, its value, "" or "bad") as a row of boxes; plain text."""
    one = lambda name, value, kind: (
        f'<div class="tile {kind}"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
    )
    return f'<div class="tiles">{"".join(one(*v) for v in values)}</div>'


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """The whole page.

    Args:
      title: plain text.
      body: HTML.
      style: more of it.
      script: plain JavaScript at the end of the page.
    """
    code = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body><main>{body}</main>{code}</body></html>\n"
    )
