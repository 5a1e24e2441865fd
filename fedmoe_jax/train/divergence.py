"""Runs that diverge: their updates break, or their loss runs away."""

import math
from collections.abc import Callable, Sequence

from fedmoe_jax.report.rows import Row

# An untrained model's loss is that of guessing; nothing that learns is ten times worse.
RUNAWAY = 10.0
RECEIVED = ("merged_clients", "stale_clients", "nonfinite_clients")


def is_broken(row: Row) -> bool:
    """Whether half or more of the updates that reached the server are not finite."""
    received = sum(float(row.get(name) or 0.0) for name in RECEIVED)
    return received > 0 and 2 * float(row.get("nonfinite_clients") or 0.0) >= received


def find_loss(row: Row) -> float:
    """The training loss of a round; NaN where no update counted."""
    loss = row.get("train_loss")
    return math.nan if loss is None else float(loss)


def watch(rows: Sequence[Row]) -> Callable[[Row], Row]:
    """Returns a function that says of each row whether its run has diverged by then.

    Args:
      rows: of the rounds done before, in order.

    Returns:
      row -> `{"diverged": 0 or 1}`, of the next rows in order. A run that has diverged
      stays so.
    """
    losses = filter(math.isfinite, map(find_loss, rows))
    first = next(losses, math.nan)
    diverged = any(row.get("diverged") for row in rows)

    def look(row: Row) -> Row:
        nonlocal first, diverged
        loss = find_loss(row)
        first = loss if math.isnan(first) else first
        diverged = diverged or is_broken(row) or loss > RUNAWAY * first
        return {"diverged": int(diverged)}

    return look
