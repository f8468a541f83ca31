"""The page of a run: header, grids, where the time went, curves, health, data, settings, checkpoints."""

import html
import json
import re
import time
from collections.abc import Sequence
from typing import Any

from gigagan_jax.config import Config, flatten, to_dict
from gigagan_jax.core.formatting import duration, in_bytes, percent
from gigagan_jax.reporting import charts
from gigagan_jax.reporting.charts import Curve, chart
from gigagan_jax.reporting.histograms import bars
from gigagan_jax.reporting.html import card, document, table, tiles
from gigagan_jax.reporting.run_data import Metrics, Run
from gigagan_jax.telemetry.goodput import CAUSES, by_size

_ALIVE_SECONDS = 200  # without a sign of life a run that has not ended was killed
_ROWS = 60  # of long tables
_CHARTS = 60  # of metrics that have no place of their own
# Charts: title, names of metrics, or beginnings of them that end in "*".
_TRAINING = (
    ("Loss of G and D", ("loss/g", "loss/d")),
    ("Logits of D", ("logits/real", "logits/fake", "logits/wrong")),
    ("R1 penalty", ("loss/r1",)),
    ("Gradient norms", ("grad_norm/*",)),
    ("Terms of D's loss", ("loss/d_*", "loss/v")),
    ("Terms of G's loss", ("loss/g_*", "loss/clip")),
    ("Spread of the generated images", ("image/*",)),
)
_SPEED = (
    ("Images a second", ("images_per_second",)),
    ("MFU: share of the chips' peak", ("mfu",)),
    ("Goodput: share of wall time in useful steps", ("goodput",)),
)
_HEALTH = (
    ("What D tells apart", ("health/d_*",)),
    ("Diversity, of that of real images", ("health/diversity*",)),
    ("What each level adds to the image", ("health/level/*",)),
    ("Spread of D's exits", ("health/exit/*",)),
    ("Skipped steps and rollbacks", ("health/skipped", "health/rollbacks", "health/lr_scale")),
)
_KNOWN = ("loss/", "logits/", "grad_norm/", "image/", "images_per_second", "mfu", "goodput", "health/", "data/")

_STYLE = (
    charts.STYLE
    + """
.badge { display: inline-block; font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 999px;
  vertical-align: middle; margin-left: 8px; background: var(--rail); color: var(--soft); }
.badge.done { background: var(--c2); color: var(--page); } .badge.running { background: var(--c0); color: var(--page); }
.badge.failed { background: var(--bad); color: var(--page); }
@media (min-width: 561px) { .tiles { grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); } }
h2.part { font-size: 20px; margin: 30px 0 12px; }
.film img { display: block; width: 100%; height: auto; max-height: 78vh; object-fit: contain; border-radius: 6px;
  background: var(--rail); image-rendering: auto; }
.film .row { display: flex; align-items: center; gap: 14px; margin-top: 12px; }
.film input { flex: 1; min-width: 0; accent-color: var(--bar); }
.film output { min-width: 7em; font-variant-numeric: tabular-nums; }
.film button { font: inherit; color: var(--ink); background: var(--rail); border: 1px solid var(--line); border-radius: 8px;
  padding: 3px 14px; cursor: pointer; }
.stack { display: flex; height: 34px; border-radius: 8px; overflow: hidden; background: var(--rail); }
.stack div { min-width: 1px; }
.k-step { background: var(--c2); } .k-compile { background: var(--c0); } .k-start { background: var(--c6); }
.k-data { background: var(--c1); } .k-checkpoint { background: var(--c4); } .k-evaluation { background: var(--c3); }
.k-profile { background: #8d7ad0; } .k-other { background: var(--c7); } .k-repeated { background: var(--bad); }
.k-skipped { background: var(--c5); } .k-down { background: var(--line); }
.causes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 3px 26px; margin-top: 12px;
  font-size: 14px; }
.causes div { display: flex; gap: 8px; align-items: center; }
.causes i { width: 11px; height: 11px; border-radius: 3px; flex: none; }
.causes span { flex: 1; } .causes b { font-weight: 600; font-variant-numeric: tabular-nums; }
.causes em { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums; min-width: 6.5em; text-align: right; }
td { overflow-wrap: anywhere; } table.settings td:first-child { min-width: 15em; }
table.settings td:not(:first-child) { font-family: ui-monospace, Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--soft); margin-top: 12px; }
.finding { border-left: 3px solid var(--mark); padding: 2px 0 2px 10px; margin: 8px 0; font-size: 14px; }
.finding.stop, .finding.rollback { border-color: var(--bad); }
.finding span { color: var(--soft); font-size: 13px; display: block; }
"""
)
_SCRIPT = (
    charts.SCRIPT
    + """
const film = document.querySelector('.film');
if (document.getElementById('grids')) {
  const grids = JSON.parse(document.getElementById('grids').textContent), slider = film.querySelector('input');
  const picture = film.querySelector('img'), said = film.querySelector('output'), button = film.querySelector('button');
  let timer = null;
  const draw = () => { const g = grids[+slider.value]; picture.src = g.uri; said.textContent = g.kimg + ' kimg'; };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = 'Play'; };
  slider.addEventListener('input', () => { stop(); draw(); });
  button.addEventListener('click', () => {
    if (timer) return stop();
    button.textContent = 'Pause';
    if (+slider.value >= grids.length - 1) slider.value = 0;
    draw();
    timer = setInterval(() => { slider.value = +slider.value + 1; draw(); if (+slider.value >= grids.length - 1) stop(); }, 450);
  });
}
"""
)


