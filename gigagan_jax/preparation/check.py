"""Decodes a sample of a data set, or all of it, and reports what is wrong."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes, format_percent
from gigagan_jax.data.source import Source
from gigagan_jax.preparation.measure import Measurements, count_quantiles, measure_source
from gigagan_jax.preparation.output import Output

# Bad examples on the screen. --report names all of them.
SHOWN = 20


def wilson_interval(bad: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Interval that contains a share with 95 % confidence (Wilson 1927). It suits small shares and small samples.

    Args:
      bad: number of draws with the property.
      tried: number of draws.
      z: quantile of the normal distribution.
    """
    # Without a draw, every share is possible.
    if not tried:
        return 0.0, 1.0
    share = bad / tried
    centre = share + z * z / (2 * tried)
    half = z * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    scale = 1 + z * z / tried
    # Exactly 0 and 1 at the ends, where rounding would leave a tiny share.
    return (centre - half) / scale if bad else 0.0, (centre + half) / scale if bad < tried else 1.0


def check_source(
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
      sample: number of examples, drawn by `seed`; 0 means all of them.
      seed: see `sample`.
      max_bad_fraction: largest share of bad examples in healthy data.
      report: file with a line of JSON for each bad example.
      workers, runner, beam_args, results, quiet: as for `run_tasks`.

    Returns:
      (text for the screen, whether the data is healthy)

    Raises:
      UserError: the report cannot be written, or an error of the source.
    """
    options: dict[str, Any] = {"runner": runner, "beam_args": beam_args, "results": results, "quiet": quiet}
    found = measure_source(source, sample, seed, True, workers=workers, title="checking", **options)
    if report is not None:
        try:
            report.write_text("".join(json.dumps(bad) + "\n" for bad in found.listed), encoding="utf-8")
        except OSError as e:
            raise UserError(f"--report={report} cannot be written: {e.strerror or e}") from None
    bad = found.examples - found.good
    # The rule of the quarantine: a share of exactly the limit is allowed.
    healthy = bad <= max_bad_fraction * found.examples
    return "\n".join(_format_report(source, found, max_bad_fraction, healthy, report)), healthy


def _format_report(source: Source, found: Measurements, limit: float, healthy: bool, report: Path | None) -> list[str]:
    bad = found.examples - found.good
    complete = found.examples == len(source)
    rows = [("good", found.good), *((f"bad: {cause}", n) for cause, n in found.bad.most_common())]
    # Marked examples (animated, rotated, ...) are usable. They count as good.
    rows += [(f"good, but {mark.replace('_', ' ')}", n) for mark, n in sorted(found.marks.items())]
    width = max(len(title) for title, _ in rows)
    lines = [f"{found.examples} of {len(source)} examples decoded" + ("" if complete else ", drawn at random")]
    # Numbers align in columns for all titles.
    lines += [f"  {title:<{width}}  {n:>9}  {format_percent(n / max(1, found.examples)):>8}" for title, n in rows]
    # Bad examples have no size.
    if found.good:
        low, middle, high = count_quantiles(found.numbers["short_side"], (0, 0.5, 1))
        size = count_quantiles(found.numbers["bytes"], (0.5,))[0]
        lines.append(
            f"shorter sides: {low:g} to {high:g} pixels, half of them {middle:g} or less; "
            f"median file {format_bytes(size)}"
        )
    lines += [f"  {b['name']}: {b['cause']}{': ' + b['detail'] if b['detail'] else ''}" for b in found.listed[:SHOWN]]
    if len(found.listed) > SHOWN:
        lines.append(
            f"  ... and {len(found.listed) - SHOWN} more" + ("" if report else ": --report=FILE.jsonl names all")
        )
    # A share of all examples is known exactly. Only a sample has an interval.
    if not complete:
        low, high = wilson_interval(bad, found.examples)
        interval = f"{format_percent(low)} to {format_percent(high)}"
        lines.append(f"share of bad examples in the whole data set: {interval} (95 % confidence)")
    # max(1, ...): an empty sample must not divide by zero.
    share = format_percent(bad / max(1, found.examples))
    verdict = "healthy" if healthy else "NOT healthy"
    lines.append(f"{verdict}: {share} bad, {format_percent(limit)} allowed (config.data.max_bad_fraction)")
    return lines
