"""Counts and names the examples that could not be read. Ends the run when their share is too large."""

import collections
import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError

_log = logging.getLogger(__name__)

# Fewer reads than this do not estimate the share of bad examples.
MIN_TRIED = 100


@dataclasses.dataclass(frozen=True)
class FailedExample:
    """One example that could not be read: its index and name in the source, the cause and the decoder's message."""

    index: int
    name: str
    cause: str
    detail: str


class Quarantine:
    """Counters of one process. Not thread-safe: the pipeline calls it from the consumer's thread only.

    Attributes:
      tried: examples that the stream requested, over every epoch and, after a resume, over the earlier runs.
      causes: how many of those had to be replaced, by cause.
      names: cause by name of each bad example of this process, bad replacements included.
    """

    def __init__(self, *, size: int, max_bad_fraction: float, path: str | os.PathLike | None):
        """Raises UserError if `path` cannot be written. `size` is the number of examples in the source."""
        self.tried = 0
        self.causes: collections.Counter[str] = collections.Counter()
        self.names: dict[str, str] = {}
        self._size = size
        # One bit for each example: the share counts distinct examples.
        # Counting reads instead would weigh examples by how often the epoch so far has used them.
        self._seen = np.zeros((size + 7) // 8, np.uint8)
        self._distinct_tried = 0
        self._distinct_bad = 0
        self._max_bad_fraction = max_bad_fraction
        self._path = None if path is None else Path(path)
        self._written: set[str] = set()
        # Of the last bad example: the decoder's message often says how to mend it.
        self._last = ""
        if self._path is not None:
            # A path that cannot be written ends the run here, not hours later at the first bad file.
            try:
                self._written = _open_list(self._path)
            except OSError as error:
                raise UserError(
                    f"cannot write the list of bad examples {self._path}: {error.strerror}; choose another place"
                ) from error

    def record_example(self, index: int, bad: tuple[FailedExample, ...]) -> None:
        """Accounts for one example of the stream.

        Args:
          index: the example's index in the source.
          bad: empty, or that example followed by its bad replacements in order. Replacements do not count into the
            share of bad examples, because a cluster of bad files would bias it.

        Raises:
          UserError: more than `max_bad_fraction` of the distinct examples that this process has tried are bad. The
            check starts after 100 examples, or after all of a smaller source.
        """
        self.tried += 1
        byte, bit = index >> 3, np.uint8(1 << (index & 7))
        if not self._seen[byte] & bit:
            self._seen[byte] |= bit
            self._distinct_tried += 1
            # bool, not len: replacements are no examples that the stream requested.
            self._distinct_bad += bool(bad)
        if bad:
            self.causes[bad[0].cause] += 1
        for failed in bad:
            self._last = f"{failed.name} ({failed.detail})"
            # Each epoch meets the same bad files again. One line in the log is enough.
            if failed.name not in self.names:
                self.names[failed.name] = failed.cause
                _log.warning(
                    "bad example %s: %s (%s); the next good one replaces it", failed.name, failed.cause, failed.detail
                )
                self._append_line(failed)
        # A source of fewer than MIN_TRIED examples is judged once all of them were tried.
        enough = self._distinct_tried >= min(MIN_TRIED, self._size)
        if enough and self._distinct_bad > self._max_bad_fraction * self._distinct_tried:
            raise UserError(
                f"{self._distinct_bad} of {self._distinct_tried} examples tried are bad, more than "
                f"max_bad_fraction={self._max_bad_fraction:g} allows; "
                f"reads replaced: {format_causes(self.causes)}; the last one is {self._last}; "
                "the log names the files: repair them or raise that limit"
            )

    def state(self) -> dict[str, Any]:
        """The counters, ready for JSON."""
        # Sorted: equal counters give equal JSON, whichever cause came first.
        return {"tried": self.tried, "causes": dict(sorted(self.causes.items()))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the counters to what `state()` returned."""
        self.tried = int(state["tried"])
        self.causes = collections.Counter({str(cause): int(count) for cause, count in state["causes"].items()})

    def _append_line(self, failed: FailedExample) -> None:
        # Names in the file come from earlier runs too: a resumed run lists each file once.
        if self._path is None or failed.name in self._written:
            return
        self._written.add(failed.name)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": failed.name, "cause": failed.cause}) + "\n")
        except OSError as error:
            # A full disk must not end a run because of this list.
            _log.warning("cannot write %s: %s", self._path, error)


def format_causes(causes: Mapping[str, int]) -> str:
    """'3 image_empty, 1 image_undecodable'."""
    return ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))


def _open_list(path: Path) -> set[str]:
    """Reads the names in the list. Leaves a file that exists, is writable and ends in a whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a+ creates the file, tests write access and keeps the lines of earlier runs.
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        text = file.read()
        # A run killed during a write leaves half a line. The next line must not be joined to it.
        if text and not text.endswith("\n"):
            file.write("\n")
    names = set()
    for line in text.splitlines():
        try:
            names.add(str(json.loads(line)["name"]))
        except (ValueError, KeyError, TypeError):
            continue
    return names
