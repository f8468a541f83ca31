"""Renders the report of a run: header, sample grids, goodput, curves, health, data, settings and checkpoints."""

import contextlib
import html
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gigagan_jax.config import Config, flatten_fields, to_dict
from gigagan_jax.core.formatting import format_bytes, format_duration, format_percent
from gigagan_jax.reporting import charts
from gigagan_jax.reporting.charts import Curve, draw_chart
from gigagan_jax.reporting.histograms import draw_bars
from gigagan_jax.reporting.html import render_card, render_document, render_table, render_tiles
from gigagan_jax.reporting.run_data import Metrics, RunData
from gigagan_jax.reporting.run_page_assets import SCRIPT, STYLE
from gigagan_jax.telemetry.goodput import CAUSES, sort_by_size

# A live run writes to goodput.jsonl once a minute: a run that is silent for this long was killed.
_ALIVE_SECONDS = 200
# Rows of a long table.
_MAX_ROWS = 60
# Charts of metrics without a group of their own.
_MAX_CHARTS = 60
# (title, names of metrics); a name that ends in "*" is a prefix. A metric is drawn in the first group that names it.
_TRAINING = (
    ("Loss of G and D", ("loss/g", "loss/d")),
    ("Logits of D", ("logits/real", "logits/fake", "logits/wrong")),
    ("R1 penalty, and that of D's last exit alone", ("loss/r1", "r1/last_exit", "loss/r2")),
    ("Gradient norms", ("grad_norm/*",)),
    ("Terms of D's loss", ("loss/d_*", "loss/v")),
    ("Terms of G's loss", ("loss/g_*", "loss/clip")),
    ("Spread of the generated images", ("image/*",)),
)
_SPEED = (
    ("Images a second", ("images_per_second",)),
    ("MFU: share of the chips' peak", ("mfu",)),
    ("Goodput: share of wall time in useful steps", ("goodput",)),
    ("Memory of the host, GiB: the process and its workers", ("memory/host_gib", "memory/workers_gib")),
    ("Peak of the devices' memory, GiB", ("memory/device_peak_gib",)),
)
_HEALTH = (
    ("What D and V tell apart", ("health/d_gap*", "health/v_gap")),
    ("Logits of the right sign", ("health/d_right_*",)),
    ("Cosine of the gradients of D's last exit and of the others", ("r1/cosine/*",)),
    ("R1 over that of D's last exit alone", ("health/r1_ratio",)),
    ("Gradient norms over the lowest level that they kept", ("health/drift/*",)),
    ("Diversity, of that of real images", ("health/diversity*",)),
    ("What each level adds to the image", ("health/level/*",)),
    ("Spread of D's exits", ("health/exit/*",)),
    ("Skipped steps and rollbacks", ("health/skipped", "health/rollbacks", "health/lr_scale")),
)
# Metrics of the training loop: all others come from evaluators.
_TRAINING_PREFIXES = (
    "loss/",
    "logits/",
    "grad_norm/",
    "image/",
    "images_per_second",
    "mfu",
    "goodput",
    "memory/",
    "health/",
    "r1/",
    "data/",
)


def render_page(run: RunData) -> str:
    """Renders the HTML page of a run."""
    parts = [_render_header(run)]
    # A metric is drawn once, in the first group that matches: the order of the calls below decides.
    if run.grids:
        parts.append(_render_grids(run))
    marks = _event_marks(run)
    drawn: set[str] = set()

    def draw_charts(groups: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        cards = []
        for title, patterns in groups:
            names = [n for p in patterns for n in _match_metrics(run.metrics, p) if n not in drawn]
            drawn.update(names)
            # More curves than colours become several charts.
            for i in range(0, len(names), charts.MAX_CURVES):
                cards.append(
                    render_card(title, draw_chart(_select_curves(run.metrics, names[i : i + charts.MAX_CURVES]), marks))
                )
        return cards

    parts.append(_render_section("Where the time went", [*_render_goodput(run), *draw_charts(_SPEED)]))
    # A constant multiple of images_per_second: its chart would be the same curve.
    drawn.add("images_per_second_per_chip")
    training = draw_charts(_TRAINING)
    # Losses and logits without a group.
    training += draw_charts([(n, (n,)) for n in sorted(run.metrics.columns) if n.startswith(("loss/", "logits/"))])
    parts.append(_render_section("Training", training or [_render_note("no line of metrics yet")]))
    rest = [n for n in sorted(run.metrics.columns) if not n.startswith(_TRAINING_PREFIXES)]
    parts.append(_render_section("Evaluation", _render_evaluation(run.metrics, rest, draw_charts)))
    health = draw_charts(_HEALTH)
    health += draw_charts([(n, (n,)) for n in sorted(run.metrics.columns) if n.startswith("health/")][:_MAX_CHARTS])
    parts.append(_render_section("Health", [*_render_findings(run.health), *health]))
    parts.append(
        _render_section("Data", [*_render_data(run), *draw_charts([("Bad examples replaced so far", ("data/*",))])])
    )
    parts.append(
        _render_section(
            "Settings and files",
            [_render_settings(run), *_render_history(run), *_render_sessions(run), *_render_checkpoints(run)],
        )
    )
    read_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.now))
    parts.append(
        f"<footer>{html.escape(run.address)}, read {read_at}. Curves are thinned to {charts.MAX_POINTS:,} points "
        "with their extremes; dashed lines are restarts and rollbacks. Point at a curve to read it.</footer>"
    )
    return render_document(run.name, "".join(parts), STYLE, SCRIPT)


