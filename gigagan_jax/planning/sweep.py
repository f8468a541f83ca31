"""Sweeps: plans for a grid of config fields. Finished plans are saved one by one, so an interrupted sweep resumes."""

import ast
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import gigagan_jax
from gigagan_jax.config import Config, config_digest
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_gib, format_milliseconds, format_percent, format_table
from gigagan_jax.planning.compile import CompileSettings
from gigagan_jax.planning.topology import Topology


def parse_grid(text: str) -> list[dict[str, str]]:
    """ "mesh.fsdp:1,8;batch_size:512,1024" -> one {field: value} for each point; the last field varies fastest.

    Raises:
      UserError: the text has another form, or names a field twice.
    """
    fields: dict[str, list[str]] = {}
    # A trailing semicolon leaves an empty part, which is no error.
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, separator, values = part.partition(":")
        # Users write the field as in the flag, --config.batch_size, or without its prefix.
        name = name.strip().removeprefix("config.")
        found = [v.strip() for v in values.split(",") if v.strip()]
        if not separator or not name or not found:
            raise UserError(
                f"--sweep={text}: write FIELD:VALUE,VALUE;FIELD:VALUE, as in mesh.fsdp:1,8;batch_size:512,1024"
            )
        if name in fields:
            raise UserError(f"--sweep={text}: {name} comes twice")
        fields[name] = found
    if not fields:
        raise UserError(f"--sweep={text}: names no field; as in mesh.fsdp:1,8;batch_size:512,1024")
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def code_digest() -> str:
    """A short hash of the source code that the compiled step depends on."""
    hashed = hashlib.sha256()
    # Sorted, so that the order of imports does not change the hash.
    for name, file in sorted(_imported_files(CompileSettings.__module__).items()):
        hashed.update(name.encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()[:12]


def _imported_files(start: str) -> dict[str, Path]:
    """{module: file} of a module of this package and of all modules of the package that it imports, also indirectly."""
    root = Path(gigagan_jax.__file__).parent.parent
    files: dict[str, Path] = {}
    names = [start]
    while names:
        name = names.pop()
        place = root / name.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        # "from module import name" may name a function, which has no file.
        if name in files or not file.is_file():
            continue
        files[name] = file
        # The syntax tree, not sys.modules: imports inside functions count, and nothing has to be imported.
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gigagan_jax"):
                names += [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return files


def plan_key(config: Config, topology: Topology, settings: CompileSettings) -> str:
    """A hash of everything that a plan depends on: equal keys mean equal plans."""
    parts = (config_digest(config), topology.title, repr(settings), code_digest(), jax.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_plans(file: Path | None) -> dict[str, dict]:
    """{key: plan} of an earlier sweep; empty without a file.

    Raises:
      UserError: the file holds no sweep.
    """
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        return {row["key"]: row for row in found["sweep"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file} is not the result of a sweep ({type(e).__name__}); name another file or remove it"
        ) from e


def write_plans(file: Path | None, rows: Sequence[dict]) -> None:
    """Writes the rows of a sweep atomically."""
    if file is None:
        return
    # A rename replaces the file at once, so a killed sweep leaves the previous rows intact.
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps({"sweep": list(rows)}, indent=1))
    os.replace(new, file)


def run_sweep(
    points: Sequence[dict[str, str]], run: Callable[[dict[str, str]], tuple[str, Callable[[], dict]]], file: Path | None
) -> list[dict[str, Any]]:
    """Plans every point. A point without a valid plan, such as a mesh that does not fit, becomes a row with its error.

    Args:
      run: point -> (its key, a function that plans it); raises UserError for an invalid config.
      file: holds the finished rows, and those of an earlier sweep.
    """
    known = read_plans(file)
    rows: list[dict[str, Any]] = []
    spent: list[float] = []
    for n, point in enumerate(points):
        name = " ".join(f"{k}={v}" for k, v in point.items())
        start = time.monotonic()
        try:
            # The key needs the config only; the function compiles, which takes minutes.
            point_key, make_plan = run(point)
            if point_key in known:
                print(f"[{n + 1}/{len(points)}] {name}: as found before", file=sys.stderr, flush=True)
                rows.append(known[point_key])
                continue
            # Rows found in the file took no time, so only planned ones count for the estimate.
            left = f", about {_format_duration(sum(spent) / len(spent) * (len(points) - n))} left" if spent else ""
            print(f"[{n + 1}/{len(points)}] {name}{left}", file=sys.stderr, flush=True)
            row = {"key": point_key, "point": point, **make_plan()}
            spent.append(time.monotonic() - start)
            # JAX keeps every compiled program; a sweep of hundreds would fill the memory.
            jax.clear_caches()
        # Rows with an error have no key: they are not saved, and the next sweep tries them again.
        except UserError as e:
            row = {"key": "", "point": point, "fits": False, "error": " ".join(str(e).split())}
            print(f"[{n + 1}/{len(points)}] {name}: {row['error']}", file=sys.stderr, flush=True)
        rows.append(row)
        # Rows of another sweep in the same file stay.
        written = {r["key"] for r in rows}
        write_plans(file, [*(r for r in known.values() if r["key"] not in written), *(r for r in rows if r["key"])])
    return rows


def _format_duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def best_plan(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fitting row with the most images/s a chip; None if none fits."""
    # A plan for a GPU has no speed, so it can fit without being the best.
    fit = [r for r in rows if r["fits"] and "images_per_second_per_chip" in r]
    return max(fit, key=lambda r: r["images_per_second_per_chip"], default=None)


def format_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a sweep, and its best point."""
    fields = list(rows[0]["point"])
    lines = []
    for r in rows:
        values = [str(r["point"][f]) for f in fields]
        if "error" in r:
            lines.append((*values, "no", "", "", "", "", "", r["error"][:100]))
            continue
        # 0 where the compiler's message names no size.
        total = max((s["memory"]["total"] or 0 for s in r["steps"].values()), default=0)
        speed = (
            (
                format_milliseconds(r["seconds"]),
                format_percent(r["share_of_peak"]),
                f"{r['images_per_second_per_chip']:.2f}",
            )
            if "seconds" in r
            else ("", "", "")
        )
        sent = f"{r['bytes_sent'] / 1e6:,.0f}" if "bytes_sent" in r else ""
        lines.append((*values, "yes" if r["fits"] else "NO", format_gib(total), *speed, sent, ""))
    head = (*fields, "fits", "memory", "step", "of peak", "images/s a chip", "MB sent", "")
    # The column of errors appears only where there is one.
    lines = [line[:-1] if not any(x[-1] for x in lines) else line for line in lines]
    text = format_table(lines, head[: len(lines[0])])
    best = best_plan(rows)
    if best is None:
        return (
            text + "\nnone of them fits" + ("" if any("seconds" in r for r in rows) else " or has an estimate of time")
        )
    flags = " ".join(f"--config.{k}={v}" for k, v in best["point"].items())
    return (
        text + f"\nbest: {flags} ({best['images_per_second_per_chip']:.2f} images/s a chip, estimated by the compiler)"
    )