def page(run: Run) -> str:
    """The HTML page of a run."""
    parts = [_header(run)]
    if run.grids:
        parts.append(_film(run))
    marks = _marks(run)
    taken: set[str] = set()

    def draw_charts(groups: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        out = []
        for title, patterns in groups:
            names = [n for p in patterns for n in _matching(run.metrics, p) if n not in taken]
            taken.update(names)
            for i in range(0, len(names), charts.COLOURS):
                out.append(card(title, chart(_curves(run.metrics, names[i : i + charts.COLOURS]), marks)))
        return out

    parts.append(_part("Where the time went", [*_goodput(run), *draw_charts(_SPEED)]))
    taken.add("images_per_second_per_chip")  # a multiple of the other
    training = draw_charts(_TRAINING)
    training += draw_charts([(n, (n,)) for n in sorted(run.metrics.columns) if n.startswith(("loss/", "logits/"))])
    parts.append(_part("Training", training or [_nothing("no line of metrics yet")]))
    rest = [n for n in sorted(run.metrics.columns) if not n.startswith(_KNOWN)]
    parts.append(_part("Evaluation", _evaluation(run.metrics, rest, draw_charts)))
    health = draw_charts(_HEALTH)
    health += draw_charts([(n, (n,)) for n in sorted(run.metrics.columns) if n.startswith("health/")][:_CHARTS])
    parts.append(_part("Health", [*_findings(run.health), *health]))
    parts.append(_part("Data", [*_data(run), *draw_charts([("Bad examples replaced so far", ("data/*",))])]))
    parts.append(_part("Settings and files", [_settings(run), *_sessions(run), *_checkpoints(run)]))
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.now))
    parts.append(
        f"<footer>{html.escape(str(run.workdir.resolve()))}, read {made}. Curves are thinned to {charts.POINTS:,} points with "
        "their extremes; dashed lines are restarts and rollbacks. Point at a curve to read it.</footer>"
    )
    return document(run.workdir.resolve().name, "".join(parts), _STYLE, _SCRIPT)


def _part(title: str, cards: Sequence[str]) -> str:
    return f'<h2 class="part">{title}</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def _nothing(text: str) -> str:
    return f'<section class="card wide none">{text}</section>'


def _matching(metrics: Metrics, pattern: str) -> list[str]:
    if pattern.endswith("*"):
        natural = lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
        return sorted((n for n in metrics.columns if n.startswith(pattern[:-1])), key=natural)
    return [pattern] if pattern in metrics.columns else []