# ---------------------------------------------------------------- parts of a section


def _render_section(title: str, cards: Sequence[str]) -> str:
    return f'<h2 class="part">{title}</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def _render_note(text: str) -> str:
    return f'<section class="card wide none">{text}</section>'


def _match_metrics(metrics: Metrics, pattern: str) -> list[str]:
    if pattern.endswith("*"):
        # Numbers compare as numbers: level/8 comes before level/16.
        natural = lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
        return sorted((n for n in metrics.columns if n.startswith(pattern[:-1])), key=natural)
    return [pattern] if pattern in metrics.columns else []


def _select_curves(metrics: Metrics, names: Sequence[str]) -> list[Curve]:
    return [Curve(n, *metrics.columns[n]) for n in names]


def _event_marks(run: RunData) -> list[tuple[float, str, str]]:
    """Returns restarts and rollbacks as the marks of `draw_chart`."""
    marks = []
    for session in run.account.sessions[1:]:
        # A start that failed before its first step has no place on the axis.
        if session.first_step is not None:
            marks.append(
                (run.metrics.kimg_at_step(session.first_step), f"restart from step {session.first_step}", "restart")
            )
    for before, after in run.account.rollbacks:
        marks.append((run.metrics.kimg_at_step(after), f"rolled back from step {before} to {after}", "rollback"))
    # A run that is preempted every few minutes has thousands; more lines than pixels hide the curves.
    return marks[-200:]


# ---------------------------------------------------------------- header


def _run_status(run: RunData) -> tuple[str, str, str]:
    """Returns (CSS class of the badge, its text, the reason)."""
    if not run.account.sessions:
        return "", "state unknown", ""
    last = run.account.sessions[-1]
    if last.exit == "done":
        return "done", "finished", ""
    if last.exit == "stopped":
        return "", "stopped", last.message
    if last.exit:
        return "failed", "failed", last.message
    # No exit was written: the run is alive, or it was killed.
    if run.now - last.last < _ALIVE_SECONDS:
        return "running", "running", ""
    return (
        "failed",
        "killed or lost",
        "no sign of life since " + time.strftime("%Y-%m-%d %H:%M", time.localtime(last.last)),
    )


def _render_header(run: RunData) -> str:
    kind, badge, why = _run_status(run)
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
        shown_tiles.append((f"of {_format_kimg(total)} images", format_percent(min(1.0, done / total)), ""))
    shown_tiles.append(("images seen", _format_kimg(done), ""))
    # Each tile appears only if its metric was logged.
    rate, chip, mfu = m.last_value("images_per_second"), m.last_value("images_per_second_per_chip"), m.last_value("mfu")
    if rate is not None:
        shown_tiles.append(("images a second", f"{rate:,.4g}", ""))
    # On one chip it is the same number.
    if chip is not None and about.get("chips", 1) > 1:
        shown_tiles.append(("of one chip", f"{chip:,.4g}", ""))
    if mfu is not None:
        shown_tiles.append(("MFU", f"{100 * mfu:.1f} %", ""))
    if run.account.share is not None:
        shown_tiles.append(("goodput", f"{100 * run.account.share:.1f} %", ""))
        wall = sum(run.account.seconds.values())
        shown_tiles.append(("wall time", format_duration(wall) if wall < 48 * 3600 else f"{wall / 86400:.1f} days", ""))
    restarts = len(sessions) - 1
    if restarts > 0:
        shown_tiles.append(("restarts" if restarts > 1 else "restart", str(restarts), ""))
    for name, count in (about.get("parameters") or {}).items():
        shown_tiles.append((f"parameters, {name}", _format_count(count), ""))
    findings = run.health.get("findings")
    if isinstance(findings, list) and findings:
        shown_tiles.append(("health findings", str(len(findings)), "bad"))
    bad = m.last_value("data/bad")
    if bad:
        shown_tiles.append(("bad examples replaced", f"{bad:,.0f}", "bad"))
    text = "; ".join(html.escape(str(t)) for t in line if t)
    note = f"<br>{html.escape(why)}" if why else ""
    return (
        f'<h1>{html.escape(run.name)}<span class="badge {kind}">{badge}</span></h1>'
        f'<p class="under">{text}{note}</p>{render_tiles(shown_tiles)}'
    )


