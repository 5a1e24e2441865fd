"""The clients of finished runs, one by one: their arrays, and `clients.csv`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmoe_jax.report.records import write_records
from fedmoe_jax.report.runs import Run

FIELDS = ("client", "tier", "capacity", "participation", "num_examples", "accuracy")
BITS = "bits"  # of a byte of text, a further field of runs on text


class Clients(NamedTuple):
    """The clients of one finished run, [N] each.

    Attributes:
      accuracy: float in [0, 1] of the last evaluation, each client's experts on its own
        classes; NaN for a client without examples or a model, and in files without it.
      bits: float, of a byte in the same evaluation; empty where the task has none.
      num_examples: int, of its own.
      capacity: int, experts that its device can hold; empty where all data lie in one
        place, and no client has a device.
      participation: int, rounds in which its update counted; likewise.
      tier: str, name of its device; likewise.
    """

    accuracy: np.ndarray
    bits: np.ndarray
    num_examples: np.ndarray
    capacity: np.ndarray
    participation: np.ndarray
    tier: np.ndarray


def name_tiers(run: Run) -> np.ndarray:
    """Names of the device tiers; older files have them in the config alone."""
    return run.arrays.get("tier_names", np.array(run.config["devices"]["tiers"]))


def find_clients(run: Run) -> Clients | None:
    """The clients of a run; None while it is in progress."""
    arrays = run.arrays
    if not arrays:
        return None
    num_examples = arrays["label_counts"].sum(axis=1)
    count = len(num_examples)
    unknown = np.full(count, np.nan)
    participation = arrays.get("participation", np.ones(count, int))
    own = {"capacity": arrays["capacity"], "participation": participation}
    own["tier"] = name_tiers(run)[arrays["tier"]]
    return Clients(
        accuracy=arrays.get("client_accuracy", unknown),
        bits=arrays.get("client_bits", unknown[:0]),
        num_examples=num_examples,
        **{name: v if len(v) == count else v[:0] for name, v in own.items()},
    )


def list_clients(run: Run) -> Iterator[dict[str, Any]]:
    """A record of `FIELDS` for every client; empty where a number is unknown."""
    found = find_clients(run)
    if found is None:
        return
    absent = [""] * len(found.accuracy)
    show = lambda value: f"{value:.6g}" if np.isfinite(value) else ""
    columns = (
        *(
            column.tolist() or absent
            for column in (found.tier, found.capacity, found.participation)
        ),
        found.num_examples.tolist(),
        [show(value) for value in found.accuracy.tolist()],
    )
    bits = [{BITS: show(value)} for value in found.bits.tolist()] or [{}] * len(absent)
    for number, (*values, own) in enumerate(zip(*columns, bits, strict=True)):
        yield dict(zip(FIELDS, (number, *values), strict=True)) | own


def write_clients_csv(path: str | Path, runs: Sequence[Run]) -> None:
    """One row per run and client with `FIELDS`, see `write_records`."""
    bits = [BITS] if any("client_bits" in run.arrays for run in runs) else []
    write_records(path, runs, [*FIELDS, *bits], list_clients)
