"""Metrics on the host: one JSON line per round, TensorBoard events, live progress.

A row is a flat dict with the key `round`, the number of rounds done (the first row has
1). Rows of evaluation rounds also carry `global_accuracy` and `personal_accuracy`.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import plain, write_atomically
from fedmoe_jax.world.outcome import OUTCOMES

Row = dict[str, Any]

# Fields of a row that a run adds up.
COSTS = (
    "bytes_up",
    "bytes_down",
    "client_flops",
    "simulated_seconds",
    "compute_joules",
    "radio_joules",
    "wasted_bytes",
    "wasted_flops",
    "capacity_violations",
    *(f"{name}_clients" for name in OUTCOMES),
)
FINAL_ROUNDS, FINAL_SHARE = 10, 0.25  # at most so many, and such a share of all
TARGETS = (0.35, 0.40, 0.45, 0.50)
ACCURACIES = {  # field of an evaluation row: what it is called
    "global_accuracy": "Global",
    "global_soft_accuracy": "Global soft",
    "personal_accuracy": "Personal",
    "worst_decile_accuracy": "Worst decile",
}


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, by rising round; none if there is no file.

    Of several rows of one round the last counts. A last line without its line end, as
    a killed run leaves it, is ignored.

    Raises:
      UserError: a finished line is not a JSON object with a `round`.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[int(row["round"])] = row
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} line {number} is damaged: not a JSON object with a round; "
                "remove that line"
            ) from None
    return [rows[number] for number in sorted(rows)]


def truncate_metrics(path: Path, last_round: int) -> None:
    """Rewrites a `metrics.jsonl` without repeated rows and rows past `last_round`.

    A run that resumes from round `last_round` calls it, so that the rounds that it does
    again are not listed twice.
    """
    if Path(path).exists():
        rows = [row for row in read_metrics(path) if row["round"] <= last_round]
        write_atomically(path, "".join(_line(row) for row in rows))


@contextmanager
def open_metrics(
    folder: Path | None, *, done: int, tensorboard: bool
) -> Iterator[Callable[[Row], Row]]:
    """Yields `write(row)`, which appends to `metrics.jsonl` and the TensorBoard events.

    It returns the row as the file has it.

    A row is on disk when `write` returns. TensorBoard gets finite scalars under their
    key and vectors as `key/0`, `key/1`, ...; what has more axes is only in the JSON.

    To what a run costs the row adds its sum over the rounds so far, `total_` and the
    key.

    Args:
      folder: an existing folder; None to write nothing.
      done: rounds done before; later rows and events of an earlier process are dropped.
      tensorboard: whether to write TensorBoard events too.
    """
    if folder is None:
        sums = dict.fromkeys(COSTS, 0.0)
        yield lambda row: plain(row | add_costs(sums, row))
        return
    path = Path(folder) / "metrics.jsonl"
    truncate_metrics(path, done)
    last = read_metrics(path)[-1:]
    totals = {key: last[0].get(f"total_{key}", 0.0) if last else 0.0 for key in COSTS}
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        board = stack.enter_context(_board(folder, done)) if tensorboard else None

        def write(row: Row) -> Row:
            row = row | add_costs(totals, row)
            file.write(_line(row))
            file.flush()
            if board is not None:
                _write_events(board, row)
            return plain(row)

        yield write


def add_costs(totals: dict[str, float], row: Row) -> Row:
    """Adds a row's costs to the sums so far, in place; the sums as fields of the row.

    In float64 on the host: the devices' float32 would lose small rounds in large sums.
    """
    for key in totals:
        totals[key] += float(row.get(key) or 0.0)
    return {f"total_{key}": value for key, value in totals.items()}


def _line(row: Row) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


def _board(folder: Path, done: int) -> SummaryWriter:
    # The suffix keeps apart the files of two processes that start in one second.
    return SummaryWriter(
        str(folder), purge_step=done + 1, flush_secs=10, filename_suffix=f".{done}"
    )


def _write_events(board: SummaryWriter, row: Row) -> None:
    for key, value in row.items():
        values = np.asarray(value)
        if key == "round" or values.dtype.kind not in "biuf" or values.ndim > 1:
            continue
        for index, number in np.ndenumerate(values):
            if np.isfinite(number):
                board.add_scalar(
                    "/".join([key, *map(str, index)]), number, row["round"]
                )


def evaluations(rows: Iterable[Row], key: str) -> list[tuple[int, float]]:
    """(round, value) of every row in which `key` was measured and is finite."""
    return [(row["round"], row[key]) for row in rows if row.get(key) is not None]


def rounds_to(rows: Iterable[Row], key: str, target: float) -> int | None:
    """The first evaluated round in which `key` is at least `target`; None if never."""
    reached = (at for at, value in evaluations(rows, key) if value >= target)
    return next(reached, None)


def rounds_to_targets(
    rows: Iterable[Row], key: str, targets: Iterable[float]
) -> dict[float, int | None]:
    """`rounds_to` for each of several targets."""
    rows = list(rows)
    return {target: rounds_to(rows, key, target) for target in targets}


def own_final(rows: Iterable[Row], key: str) -> float | None:
    """A run's final value: the mean over the evaluations of its last ten rounds.

    Curves under strong label skew swing from round to round, so no single evaluation
    is a fair final value. Of runs below 40 rounds only the last quarter counts, for the
    earlier ones are where they still learn. None before the first evaluation.
    """
    measured = evaluations(rows, key)
    last = measured[-1][0] if measured else 0
    window = min(FINAL_ROUNDS, FINAL_SHARE * last)
    values = [v for at, v in measured if at > last - window]
    return sum(values) / len(values) if values else None


def rounds_to_share(rows: Iterable[Row], key: str, share: float) -> int | None:
    """The first evaluated round that reaches `share` (0.95, say) of `own_final`."""
    rows = list(rows)
    final = own_final(rows, key)
    return None if final is None else rounds_to(rows, key, share * final)


@contextmanager
def open_progress(
    total: int, names: list[str], *, done: int, stream: TextIO
) -> Iterator[Callable[[list[Row]], None]]:
    """Yields `update(rows)`, one row per run: live bars on a terminal, else lines.

    The time left counts what this process did: a resumed run does not look faster.

    Args:
      total: rounds of the whole run.
      names: of the runs that advance together.
      done: rounds done before this process.
      stream: where to show it, `sys.stdout` as a rule.
    """
    start = time.monotonic()
    console = Console(file=stream)

    def pace(rows: list[Row]) -> float:
        return (time.monotonic() - start) / max(rows[0]["round"] - done, 1)

    if stream.isatty() and not console.is_dumb_terminal:
        with _bar(console) as bar:
            tasks = [
                bar.add_task(name, total=total, completed=done, **_shown({}, 0, 0))
                for name in names
            ]
            yield lambda rows: [
                _advance(bar, task, row, pace(rows), total)
                for task, row in zip(tasks, rows, strict=True)
            ]
    else:
        yield _line_printer(total, names, done, pace, stream)


def _line_printer(
    total: int, names: list[str], done: int, pace: Callable, stream: TextIO
) -> Callable[[list[Row]], None]:
    """Prints evaluations; of several runs about ten each, with their names."""
    several = len(names) > 1
    wait = total / 10 if several else 0
    width = max(map(len, names)) if several else 0
    last = done

    def update(rows: list[Row]) -> None:
        nonlocal last
        at = rows[0]["round"]
        if rows[0].get("global_accuracy") is None or last + wait > at < total:
            return
        last = at
        for name, row in zip(names, rows, strict=True):
            label = f"{name:{width}}  " if several else ""
            _print_row(label, row, pace(rows), total, stream)

    return update


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("global {task.fields[world]}  personal {task.fields[personal]}"),
        TextColumn("load CV {task.fields[cv]}  left {task.fields[left]}"),
        console=console,
    )


def _advance(bar: Progress, task: Any, row: Row, pace: float, total: int) -> None:
    shown = _shown(row, pace, total)
    if row.get("global_accuracy") is None:  # keep showing the last evaluation
        del shown["world"], shown["personal"]
    bar.update(task, completed=row["round"], **shown)


def _print_row(label: str, row: Row, pace: float, total: int, stream: TextIO) -> None:
    shown = _shown(row, pace, total)
    line = "{}round {}/{}  global {world}  personal {personal}  load CV {cv}  "
    line += "{pace:.2g} s/round  left {left}"
    text = line.format(label, row["round"], total, pace=pace, **shown)
    print(text, file=stream, flush=True)


def _shown(row: Row, pace: float, total: int) -> dict[str, str]:
    seconds = round(pace * (total - row["round"])) if row else None
    return {
        "world": _number(row.get("global_accuracy"), 3),
        "personal": _number(row.get("personal_accuracy"), 3),
        "cv": _number(row.get("load_cv"), 2),
        "left": "-" if seconds is None else _clock(seconds),
    }


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"


def _clock(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
