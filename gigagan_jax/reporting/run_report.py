"""Writes the report of a run, one self-contained HTML file, to its workdir."""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import METRICS_FILE, REPORT_FILE
from gigagan_jax.reporting.run_data import read_run

_log = logging.getLogger(__name__)


def write_report(workdir: Path, out: Path | None = None, **place: Any) -> Path:
    """Writes the report of a workdir atomically.

    Args:
      workdir: workdir of the run.
      out: path of the report; None for report.html in the workdir.
      place: `address` and `checkpoints` of `read_run`, for a run in a bucket.

    Returns:
      path of the report

    Raises:
      UserError: there is no such run, or the file cannot be written.
    """
    # Imported late: the page is needed only after the last step.
    from gigagan_jax.reporting.run_page import render_page

    out = workdir / REPORT_FILE if out is None else out
    text = render_page(read_run(workdir, **place))
    # A random name: a run and tools/report.py may write the report of one workdir at the same time.
    temporary = out.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        try:
            # A prompt from a shell can hold lone surrogates, which UTF-8 cannot encode.
            temporary.write_text(text, encoding="utf-8", errors="replace")
            # Atomic: a browser that reloads the page never sees half of it.
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(
            f"the report {out} cannot be written: {e.strerror or e}; choose another file by --out"
        ) from None
    return out


@contextlib.contextmanager
def write_report_at_end(
    workdir: Path,
    enabled: bool = True,
    *,
    before: Callable[[], dict[str, Any]] = lambda: {},
    after: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Writes the report when the body ends, or when it fails after it has logged metrics. It raises no error of its own.

    An interrupted run writes none: it has seconds to exit, and will resume.

    Args:
      workdir: folder of the run.
      enabled: False writes none.
      before: called before the report is written; returns the last arguments of `write_report`.
      after: called after it.
    """

    def write() -> None:
        try:
            place = before()
            out = write_report(workdir, **place)
            after()
            _log.info("report: %s", f"{place['address']}/{out.name}" if place else out)
        # Any error: the training is done, and a report must not turn it into a failure.
        except Exception as e:
            _log.warning("no report was written: %s: %s", type(e).__name__, e)

    # A start that fails at once must not replace the report of the run before it.
    size = _file_size(workdir / METRICS_FILE)
    try:
        yield
    except UserError:
        if enabled and _file_size(workdir / METRICS_FILE) > size:
            write()
        raise
    if enabled:
        write()


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    # Smaller than an empty file.
    except OSError:
        return -1
