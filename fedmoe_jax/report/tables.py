"""Runs side by side: the table of final numbers, Markdown, `runs.csv`."""

import csv
import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from fedmoe_jax.options import FINAL, LABELS, LEARNING, ROUNDS, Measure
from fedmoe_jax.report.origins import made_by_columns
from fedmoe_jax.report.runs import (
    NAN,
    Run,
    group_runs,
    interval,
    join_measures,
    name_folders,
    name_runs,
    numbers,
    varied_fields,
    varies,
)
from fedmoe_jax.report.targets import Target, find_targets
from fedmoe_jax.report.text import escape_markdown, one_line, quote_markdown
from fedmoe_jax.runtime.files import flatten, write_atomically

Found = Mapping[str, Sequence[Mapping[str, float]]]  # numbers of runs by label


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
      cell: makes a cell of the numbers of all seeds.
      better: +1 where more is better, -1 where less is, 0 where neither.
      zero_wins: whether 0 can be the best number.
      group: the table that it belongs to.
      about: its definition; empty where the title says it all.
      printed: whether it is shown in the terminal.
    """

    title: str
    key: str
    cell: Callable[[Sequence[float]], Cell]
    better: int
    zero_wins: bool = True
    group: str = LEARNING
    about: str = ""
    printed: bool = False


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


def _column(key: str, measure: Measure) -> Column:
    return Column(
        measure.title,
        key,
        functools.partial(mean_cell, scale=measure.scale, digits=measure.digits),
        measure.better,
        measure.zero_wins,
        measure.group,
        measure.about,
        measure.printed,
    )


def _columns(
    measures: Mapping[str, Measure], targets: Sequence[Target]
) -> list[Column]:
    """Final values, rounds to targets, other measures of learning, then costs."""
    rounds = [
        Column(
            f"Rounds to {target.title}",
            f"rounds_to.{target.key}",
            median_cell,
            -1,
            about=target.about,
        )
        for target in targets
    ]
    own = "rounds_to_95_percent_of_final"
    rounds.append(Column("Rounds to 95 % of own final", own, median_cell, -1))
    titled = {key: m for key, m in measures.items() if m.title}
    final, learning, costs = [], [], []
    for key, measure in titled.items():
        group = learning if measure.group == LEARNING else costs
        (final if measure.over == FINAL else group).append(_column(key, measure))
    return [*final, *rounds, *learning, *costs]


def measure_runs(
    runs: Sequence[Run], targets: Sequence[Target]
) -> list[dict[str, float]]:
    """The numbers of each run, with all measures and targets of their comparison."""
    measures = join_measures(runs)
    values = {target.key: target.value for target in targets}
    return [numbers(run, measures, values) for run in runs]


def _trivial(
    runs: Sequence[Run], measures: Mapping[str, Measure], found: Found
) -> set[str]:
    """Keys of numbers that are not worth a column.

    They are `trivial` in every run; or they do not vary over labels or rounds, though
    that is all that they are about.
    """
    every = [one for each in found.values() for one in each]
    return {
        key
        for key, measure in measures.items()
        if _all_near(measure.trivial, [one.get(key, NAN) for one in every])
        or (measure.varies_over == LABELS and _labels_agree(found, key))
        or (measure.varies_over == ROUNDS and not any(varies(r, measure) for r in runs))
    }


def _all_near(trivial: float | None, values: Sequence[float]) -> bool:
    if trivial is None:
        return False
    return not any(
        abs(value - trivial) > 1e-6 for value in values
    )  # NaN counts as near


def _labels_agree(found: Found, key: str) -> bool:
    """True where several labels have the same numbers, seed by seed."""
    shares = {tuple(one.get(key, NAN) for one in each) for each in found.values()}
    return len(found) > 1 and len(shares) == 1


def _mark_best(cells: Sequence[Cell], column: Column) -> list[Cell]:
    """Marks the best cells of a column, unless all the numbers are equal."""
    values = [column.better * cell.value for cell in cells]
    absent = [math.isnan(v) or (v == 0 and not column.zero_wins) for v in values]
    rivals = {v for v, out in zip(values, absent, strict=True) if not out}
    if len(rivals) < 2:
        return list(cells)
    return [
        cell._replace(best=value == max(rivals))
        for cell, value in zip(cells, values, strict=True)
    ]


def table(runs: Sequence[Run]) -> tuple[list[Column], dict[str, list[Cell]]]:
    """The columns, and the cells of every label's row."""
    named, measures, targets = name_runs(runs), join_measures(runs), find_targets(runs)
    found: dict[str, list[dict[str, float]]] = {}
    for run, one in zip(named, measure_runs(runs, targets), strict=True):
        found.setdefault(run.label, []).append(one)
    trivial = _trivial(runs, measures, found)
    columns = [c for c in _columns(measures, targets) if c.key not in trivial]
    by_column = []
    for column in columns:
        cells = [
            column.cell([one.get(column.key, NAN) for one in each])
            for each in found.values()
        ]
        by_column.append(_mark_best(cells, column))
    rows = dict(zip(found, map(list, zip(*by_column, strict=True)), strict=True))
    return columns, rows


