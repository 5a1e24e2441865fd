"""Accuracy at equal rounds, bytes, FLOPs and simulated time."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.options import DEVICES, FINAL, Measure
from fedmoe_jax.report.cells import NOT_APPLICABLE, Cell, mark_best, mean_cell
from fedmoe_jax.report.diverged import has_diverged, mark_cell
from fedmoe_jax.report.rows import measured, spend_so_far
from fedmoe_jax.report.runs import NAN, Run, group_runs, join_measures, name_runs
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.report.tables import EVERYWHERE, pick_cells

# The columns beside the accuracies: what the server trains, the memory of a client, and
# what it cannot do.
BESIDE = ("server_gigaflops", "peak_client_parameters", *EVERYWHERE)


class Budget(NamedTuple):
    """Something that runs spend.

    Attributes:
      fields: of the rows, added up over rounds; none: the rounds themselves.
      unit: by which they are divided.
      name: of the unit.
      of: `DEVICES` where a run without them cannot spend it; else empty.
    """

    fields: tuple[str, ...]
    unit: float
    name: str
    of: str = ""


ABOUT = (
    "Each row at its last evaluation for which it had spent no more than the least "
    "that a run of this report spends in all, where any is spent; –: its first "
    "evaluation is beyond that. These are means ± half-widths of single evaluations, "
    "not of the last ten rounds as above. Bold: best of its column."
)
BUDGETS = (
    Budget((), 1.0, "rounds"),
    Budget(("bytes_up", "bytes_down"), 1e6, "MB"),
    Budget(("client_flops",), 1e9, "GFLOP"),
    Budget(("simulated_seconds",), 60.0, "simulated min", DEVICES),
    Budget(("compute_joules", "radio_joules"), 1e3, "kJ", DEVICES),
)


def spend(run: Run, budget: Budget) -> np.ndarray:
    """[R] float64, what was spent up to the end of each row's round."""
    if not budget.fields:
        return np.array([row["round"] for row in run.rows], float)
    return spend_so_far(run.rows, budget.fields) / budget.unit


def find_smallest(runs: Sequence[Run], budget: Budget) -> float:
    """The least that a run has spent in total; infinity where none spends anything.

    Runs that spend nothing do not count: within nothing there is no accuracy.
    """
    totals = [float(spend(run, budget)[-1]) for run in runs if run.rows]
    return min((total for total in totals if total > 0), default=math.inf)


def value_within(run: Run, measure: Measure, budget: Budget, most: float) -> float:
    """A measure at the last evaluation for which no more than `most` was spent.

    NaN without an evaluation; minus infinity where the first one is beyond it.
    """
    rounds = [row["round"] for row in run.rows]
    spent = dict(zip(rounds, spend(run, budget), strict=True))
    points = measured(run.rows, *measure.fields)
    within = [value for at, value in points if spent[at] <= most]
    if within:
        return within[-1] / measure.unit
    return -math.inf if points else NAN


def _budget_cell(
    group: Sequence[Run], measure: Measure, budget: Budget, most: float
) -> Cell:
    """The mean over the runs of a label; – where all of them begin beyond."""
    spent = any(run.rows and spend(run, budget)[-1] > 0 for run in group)
    if budget.of == DEVICES and not spent:
        return Cell(NOT_APPLICABLE, NAN)
    values = [value_within(run, measure, budget, most) for run in group]
    if not any(map(math.isfinite, values)) and -math.inf in values:
        return Cell("–", NAN)
    cell = mean_cell(values, measure.scale, measure.digits)
    return mark_cell(cell) if any(map(has_diverged, group)) else cell


def show_amount(amount: float) -> str:
    """A positive number with three digits or more."""
    text = f"{amount:,.1f}" if amount >= 10 else f"{amount:.3g}"
    return text.removesuffix(".0")


def _budget_cells(
    groups: Mapping[str, Sequence[Run]], measure: Measure, spent: Mapping[Budget, float]
) -> dict[str, list[Cell]]:
    """A cell for each budget, by label."""
    columns = []
    for budget, most in spent.items():
        cells = [
            _budget_cell(group, measure, budget, most) for group in groups.values()
        ]
        columns.append(mark_best(cells, measure.better))
    return dict(zip(groups, map(list, zip(*columns, strict=True)), strict=True))


def budget_section(runs: Sequence[Run]) -> Section | None:
    """A table for each accuracy that is drawn against costs, where a run has it.

    None of one label.

    Its columns are the budgets that any run spends, each as large as the smallest total
    of a run, and what stands `BESIDE`.
    """
    groups, measures = group_runs(name_runs(runs)), join_measures(runs).values()
    drawn = [m for m in measures if m.over == FINAL and m.curve and m.curve.costs]
    has = lambda measure: any(measured(run.rows, *measure.fields) for run in runs)
    compared = list(filter(has, drawn))
    smallest = {budget: find_smallest(runs, budget) for budget in BUDGETS}
    spent = {budget: most for budget, most in smallest.items() if math.isfinite(most)}
    if len(groups) < 2 or not spent:
        return None
    titles, beside = pick_cells(runs, BESIDE)
    heads = [f"At {show_amount(most)} {b.name}" for b, most in spent.items()]
    sheets = []
    for measure in compared:
        cells = _budget_cells(groups, measure, spent)
        rows = {label: [*cells[label], *beside[label]] for label in groups}
        sheets.append(Sheet(measure.title, ("Strategy", *heads, *titles), rows))
    return Section("At equal budgets", ABOUT, sheets)
