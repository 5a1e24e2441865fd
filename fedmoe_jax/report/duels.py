"""The best mixture beside the best control, in one measure."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedmoe_jax.options import Measure
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.paired import (
    Paired,
    Seeds,
    difference_cell,
    find_gain,
    pair_up,
)
from fedmoe_jax.report.runs import NAN

GROUPS = "final_groups_found"  # key of a measure


class Duel(NamedTuple):
    """The best of each kind by their means in one measure.

    Both are chosen by the numbers that are compared, so that the difference of two that
    are alike is partly luck.

    Attributes:
      mixture: its label.
      control: its label.
      paired: the mixture less the control.
      gain: the mean difference, above 0 where the mixture is better.
      lead: +1 where the mixture is better by more than the interval, -1 where the
        control is, 0 where neither is.
    """

    mixture: str
    control: str
    paired: Paired
    gain: float
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


def is_merged(seeds: Seeds) -> bool:
    """Whether a strategy that looks for groups found one in every seed.

    All of its clients then train one network, which is no mixture.
    """
    return all(one.get(GROUPS) == 1 for one in seeds.values())


def hold_duel(
    seeds: Mapping[str, Seeds], controls: Collection[str], key: str, measure: Measure
) -> Duel | None:
    """The best of the controls and the best of the mixtures.

    Mixtures are the other labels, but for those that are one network, see `is_merged`.

    Args:
      seeds: numbers by label and seed.
      controls: some of the labels.
      key: of the measure.
      measure: `better` says what the best is, the most where it is 0.

    Returns:
      None where either kind lacks the measure, or the two have no seed in common.
    """
    known = {label: each for label, each in seeds.items() if label in controls}
    others = {
        label: each
        for label, each in seeds.items()
        if label not in controls and not is_merged(each)
    }
    mixture, control = (find_best(kind, key, measure) for kind in (others, known))
    if mixture is None or control is None:
        return None
    paired = pair_up(seeds[mixture], seeds[control], key, measure)
    if not paired.pairs:
        return None
    gain = paired.mean * (measure.better or 1)
    return Duel(mixture, control, paired, gain, find_gain(paired, measure))


class Phrase(NamedTuple):
    """A duel in words: `first margin word second`.

    Attributes:
      first: the label that leads; the mixture where none does.
      margin: the difference and its interval: without a sign where one leads, else
        above 0 where the mixture is better.
      word: `over` where one leads, else `against`.
      second: the other label.
    """

    first: str
    margin: str
    word: str
    second: str


def phrase_duel(duel: Duel, digits: int, unit: str = "") -> Phrase:
    """A duel in words.

    Args:
      duel: of two labels.
      digits: of the margin.
      unit: which follows it, where it is not that of all.
    """
    margin = difference_cell(duel.paired._replace(mean=duel.gain), digits).text
    margin += f" {unit}" if unit else ""
    if not duel.lead:
        return Phrase(duel.mixture, margin, "against", duel.control)
    first, second = duel.mixture, duel.control
    if duel.lead < 0:
        first, second = second, first
    return Phrase(first, margin.lstrip("+-"), "over", second)


def duel_cell(
    duel: Duel, digits: int, quote: Callable[[str], str] = str, unit: str = ""
) -> Cell:
    """The winner and its margin, bold; the difference where it can be chance.

    Args:
      duel: of two labels.
      digits: of the margin.
      quote: how a label is written.
      unit: see `phrase_duel`.
    """
    first, margin, word, second = phrase_duel(duel, digits, unit)
    text = f"{quote(first)} {margin} {word} {quote(second)}"
    return difference_cell(duel.paired, digits)._replace(text=text)
