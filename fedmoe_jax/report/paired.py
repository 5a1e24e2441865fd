"""Labels less others, seed by seed: runs of one seed share split and weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from fedmoe_jax.options import FINAL, Measure
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.diverged import is_diverged, mark_cell
from fedmoe_jax.report.runs import NAN, Run, interval, join_measures, name_runs, numbers

Seeds = Mapping[int, Mapping[str, float]]  # numbers of the runs of a label, by seed
Pair = tuple[str, str]  # a label, and the one that is taken from it


class Paired(NamedTuple):
    """The differences of one label to another, over the seeds that both have.

    Attributes:
      mean: in the unit of the measure's column; NaN without a pair.
      half: half-width of its 95 % t-interval; NaN below two pairs.
      pairs: number of these seeds.
      wins: pairs in which the label is better.
      losses: pairs in which it is worse; equal ones are neither.
      p: of the two-sided sign test, in (0, 1]; NaN without a pair.
      diverged: pairs of which a run diverged.
    """

    mean: float
    half: float
    pairs: int
    wins: int
    losses: int
    p: float
    diverged: int


def sign_test(wins: int, losses: int) -> float:
    """p of the two-sided sign test, which leaves equal pairs out; 1 without others.

    That of `scipy.stats.binomtest`, whose module takes longer to import than a report
    to draw.
    """
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def pair_up(ours: Seeds, others: Seeds, key: str, measure: Measure) -> Paired:
    """One measure of a label less that of another.

    Args:
      ours: of the label.
      others: of the label that is taken from it.
      key: of the measure.
      measure: `better` says what a win is, more where it is 0.
    """
    both = [seed for seed in ours if seed in others]
    less = [ours[seed].get(key, NAN) - others[seed].get(key, NAN) for seed in both]
    apart = measure.scale * np.array(less, float)
    known = np.isfinite(apart)
    broken = [is_diverged(ours[seed]) or is_diverged(others[seed]) for seed in both]
    apart, diverged = apart[known], int(np.sum(known & np.array(broken, bool)))
    if not len(apart):
        return Paired(NAN, NAN, 0, 0, 0, NAN, 0)
    mean, half = interval(apart)
    gains = apart if measure.better >= 0 else -apart
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    p = sign_test(wins, losses)
    return Paired(mean, half, len(apart), wins, losses, p, diverged)


def seeds_of(runs: Sequence[Run]) -> dict[str, dict[int, dict[str, float]]]:
    """The numbers of all runs, by label and seed; of equal seeds the first counts."""
    measures = join_measures(runs)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in name_runs(runs):
        seeds = found.setdefault(run.label, {})
        seeds.setdefault(run.config.get("seed", 0), numbers(run, measures, {}))
    return found


def final_measures(runs: Sequence[Run]) -> dict[str, Measure]:
    """The measures of final evaluations that have a column, by key."""
    measures = join_measures(runs)
    return {key: m for key, m in measures.items() if m.over == FINAL and m.title}


def pair_labels(
    runs: Sequence[Run], pairs: Sequence[Pair]
) -> dict[str, dict[Pair, Paired]]:
    """The differences of pairs of labels, by the key of the measure and the pair."""
    seeds, measures = seeds_of(runs), final_measures(runs)
    return {
        key: {
            (label, other): pair_up(seeds[label], seeds[other], key, measure)
            for label, other in pairs
        }
        for key, measure in measures.items()
    }


def exceeds(paired: Paired) -> bool:
    """Whether a difference is beyond its interval; of one pair it never is."""
    return abs(paired.mean) > paired.half


def find_gain(paired: Paired, measure: Measure) -> int:
    """+1 where a difference is better by more than its interval, -1 worse, else 0.

    Args:
      paired: of the measure.
      measure: `better` says what a gain is, more where it is 0.
    """
    if not exceeds(paired):
        return 0
    return (1 if paired.mean > 0 else -1) * (measure.better or 1)


def difference_cell(paired: Paired, digits: int) -> Cell:
    """Mean and half-width, bold where the mean is beyond it; marked, see `diverged`."""
    if not paired.pairs:
        return Cell("no pair", NAN)
    text = f"{paired.mean:+z.{digits}f}"
    text += f" ± {paired.half:.{digits}f}" if paired.pairs > 1 else " (1 pair)"
    cell = Cell(text, paired.mean, exceeds(paired))
    return mark_cell(cell) if paired.diverged else cell
