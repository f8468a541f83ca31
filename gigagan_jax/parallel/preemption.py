"""Notice of a machine that is about to be taken away: asked for at Google's metadata server, passed on as a SIGTERM."""

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

_GOOGLE = "http://metadata.google.internal/computeMetadata/v1/instance"
_PRODUCT = Path("/sys/class/dmi/id/product_name")  # says "Google Compute Engine" there, in containers too
# Key -> what it says when the machine goes. A machine that is only moved (MIGRATE_ON_HOST_MAINTENANCE) goes on.
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_EVERY_SECONDS = 2.0
_PATIENCE, _RARELY = 5, 60.0  # questions without an answer, after which they are asked so many seconds apart


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--maintenance_url"""
    parser.add_argument(
        "--maintenance_url",
        default="auto",
        help="where notices of maintenance and preemption are asked for: auto (on Google's machines), off, or a URL like theirs",
    )


@contextlib.contextmanager
def watch(url: str) -> Iterator[None]:
    """While it is open, a notice is as good as a SIGTERM to this process; one that stands from the start is only logged.

    That one has stopped a run on this machine before, perhaps an hour ahead: stopping again would lead to no step at all.

    Args:
      url: "auto", "off", or the folder of `preempted` and `maintenance-event` on a server that answers like Google's.

    Raises:
      UserError: it is none of these.
    """
    if url == "auto":
        url = _GOOGLE if _on_google() else "off"
    if url == "off":
        yield
        return
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--maintenance_url={url}: write auto, off, or http://HOST/PATH")
    over = threading.Event()
    thread = threading.Thread(target=_ask, args=(url.rstrip("/"), over), daemon=True, name="maintenance")
    thread.start()
    try:
        yield
    finally:
        over.set()


def _on_google() -> bool:
    try:
        return "Google" in _PRODUCT.read_text()
    except OSError:
        return False


def _ask(url: str, over: threading.Event) -> None:
    # Straight to the machine's own server, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    unanswered, pause, standing = 0, _EVERY_SECONDS, None
    while not over.wait(pause):
        answers = {key: _answer(opener, f"{url}/{key}") for key in _NOTICES}
        unanswered = 0 if any(a is not None for a in answers.values()) else unanswered + 1
        if unanswered == _PATIENCE:
            _log.warning(
                "%s does not answer: maintenance and preemption will be seen by SIGTERM only until it does", url
            )
        pause = _RARELY if unanswered >= _PATIENCE else _EVERY_SECONDS
        if unanswered:
            continue
        notices = {f"{key} is {answer}" for key, answer in answers.items() if answer == _NOTICES[key]}
        if standing is None and notices:
            _log.warning(
                "notice from %s, as this process starts: %s; going on until the machine goes", url, ", ".join(notices)
            )
        standing = notices if standing is None else standing & notices
        said = sorted(notices - standing)
        if said and not over.is_set():
            _log.warning("notice from %s: %s; saving and stopping", url, ", ".join(said))
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _answer(opener: urllib.request.OpenerDirector, url: str) -> str | None:
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.read(1000).decode("utf-8", "replace").strip().upper()
    except (OSError, ValueError):  # urllib's errors are OSErrors
        return None
