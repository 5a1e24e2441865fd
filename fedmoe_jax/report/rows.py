"""Rows of `metrics.jsonl`, read back, and numbers of one of their fields."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_jax.options import UserError

Row = dict[str, Any]

FINAL_ROUNDS, FINAL_SHARE = 10, 0.25  # at most so many, and such a share of all


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
            whole = type(row["round"]) is int and row["round"] > 0
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(
                f"{path} line {number} is damaged; allowed: a JSON object with a round"
            )
        rows[row["round"]] = row
    return [rows[number] for number in sorted(rows)]


def check_count(path: Path, rows: Sequence[Row], num_rounds: int) -> None:
    """Checks that a finished run has a row for each of its rounds.

    Args:
      path: of the rows, for messages.
      rows: from `read_metrics`.
      num_rounds: of its summary.

    Raises:
      UserError: one is missing, or there are more.
    """
    rounds = [row["round"] for row in rows]
    gap = next((n for n, at in enumerate(rounds, 1) if at != n), len(rounds) + 1)
    fault = f"lacks round {gap}" if gap <= num_rounds else ""
    if not fault and len(rounds) > num_rounds:
        fault = f"has {len(rounds)} rounds, which summary.json says are {num_rounds}"
    if fault:
        raise UserError(
            f"{path} {fault}; allowed: what the run has written, restored, or "
            f"{path.parent} removed to run again"
        )


def is_number(value: Any) -> bool:
    """True for one number: a field may also be absent, null or a vector."""
    return isinstance(value, int | float)


def measured(rows: Iterable[Row], *fields: str) -> list[tuple[int, float]]:
    """(round, sum of the fields) of every row with a number in any of them."""
    found = []
    for row in rows:
        values = [row[name] for name in fields if is_number(row.get(name))]
        if values:
            found.append((row["round"], sum(values)))
    return found


def stack_experts(rows: Iterable[Row], field: str) -> np.ndarray:
    """[R, G, E] float64 of the rows that have the field; [0, 1, 0] where none has.

    A row has one number per expert, [E], or [G][E] in a model with G MoE layers.
    """
    values = np.array([row[field] for row in rows if row.get(field)], float)
    if not len(values):
        return np.zeros((0, 1, 0))
    return values if values.ndim == 3 else values[:, None]


def name_experts(num_layers: int, num_experts: int) -> list[str]:
    """Names of G * E experts, layer by layer; of one layer without its number."""
    if num_layers == 1:
        return [f"expert {e}" for e in range(num_experts)]
    return [
        f"layer {g} expert {e}" for g in range(num_layers) for e in range(num_experts)
    ]


def spend_so_far(rows: Sequence[Row], fields: Sequence[str]) -> np.ndarray:
    """[R] float64, the sum of the fields over all rounds up to each row's."""
    spent = [sum(float(row.get(name) or 0.0) for name in fields) for row in rows]
    return np.cumsum(spent, dtype=np.float64)


def rounds_to(rows: Iterable[Row], key: str, target: float) -> int | None:
    """The first evaluated round in which `key` is at least `target`; None if never."""
    reached = (at for at, value in measured(rows, key) if value >= target)
    return next(reached, None)


def final_values(points: Sequence[tuple[int, Any]]) -> list[Any]:
    """The values of the evaluations of the last ten rounds.

    Curves under strong label skew swing from round to round, so no single evaluation
    is a fair final value. Of runs below 40 rounds only the last quarter counts, for the
    earlier ones are where they still learn.

    Args:
      points: (round, value) of every evaluation, at least one; a value is a number or
        an array.
    """
    last = points[-1][0]
    window = min(FINAL_ROUNDS, FINAL_SHARE * last)
    return [value for at, value in points if at > last - window]


def final_mean(points: Sequence[tuple[int, float]]) -> float:
    """The mean of `final_values`."""
    values = final_values(points)
    return sum(values) / len(values)


def own_final(rows: Iterable[Row], key: str) -> float | None:
    """A run's final value, see `final_mean`; None before the first evaluation."""
    points = measured(rows, key)
    return final_mean(points) if points else None


def rounds_to_share(rows: Iterable[Row], key: str, share: float) -> int | None:
    """The first evaluated round that reaches `share` (0.95, say) of `own_final`."""
    rows = list(rows)
    final = own_final(rows, key)
    return None if final is None else rounds_to(rows, key, share * final)
