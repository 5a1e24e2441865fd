"""The best mixture beside the best control, in one measure."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedmoe_jax.options import Measure
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.paired import Paired, Seeds, difference_cell, pair_up
from fedmoe_jax.report.runs import NAN


class Duel(NamedTuple):
    """The best of each kind by their means in one measure.

    Both are chosen by the numbers that are compared, so that the difference of two that
    are alike is partly luck.

    Attributes:
      mixture: its label.
      control: its label.
      paired: the mixture less the control.
      lead: +1 where the mixture is better by more than the interval, -1 where the
        control is, 0 where neither is.
    """

    mixture: str
    control: str
    paired: Paired
    lead: int


def find_best(seeds: Mapping[str, Seeds], key: str, measure: Measure) -> str | None:
    """The label of the best mean; the first of equals, None where none is known."""
    means = {}
    for label, each in seeds.items():
        values = np.array([one.get(key, NAN) for one in each.values()], float)
        if np.isfinite(values).any():
            means[label] = float(np.mean(values[np.isfinite(values)]))
    sign = measure.better or 1
    return max(means, key=lambda label: sign * means[label], default=None)


def hold_duel(
    seeds: Mapping[str, Seeds], controls: Collection[str], key: str, measure: Measure
) -> Duel | None:
    """The best of the controls and the best of the other labels.

    Args:
      seeds: numbers by label and seed.
      controls: some of the labels.
      key: of the measure.
      measure: `better` says what the best is, the most where it is 0.

    Returns:
      None where either kind lacks the measure, or the two have no seed in common.
    """
    kinds = [
        {label: each for label, each in seeds.items() if (label in controls) == control}
        for control in (False, True)
    ]
    mixture, control = (find_best(kind, key, measure) for kind in kinds)
    if mixture is None or control is None:
        return None
    paired = pair_up(seeds[mixture], seeds[control], key, measure)
    if not paired.pairs:
        return None
    sign = (1 if paired.mean > 0 else -1) * (measure.better or 1)
    lead = sign if abs(paired.mean) > paired.half else 0
    return Duel(mixture, control, paired, lead)


def duel_cell(duel: Duel, digits: int, quote: Callable[[str], str] = str) -> Cell:
    """The winner and its margin, bold; the difference where it can be chance.

    Args:
      duel: of two labels.
      digits: of the margin.
      quote: how a label is written.
    """
    cell = difference_cell(duel.paired, digits)
    labels = [quote(duel.mixture), quote(duel.control)]
    if not duel.lead:
        return cell._replace(text=f"{labels[0]} {cell.text} less {labels[1]}")
    first, second = labels if duel.lead > 0 else reversed(labels)
    return cell._replace(text=f"{first} {cell.text.lstrip('+-')} over {second}")
