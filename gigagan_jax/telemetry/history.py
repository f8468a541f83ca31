"""The history of a run: from what it was begun, and what was changed at which step, in `history.jsonl` of its workdir."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigagan_jax.core.files import append_text, read_json_lines
from gigagan_jax.core.workdir_files import HISTORY_FILE

_log = logging.getLogger(__name__)


def record_event(workdir: Path, event: str, **facts: Any) -> None:
    """Appends a line, unless the last line of this kind says the same: a start that was killed is repeated.

    Args:
      workdir: folder of the run on this machine.
      event: kind of the event: "init", "data" or "settings".
      facts: ready for JSON; "step" and "images" are the run's at the event.
    """
    # Through JSON: a tuple must compare equal to the list that is read back.
    line = json.loads(json.dumps({"event": event, **facts}))
    # Of this kind: a start may record several, and each is repeated with it.
    same_kind = [known for known in read_history(workdir) if known.get("event") == event]
    if same_kind and _without_time(same_kind[-1]) == line:
        return
    try:
        append_text(workdir / HISTORY_FILE, json.dumps({"time": round(time.time(), 3)} | line) + "\n")
    except OSError as error:
        # A full disk must not keep a run from resuming.
        _log.warning("cannot write %s: %s", workdir / HISTORY_FILE, error.strerror or error)


def read_history(workdir: Path) -> list[dict[str, Any]]:
    """All events in their order; empty without a file."""
    return list(read_json_lines(workdir / HISTORY_FILE))


def _without_time(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != "time"}
