"""The account of examples that could not be read: counted by cause, named once, and too many of them end the run."""

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

# Fewer reads than this say little about the share of bad examples.
MIN_TRIED = 100


@dataclasses.dataclass(frozen=True)
class Bad:
    """One example that could not be read: its index and name in the source, the cause and what the decoder said."""

    index: int
    name: str
    cause: str
    detail: str


class Quarantine:
    """Counts for one process. Not thread-safe: the pipeline calls it from the consumer's thread only.

    Attributes:
      tried: examples that the stream asked for, counting every epoch and, after a resume, the runs before.
      causes: of those, how many had to be replaced, by cause.
      names: cause by name of each bad example met by this process, replacements that were bad themselves included.
    """

    def __init__(self, *, size: int, max_bad_fraction: float, path: str | os.PathLike | None):
        """Raises UserError if `path` cannot be written. `size` is the number of examples in the source."""
        self.tried = 0
        self.causes: collections.Counter[str] = collections.Counter()
        self.names: dict[str, str] = {}
        self._size = size
        # One bit for each example: shares are of distinct examples, or the middle of an epoch would distort them.
        self._seen = np.zeros((size + 7) // 8, np.uint8)
        self._distinct_tried = 0
        self._distinct_bad = 0
        self._max_bad_fraction = max_bad_fraction
        self._path = None if path is None else Path(path)
        self._written: set[str] = set()
        if self._path is not None:
            try:
                self._written = _open_list(self._path)
            except OSError as error:
                raise UserError(
                    f"cannot write the list of bad examples {self._path}: {error.strerror}; choose another place"
                ) from error

    def record(self, index: int, bad: tuple[Bad, ...]) -> None:
        """Accounts for one example of the stream: `index` in the source.

        `bad` is empty, or holds that example and its bad replacements in order. The share of bad examples is taken
        over those that the stream asked for and not over replacements: a cluster of bad files would bias it.

        Raises UserError once more than `max_bad_fraction` of the distinct examples tried since this process started
        were bad, after 100 of them or all there are.
        """
        self.tried += 1
        byte, bit = index >> 3, np.uint8(1 << (index & 7))
        if not self._seen[byte] & bit:
            self._seen[byte] |= bit
            self._distinct_tried += 1
            self._distinct_bad += bool(bad)
        if bad:
            self.causes[bad[0].cause] += 1
        for one in bad:
            if one.name not in self.names:
                self.names[one.name] = one.cause
                _log.warning("bad example %s: %s (%s); the next good one replaces it", one.name, one.cause, one.detail)
                self._write(one)
        enough = self._distinct_tried >= min(MIN_TRIED, self._size)
        if enough and self._distinct_bad > self._max_bad_fraction * self._distinct_tried:
            raise UserError(
                f"{self._distinct_bad} of {self._distinct_tried} examples tried are bad, more than "
                f"max_bad_fraction={self._max_bad_fraction:g} allows; "
                f"reads replaced: {describe(self.causes)}; the log names the files: mend them or raise that limit"
            )

    def state(self) -> dict[str, Any]:
        """The counters, ready for JSON."""
        return {"tried": self.tried, "causes": dict(sorted(self.causes.items()))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the counters to what `state()` returned."""
        self.tried = int(state["tried"])
        self.causes = collections.Counter({str(cause): int(count) for cause, count in state["causes"].items()})

    def _write(self, bad: Bad) -> None:
        if self._path is None or bad.name in self._written:
            return
        self._written.add(bad.name)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": bad.name, "cause": bad.cause}) + "\n")
        except OSError as error:  # A full disk is no reason to lose the run over its list of bad files.
            _log.warning("cannot write %s: %s", self._path, error)


def describe(causes: Mapping[str, int]) -> str:
    """'3 image_empty, 1 image_undecodable'."""
    return ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))


def _open_list(path: Path) -> set[str]:
    """Names already in the list. Leaves it existing, writable and ending in a whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        text = file.read()
        if text and not text.endswith("\n"):  # A run that was killed while it wrote.
            file.write("\n")
    names = set()
    for line in text.splitlines():
        try:
            names.add(str(json.loads(line)["name"]))
        except (ValueError, KeyError, TypeError):
            continue
    return names