def _format_kimg(kimg: float) -> str:
    return f"{kimg:,.4g} k" if kimg < 1000 else f"{kimg / 1000:,.4g} M" if kimg < 1e6 else f"{kimg / 1e6:,.4g} G"


def _format_count(n: Any) -> str:
    return f"{n / 1e9:.3g} G" if n >= 1e9 else f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n / 1e3:.3g} k"


# ---------------------------------------------------------------- parts


def _render_grids(run: RunData) -> str:
    grids = [{"kimg": f"{g.kimg:,.6g}", "uri": g.uri} for g in run.grids]
    last = run.grids[-1]
    count = f"{len(grids)} of {run.all_grids:,} grids" if run.all_grids > len(grids) else f"{len(grids)} grids"
    controls = ""
    if len(grids) > 1:
        controls = (
            f'<div class="row"><button type="button">Play</button><input type="range" min="0" max="{len(grids) - 1}" '
            f'value="{len(grids) - 1}" aria-label="thousands of images seen"><output>{last.kimg:,.6g} kimg</output></div>'
        )
        # Neither numbers nor base64 contain "<": nothing can end the script element early.
        controls += f'<script type="application/json" id="grids">{json.dumps(grids)}</script>'
    picture = f'<img src="{last.uri}" alt="samples after {last.kimg:,.6g} thousand images">'
    return render_card(f"Samples over time ({count})", f'<div class="film">{picture}{controls}</div>', wide=True)


def _render_goodput(run: RunData) -> list[str]:
    total = sum(run.account.seconds.values())
    if not total:
        return []
    rows = sort_by_size(run.account.seconds)
    # One bar of the wall time, with a part for each cause.
    stack = "".join(
        f'<div class="k-{c}" style="width:{100 * s / total:.3f}%" title="{html.escape(CAUSES[c])}: {format_duration(s)}"></div>'
        for c, s in rows
        if s > 0
    )
    causes = "".join(
        f'<div><i class="k-{c}"></i><span>{html.escape(CAUSES[c])}</span><b>{100 * s / total:.1f} %</b>'
        f"<em>{format_duration(s)}</em></div>"
        for c, s in rows
    )
    body = f'<div class="stack">{stack}</div><div class="causes">{causes}</div>'
    title = f"Goodput: {100 * (run.account.share or 0.0):.1f} % of {format_duration(total)}"
    return [render_card(title, body, wide=True)]


def _render_evaluation(metrics: Metrics, names: Sequence[str], draw_charts: Any) -> list[str]:
    if not names:
        return []
    # One value makes no curve.
    charts_of_metrics = draw_charts([(n, (n,)) for n in names if len(metrics.columns[n][0]) > 1][:_MAX_CHARTS])
    single = [n for n in names if len(metrics.columns[n][0]) == 1 or metrics.last_value(n) is not None]
    rows = []
    # More rows than elsewhere: each metric of an evaluator has one.
    for n in single[: 4 * _MAX_ROWS]:
        value = metrics.last_value(n)
        rows.append([n, "not finite" if value is None else f"{value:.5g}", f"{metrics.columns[n][0][-1]:,.6g}"])
    return [render_card("Last values", "", ["metric", "value", "kimg"], rows), *charts_of_metrics]


