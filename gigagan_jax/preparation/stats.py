"""Statistics of a data set, as an HTML page for people and as JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.source import Source
from gigagan_jax.preparation.measure import measure_source
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.stats_page import render_page, summary_data


def write_stats(
    source: Source,
    out: Path,
    *,
    title: str,
    sample: int = 0,
    seed: int = 0,
    check_images: bool = False,
    workers: int = 0,
    runner: str | None = None,
    beam_args: Sequence[str] = (),
    results: Output | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the page, and the same numbers beside it as .json.

    Args:
      source: the data set.
      out: the .html file.
      title: of the page.
      sample: number of examples, drawn by `seed`; 0 means all of them.
      seed: see `sample`.
      check_images: decode images; otherwise sizes come from the headers.
      workers, runner, beam_args, results, quiet: as for `run_tasks`.

    Returns:
      the content of the .json file

    Raises:
      UserError: a file cannot be written, or an error of the source.
    """
    options: dict[str, Any] = {"runner": runner, "beam_args": beam_args, "results": results, "quiet": quiet}
    found = measure_source(source, sample, seed, check_images, workers=workers, title="counting", **options)
    # Only sources with metadata have filters.
    report = getattr(source, "filter_report", None)
    about = {
        "title": title,
        "total": len(source),
        "identity": source.identity(),
        "decoded": check_images,
        # The key is part of the JSON file's format.
        "funnel": report["steps"] if report else [],
    }
    data = summary_data(found, about)
    try:
        # The page first: with a full disk, there is no JSON file without its page.
        out.write_text(render_page(found, about), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror or e}") from None
    return data
