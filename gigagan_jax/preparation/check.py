"""The doctor: decodes a sample of a data set, or all of it, and says what is wrong with it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import in_bytes, percent
from gigagan_jax.data.source import Source
from gigagan_jax.preparation.measure import Measured, measure, quantiles
from gigagan_jax.preparation.output import Output

SHOWN = 20  # bad examples on the screen; a report names all


def wilson(bad: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Interval in which a share lies with 95 % confidence, by Wilson (1927); it fits small shares and small samples.

    Args:
      bad: so many of them have the property.
      tried: so many were drawn.
      z: quantile of the normal distribution.
    """
    if not tried:
        return 0.0, 1.0
    share = bad / tried
    centre = share + z * z / (2 * tried)
    half = z * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    scale = 1 + z * z / tried
    # Exactly 0 and 1 at the ends, where rounding leaves a little.
    return (centre - half) / scale if bad else 0.0, (centre + half) / scale if bad < tried else 1.0


def check(
    source: Source,
    *,
    sample: int = 0,
    seed: int = 0,
    max_bad_fraction: float = 0.05,
    report: Path | None = None,
    workers: int = 0,
    runner: str | None = None,
    beam_args: Sequence[str] = (),
    results: Output | None = None,
    quiet: bool = False,
) -> tuple[str, bool]:
    """Decodes examples and counts what is wrong.

    Args:
      source: the data set.
      sample: how many examples, drawn by `seed`; 0: all of them.
      seed: see `sample`.
      max_bad_fraction: share of bad examples that is still healthy.
      report: file for a line of JSON about each bad example.
      workers, runner, beam_args, results, quiet: as for `run_tasks`.

    Returns:
      (what to show, whether the data is healthy)

    Raises:
      UserError: the report cannot be written; whatever the source raises.
    """
    how: dict[str, Any] = {"runner": runner, "beam_args": beam_args, "results": results, "quiet": quiet}
    found = measure(source, sample, seed, True, workers=workers, title="checking", **how)
    if report is not None:
        try:
            report.write_text("".join(json.dumps(bad) + "\n" for bad in found.listed), encoding="utf-8")
        except OSError as e:
            raise UserError(f"--report={report} cannot be written: {e.strerror or e}") from None
    bad = found.examples - found.good
    healthy = bad <= max_bad_fraction * found.examples
    return "\n".join(_lines(source, found, max_bad_fraction, healthy, report)), healthy


def _lines(source: Source, found: Measured, limit: float, healthy: bool, report: Path | None) -> list[str]:
    bad = found.examples - found.good
    whole = found.examples == len(source)
    rows = [("good", found.good), *((f"bad: {cause}", n) for cause, n in found.bad.most_common())]
    rows += [(f"good, but {mark.replace('_', ' ')}", n) for mark, n in sorted(found.marks.items())]
    width = max(len(title) for title, _ in rows)
    lines = [f"{found.examples} of {len(source)} examples decoded" + ("" if whole else ", drawn at random")]
    lines += [f"  {title:<{width}}  {n:>9}  {percent(n / max(1, found.examples)):>8}" for title, n in rows]
    if found.good:
        low, middle, high = quantiles(found.numbers["short_side"], (0, 0.5, 1))
        size = quantiles(found.numbers["bytes"], (0.5,))[0]
        lines.append(
            f"shorter sides: {low:g} to {high:g} pixels, half of them {middle:g} or less; median file {in_bytes(size)}"
        )
    lines += [f"  {b['name']}: {b['cause']}{': ' + b['detail'] if b['detail'] else ''}" for b in found.listed[:SHOWN]]
    if len(found.listed) > SHOWN:
        lines.append(
            f"  ... and {len(found.listed) - SHOWN} more" + ("" if report else ": --report=FILE.jsonl names all")
        )
    if not whole:
        low, high = wilson(bad, found.examples)
        lines.append(f"share of bad ones in the whole data set: {percent(low)} to {percent(high)} (95 % confidence)")
    share = percent(bad / max(1, found.examples))
    verdict = "healthy" if healthy else "NOT healthy"
    lines.append(f"{verdict}: {share} bad, {percent(limit)} allowed (config.data.max_bad_fraction)")
    return lines
