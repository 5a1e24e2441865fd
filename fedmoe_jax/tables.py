"""Runs side by side: the table of final numbers, Markdown, `runs.csv`."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmoe_jax.config import flatten
from fedmoe_jax.metrics import ACCURACIES
from fedmoe_jax.runs import (
    NAN,
    Run,
    group_runs,
    interval,
    name_runs,
    numbers,
    varied_fields,
)


class Cell(NamedTuple):
    """One number of a table: its text, its value (NaN: none), whether it is best."""

    text: str
    value: float
    best: bool


class Column(NamedTuple):
    """One column; `better` is +1 where more is better and -1 where less is."""

    title: str
    key: str
    better: int
    cell: Callable[[Sequence[float]], Cell]


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


def _columns(measured: Sequence[Mapping[str, float]]) -> list[Column]:
    percent = lambda values: mean_cell(values, 100, 1)
    plain = lambda values: mean_cell(values, 1, 2)
    tenths = lambda values: mean_cell(values, 1, 1)
    thousand = lambda values: mean_cell(values, 1e-3, 1)
    targets = {key for found in measured for key in found if key[:10] == "rounds_to."}
    columns = [
        Column(f"{title} %", f"final_{name}", 1, percent)
        for name, title in ACCURACIES.items()
    ]
    for key in sorted(targets, key=lambda key: float(key[10:])):
        title = f"Rounds to {100 * float(key[10:]):g} %"
        columns.append(Column(title, key, -1, median_cell))
    own = "rounds_to_95_percent_of_final"
    return columns + [
        Column("Rounds to 95 % of own final", own, -1, median_cell),
        Column("Load CV", "mean_load_cv", -1, plain),
        Column("Load entropy", "mean_load_entropy", 1, plain),
        Column("Starved experts", "starved_experts", -1, tenths),
        Column("Late clients a round", "mean_late_clients", -1, tenths),
        Column("MB up a round", "megabytes_up", -1, tenths),
        Column("MB down a round", "megabytes_down", -1, tenths),
        Column("GFLOP a round", "gigaflops", -1, tenths),
        Column("Peak client parameters, 1,000", "peak_client_parameters", -1, thousand),
    ]


def _mark_best(cells: Sequence[Cell], better: int) -> list[Cell]:
    """Marks the best cells of a column, unless all the numbers are equal."""
    values = [better * cell.value for cell in cells if not math.isnan(cell.value)]
    best = max(values, default=NAN)
    if len(set(values)) < 2:
        return list(cells)
    return [cell._replace(best=better * cell.value == best) for cell in cells]


def table(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[Cell]]]:
    """Column titles, and the cells of every label's row."""
    groups = group_runs(name_runs(runs))
    measured = {label: [numbers(run) for run in g] for label, g in groups.items()}
    columns = _columns([found for each in measured.values() for found in each])
    by_column = []
    for column in columns:
        cells = [
            column.cell([found.get(column.key, NAN) for found in each])
            for each in measured.values()
        ]
        by_column.append(_mark_best(cells, column.better))
    rows = dict(zip(groups, map(list, zip(*by_column, strict=True)), strict=True))
    return [column.title for column in columns], rows


def note_of(group: Sequence[Run]) -> str:
    """The strategy's sentence; empty until its first run is done."""
    return group[0].summary.get("note", "")


def needs_of(group: Sequence[Run]) -> str:
    """What the strategy gets beyond the shared rules, as a sentence or nothing."""
    needs = group[0].summary.get("needs", "")
    return f"Needs {needs}." if needs else ""


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
