"""What a bench prints: a headline, a few lines a job, and what was left out."""

from collections.abc import Sequence
from typing import Any

_SHOWN = 12  # modules of a table


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"


def headline(facts: dict[str, Any]) -> str:
    """Config, device, versions, commit."""
    c = facts["config"]
    g, d = facts["parameters"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if k in ("python", "jax", "flax", "libtpu"))
    driver = f", driver {facts['driver']['driver_version']}" if facts["driver"] else ""
    commit = (facts["commit"] or "unknown")[:12] + (" with changes" if facts["dirty"] else "")
    lines = [
        f"{c['name']} ({g / 1e6:.1f}M + {d / 1e6:.1f}M parameters), batch {c['batch']}, {c['dtype']}",
        f"on {facts['devices']} x {facts['device']}{driver}; {versions}; commit {commit}",
    ]
    if facts["frozen"] == "random":
        absent = f" ({', '.join(facts['not_in_the_cache'])})" if facts["not_in_the_cache"] else ""
        lines.append(f"frozen networks have random weights{absent}: times are right, losses mean nothing")
    return "\n".join(lines)


def _seconds(s: dict[str, Any]) -> str:
    low, high = s["quartiles"]
    return (
        f"{s['median'] * 1e3:.2f} ms (min {s['min'] * 1e3:.2f}, quartiles {low * 1e3:.2f} to {high * 1e3:.2f}, "
        f"max {s['max'] * 1e3:.2f}; {s['runs']} runs)"
    )


def row(name: str, r: dict[str, Any]) -> str:
    """One program's figures."""
    shares = [
        f"{r[key]:.1%} of {words}"
        for key, words in (("share_of_peak", "peak"), ("share_of_ceiling", "the measured product"))
        if r.get(key)
    ]
    rate = f"{r['images_per_second']:.2f} images/s, {r['flops'] / 1e9:.2f} GFLOP"
    return f"  {name:13} batch {r['batch']}: {_seconds(r['seconds'])}, {', '.join([rate, *shares])}"


def _ceilings(result: dict[str, Any]) -> list[str]:
    lines = []
    for dtype, p in result["products"].items():
        share = f", {p['share_of_peak']:.1%} of the maker's {p['peak'] / 1e12:.0f}" if "peak" in p else ""
        lines.append(
            f"  product of {p['side']} x {p['side']}, {dtype}: {p['flops_per_second']['median'] / 1e12:.3f} TFLOP/s{share}"
        )
    copy = result["copy"]
    share = f", {copy['share_of_peak']:.1%} of the maker's {copy['peak'] / 1e9:.0f}" if "peak" in copy else ""
    lines.append(f"  copy: {copy['bytes_per_second']['median'] / 1e9:.1f} GB/s{share}")
    return lines


def _program(name: str, r: dict[str, Any]) -> list[str]:
    c, p, device = r["compile_seconds"], r["program_bytes"], r.get("device_bytes")
    peak = f"; at most {_gib(device['peak_bytes_in_use'])} in use so far" if device else ""
    return [
        row(name, r),
        f"  {'':13} compiled in {c['all']:.1f} s: tracing {c['tracing']:.1f}, lowering {c['lowering']:.1f}, "
        f"compiling {c['compiling']:.1f}; arguments {_gib(p['arguments'])}, temporaries {_gib(p['temporaries'])}{peak}",
    ]


def _kernels(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, table in result["results"].items():
        if "missing" in table:
            lines.append(f"  {name}: no table ({table['missing']})")
            continue
        lines.append(
            f"  {name}: {table['device_seconds'] * 1e3:.2f} ms of kernels a step; the module is known of {table['known']:.0%}"
        )
        for r in table["modules"][:_SHOWN]:
            lines.append(f"    {r['seconds'] * 1e3:9.3f} ms {r['share']:6.1%}  {r['module']}")
    return lines


def _training(r: dict[str, Any]) -> list[str]:
    g, d = r["parameters"]
    first, last = r["first"], r["last"]
    compiled = sum(sum(x.values()) for x in r["compile_seconds"].values())
    lines = [
        f"  {r['config']} ({g / 1e6:.1f}M + {d / 1e6:.1f}M), batch {r['batch']}, {r['dtype']}: {r['steps']} steps in "
        f"{r['seconds']:.1f} s, {r['images_per_second']:.1f} images/s; compiled in {compiled:.1f} s",
        f"  losses D {first['loss/d']:.3f} to {last['loss/d']:.3f}, G {first['loss/g']:.3f} to {last['loss/g']:.3f}"
        + ("" if r["finite"] else "; NOT FINITE"),
    ]
    if r["device_bytes"]:
        lines.append(f"  at most {_gib(r['device_bytes']['peak_bytes_in_use'])} in use")
    return lines


def one_job(name: str, result: dict[str, Any], took: float) -> str:
    """The lines of a finished job."""
    lines = [f"  {note}" for note in result.get("notes", ())]
    if "error" in result:
        lines.append(f"  failed: {result['error']}")
    elif result.get("out_of_memory"):
        lines.append("  given up: out of memory")
    elif name == "ceilings":
        lines += _ceilings(result)
    elif name == "turns":
        lines += [row(program, r) for program, r in result["results"].items()]
        if mean := result.get("mean_step"):
            lines.append(f"  {'mean step':13} {mean['seconds'] * 1e3:.2f} ms, {mean['images_per_second']:.2f} images/s")
    elif name == "kernels":
        lines += _kernels(result)
    elif name == "training":
        lines += _training(result)
    else:
        lines += _program(name, result)
    return "\n".join([*lines, f"  ({name} took {took:.1f} s)"])


def closing(results: dict[str, Any], left_out: Sequence[str], failed: Sequence[str], spent: float) -> str:
    """The last line."""
    parts = [f"{len(results)} jobs in {spent:.0f} s"]
    parts += [f"left out: {', '.join(left_out)}"] * bool(left_out)
    parts += [f"failed: {', '.join(failed)}"] * bool(failed)
    return "; ".join(parts)
