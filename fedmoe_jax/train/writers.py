"""Metrics on the host: one JSON line per round, TensorBoard events, live progress.

A row is a flat dict with the key `round`, the number of rounds done (the first row has
1). Rows of evaluation rounds also carry `global_accuracy` and `personal_accuracy`.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedmoe_jax.measures import MEASURES, running_fields
from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import Row, read_metrics
from fedmoe_jax.report.text import shorten
from fedmoe_jax.runtime.files import plain, write_atomically
from fedmoe_jax.runtime.seals import METRICS
from fedmoe_jax.train.board import open_board
from fedmoe_jax.train.divergence import watch

SEED = re.compile(r"-seed\d+$")  # at the end of the name of a comparison's run
MOST_IN_LINES = 100  # letters of a name, as settings differ in the middle
LINES = 5  # of several runs, beside the first


def truncate_metrics(path: Path, last_round: int) -> None:
    """Rewrites a `metrics.jsonl` without repeated rows and rows past `last_round`.

    A run that resumes from round `last_round` calls it, so that the rounds that it does
    again are not listed twice.
    """
    if Path(path).exists():
        rows = [row for row in read_metrics(path) if row["round"] <= last_round]
        write_atomically(path, "".join(_line(row) for row in rows))


def sync_metrics(folder: Path) -> str:
    """Sees to it that a run's rows outlast a power failure; returns their sha256."""
    with (folder / METRICS).open("rb+") as file:
        os.fsync(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_metrics(folder: Path, done: int, sha256: str | None) -> None:
    """Checks that a run has every row up to a checkpoint, as it was written.

    Args:
      folder: of the run.
      done: rounds done at the checkpoint.
      sha256: of the rows then; None where it is unknown.

    Raises:
      UserError: rows are missing or others.
    """
    path = folder / METRICS
    rows = [row for row in read_metrics(path) if row["round"] <= done]
    missing = set(range(1, done + 1)) - {row["round"] for row in rows}
    text = "".join(map(_line, rows)).encode()
    fault = ""
    if missing:
        fault = f"lacks round {min(missing)}"
    elif sha256 and hashlib.sha256(text).hexdigest() != sha256:
        fault = f"has other rows up to round {done} than were written"
    if fault:
        raise UserError(
            f"{path} {fault}, which checkpoints do not hold; allowed: the file as the "
            "run has written it, or another workdir"
        )


@contextmanager
def open_metrics(
    folder: Path | None, *, done: int, tensorboard: bool
) -> Iterator[Callable[[Row], Row]]:
    """Yields `write(row)`, which appends to `metrics.jsonl` and the TensorBoard events.

    It returns the row as the file has it.

    A row is on disk when `write` returns. TensorBoard's events are a convenience, see
    `board`.

    The row also gets the sums so far of the measures that are `running`, and whether
    the run has diverged, see `divergence`.

    Args:
      folder: an existing folder; None to write nothing.
      done: rounds done before; later rows and events of an earlier process are dropped.
      tensorboard: whether to write TensorBoard events too.
    """
    if folder is None:
        sums, look = dict.fromkeys(running_fields(MEASURES), 0.0), watch([])
        yield lambda row: plain(row | add_costs(sums, row) | look(row))
        return
    path = Path(folder) / METRICS
    truncate_metrics(path, done)
    rows = read_metrics(path)
    last, look = (rows or [{}])[-1], watch(rows)
    totals = {key: last.get(f"total_{key}", 0.0) for key in running_fields(MEASURES)}
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        show = ignore
        if tensorboard:
            show = stack.enter_context(open_board(Path(folder), done))

        def write(row: Row) -> Row:
            row = row | add_costs(totals, row) | look(row)
            file.write(_line(row))
            file.flush()
            show(row)
            return plain(row)

        yield write


def ignore(row: Row) -> None:
    """In place of TensorBoard's events."""


def add_costs(totals: dict[str, float], row: Row) -> Row:
    """Adds a row's costs to the sums so far, in place; the sums as fields of the row.

    In float64 on the host: the devices' float32 would lose small rounds in large sums.
    """
    for key in totals:
        totals[key] += float(row.get(key) or 0.0)
    return {f"total_{key}": value for key, value in totals.items()}


def _line(row: Row) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


@contextmanager
def open_progress(
    total: int, names: list[str], *, done: int, stream: TextIO
) -> Iterator[Callable[[list[Row]], object]]:
    """Yields `update(rows)`, one row per run: live bars on a terminal, else lines.

    The time left follows from the rounds of this process: a resumed run does not look
    faster.

    Args:
      total: rounds of the whole run.
      names: of the runs that advance together.
      done: rounds done before this process.
      stream: of the output, `sys.stdout` as a rule.
    """
    start = time.monotonic()
    console = Console(file=stream)

    def pace(rows: list[Row]) -> float:
        return (time.monotonic() - start) / max(rows[0]["round"] - done, 1)

    if stream.isatty() and not console.is_dumb_terminal:
        with _bar(console) as bar:
            tasks = [
                bar.add_task(
                    shorten(name), total=total, completed=done, **_shown({}, 0, 0)
                )
                for name in names
            ]
            yield lambda rows: [
                _advance(bar, task, average_rows([row]), pace(rows), total)
                for task, row in zip(tasks, rows, strict=True)
            ]
    else:
        yield _line_printer(total, names, done, pace, stream)


def _line_printer(
    total: int, names: list[str], done: int, pace: Callable, stream: TextIO
) -> Callable[[list[Row]], None]:
    """Prints evaluations; of several runs the first and five more, means over seeds."""
    several, groups = len(names) > 1, group_seeds(names)
    wait = total / LINES if several else 0
    width = max(len(name) for name, _ in groups) if several else 0
    last = -math.inf

    def update(rows: list[Row]) -> None:
        nonlocal last
        at = rows[0]["round"]
        if rows[0].get("global_accuracy") is None or last + wait > at < total:
            return
        last = at
        for name, places in groups:
            label = f"{name:{width}}  " if several else ""
            row = average_rows([rows[place] for place in places])
            _print_row(label, row, pace(rows), total, stream)

    return update


def group_seeds(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Runs that differ in the seed alone: a name for them, and their places."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(SEED.sub("", name), []).append(place)
    return [
        (f"{short} ({len(places)} seeds)" if len(places) > 1 else short, places)
        for stem, places in groups.items()
        for short in [shorten(stem, MOST_IN_LINES)]
    ]


SCORES = ("global_accuracy", "personal_accuracy", "global_bits", "personal_bits")


def average_rows(rows: Sequence[Row]) -> Row:
    """The means of what progress shows, over the rows that have it."""
    average = {"round": rows[0]["round"]}
    for key in (*SCORES, "load_cv"):
        known = [float(row[key]) for row in rows if row.get(key) is not None]
        average[key] = sum(known) / len(known) if known else None
    broken = sum(bool(row.get("diverged")) for row in rows)
    of = f" {broken} of {len(rows)}" if len(rows) > 1 else ""
    return average | {"diverged": f"DIVERGED{of}" if broken else ""}


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("global {task.fields[global]}  personal {task.fields[personal]}"),
        TextColumn("load CV {task.fields[cv]}  left {task.fields[left]}"),
        TextColumn("{task.fields[diverged]}"),
        console=console,
    )


def _advance(bar: Progress, task: Any, row: Row, pace: float, total: int) -> None:
    shown = _shown(row, pace, total)
    if row.get("global_accuracy") is None:  # keep showing the last evaluation
        del shown["global"], shown["personal"]
    bar.update(task, completed=row["round"], **shown)


def _print_row(label: str, row: Row, pace: float, total: int, stream: TextIO) -> None:
    shown = _shown(row, pace, total)
    line = "{}round {}/{}  global {global}  personal {personal}  load CV {cv}  "
    line += "{pace:.2g} s/round  left {left}  {diverged}"
    text = line.format(label, row["round"], total, pace=pace, **shown)
    print(text.rstrip(), file=stream, flush=True)


def _shown(row: Row, pace: float, total: int) -> dict[str, Any]:
    seconds = round(pace * (total - row["round"])) if row else None
    return {
        "global": _score(row, "global"),
        "personal": _score(row, "personal"),
        "cv": _number(row.get("load_cv"), 2),
        "left": "-" if seconds is None else _clock(seconds),
        "diverged": row.get("diverged") or "",
    }


def _score(row: Row, name: str) -> str:
    """Bits of a byte, where a task has such, else the accuracy."""
    bits = row.get(f"{name}_bits")
    if bits is not None:
        return f"{_number(bits, 3)} bits"
    return _number(row.get(f"{name}_accuracy"), 3)


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"


def _clock(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
