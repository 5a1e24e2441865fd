"""Runs side by side: the table of final numbers, Markdown, `runs.csv`."""

import csv
import functools
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.table import Column as Header
from rich.table import Table

from fedmoe_jax.options import COST, FINAL, LABELS, ROUNDS, Measure
from fedmoe_jax.report import diverged
from fedmoe_jax.report.cells import (
    NOT_APPLICABLE,
    Cell,
    mark_best,
    mean_cell,
    median_cell,
)
from fedmoe_jax.report.origins import made_by_columns
from fedmoe_jax.report.runs import (
    LEARNT,
    NAN,
    OWN_ROUNDS,
    Run,
    absent_kinds,
    group_runs,
    join_measures,
    name_folders,
    name_runs,
    numbers,
    varied_fields,
    varies,
)
from fedmoe_jax.report.sheets import markdown_rows
from fedmoe_jax.report.targets import Target, find_targets
from fedmoe_jax.report.text import escape_markdown, one_line, quote_markdown
from fedmoe_jax.runtime.files import flatten, write_atomically

# What a system asks of devices that they cannot do stands beside each of its numbers.
EVERYWHERE = ("mean_late_clients", "mean_capacity_violations")
# A page is not wide enough for all columns; these are its tables.
END, WAY, COSTS = HEADINGS = ("At the end", "On the way", "Costs")
LEARNT_ABOUT = (
    "the first evaluated round with 95 % of a run's own final global accuracy; never "
    f"where that has not come {100 * LEARNT:.0f} % of the way from chance to 100 %, as "
    "what does not learn is soon where it ends"
)

# Letters: of a printed line at least, a column's head, a name that is not folded.
PRINTED, HEAD, WHOLE = 120, 14, 40

Found = Mapping[str, Sequence[Mapping[str, float]]]  # numbers of runs by label


class Column(NamedTuple):
    """One column of a table.

    Attributes:
      title: above it.
      key: of the numbers of a run.
      cell: makes a cell of the numbers of all seeds.
      better: +1 where more is better, -1 where less is, 0 where neither.
      zero_wins: whether 0 can be the best number.
      of: systems with `EXPERTS` or `DEVICES` alone; empty: every one.
      heading: of the table that it belongs to on a page, one of `HEADINGS`.
      about: its definition; empty where the title says it all.
      printed: whether it is shown in the terminal.
      averaged: whether a cell is a mean over seeds.
    """

    title: str
    key: str
    cell: Callable[[Sequence[float]], Cell]
    better: int
    zero_wins: bool = True
    of: str = ""
    heading: str = WAY
    about: str = ""
    printed: bool = False
    averaged: bool = False


def _column(key: str, measure: Measure) -> Column:
    if key == diverged.KEY:
        return _make_column(key, measure)._replace(
            cell=diverged.count_cell, better=0, averaged=False
        )
    return _make_column(key, measure)


def _make_column(key: str, measure: Measure) -> Column:
    return Column(
        measure.title,
        key,
        functools.partial(mean_cell, scale=measure.scale, digits=measure.digits),
        measure.better,
        measure.zero_wins,
        measure.of,
        _head(measure),
        measure.about,
        measure.printed,
        averaged=True,
    )


def _head(measure: Measure) -> str:
    if measure.group == COST:
        return COSTS
    # Numbers that no row has are made of final values.
    return END if measure.over in (FINAL, "") else WAY


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
    title = "Rounds to 95 % of own final"
    rounds.append(Column(title, OWN_ROUNDS, median_cell, -1, about=LEARNT_ABOUT))
    titled = [_column(key, m) for key, m in measures.items() if m.title]
    end, way, costs = ([c for c in titled if c.heading == h] for h in HEADINGS)
    return [*end, *rounds, *way, *costs]


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


def _fill(column: Column, each: Sequence[Mapping[str, float]]) -> Cell:
    """The cell of a label's runs, marked where a run that it averages diverged."""
    values = [one.get(column.key, NAN) for one in each]
    broken = [
        math.isfinite(value) and diverged.is_diverged(one)
        for value, one in zip(values, each, strict=True)
    ]
    cell = column.cell(values)
    return diverged.mark_cell(cell) if column.averaged and any(broken) else cell


