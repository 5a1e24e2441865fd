"""Runs that diverged: counted, named, and marked where a mean includes them."""

import math
from collections.abc import Mapping, Sequence

from fedmoe_jax.report.cells import NO_DATA, Cell
from fedmoe_jax.report.runs import NAN, Run, group_runs, name_runs, numbers

KEY = "diverged"  # of the measure, above 0 in a run that diverged
MARK = "†"


def is_diverged(found: Mapping[str, float]) -> bool:
    """Whether the numbers of a run say so; False where they lack the measure."""
    return found.get(KEY, NAN) > 0


def has_diverged(run: Run) -> bool:
    """Whether a run says that it diverged."""
    return is_diverged(numbers(run, run.measures, {}))


def count_cell(values: Sequence[float]) -> Cell:
    """How many of the runs diverged, of those that say."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Cell(NO_DATA, NAN)
    count = sum(value > 0 for value in known)
    return Cell(f"{count} of {len(known)}", count)


def mark_cell(cell: Cell) -> Cell:
    """The cell with the mark, where it has a number."""
    if math.isnan(cell.value):
        return cell
    return cell._replace(text=f"{cell.text} {MARK}")


def describe_diverged(runs: Sequence[Run]) -> str:
    """A sentence that explains the mark; empty where no run diverged."""
    found = []
    for label, group in group_runs(name_runs(runs)).items():
        seeds = [run.config.get("seed", 0) for run in group if has_diverged(run)]
        if seeds:
            found.append(f"{label} (seed {', '.join(map(str, seeds))})")
    return f"{MARK}: with runs that diverged: {', '.join(found)}." if found else ""
