"""Floors of participation: the spread over clients at each, its trend, the price."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.options import Measure
from fedmoe_jax.report.cells import NO_DATA, Cell, mean_cell
from fedmoe_jax.report.curves import Series, curves
from fedmoe_jax.report.diverged import is_diverged, mark_cell
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.paired import Seeds, difference_cell, pair_up, seeds_of
from fedmoe_jax.report.runs import NAN, Run, join_measures, name_runs
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.runtime.files import flatten

GROUP, LEAF = "fairness", "floor"
FIELD = f"{GROUP}.{LEAF}"
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

Ladder = dict[float, Seeds]  # numbers of the runs of a label, by floor and seed


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


def find_floor(run: Run) -> float | None:
    """The floor of a run; None in one that is older than floors."""
    return flatten(run.config).get(FIELD)


def hide_floor(run: Run) -> Run:
    """The run as if it had no floor, so that all floors share a label."""
    return run._replace(config=run.config | {GROUP: run.config[GROUP] | {LEAF: 0.0}})


def group_floors(runs: Sequence[Run]) -> dict[str, dict[float, list[Run]]]:
    """Runs by their label without a floor, and by floor."""
    known = [run for run in runs if find_floor(run) is not None]
    named, found = name_runs(list(map(hide_floor, known))), {}
    for run, bare in zip(known, named, strict=True):
        floors = found.setdefault(bare.label, {})
        floors.setdefault(find_floor(run), []).append(run)
    return found


def find_ladders(runs: Sequence[Run]) -> dict[str, Ladder]:
    """The numbers of each label that has several floors, by rising floor and seed.

    Args:
      runs: of any labels.
    """
    several = [floors for floors in group_floors(runs).values() if len(floors) > 1]
    chosen = [run for floors in several for group in floors.values() for run in group]
    # Grouped again, as they are now named by what sets them alone apart.
    return {
        label: {
            floor: next(iter(seeds_of(list(map(hide_floor, group))).values()))
            for floor, group in sorted(floors.items())
        }
        for label, floors in group_floors(chosen).items()
    }


def stack_floors(ladder: Ladder, key: str) -> np.ndarray:
    """A number of the seeds that have it at every floor: [seeds, floors]."""
    first = next(iter(ladder.values()))
    rows = [
        [seeds.get(seed, {}).get(key, NAN) for seeds in ladder.values()]
        for seed in first
    ]
    values = np.array(rows, float).reshape(len(first), len(ladder))
    return values[np.isfinite(values).all(axis=1)]


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


def mean_of(seeds: Seeds, key: str, measure: Measure) -> Cell:
    """The mean over the seeds of a floor, marked where one diverged."""
    values = [one.get(key, NAN) for one in seeds.values()]
    cell = mean_cell(values, measure.scale, measure.digits)
    return mark_cell(cell) if any(map(is_diverged, seeds.values())) else cell


def floor_cells(
    ladder: Ladder, measures: Mapping[str, Measure]
) -> dict[float, list[Cell]]:
    """The cells of every floor of a label: means of the lowest, then differences."""
    lowest, *others = ladder
    first = ladder[lowest]
    found = {lowest: [mean_of(first, key, m) for key, m in measures.items()]}
    for floor in others:
        found[floor] = [
            difference_cell(pair_up(ladder[floor], first, key, m), m.digits)
            for key, m in measures.items()
        ]
    return found


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
    ladders, joined = find_ladders(runs), join_measures(runs)
    if not ladders:
        return None
    known = {
        key
        for ladder in ladders.values()
        for seeds in ladder.values()
        for numbers in seeds.values()
        for key, value in numbers.items()
        if np.isfinite(value)
    }
    measures = {key: joined[key] for key in SHOWN if key in joined and key in known}
    rows = {
        f"{label}, floor {floor:g}": cells
        for label, ladder in ladders.items()
        for floor, cells in floor_cells(ladder, measures).items()
    }
    trends = {
        label: trend_cells(find_trend(stack_floors(ladder, SPREAD)))
        for label, ladder in ladders.items()
    }
    heads = ("Strategy", *(measure.title for measure in measures.values()))
    tests = "Strategy", "Floors", "Seeds", "Rank correlation", "p, falls", "p, rises"
    title = "Trend of the standard deviation over clients"
    return Section(TITLE, ABOUT, (Sheet("", heads, rows), Sheet(title, tests, trends)))


def floor_picture(runs: Sequence[Run]) -> Iterator[Picture]:
    """The spread over clients against the floor; none below two floors."""
    lines = []
    for place, (label, ladder) in enumerate(find_ladders(runs).items()):
        values = 100 * stack_floors(ladder, SPREAD)
        if len(values):
            lines.append(Series(place, label, 100 * np.array([*ladder]), values))
    if lines:
        axes = "SD over clients (points)", None, "Floor (% of the rounds)"
        yield Picture("floors", CAPTION, curves(lines, *axes))