def _curves(metrics: Metrics, names: Sequence[str]) -> list[Curve]:
    return [Curve(n, *metrics.columns[n]) for n in names]


def _marks(run: Run) -> list[tuple[float, str, str]]:
    """Restarts and rollbacks, as `chart` takes them; of very many the last."""
    out = []
    for session in run.account.sessions[1:]:
        if session.first_step is not None:
            out.append((run.metrics.kimg_of(session.first_step), f"restart from step {session.first_step}", "restart"))
    for before, after in run.account.rollbacks:
        out.append((run.metrics.kimg_of(after), f"rolled back from step {before} to {after}", "rollback"))
    return out[-200:]


# ---------------------------------------------------------------- header


def _state(run: Run) -> tuple[str, str, str]:
    """(class of the badge, its text, a sentence on why)"""
    if not run.account.sessions:
        return "", "state unknown", ""
    last = run.account.sessions[-1]
    if last.exit == "done":
        return "done", "finished", ""
    if last.exit == "stopped":
        return "", "stopped", last.message
    if last.exit:
        return "failed", "failed", last.message
    if run.now - last.last < _ALIVE_SECONDS:
        return "running", "running", ""
    return (
        "failed",
        "killed or lost",
        "no sign of life since " + time.strftime("%Y-%m-%d %H:%M", time.localtime(last.last)),
    )


def _header(run: Run) -> str:
    kind, badge, why = _state(run)
    m, sessions = run.metrics, run.account.sessions
    about = sessions[-1].about if sessions else {}
    line = [str(run.config.get("name") or about.get("config") or "")]
    if about.get("devices"):
        line.append(f"{about['devices']} × {about.get('device', '?')}")
        if about.get("processes", 1) > 1:
            line.append(f"{about['processes']} processes")
        mesh = about.get("mesh") or {}
        shown = " × ".join(f"{k} {v}" for k, v in mesh.items() if v != 1) if isinstance(mesh, dict) else ""
        line += [f"mesh {shown}"] if shown else []
    if run.config.get("resolution"):
        line.append(f"{run.config['resolution']} px, batch {run.config.get('batch_size', '?')}")
    if sessions:
        line.append("started " + time.strftime("%Y-%m-%d %H:%M", time.localtime(sessions[0].began)))
    total = run.config.get("total_kimg")
    done = float(m.kimg.max()) if len(m.kimg) else 0.0
    shown_tiles: list[tuple[str, str, str]] = []
    if isinstance(total, (int, float)) and total > 0:
        shown_tiles.append((f"of {_many(total)} images", percent(min(1.0, done / total)), ""))
    shown_tiles.append(("images seen", _many(done), ""))
    rate, chip, mfu = m.last("images_per_second"), m.last("images_per_second_per_chip"), m.last("mfu")
    if rate is not None:
        shown_tiles.append(("images a second", f"{rate:,.4g}", ""))
    if chip is not None and about.get("chips", 1) > 1:
        shown_tiles.append(("of one chip", f"{chip:,.4g}", ""))
    if mfu is not None:
        shown_tiles.append(("MFU", f"{100 * mfu:.1f} %", ""))
    if run.account.share is not None:
        shown_tiles.append(("goodput", f"{100 * run.account.share:.1f} %", ""))
        wall = sum(run.account.seconds.values())
        shown_tiles.append(("wall time", duration(wall) if wall < 48 * 3600 else f"{wall / 86400:.1f} days", ""))
    restarts = len(sessions) - 1
    if restarts > 0:
        shown_tiles.append(("restarts" if restarts > 1 else "restart", str(restarts), ""))
    for name, count in (about.get("parameters") or {}).items():
        shown_tiles.append((f"parameters, {name}", _short(count), ""))
    findings = run.health.get("findings")
    if isinstance(findings, list) and findings:
        shown_tiles.append(("health findings", str(len(findings)), "bad"))
    bad = m.last("data/bad")
    if bad:
        shown_tiles.append(("bad examples replaced", f"{bad:,.0f}", "bad"))
    text = "; ".join(html.escape(str(t)) for t in line if t)
    note = f"<br>{html.escape(why)}" if why else ""
    return (
        f'<h1>{html.escape(run.workdir.resolve().name)}<span class="badge {kind}">{badge}</span></h1>'
        f'<p class="under">{text}{note}</p>{tiles(shown_tiles)}'
    )


