"""Floors of participation: the spread over clients at each, its trend, the price."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.report.cells import NO_DATA, Cell
from fedmoe_jax.report.curves import Series, curves
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.ladders import (
    find_known,
    find_ladders,
    ladder_rows,
    stack_values,
)
from fedmoe_jax.report.runs import NAN, Run, join_measures
from fedmoe_jax.report.sheets import Section, Sheet

FIELD = "fairness.floor"
SPREAD = "final_accuracy_spread"  # whose trend is tested
SHOWN = (
    *("least_participation", "final_participation_jain", SPREAD),
    *("final_worst_decile_accuracy", "final_weakest_accuracy", "final_capacity_gap"),
    *("final_personal_accuracy", "final_global_accuracy", "simulated_minutes"),
)
LEAST_SEEDS, LEAST_FLOORS = 2, 3  # of the test
TITLE = "Floors of participation"
ABOUT = (
    "Runs that differ in fairness.floor and seed alone. The lowest floor of each has "
    "its means; the others their differences to it over the seeds that both have, ± "
    "half-width of the 95 % t-interval, bold where the difference exceeds it: what a "
    "floor does, and its price. Trend: Page's test over seeds, which have all of the "
    "floors, of whether the standard deviation of the clients' accuracies falls, or "
    "rises, in the order of the floors; the mean rank correlation of both within a "
    f"seed, -1 to 1, and one-sided p. It needs {LEAST_SEEDS} seeds and {LEAST_FLOORS} "
    "floors."
)
CAPTION = (
    "Standard deviation of the clients' personal accuracies at each floor of "
    "participation: mean over seeds, the band from the lowest to the highest. Where it "
    "falls, clients that seldom took part were those that the system served worst."
)


class Trend(NamedTuple):
    """Page's test of a number against rising floors.

    Attributes:
      floors: how many.
      seeds: that have a number at each of them.
      correlation: mean over seeds of the rank correlation, in [-1, 1].
      falls: one-sided p that it does not fall.
      rises: one-sided p that it does not rise.
    """

    floors: int
    seeds: int
    correlation: float
    falls: float
    rises: float


def find_trend(values: np.ndarray) -> Trend | None:
    """Page's test of a number [seeds, floors]; None of too few seeds or floors."""
    seeds, floors = values.shape
    if seeds < LEAST_SEEDS or floors < LEAST_FLOORS:
        return None
    from scipy.stats import page_trend_test  # slow to import, and seldom needed

    rises, falls = page_trend_test(values), page_trend_test(values[:, ::-1])
    # Page's L is linear in the mean of the seeds' rank correlations.
    scale = seeds * floors * (floors**2 - 1) / 12
    correlation = rises.statistic / scale - 3 * (floors + 1) / (floors - 1)
    p_values = float(falls.pvalue), float(rises.pvalue)
    return Trend(floors, seeds, float(correlation), *p_values)


def trend_cells(trend: Trend | None) -> list[Cell]:
    """The cells of a trend, p bold below 5 %."""
    if trend is None:
        return [Cell(NO_DATA, NAN)] * len(Trend._fields)
    counts = [Cell(str(n), n) for n in (trend.floors, trend.seeds)]
    correlation = Cell(f"{trend.correlation:+.2f}", trend.correlation)
    tests = [Cell(f"{p:.2g}", p, p < 0.05) for p in (trend.falls, trend.rises)]
    return [*counts, correlation, *tests]


def floor_section(runs: Sequence[Run]) -> Section | None:
    """What floors do to the clients, and what they cost; None below two floors."""
    ladders = find_ladders(runs, FIELD)
    if not ladders:
        return None
    measures = find_known(ladders, join_measures(runs), SHOWN)
    rows = ladder_rows(ladders, measures, "floor")
    trends = {
        label: trend_cells(find_trend(stack_values(ladder, SPREAD)))
        for label, ladder in ladders.items()
    }
    heads = ("Strategy", *(measure.title for measure in measures.values()))
    tests = "Strategy", "Floors", "Seeds", "Rank correlation", "p, falls", "p, rises"
    title = "Trend of the standard deviation over clients"
    return Section(TITLE, ABOUT, (Sheet("", heads, rows), Sheet(title, tests, trends)))


def floor_picture(runs: Sequence[Run]) -> Iterator[Picture]:
    """The spread over clients against the floor; none below two floors."""
    lines = []
    for place, (label, ladder) in enumerate(find_ladders(runs, FIELD).items()):
        values = 100 * stack_values(ladder, SPREAD)
        if len(values):
            lines.append(Series(place, label, 100 * np.array([*ladder]), values))
    if lines:
        axes = "SD over clients (points)", None, "Floor (% of the rounds)"
        yield Picture("floors", CAPTION, curves(lines, *axes))
