"""Runs side by side: the table of final numbers, Markdown, `runs.csv`."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from fedmoe_jax.report.runs import (
    NAN,
    Run,
    group_runs,
    interval,
    name_runs,
    numbers,
    varied_fields,
    varies,
)
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.train.writers import ACCURACIES

Measured = Mapping[str, Sequence[Mapping[str, float]]]  # numbers of runs by label
JAIN = "final_participation_jain"
FIRST_COST = "Late clients a round"  # title of the first column about devices and costs
LOST = "Lost a round"
PRINTED = ("Global %", "Global soft %", "Personal %", LOST)  # in the terminal
# Numbers that have no column where they are like this in every run, or unknown.
TRIVIAL = {
    "mean_lost_clients": 0.0,
    "mean_stale_clients": 0.0,
    "mean_capacity_violations": 0.0,
    "mean_capacity_error": 0.0,
    JAIN: 1.0,
    "wasted_bytes_share": 0.0,
    "simulated_minutes": 0.0,
    "kilojoules": 0.0,
}


class Cell(NamedTuple):
    """One number of a table: its text, its value (NaN: none), whether it is best."""

    text: str
    value: float
    best: bool


class Column(NamedTuple):
    """One column of a table.

    Attributes:
      title: above it.
      key: of the numbers of a run.
      better: +1 where more is better and -1 where less is.
      cell: makes a cell of the numbers of all seeds.
      silent: whether a 0 says that nothing travels at all, so that it cannot be the
        best of those that exchange something.
    """

    title: str
    key: str
    better: int
    cell: Callable[[Sequence[float]], Cell]
    silent: bool = False


def mean_cell(values: Sequence[float], scale: float, digits: int) -> Cell:
    """Mean and 95 % t-interval; how many seeds have a number, if not all do."""
    finite = [scale * value for value in values if math.isfinite(value)]
    if not finite:
        return Cell("–", NAN, False)
    mean, half = interval(finite)
    text = f"{mean:.{digits}f}"
    text += f" ± {half:.{digits}f}" if half > 1e-9 * abs(mean) else ""
    text += f" ({len(finite)}/{len(values)})" if len(finite) < len(values) else ""
    return Cell(text, mean, False)


def median_cell(values: Sequence[float]) -> Cell:
    """Median round, where never is infinity, and how many seeds got there."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Cell("–", NAN, False)
    median = float(np.median(known))
    text = f"{median:g}" if math.isfinite(median) else "–"
    return Cell(f"{text} ({np.isfinite(known).sum()}/{len(known)})", median, False)


def _percent(values: Sequence[float]) -> Cell:
    return mean_cell(values, 100, 1)


def _tenths(values: Sequence[float]) -> Cell:
    return mean_cell(values, 1, 1)


def _hundredths(values: Sequence[float]) -> Cell:
    return mean_cell(values, 1, 2)


def _thousands(values: Sequence[float]) -> Cell:
    return mean_cell(values, 1e-3, 1)


OTHER_COLUMNS = (  # after accuracies and rounds to targets
    Column("Load CV", "mean_load_cv", -1, _hundredths),
    Column("Load entropy", "mean_load_entropy", 1, _hundredths),
    Column("Starved experts", "starved_experts", -1, _tenths),
    Column(FIRST_COST, "mean_late_clients", -1, _tenths),
    Column(LOST, "mean_lost_clients", -1, _tenths),
    Column("Stale a round", "mean_stale_clients", -1, _tenths),
    Column("Capacity violations a round", "mean_capacity_violations", -1, _tenths),
    Column("Capacity error", "mean_capacity_error", -1, _hundredths),
    Column("Jain of participation", JAIN, 1, _hundredths),
    Column("MB up a round", "megabytes_up", -1, _tenths, True),
    Column("MB down a round", "megabytes_down", -1, _tenths, True),
    Column("Wasted MB %", "wasted_bytes_share", -1, _percent),
    Column("GFLOP a round", "gigaflops", -1, _tenths),
    Column("Simulated min", "simulated_minutes", -1, _tenths),
    Column("kJ", "kilojoules", -1, _tenths),
    Column("Peak client parameters, 1,000", "peak_client_parameters", -1, _thousands),
)