def _many(kimg: float) -> str:
    return f"{kimg:,.4g} k" if kimg < 1000 else f"{kimg / 1000:,.4g} M" if kimg < 1e6 else f"{kimg / 1e6:,.4g} G"


def _short(n: Any) -> str:
    return f"{n / 1e9:.3g} G" if n >= 1e9 else f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n / 1e3:.3g} k"


# ---------------------------------------------------------------- parts


def _film(run: Run) -> str:
    grids = [{"kimg": f"{g.kimg:,.6g}", "uri": g.uri} for g in run.grids]
    last = run.grids[-1]
    count = f"{len(grids)} of {run.all_grids:,} grids" if run.all_grids > len(grids) else f"{len(grids)} grids"
    controls = ""
    if len(grids) > 1:
        controls = (
            f'<div class="row"><button type="button">Play</button><input type="range" min="0" max="{len(grids) - 1}" '
            f'value="{len(grids) - 1}" aria-label="thousands of images seen"><output>{last.kimg:,.6g} kimg</output></div>'
        )
        # "<" is in no number and no base64: nothing ends the script early.
        controls += f'<script type="application/json" id="grids">{json.dumps(grids)}</script>'
    picture = f'<img src="{last.uri}" alt="samples after {last.kimg:,.6g} thousand images">'
    return card(f"Samples over time ({count})", f'<div class="film">{picture}{controls}</div>', wide=True)


def _goodput(run: Run) -> list[str]:
    total = sum(run.account.seconds.values())
    if not total:
        return []
    rows = by_size(run.account.seconds)
    stack = "".join(
        f'<div class="k-{c}" style="width:{100 * s / total:.3f}%" title="{html.escape(CAUSES[c])}: {duration(s)}"></div>'
        for c, s in rows
        if s > 0
    )
    causes = "".join(
        f'<div><i class="k-{c}"></i><span>{html.escape(CAUSES[c])}</span><b>{100 * s / total:.1f} %</b>'
        f"<em>{duration(s)}</em></div>"
        for c, s in rows
    )
    body = f'<div class="stack">{stack}</div><div class="causes">{causes}</div>'
    title = f"Goodput: {100 * (run.account.share or 0.0):.1f} % of {duration(total)}"
    return [card(title, body, wide=True)]


def _evaluation(metrics: Metrics, names: Sequence[str], draw_charts: Any) -> list[str]:
    if not names:
        return []
    out = draw_charts([(n, (n,)) for n in names if len(metrics.columns[n][0]) > 1][:_CHARTS])
    single = [n for n in names if len(metrics.columns[n][0]) == 1 or metrics.last(n) is not None]
    rows = []
    for n in single[: 4 * _ROWS]:
        value = metrics.last(n)
        rows.append([n, "not finite" if value is None else f"{value:.5g}", f"{metrics.columns[n][0][-1]:,.6g}"])
    return [card("Last values", "", ["metric", "value", "kimg"], rows), *out]


