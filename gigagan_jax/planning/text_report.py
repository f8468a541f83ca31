"""Plans as text: the report of one plan, and the Markdown tables of many."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gigagan_jax.core.formatting import format_gib, format_milliseconds, format_percent, format_table
from gigagan_jax.planning.compile import SLOWEST_SHOWN

# Labels of the kinds of memory, in the order of the report; the keys are those of the JSON file.
MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "ema": "moving average",
    "frozen": "frozen networks",
    "batch": "batch",
    "padding": "padding of these",
    "outputs": "outputs",
    "temporary": "gradients, activations, temporaries",
    "gradients": "gradients",
    "activations": "activations (estimated from the trace)",
    "program": "program",
    "total": "total",
}


def format_plan(plan: dict[str, Any]) -> str:
    """The whole plan for a terminal."""
    mesh = ", ".join(f"{k}={v}" for k, v in plan["mesh"].items())
    sizes = " + ".join(f"{n / 1e6:,.1f} M {name}" for name, n in plan["parameters"].items())
    lines = [
        f"{plan['config']} on {plan['chips']} {plan['chip']} chips ({plan['topology']}), mesh {mesh}",
        f"{sizes}; batch {plan['batch_size']}"
        + (f" in {plan['micro_batches']} micro-batches" if plan["micro_batches"] > 1 else "")
        + f", {plan['batch_size'] / plan['chips']:g} images a chip",
    ]
    for name, step in plan["steps"].items():
        title = {"without_r1": "The step", "with_r1": f"The step with R1 (one in {plan['r1_interval']})"}[name]
        lines += ["", title, *_format_step(plan, step)]
    return "\n".join([*lines, "", *_format_summary(plan)])


def _format_step(plan: dict[str, Any], step: dict[str, Any]) -> list[str]:
    memory = step["memory"]
    chip = plan["bytes_of_chip"]
    rows: list[tuple[str, ...]] = [
        (MEMORY[k], f"{v / 2**30:,.3f}", format_percent(v / chip)) for k, v in memory.items() if v
    ]
    lines = [format_table(rows, ("memory of a chip", "GiB", f"of {format_gib(chip)}"))]
    lines += [
        f"FLOPs of a chip: {step['flops'] / 1e12:.2f} T (traced), "
        f"{format_milliseconds(step['seconds_at_peak'])} at its peak"
    ]
    # A plan for a GPU ends here: XLA compiles for a GPU only where there is one.
    if not plan["compiled"]:
        return [
            *lines,
            "Not known without the GPU: the compiler's temporaries, the step time, what is exchanged. Memory without "
            "temporaries is a lower bound.",
        ]
    if "seconds" not in step:
        return [*lines, f"the compiler found no room for it: {step['why']}"]
    by_cycles = ""
    # Only a plan below the effort of the search has rooflines, and so less than its cycles.
    if step["seconds_by_cycles"] > step["seconds_of_operations"]:
        by_cycles = (
            f"; matrix products at most at their roof: at effort {plan['effort']:g} the compiler does not "
            f"search for their windows: {format_milliseconds(step['seconds_by_cycles'])} without that"
        )
    # A program without timed operations has 0 seconds.
    share = step["seconds_of_matrix_units"] / max(step["seconds_of_operations"], 1e-12)
    lines += [
        f"bytes accessed (loop bodies counted once): {(step['bytes_accessed'] or 0) / 1e9:,.1f} GB",
        "",
        f"estimated by the compiler: {format_milliseconds(step['seconds'])} a step, "
        f"{format_percent(step['share_of_peak'])} of peak",
        f"  operations {format_milliseconds(step['seconds_of_operations'])} "
        f"(summed estimated_cycles, loops by their trip counts; "
        f"matrix units {format_percent(share)}{by_cycles})",
        f"  communication {format_milliseconds(step['seconds_of_communication'])} "
        f"by bytes over link bandwidth, of which "
        f"{format_milliseconds(step['seconds_hidden'])} beside operations",
        "  a bound by FLOPs and bytes with loops counted once (optimal_seconds): "
        f"{format_milliseconds(step['seconds_optimal'])}",
    ]
    # Such a loop makes the time too short, so the report names it.
    if step["loops_of_unknown_length"]:
        lines.append(f"  {step['loops_of_unknown_length']} loops of unknown length are counted once")
    if step["collectives"]:
        rows = [
            (
                row["kind"],
                row["network"],
                f"{row['bytes_sent'] / 1e6:,.1f}",
                str(row["exchanges"]),
                str(row["largest_group"]),
                format_milliseconds(row["seconds"]),
                format_percent(row["bytes_overlapped"] / row["bytes_sent"] if row["bytes_sent"] else 0.0),
            )
            for row in step["collectives"]
        ]
        head = ("exchange", "where", "MB a chip sends", "times", "group", "time", "overlapped")
        lines += ["", format_table(rows, head)]
    # Milliseconds without a unit in each cell keep the columns narrow.
    rows = [
        (
            row["module"],
            f"{row['seconds'] * 1e3:,.2f}",
            format_percent(row["share"]),
            *(f"{row[w] * 1e3:,.2f}" for w in ("forward", "recomputed", "backward")),
        )
        for row in step["modules"][:SLOWEST_SHOWN]
    ]
    lines += ["", format_table(rows, ("slowest operations", "ms", "share", "forward", "recomputed", "backward"))]
    parts = ", ".join(f"{name} {format_milliseconds(s)}" for name, s in step["parts"].items())
    lines += [f"by loss: {parts}"]
    effort = "the compiler's own effort" if plan["effort"] is None else f"effort {plan['effort']:g}"
    lines += [f"traced in {step['seconds_to_trace']:.0f} s, compiled in {step['seconds_to_compile']:.0f} s at {effort}"]
    return lines


def _format_summary(plan: dict[str, Any]) -> list[str]:
    total = max((s["memory"]["total"] or 0 for s in plan["steps"].values()), default=0)
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    # The larger step decides: the one with R1, where it is compiled.
    lines = [f"{verdict}: {format_gib(total) if total else 'unknown'} of {format_gib(plan['bytes_of_chip'])} a chip"]
    if not plan["compiled"]:
        lines[0] += " before temporaries"
    if "seconds" in plan:
        which = "without R1; --with-r1 adds it" if "with_r1" not in plan["steps"] else "R1 steps in their proportion"
        lines.append(
            f"{format_milliseconds(plan['seconds'])} a step, {format_percent(plan['share_of_peak'])} of peak, "
            f"{plan['images_per_second_per_chip']:.2f} images/s a chip, "
            f"{plan['images_per_day'] / 1e6:,.1f} M images a day "
            f"({which})"
        )
    return lines


def compact_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without its lists by module and by exchange: 98 % of its text, which the tables do not read."""
    steps = {
        name: {k: v for k, v in step.items() if k not in ("modules", "collectives")}
        for name, step in plan["steps"].items()
    }
    return plan | {"steps": steps}


