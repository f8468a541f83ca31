"""Writes the report of a run to its workdir."""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from gigagan_jax.core.errors import UserError
from gigagan_jax.reporting.run_data import read_run
from gigagan_jax.telemetry.metrics import METRICS_FILE

_log = logging.getLogger(__name__)

REPORT_FILE = "report.html"


def write(workdir: Path, out: Path | None = None) -> Path:
    """Writes the report of a workdir, whole or not at all -> its file.

    Args:
      workdir: of the run.
      out: the file; None for report.html in the workdir.

    Raises:
      UserError: no such run, or a file that cannot be written.
    """
    from gigagan_jax.reporting.run_page import page

    out = workdir / REPORT_FILE if out is None else out
    text = page(read_run(workdir))
    temporary = out.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        try:
            temporary.write_text(text, encoding="utf-8", errors="replace")
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(
            f"the report {out} cannot be written: {e.strerror or e}; choose another file by --out"
        ) from None
    return out


@contextlib.contextmanager
def at_the_end(workdir: Path, enabled: bool = True) -> Iterator[None]:
    """Writes the report when what is inside is done, or has failed after it had logged something. It is never itself a failure.

    A run that was asked to stop leaves none: it has no time, and will go on.
    """
    before = _size(workdir / METRICS_FILE)
    try:
        yield
    except UserError:
        if enabled and _size(workdir / METRICS_FILE) > before:
            _quietly(workdir)
        raise
    if enabled:
        _quietly(workdir)


def _quietly(workdir: Path) -> None:
    try:
        _log.info("report: %s", write(workdir))
    except Exception as e:  # whatever is odd about a workdir, the training was done
        _log.warning("no report was written: %s: %s", type(e).__name__, e)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