def _columns(measured: Sequence[Mapping[str, float]]) -> list[Column]:
    targets = {key for found in measured for key in found if key[:10] == "rounds_to."}
    columns = [
        Column(f"{title} %", f"final_{name}", 1, _percent)
        for name, title in ACCURACIES.items()
    ]
    for key in sorted(targets, key=lambda key: float(key[10:])):
        title = f"Rounds to {100 * float(key[10:]):g} %"
        columns.append(Column(title, key, -1, median_cell))
    own = "rounds_to_95_percent_of_final"
    columns.append(Column("Rounds to 95 % of own final", own, -1, median_cell))
    return [*columns, *OTHER_COLUMNS]


def _dull(runs: Sequence[Run], measured: Measured) -> set[str]:
    """Keys of numbers that are not worth a column.

    They are `TRIVIAL` in every run; or they are the same for all labels because no
    label changes who takes part, or in every round because the world stands still.
    """
    found = [one for each in measured.values() for one in each]
    dull = {
        key
        for key, value in TRIVIAL.items()
        if not any(abs(one.get(key, NAN) - value) > 1e-6 for one in found)
    }
    shares = {tuple(one.get(JAIN, NAN) for one in each) for each in measured.values()}
    if len(measured) > 1 and len(shares) == 1:
        dull.add(JAIN)
    if not any(varies(run, "capacity_error") for run in runs):
        dull.add("mean_capacity_error")
    return dull


def _mark_best(cells: Sequence[Cell], column: Column) -> list[Cell]:
    """Marks the best cells of a column, unless all the numbers are equal."""
    values = [column.better * cell.value for cell in cells]
    absent = [math.isnan(v) or (column.silent and v == 0) for v in values]
    rivals = {v for v, out in zip(values, absent, strict=True) if not out}
    if len(rivals) < 2:
        return list(cells)
    return [
        cell._replace(best=value == max(rivals))
        for cell, value in zip(cells, values, strict=True)
    ]


def table(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[Cell]]]:
    """Column titles, and the cells of every label's row."""
    groups = group_runs(name_runs(runs))
    measured = {label: [numbers(run) for run in g] for label, g in groups.items()}
    columns = _columns([found for each in measured.values() for found in each])
    dull = _dull(runs, measured)
    columns = [column for column in columns if column.key not in dull]
    by_column = []
    for column in columns:
        cells = [
            column.cell([found.get(column.key, NAN) for found in each])
            for each in measured.values()
        ]
        by_column.append(_mark_best(cells, column))
    rows = dict(zip(groups, map(list, zip(*by_column, strict=True)), strict=True))
    return [column.title for column in columns], rows


def note_of(group: Sequence[Run]) -> str:
    """The strategy's sentence; empty until its first run is done."""
    return group[0].summary.get("note", "")


def needs_of(group: Sequence[Run]) -> str:
    """What the strategy gets beyond the shared rules, as a sentence or nothing."""
    needs = group[0].summary.get("needs", "")
    return f"Needs {needs}." if needs else ""


def print_table(runs: Sequence[Run], stream: TextIO) -> None:
    """Accuracies, and who was lost, for a terminal."""
    titles, rows = table(runs)
    chosen = [place for place, title in enumerate(titles) if title in PRINTED]
    shown = Table("Strategy", "Seeds", *(titles[place] for place in chosen), box=None)
    groups = group_runs(name_runs(runs))
    for label, cells in rows.items():
        texts = [cells[place].text for place in chosen]
        shown.add_row(label, str(len(groups[label])), *texts)
    Console(file=stream, width=max(100, Console().width)).print(shown)


def markdown_table(runs: Sequence[Run]) -> str:
    """The report's table of final numbers as a Markdown table, best values bold."""
    titles, rows = table(runs)
    groups = group_runs(name_runs(runs))
    lines = [["Strategy", "Seeds", *titles, "Note"], ["---"] * (len(titles) + 3)]
    for label, cells in rows.items():
        shown = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
        group = groups[label]
        told = f"{note_of(group)} {needs_of(group)}".strip()
        lines.append([f"`{label}`", str(len(group)), *shown, told.replace("|", "\\|")])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_runs_csv(path: str | Path, runs: Sequence[Run]) -> None:
    """One row per run: strategy, seed, varied fields, every number of `numbers`.

    A field is empty where the number is unknown or the target was not reached.
    """
    varied = varied_fields(runs)
    records = []
    for run in runs:
        flat = flatten(run.config)
        record = {"strategy": flat["strategy"], "seed": flat.get("seed")}
        record |= {field: flat.get(field) for field in varied}
        for name, value in numbers(run).items():
            record.setdefault(name, f"{value:.10g}" if math.isfinite(value) else "")
        records.append(record | {"folder": run.folder.name})
    fields = list(dict.fromkeys(field for record in records for field in record))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(records)