def _render_findings(health: dict[str, Any]) -> list[str]:
    if not health:
        return []
    findings = [f for f in health.get("findings") or [] if isinstance(f, dict)]
    shown = []
    # The newest first.
    for f in findings[-_MAX_ROWS:][::-1]:
        kimg = f.get("kimg")
        where = f"step {f.get('step', '?')}" + (f", {kimg:,.6g} kimg" if isinstance(kimg, (int, float)) else "")
        action = str(f.get("action", ""))
        text = str(f.get("text") or f.get("name") or "")
        shown.append(
            f'<div class="finding {html.escape(action, quote=True)}">{html.escape(text)}'
            f"<span>{html.escape(where)}; {html.escape(str(f.get('name', '')))}: {html.escape(action)}</span></div>"
        )
    # The counters of the report; bool is an int in Python.
    numbers = [[k, str(v)] for k, v in health.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    title = f"Findings: {len(findings)}" + (f", the newest {_MAX_ROWS}" if len(findings) > _MAX_ROWS else "")
    return [render_card(title, "".join(shown) or '<p class="none">none</p>', [], numbers, wide=True)]


def _render_data(run: RunData) -> list[str]:
    cards = []
    # Of the last session that described its data.
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
    bad = run.metrics.last_value("data/bad")
    # Images seen: nearly one read an image.
    seen = 1000 * float(run.metrics.kimg.max()) if len(run.metrics.kimg) else 0.0
    rows.append(
        [
            "bad examples replaced",
            f"{bad or 0:,.0f}" + (f" ({format_percent((bad or 0) / seen)} of reads)" if seen else ""),
        ]
    )
    if run.config or examples:
        cards.append(render_card("Data", "", [], rows))
    filters = [f for f in about.get("filters") or [] if isinstance(f, list) and len(f) == 2]
    if filters:
        cards.append(
            render_card(
                "Filters: what they left", draw_bars([(str(t), int(n)) for t, n in filters], int(filters[0][1]) or 1)
            )
        )
    if run.bad:
        # The most frequent causes; the bars are shares of all bad files.
        common = run.bad.most_common(12)
        body = draw_bars(common, run.bad.total(), ["bad"] * len(common))
        cards.append(render_card(f"Bad files by cause: {run.bad.total():,}", body))
    return cards


def _render_settings(run: RunData) -> str:
    if not run.config:
        return render_card("Settings", '<p class="none">there is no config.json</p>', wide=True)
    # Through JSON, as the stored config went: a tuple must compare equal to a list.
    plain = lambda values: flatten_fields(json.loads(json.dumps(values)))
    default, own = plain(to_dict(Config())), plain(run.config)
    # A default can be None.
    absent = object()
    changed = [
        [k, _format_value(v), _format_value(default[k]) if k in default else "-"]
        for k, v in own.items()
        if default.get(k, absent) != v
    ]
    same = [[k, _format_value(v)] for k, v in own.items() if default.get(k, absent) == v]
    body = render_table(["setting", "value", "default"], changed).replace("<table>", '<table class="settings">')
    more = render_table([], same).replace("<table>", '<table class="settings">')
    return render_card(
        f"Settings that differ from their defaults: {len(changed)}",
        f"{body}<details><summary>the {len(same)} others</summary>{more}</details>",
        wide=True,
    )


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _render_sessions(run: RunData) -> list[str]:
    at = lambda t: time.strftime("%m-%d %H:%M:%S", time.localtime(t))
    rows = []
    sessions = run.account.sessions
    for i, s in enumerate(sessions):
        end = {"": "killed or lost"}.get(s.exit, s.exit)
        # Only the last session can still be running.
        if i == len(sessions) - 1:
            end = _run_status(run)[1]
        steps = "-" if s.first_step is None else f"{s.first_step:,} to {s.last_step:,}"
        rows.append([str(i + 1), at(s.began), format_duration(max(0.0, s.last - s.began)), steps, end])
    title = "Starts" + (f", the last {_MAX_ROWS} of {len(rows):,}" if len(rows) > _MAX_ROWS else "")
    return [render_card(title, "", ["", "began", "lasted", "steps", "end"], rows[-_MAX_ROWS:])] if rows else []


def _render_checkpoints(run: RunData) -> list[str]:
    at = lambda t: time.strftime("%m-%d %H:%M:%S", time.localtime(t))
    rows = [[name, format_bytes(size), at(written)] for name, size, written in run.checkpoints]
    title = "Checkpoints" + (f", the last {_MAX_ROWS} of {len(rows):,}" if len(rows) > _MAX_ROWS else "")
    return [render_card(title, "", ["step", "size", "written"], rows[-_MAX_ROWS:])] if rows else []


def _render_history(run: RunData) -> list[str]:
    rows = []
    for event in run.history:
        # A damaged line leaves a gap.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            when = time.strftime("%m-%d %H:%M:%S", time.localtime(float(event["time"])))
            rows.append([when, f"{int(event['step']):,}", _describe_event(event)])
    title = "Changes" + (f", the last {_MAX_ROWS} of {len(rows):,}" if len(rows) > _MAX_ROWS else "")
    return [render_card(title, "", ["when", "step", "what"], rows[-_MAX_ROWS:])] if rows else []


def _describe_event(event: Mapping[str, Any]) -> str:
    """One line of history.jsonl in words. Raises KeyError, TypeError or AttributeError for a damaged one."""
    if event["event"] == "data":
        old, new = (x["examples"] for x in (event["old"], event["new"]))
        return f"data: {'?' if old is None else old} -> {new} examples"
    if event["event"] == "init":
        taken = [f"{title} {x['arrays']} of {x['of']} arrays" for title, x in event["taken"].items()]
        return f"started from {event['source']}: {', '.join(taken)}"
    return "; ".join(f"{name}: {a} -> {b}" for name, (a, b) in event["fields"].items())