def _findings(health: dict[str, Any]) -> list[str]:
    if not health:
        return []
    found = [f for f in health.get("findings") or [] if isinstance(f, dict)]
    shown = []
    for f in found[-_ROWS:][::-1]:
        kimg = f.get("kimg")
        where = f"step {f.get('step', '?')}" + (f", {kimg:,.6g} kimg" if isinstance(kimg, (int, float)) else "")
        action = str(f.get("action", ""))
        said = str(f.get("text") or f.get("name") or "")
        shown.append(
            f'<div class="finding {html.escape(action, quote=True)}">{html.escape(said)}'
            f"<span>{html.escape(where)}; {html.escape(str(f.get('name', '')))}: {html.escape(action)}</span></div>"
        )
    numbers = [[k, str(v)] for k, v in health.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    title = f"Findings: {len(found)}" + (f", the newest {_ROWS}" if len(found) > _ROWS else "")
    return [card(title, "".join(shown) or '<p class="none">none</p>', [], numbers, wide=True)]


def _data(run: Run) -> list[str]:
    out = []
    about: dict[str, Any] = {}
    for session in run.account.sessions:
        value = session.about.get("data")
        about = value if isinstance(value, dict) else about
    rows = []
    settings = run.config.get("data")
    if isinstance(settings, dict):
        rows.append(["source", f"{settings.get('source', '')} {settings.get('path', '')}".strip()])
    examples = about.get("examples")
    if isinstance(examples, int) and examples > 0:
        rows.append(["examples", f"{examples:,}"])
        if len(run.metrics.kimg):
            rows.append(["epochs seen", f"{1000 * float(run.metrics.kimg.max()) / examples:,.3g}"])
    bad = run.metrics.last("data/bad")
    seen = 1000 * float(run.metrics.kimg.max()) if len(run.metrics.kimg) else 0.0
    rows.append(
        ["bad examples replaced", f"{bad or 0:,.0f}" + (f" ({percent((bad or 0) / seen)} of reads)" if seen else "")]
    )
    if run.config or examples:
        out.append(card("Data", "", [], rows))
    filters = [f for f in about.get("filters") or [] if isinstance(f, list) and len(f) == 2]
    if filters:
        out.append(
            card("Filters: what they left", bars([(str(t), int(n)) for t, n in filters], int(filters[0][1]) or 1))
        )
    if run.bad:
        common = run.bad.most_common(12)
        body = bars(common, run.bad.total(), ["bad"] * len(common))
        out.append(card(f"Bad files by cause: {run.bad.total():,}", body))
    return out


def _settings(run: Run) -> str:
    if not run.config:
        return card("Settings", '<p class="none">there is no config.json</p>', wide=True)
    plain = lambda values: flatten(json.loads(json.dumps(values)))
    default, own = plain(to_dict(Config())), plain(run.config)
    absent = object()
    changed = [
        [k, _value(v), _value(default[k]) if k in default else "-"]
        for k, v in own.items()
        if default.get(k, absent) != v
    ]
    same = [[k, _value(v)] for k, v in own.items() if default.get(k, absent) == v]
    body = table(["setting", "value", "default"], changed).replace("<table>", '<table class="settings">')
    more = table([], same).replace("<table>", '<table class="settings">')
    return card(
        f"Settings that differ from their defaults: {len(changed)}",
        f"{body}<details><summary>the {len(same)} others</summary>{more}</details>",
        wide=True,
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _sessions(run: Run) -> list[str]:
    at = lambda t: time.strftime("%m-%d %H:%M:%S", time.localtime(t))
    rows = []
    sessions = run.account.sessions
    for i, s in enumerate(sessions):
        end = {"": "killed or lost"}.get(s.exit, s.exit)
        if i == len(sessions) - 1:
            end = _state(run)[1]
        steps = "-" if s.first_step is None else f"{s.first_step:,} to {s.last_step:,}"
        rows.append([str(i + 1), at(s.began), duration(max(0.0, s.last - s.began)), steps, end])
    title = "Starts" + (f", the last {_ROWS} of {len(rows):,}" if len(rows) > _ROWS else "")
    return [card(title, "", ["", "began", "lasted", "steps", "end"], rows[-_ROWS:])] if rows else []


def _checkpoints(run: Run) -> list[str]:
    at = lambda t: time.strftime("%m-%d %H:%M:%S", time.localtime(t))
    rows = [[name, in_bytes(size), at(written)] for name, size, written in run.checkpoints]
    title = "Checkpoints" + (f", the last {_ROWS} of {len(rows):,}" if len(rows) > _ROWS else "")
    return [card(title, "", ["step", "size", "written"], rows[-_ROWS:])] if rows else []
