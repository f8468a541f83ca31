"""Asks Google's metadata server for notice of preemption and passes it on as a SIGTERM, which signals.py handles."""

import argparse
import contextlib
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from gigagan_jax.core.errors import UserError

_log = logging.getLogger(__name__)

_GOOGLE_URL = "http://metadata.google.internal/computeMetadata/v1/instance"
# Contains "Google Compute Engine" on their machines, in containers too.
_PRODUCT_FILE = Path("/sys/class/dmi/id/product_name")
# Key -> value that announces a shutdown. A live migration (MIGRATE_ON_HOST_MAINTENANCE) does not stop the run.
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_POLL_SECONDS = 2.0
# After _MAX_FAILURES polls without an answer, the server is polled every _SLOW_POLL_SECONDS.
_MAX_FAILURES, _SLOW_POLL_SECONDS = 5, 60.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--maintenance_url"""
    parser.add_argument(
        "--maintenance_url",
        default="auto",
        help="server of maintenance and preemption notices: auto (on Google's machines), off, or a URL that answers like theirs",
    )


@contextlib.contextmanager
def watch_notices(url: str) -> Iterator[None]:
    """Within it, a new notice sends SIGTERM to this process. A notice that is there from the start is only logged.

    Such a notice has already stopped an earlier run, up to an hour before the shutdown. To stop again would allow no step.

    Args:
      url: "auto", "off", or the folder of `preempted` and `maintenance-event` on a server that answers like Google's.

    Raises:
      UserError: `url` is none of these.
    """
    if url == "auto":
        url = _GOOGLE_URL if _runs_on_google() else "off"
    if url == "off":
        yield
        return
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--maintenance_url={url}: write auto, off, or http://HOST/PATH")
    over = threading.Event()
    thread = threading.Thread(target=_poll_notices, args=(url.rstrip("/"), over), daemon=True, name="maintenance")
    thread.start()
    try:
        yield
    finally:
        over.set()


def _runs_on_google() -> bool:
    try:
        return "Google" in _PRODUCT_FILE.read_text()
    except OSError:
        return False


def _poll_notices(url: str, over: threading.Event) -> None:
    # Without a proxy, whatever the environment names: only the machine itself reaches its metadata server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    failures, pause = 0, _POLL_SECONDS
    # Notices of the first answer that have not gone since; None before it.
    standing: set[str] | None = None
    while not over.wait(pause):
        values = {key: _read_metadata(opener, f"{url}/{key}") for key in _NOTICES}
        failures = 0 if any(value is not None for value in values.values()) else failures + 1
        if failures == _MAX_FAILURES:
            _log.warning("%s does not answer: until it does, only SIGTERM announces maintenance and preemption", url)
        pause = _SLOW_POLL_SECONDS if failures >= _MAX_FAILURES else _POLL_SECONDS
        if failures:
            continue
        notices = {f"{key} is {value}" for key, value in values.items() if value == _NOTICES[key]}
        if standing is None and notices:
            _log.warning(
                "notice from %s, as this process starts: %s; going on until the machine goes", url, ", ".join(notices)
            )
        # A notice that was withdrawn and returns is a new one.
        standing = notices if standing is None else standing & notices
        new_notices = sorted(notices - standing)
        if new_notices and not over.is_set():
            _log.warning("notice from %s: %s; saving and stopping", url, ", ".join(new_notices))
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _read_metadata(opener: urllib.request.OpenerDirector, url: str) -> str | None:
    # The server refuses requests without this header.
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with opener.open(request, timeout=5) as response:
            return response.read(1000).decode("utf-8", "replace").strip().upper()
    # urllib raises subclasses of OSError; ValueError is for a malformed URL or answer.
    except (OSError, ValueError):
        return None
