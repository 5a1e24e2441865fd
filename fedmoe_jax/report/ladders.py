"""Runs that differ in one config field and seed alone, by the values of that field."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedmoe_jax.options import Measure
from fedmoe_jax.report.cells import Cell, mean_cell
from fedmoe_jax.report.diverged import is_diverged, mark_cell
from fedmoe_jax.report.paired import Seeds, difference_cell, pair_up, seeds_of
from fedmoe_jax.report.runs import NAN, Run, name_runs
from fedmoe_jax.runtime.files import flatten

Ladder = dict[float, Seeds]  # numbers of the runs of a label, by value and seed


def find_value(run: Run, field: str) -> float | None:
    """The value of a config field; None where a run has no number there."""
    value = flatten(run.config).get(field)
    return float(value) if isinstance(value, int | float) else None


def find_ladders(runs: Sequence[Run], field: str) -> dict[str, Ladder]:
    """The numbers of each label that has several values of a field.

    Args:
      runs: of any labels.
      field: a config field with numbers, such as `channel.csi`.
    Returns:
      By the label that a table of the same runs has, without the field; its values
      rise.
    """
    found: dict[str, dict[float, list[Run]]] = {}
    for run in name_runs(runs):
        value = find_value(run, field)
        if value is not None:
            words = run.label.split(" ")
            bare = " ".join(w for w in words if not w.startswith(f"{field}="))
            found.setdefault(bare, {}).setdefault(value, []).append(run)
    return {
        label: {
            value: next(iter(seeds_of(group).values()))
            for value, group in sorted(each.items())
        }
        for label, each in found.items()
        if len(each) > 1
    }


def stack_values(ladder: Ladder, key: str) -> np.ndarray:
    """A number of the seeds that have it at every value: [seeds, values]."""
    first = next(iter(ladder.values()))
    rows = [
        [seeds.get(seed, {}).get(key, NAN) for seeds in ladder.values()]
        for seed in first
    ]
    values = np.array(rows, float).reshape(len(first), len(ladder))
    return values[np.isfinite(values).all(axis=1)]


def find_known(
    ladders: Mapping[str, Ladder], measures: Mapping[str, Measure], keys: Sequence[str]
) -> dict[str, Measure]:
    """Those of some measures of which a run of the ladders has a finite number."""
    known: set[str] = set()
    for ladder in ladders.values():
        for seeds in ladder.values():
            for numbers in seeds.values():
                known |= {key for key, value in numbers.items() if np.isfinite(value)}
    return {key: measures[key] for key in keys if key in measures and key in known}


def mean_of(seeds: Seeds, key: str, measure: Measure) -> Cell:
    """The mean over seeds, marked where one diverged."""
    values = [one.get(key, NAN) for one in seeds.values()]
    cell = mean_cell(values, measure.scale, measure.digits)
    return mark_cell(cell) if any(map(is_diverged, seeds.values())) else cell


def ladder_cells(
    ladder: Ladder, measures: Mapping[str, Measure]
) -> dict[float, list[Cell]]:
    """The cells of every value: means of the lowest, then differences to it."""
    lowest, *others = ladder
    first = ladder[lowest]
    found = {lowest: [mean_of(first, key, m) for key, m in measures.items()]}
    for value in others:
        found[value] = [
            difference_cell(pair_up(ladder[value], first, key, m), m.digits)
            for key, m in measures.items()
        ]
    return found


def ladder_rows(
    ladders: Mapping[str, Ladder], measures: Mapping[str, Measure], name: str
) -> dict[str, list[Cell]]:
    """The rows of a table, named by label and value.

    Args:
      ladders: by label.
      measures: of the columns.
      name: of the field, before its value.
    """
    return {
        f"{label}, {name} {value:g}": cells
        for label, ladder in ladders.items()
        for value, cells in ladder_cells(ladder, measures).items()
    }
