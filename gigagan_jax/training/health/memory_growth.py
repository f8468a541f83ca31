"""Host memory that grows without end: a leak ends a run after days, without a message of its own."""

import collections

# Seconds between two readings: lines of metrics may come every second.
_SPACING = 60.0
# Readings that are passed over while buffers fill; then those whose largest one is compared with.
_WARM_UP, _BASELINE = 10, 20
# Readings that must all be beyond the limit, and still rise.
_WINDOW = 20
# A finding asks for a growth of this share and of so many GiB.
_SHARE, _LEAST = 0.2, 2.0
# The next finding comes when the memory has grown by this factor since the last.
_AGAIN = 1.5


class MemoryGrowth:
    """Judges the host memory of one process.

    A single jump, such as that of an evaluator's network, is no growth: the memory does not rise after it. Files that the kernel
    caches are no part of what is read.
    """

    def __init__(self) -> None:
        self.baseline: float | None = None
        self._last: float | None = None
        self._count = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._reported = 0.0

    def add_reading(self, gib: float, seconds: float) -> bool:
        """Adds a reading -> whether it is a finding.

        Args:
          gib: memory of the process and its workers.
          seconds: on a clock that does not go back.
        """
        if self._last is not None and seconds - self._last < _SPACING:
            return False
        self._last = seconds
        self._count += 1
        if self._count <= _WARM_UP:
            return False
        if self._count <= _WARM_UP + _BASELINE:
            self.baseline = max(self.baseline or 0.0, gib)
            return False
        self._recent.append(gib)
        if len(self._recent) < _WINDOW or self.baseline is None:
            return False
        lowest = min(self._recent)
        limit = max(self.baseline * (1 + _SHARE), self.baseline + _LEAST, self._reported * _AGAIN)
        if lowest <= limit or not self._rises():
            return False
        self._reported = lowest
        return True

    def _rises(self) -> bool:
        readings = list(self._recent)
        before, after = readings[: _WINDOW // 2], readings[_WINDOW // 2 :]
        # By the lowest of each half too: saving and evaluation take memory for a moment.
        return min(after) > min(before) and sum(after) > sum(before)
