"""The clients by the kinds of their devices: how often they count, how they are served.

`clients.csv` has every client.
"""

from collections.abc import Sequence

import numpy as np

from fedmoe_jax.report.cells import Cell, mean_cell
from fedmoe_jax.report.clients import find_clients, name_tiers
from fedmoe_jax.report.runs import NAN, Run, group_runs, name_runs
from fedmoe_jax.report.sheets import Section, Sheet

TITLE = "Kinds of device"
ABOUT = (
    "Of the clients with each kind of device: the rounds in which an update counted, "
    "and personal accuracy in the last evaluation, means over its clients and then "
    "over seeds."
)


def is_uneven(run: Run) -> bool:
    """Whether the clients of a finished run have counted in different rounds."""
    found = find_clients(run)
    return found is not None and len(np.unique(found.participation)) > 1


def measure_tiers(run: Run, names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Percent of the rounds, and of accuracy, of every kind; NaN of a kind without."""
    found, rounds = find_clients(run), len(run.rows)
    if found is None or not len(found.tier):
        return [NAN] * len(names), [NAN] * len(names)
    mean = lambda values: float(np.mean(values)) if len(values) else NAN
    took_part, accuracy = [], []
    for name in names:
        own = found.tier == name
        scored = own & np.isfinite(found.accuracy)
        took_part.append(100 * mean(found.participation[own]) / max(rounds, 1))
        accuracy.append(100 * mean(found.accuracy[scored]))
    return took_part, accuracy


def tiers_section(runs: Sequence[Run]) -> Section | None:
    """A row for each label; None where there is one kind, or all count alike."""
    scored = lambda run: np.isfinite(run.arrays.get("client_accuracy", NAN)).any()
    finished = [run for run in name_runs(runs) if run.arrays and scored(run)]
    names = [*dict.fromkeys(name for run in finished for name in name_tiers(run))]
    if len(names) < 2 or not any(map(is_uneven, finished)):
        return None
    rows: dict[str, list[Cell]] = {}
    for label, group in group_runs(finished).items():
        seeds = [sum(measure_tiers(run, names), []) for run in group]
        rows[label] = [mean_cell(each, 1.0, 1) for each in zip(*seeds, strict=True)]
    heads = [f"{name}, {what} %" for what in ("rounds", "personal") for name in names]
    return Section(TITLE, ABOUT, [Sheet("", ("Strategy", *heads), rows)])
