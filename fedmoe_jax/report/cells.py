"""Cells of a report's tables: a number of all seeds of a label, as text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.report.runs import NAN, interval

NO_DATA = "no data"
NOT_APPLICABLE = "does not apply"  # to this system, whatever is measured


class Cell(NamedTuple):
    """One number of a table: its text, its value (NaN: none), whether it is bold."""

    text: str
    value: float
    bold: bool = False


def mean_cell(values: Sequence[float], scale: float, digits: int) -> Cell:
    """Mean and 95 % t-interval, of one seed a mark in its place.

    Then how many seeds have a number, if not all do.
    """
    finite = [scale * value for value in values if math.isfinite(value)]
    if not finite:
        return Cell(NO_DATA, NAN)
    mean, half = interval(finite)
    text = f"{mean:z.{digits}f}"  # 0, not -0
    text += f" ± {half:.{digits}f}" if len(finite) > 1 else ""
    if len(finite) < len(values):
        text += f" ({len(finite)}/{len(values)} seeds)"
    elif len(values) == 1:
        text += " (1 seed)"
    return Cell(text, mean)


def median_cell(values: Sequence[float]) -> Cell:
    """Median round, where never is infinity, and how many seeds got there."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Cell(NO_DATA, NAN)
    median = float(np.median(known))
    text = f"{median:g}" if math.isfinite(median) else "–"
    return Cell(f"{text} ({np.isfinite(known).sum()}/{len(known)})", median)


def mark_best(cells: Sequence[Cell], better: int, zero_wins: bool = True) -> list[Cell]:
    """Makes the best cells of a column bold, unless all the numbers are equal.

    Args:
      cells: of all labels.
      better: +1 where more is better, -1 where less is, 0 where neither.
      zero_wins: whether 0 can be the best number.
    """
    values = [better * cell.value for cell in cells]
    absent = [math.isnan(v) or (v == 0 and not zero_wins) for v in values]
    rivals = {v for v, out in zip(values, absent, strict=True) if not out}
    if len(rivals) < 2:
        return list(cells)
    return [
        cell._replace(bold=value == max(rivals))
        for cell, value in zip(cells, values, strict=True)
    ]
