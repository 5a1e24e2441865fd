"""Ranges of numbers that a config field may have."""

import math
from typing import Any, NamedTuple

import numpy as np


class Range(NamedTuple):
    """Numbers from `low` to `high`; `open_low` and `open_high` leave an end out.

    A number must lie there as a float32, too, which is what a run reads.
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        try:
            with np.errstate(over="ignore", under="ignore"):
                kept, low, high = map(np.float32, (value, self.low, self.high))
        except OverflowError:  # a whole number beyond float64
            return False
        lies = self._is_between(value, self.low, self.high)
        return lies and self._is_between(kept, low, high) and bool(np.isfinite(kept))

    def _is_between(self, value: Any, low: Any, high: Any) -> bool:
        above = value > low if self.open_low else value >= low
        below = value < high if self.open_high else value <= high
        return bool(above and below)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


COUNT = Range(1)
SHARE = Range(0, 1)
NON_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