def markdown_table(plans: Sequence[dict[str, Any]]) -> str:
    """The table of configs (rows) by topologies (columns), in the order of their first plan.

    Plans of one config and topology with different meshes or batches share a cell.
    """
    configs = list(dict.fromkeys(p["config"] for p in plans))
    # {topology: name of its column}. Plans may name one topology by its shape or by its size; the first name counts.
    names: dict[tuple[str, int], str] = {}
    for p in plans:
        names.setdefault((p["topology"], p["slices"]), _column_name(p))
    topologies = list(dict.fromkeys(names.values()))
    cell_texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for p in plans:
        cell_texts[p["config"], names[p["topology"], p["slices"]]].append(_format_cell(p))
    cells = {place: "<br>or<br>".join(texts) for place, texts in cell_texts.items()}
    line = lambda values: "| " + " | ".join(values) + " |"
    return "\n".join(
        [
            line(["config", *topologies]),
            line(["---"] * (len(topologies) + 1)),
            *(line([f"`{c}`", *(cells.get((c, t), "") for t in topologies)]) for c in configs),
        ]
    )


def _column_name(plan: dict[str, Any]) -> str:
    asked, shape = plan.get("asked", plan["topology"]), plan["topology"].split(":")[-1]
    # The shape follows a size such as "v5p-128"; it is not repeated after a shape.
    several = f"{plan['slices']} x " if plan["slices"] > 1 and plan["compiled"] else ""
    return f"{several}{asked}" + ("" if asked.endswith(shape) else f" ({shape})")


def _format_cell(plan: dict[str, Any]) -> str:
    total = max((s["memory"]["total"] or 0 for s in plan["steps"].values()), default=0)
    chip = plan["bytes_of_chip"] / 2**30
    # The compiler does not always name the size of a program that does not fit.
    shown = f"{total / 2**30:.1f} of {chip:.0f} GiB" if total else f"more than {chip:.0f} GiB"
    parts = ["fits" if plan["fits"] else "**does not fit**", shown]
    if "seconds" in plan:
        parts += [format_milliseconds(plan["seconds"]), f"{format_percent(plan['share_of_peak'])} of peak"]
        parts.append(f"compiled in {plan['seconds_to_compile'] / 60:.1f} min")
    # Axes of size 1 do not shard anything.
    mesh = " ".join(f"{k}={v}" for k, v in plan["mesh"].items() if v > 1)
    return "<br>".join([*parts, f"batch {plan['batch_size']}" + (f", {mesh}" if mesh else "")])


def scaling_table(plans: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of one config on more and more chips: bytes sent and step time, each relative to the first."""
    line = lambda values: "| " + " | ".join(values) + " |"
    against = lambda n, first: f" ({100 * (n / first - 1):+.1f} %)" if first else ""
    head = ["config", "topology", "mesh", "chips", "batch", "memory", "sent by a chip", "step", "images/s a chip"]
    lines = [line(head), line(["---"] * len(head))]
    first: dict[str, dict[str, Any]] = {}
    for p in plans:
        # A row needs a time: plans for GPUs and programs without room have none.
        if "seconds" not in p:
            raise KeyError(f"no step time for {p['topology']}")
        # Each config is compared with its own first plan.
        start = first.setdefault(p["config"], p)
        total = max(s["memory"]["total"] or 0 for s in p["steps"].values())
        lines.append(
            line(
                [
                    f"`{p['config']}`",
                    _column_name(p),
                    " ".join(f"{k}={v}" for k, v in p["mesh"].items() if v > 1),
                    f"{p['chips']:,}",
                    f"{p['batch_size']:,}",
                    format_gib(total),
                    f"{p['bytes_sent'] / 1e6:,.0f} MB{against(p['bytes_sent'], start['bytes_sent'])}",
                    f"{format_milliseconds(p['seconds'])}{against(p['seconds'], start['seconds'])}",
                    f"{p['images_per_second_per_chip']:.2f}",
                ]
            )
        )
    return "\n".join(lines)
