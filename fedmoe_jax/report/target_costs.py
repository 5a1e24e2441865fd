"""What it costs to reach target accuracies: rounds, simulated time, energy, bytes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.options import DEVICES
from fedmoe_jax.report.cells import NOT_APPLICABLE, Cell, mark_best, median_cell
from fedmoe_jax.report.runs import NAN, Run, absent_kinds, group_runs, name_runs
from fedmoe_jax.report.sheets import Section, Sheet
from fedmoe_jax.report.tables import measure_runs
from fedmoe_jax.report.targets import Target, find_targets

Numbers = Mapping[str, float]  # of one run

ABOUT = (
    "Median over seeds of what all clients had spent by the end of the first evaluated "
    "round with that global accuracy, then how many of the seeds reached it; – where "
    "most never did. Simulated time is that of the rounds one after the other, each as "
    "long as its slowest client is waited for. Bold: best of its column."
)


class Cost(NamedTuple):
    """Something that is counted up to a target.

    Attributes:
      table: of a run's numbers, in front of the target's key; see `Measure.budget`.
      unit: by which it is divided.
      title: of its column.
      of: `DEVICES` where a run without them cannot spend it; else empty.
    """

    table: str
    unit: float
    title: str
    of: str = ""


COSTS = (
    Cost("rounds_to", 1.0, "Rounds"),
    Cost("simulated_seconds_to", 60.0, "Simulated min", DEVICES),
    Cost("joules_to", 1e3, "kJ", DEVICES),
    Cost("megabytes_to", 1.0, "MB"),
)


def cost_cell(group: Sequence[tuple[Run, Numbers]], cost: Cost, target: Target) -> Cell:
    """The median of a label's runs, with three digits."""
    if all(cost.of in absent_kinds(run, known) for run, known in group):
        return Cell(NOT_APPLICABLE, NAN)
    key = f"{cost.table}.{target.key}"
    spent = np.array([known.get(key, NAN) for _, known in group]) / cost.unit
    return median_cell([float(f"{value:.3g}") for value in spent])


def target_sheet(
    groups: Mapping[str, Sequence[tuple[Run, Numbers]]], target: Target
) -> Sheet:
    """The costs of one target, a row for every label."""
    columns = [
        mark_best([cost_cell(group, cost, target) for group in groups.values()], -1)
        for cost in COSTS
    ]
    rows = dict(zip(groups, map(list, zip(*columns, strict=True)), strict=True))
    return Sheet(target.title, ("Strategy", *(cost.title for cost in COSTS)), rows)


def target_section(runs: Sequence[Run]) -> Section | None:
    """A table for each target; none of one label, or of runs that simulate no device.

    Rounds alone are in the table of final numbers.
    """
    targets, named = find_targets(runs), name_runs(runs)
    known = measure_runs(runs, targets)
    timed = any(
        DEVICES not in absent_kinds(run, one)
        for run, one in zip(runs, known, strict=True)
    )
    if not targets or not timed or len(group_runs(named)) < 2:
        return None
    groups: dict[str, list[tuple[Run, Numbers]]] = {}
    for run, one in zip(named, known, strict=True):
        groups.setdefault(run.label, []).append((run, one))
    sheets = [target_sheet(groups, target) for target in targets]
    return Section("Costs to target accuracies", ABOUT, sheets)