def note_of(group: Sequence[Run]) -> str:
    """The strategy's sentence; empty until its first run is done."""
    return group[0].summary.get("note", "")


def needs_of(group: Sequence[Run]) -> str:
    """Data or room that the strategy needs beyond the shared rules, as a sentence."""
    needs = group[0].summary.get("needs", "")
    return f"Needs {needs}." if needs else ""


def overwrites_of(group: Sequence[Run]) -> str:
    """The config fields that the strategy overwrites, as a sentence; empty for none."""
    fields = group[0].summary.get("overwrites", {})
    changes = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"Overwrites {changes}." if changes else ""


def print_table(runs: Sequence[Run], stream: TextIO) -> None:
    """The columns that are `printed`, for a terminal."""
    columns, rows = table(runs)
    chosen = [place for place, column in enumerate(columns) if column.printed]
    titles = [columns[place].title for place in chosen]
    shown = Table("Strategy", "Seeds", *map(one_line, titles), box=None)
    groups = group_runs(name_runs(runs))
    for label, cells in rows.items():
        texts = [cells[place].text for place in chosen]
        shown.add_row(one_line(label), str(len(groups[label])), *texts)
    # Names of users may have [ and :, which are no markup and no emoji.
    plain: dict[str, Any] = dict(markup=False, emoji=False)
    width = max(100, Console().width)
    Console(file=stream, width=width, **plain).print(shown)


def markdown_table(runs: Sequence[Run]) -> str:
    """The report's table of final numbers as a Markdown table, best values bold."""
    columns, rows = table(runs)
    groups = group_runs(name_runs(runs))
    titles = [escape_markdown(column.title) for column in columns]
    lines = [["Strategy", "Seeds", *titles, "Note"], ["---"] * (len(titles) + 3)]
    for label, cells in rows.items():
        shown = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
        group = groups[label]
        note = escape_markdown(f"{note_of(group)} {needs_of(group)}")
        lines.append([quote_markdown(label), str(len(group)), *shown, note])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_runs_csv(path: str | Path, runs: Sequence[Run]) -> None:
    """One row per run: strategy, seed, varied fields, every number of `numbers`.

    Then its folder, and what made it: commit, versions, device, flags.

    A field is empty where the number is unknown or the target was not reached.
    """
    varied, found = varied_fields(runs), measure_runs(runs, find_targets(runs))
    folders, records = name_folders(runs), []
    for run, folder, values in zip(runs, folders, found, strict=True):
        flat = flatten(run.config)
        record = {"strategy": flat["strategy"], "seed": flat.get("seed")}
        record |= {field: flat.get(field) for field in varied}
        for name, value in values.items():
            record.setdefault(name, f"{value:.10g}" if math.isfinite(value) else "")
        records.append(record | {"folder": folder} | made_by_columns(run))
    fields = list(dict.fromkeys(field for record in records for field in record))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(records)
    write_atomically(Path(path), text.getvalue())
