"""Measures how far a network's gradient norm has grown from the lowest level that it kept."""

import math
from collections.abc import Mapping
from typing import Any


class DriftMeter:
    """Compares the running mean of a gradient norm with the lowest level that it kept.

    The mean is geometric: norms have heavy tails, and a spike of a thousandfold norm must not look like growth.
    The reference falls only to a level that the mean stayed below for `patience` steps in a row. A short dip leaves it alone:
    the lowest mean of all would be the dip of a moment, and would fall with the length of the run.

    Args:
      window: steps of the running mean.
      patience: steps that a lower level must last.
      state: what `state` returned; None for a new meter.
    """

    def __init__(self, window: int, patience: int, state: Mapping[str, Any] | None = None):
        self._window, self._patience = window, patience
        state = state or {}
        # Logarithms; the reference is None until the first `patience` steps with a full window.
        self._mean: float = state.get("mean", 0.0)
        self._count: int = state.get("count", 0)
        self._reference: float | None = state.get("reference")
        # Consecutive steps below the reference, and the highest mean in them.
        self._below: int = state.get("below", 0)
        self._highest: float = state.get("highest", 0.0)

    def state(self) -> dict[str, Any]:
        """Returns the state of the meter as JSON values."""
        return {
            "mean": self._mean,
            "count": self._count,
            "reference": self._reference,
            "below": self._below,
            "highest": self._highest,
        }

    @property
    def factor(self) -> float:
        """The mean over the reference; NaN without a reference."""
        return math.nan if self._reference is None else math.exp(self._mean - self._reference)

    def add_norm(self, norm: float, *, is_saturated: bool = False) -> None:
        """Adds the norm of a step.

        Args:
          norm: gradient norm of the network
          is_saturated: whether a critic is sure of everything; gradients are then small for that reason alone, and the
            reference keeps its level
        """
        # The gradient of a network that gets none has no logarithm.
        if not 0 < norm < math.inf:
            return
        # A plain mean until the window is full, then an exponential one with that time constant.
        self._count = min(self._count + 1, self._window)
        self._mean += (math.log(norm) - self._mean) / self._count
        if self._count < self._window:
            return
        if is_saturated or (self._reference is not None and self._mean >= self._reference):
            self._below = 0
            return
        self._highest = max(self._highest, self._mean) if self._below else self._mean
        self._below += 1
        if self._below >= self._patience:
            self._reference, self._below = self._highest, 0
