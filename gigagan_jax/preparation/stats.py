"""What a data set is like, as a page for people and as JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.source import Source
from gigagan_jax.preparation.measure import measure
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.stats_page import page, summary


def stats(
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
    """Writes the page, and beside it the same as .json.

    Args:
      source: the data set.
      out: the .html file.
      title: of the page.
      sample: how many examples to look at, drawn by `seed`; 0: all of them.
      seed: see `sample`.
      check_images: decode images; otherwise sizes come from their headers.
      workers, runner, beam_args, results, quiet: as for `run_tasks`.

    Returns:
      what the .json file holds

    Raises:
      UserError: a file that cannot be written; whatever the source raises.
    """
    how: dict[str, Any] = {"runner": runner, "beam_args": beam_args, "results": results, "quiet": quiet}
    found = measure(source, sample, seed, check_images, workers=workers, title="counting", **how)
    funnel = getattr(source, "funnel", None)
    about = {
        "title": title,
        "total": len(source),
        "identity": source.identity(),
        "decoded": check_images,
        "funnel": funnel["steps"] if funnel else [],
    }
    said = summary(found, about)
    try:
        out.write_text(page(found, about), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror or e}") from None
    return said