def table(runs: Sequence[Run]) -> tuple[list[Column], dict[str, list[Cell]]]:
    """The columns, and the cells of every label's row."""
    named, measures, targets = name_runs(runs), join_measures(runs), find_targets(runs)
    found: dict[str, list[dict[str, float]]] = {}
    absent: dict[str, set[str]] = {}
    for run, one in zip(named, measure_runs(runs, targets), strict=True):
        found.setdefault(run.label, []).append(one)
        kinds = absent_kinds(run, one)
        absent[run.label] = kinds & absent.get(run.label, kinds)
    trivial = _trivial(runs, measures, found)
    columns = [c for c in _columns(measures, targets) if c.key not in trivial]
    by_column = []
    for column in columns:
        cells = [
            Cell(NOT_APPLICABLE, NAN)
            if column.of in absent[label]
            else _fill(column, each)
            for label, each in found.items()
        ]
        by_column.append(mark_best(cells, column.better, column.zero_wins))
    rows = dict(zip(found, map(list, zip(*by_column, strict=True)), strict=True))
    return columns, rows


def pick_cells(
    runs: Sequence[Run], keys: Sequence[str]
) -> tuple[list[str], dict[str, list[Cell]]]:
    """Titles and cells of some columns, by label; none is bold.

    Args:
      runs: all that are compared.
      keys: of the columns; one that the table does not have is left out.
    """
    columns, rows = table(runs)
    keyed = {column.key: at for at, column in enumerate(columns)}
    places = [keyed[key] for key in keys if key in keyed]
    cells = {
        label: [row[at]._replace(bold=False) for at in places]
        for label, row in rows.items()
    }
    return [columns[at].title for at in places], cells


def note_of(group: Sequence[Run]) -> str:
    """The strategy's sentence; empty until its first run is done."""
    return group[0].summary.get("note", "")


def needs_of(group: Sequence[Run]) -> str:
    """Data or room that the strategy needs beyond the shared rules, as a sentence."""
    needs = group[0].summary.get("needs", "")
    return f"Needs {needs}." if needs else ""


def owners_of(group: Sequence[Run]) -> str:
    """That examples have several owners, as a sentence; empty where they have one."""
    owners = group[0].summary.get("owners_per_example")
    return f"An example has {owners:.3g} owners, on average." if owners else ""


def overwrites_of(group: Sequence[Run]) -> str:
    """The config fields that the strategy overwrites, as a sentence; empty for none."""
    fields = group[0].summary.get("overwrites", {})
    changes = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"Overwrites {changes}." if changes else ""


def privacy_of(group: Sequence[Run]) -> str:
    """What the mechanisms of a label's runs guarantee; empty where nothing is private.

    Of each mechanism its epsilon and what that covers, or why it has none.
    """
    found = group[0].summary.get("privacy", {})
    each = [f"{k}: {v['text']}" for k, v in found.items() if isinstance(v, dict)]
    if not each:
        return ""
    return (
        f"Private for {found['unit']}, delta {found['delta']:g}, {found['rounds']} "
        f"rounds, {found['sampling']}; {'; '.join(each)}."
    )


def rates_of(group: Sequence[Run]) -> str:
    """Whether the rates of a label's runs were tuned, see `train.tune`."""
    tuned = [bool(run.config.get("tuned")) for run in group]
    if all(tuned):
        return "tuned"
    return "tuned in part" if any(tuned) else "untuned"


def print_table(runs: Sequence[Run], stream: TextIO) -> None:
    """The columns that are `printed`, for a terminal, and the runs that diverged."""
    columns, rows = table(runs)
    chosen = [place for place, column in enumerate(columns) if column.printed]
    titles = [textwrap.fill(one_line(columns[at].title), HEAD) for at in chosen]
    whole = max(map(len, rows)) <= WHOLE
    shown = Table(
        Header("Strategy", no_wrap=whole), "Seeds", "Rates", *titles, box=None
    )
    groups = group_runs(name_runs(runs))
    for label, cells in rows.items():
        texts = [cells[place].text for place in chosen]
        group = groups[label]
        shown.add_row(one_line(label), str(len(group)), rates_of(group), *texts)
    # Names of users may have [ and :, which are no markup and no emoji.
    plain: dict[str, Any] = dict(markup=False, emoji=False)
    width = max(PRINTED, Console().width)
    console = Console(file=stream, width=width, **plain)
    console.print(shown)
    if note := diverged.describe_diverged(runs):
        console.print(one_line(note))


def markdown_table(runs: Sequence[Run]) -> str:
    """The report's table of final numbers as a Markdown table, best values bold."""
    columns, rows = table(runs)
    groups = group_runs(name_runs(runs))
    titles = [escape_markdown(column.title) for column in columns]
    lines = [["Strategy", "Seeds", "Rates", *titles, "Note"]]
    for label, cells in rows.items():
        shown = [f"**{cell.text}**" if cell.bold else cell.text for cell in cells]
        group = groups[label]
        sentences = note_of(group), owners_of(group), needs_of(group), privacy_of(group)
        note = escape_markdown(" ".join(filter(None, sentences)))
        own = [quote_markdown(label), str(len(group)), rates_of(group)]
        lines.append([*own, *shown, note])
    return markdown_rows(lines)


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
