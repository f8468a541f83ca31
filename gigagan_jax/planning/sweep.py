"""Many plans: a grid over config fields, kept in a file as it goes so that an interrupted one goes on."""

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
from gigagan_jax.config import Config, digest
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import gib, milliseconds, percent, table
from gigagan_jax.planning.compile import Settings
from gigagan_jax.planning.topology import Topology


def grid(text: str) -> list[dict[str, str]]:
    """ "mesh.fsdp:1,8;batch_size:512,1024" -> one {field: value} for each point of the grid, the last field fastest.

    Raises:
      UserError: it is not of this form, or a field comes twice.
    """
    fields: dict[str, list[str]] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, separator, values = part.partition(":")
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
    """A short hash of the code that a compiled step comes from."""
    hashed = hashlib.sha256()
    for name, file in sorted(_imported_files(Settings.__module__).items()):
        hashed.update(name.encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()[:12]


def _imported_files(start: str) -> dict[str, Path]:
    """{module: file} of a module of this package and of all of the package that it imports, directly or not."""
    root = Path(gigagan_jax.__file__).parent.parent
    files: dict[str, Path] = {}
    names = [start]
    while names:
        name = names.pop()
        place = root / name.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if name in files or not file.is_file():  # the name of a function, and no module
            continue
        files[name] = file
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gigagan_jax"):
                names += [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return files


def key(config: Config, topology: Topology, settings: Settings) -> str:
    """What a plan depends on; equal keys, equal plans."""
    parts = (digest(config), topology.title, repr(settings), code_digest(), jax.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read(file: Path | None) -> dict[str, dict]:
    """{key: plan} of a sweep that was begun; nothing where there is no file.

    Raises:
      UserError: the file is something else.
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


def write(file: Path | None, rows: Sequence[dict]) -> None:
    """The rows of a sweep, all or nothing."""
    if file is None:
        return
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps({"sweep": list(rows)}, indent=1))
    os.replace(new, file)


def sweep(
    points: Sequence[dict[str, str]], run: Callable[[dict[str, str]], tuple[str, Callable[[], dict]]], file: Path | None
) -> list[dict[str, Any]]:
    """Plans every point; one that cannot be planned (a mesh that does not fit) is a row that says why.

    Args:
      run: point -> (its key, what plans it); raises UserError for a point that is no config.
      file: where finished rows are kept and found again.
    """
    known = read(file)
    rows: list[dict[str, Any]] = []
    spent: list[float] = []
    for n, point in enumerate(points):
        name = " ".join(f"{k}={v}" for k, v in point.items())
        start = time.monotonic()
        try:
            mark, work = run(point)
            if mark in known:
                print(f"[{n + 1}/{len(points)}] {name}: as found before", file=sys.stderr, flush=True)
                rows.append(known[mark])
                continue
            left = f", about {_span(sum(spent) / len(spent) * (len(points) - n))} left" if spent else ""
            print(f"[{n + 1}/{len(points)}] {name}{left}", file=sys.stderr, flush=True)
            row = {"key": mark, "point": point, **work()}
            spent.append(time.monotonic() - start)
            jax.clear_caches()  # hundreds of programs would stay in memory
        except UserError as e:
            row = {"key": "", "point": point, "fits": False, "error": " ".join(str(e).split())}
            print(f"[{n + 1}/{len(points)}] {name}: {row['error']}", file=sys.stderr, flush=True)
        rows.append(row)
        # Those of another sweep in the same file stay.
        mine = {r["key"] for r in rows}
        write(file, [*(r for r in known.values() if r["key"] not in mine), *(r for r in rows if r["key"])])
    return rows


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with most images/s a chip of those that fit; None if none fits."""
    fit = [r for r in rows if r["fits"] and "images_per_second_per_chip" in r]
    return max(fit, key=lambda r: r["images_per_second_per_chip"], default=None)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a sweep, and its best."""
    fields = list(rows[0]["point"])
    lines = []
    for r in rows:
        values = [str(r["point"][f]) for f in fields]
        if "error" in r:
            lines.append((*values, "no", "", "", "", "", "", r["error"][:100]))
            continue
        total = max((s["memory"]["total"] or 0 for s in r["steps"].values()), default=0)
        speed = (
            (milliseconds(r["seconds"]), percent(r["share_of_peak"]), f"{r['images_per_second_per_chip']:.2f}")
            if "seconds" in r
            else ("", "", "")
        )
        sent = f"{r['bytes_sent'] / 1e6:,.0f}" if "bytes_sent" in r else ""
        lines.append((*values, "yes" if r["fits"] else "NO", gib(total), *speed, sent, ""))
    head = (*fields, "fits", "memory", "step", "of peak", "images/s a chip", "MB sent", "")
    lines = [line[:-1] if not any(x[-1] for x in lines) else line for line in lines]
    out = table(lines, head[: len(lines[0])])
    top = best(rows)
    if top is None:
        return (
            out + "\nnone of them fits" + ("" if any("seconds" in r for r in rows) else " or has an estimate of time")
        )
    flags = " ".join(f"--config.{k}={v}" for k, v in top["point"].items())
    return out + f"\nbest: {flags} ({top['images_per_second_per_chip']:.2f} images/s a chip, estimated by the compiler)"
