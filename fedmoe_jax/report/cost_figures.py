"""The pictures of accuracy against what it cost: simulated time and traffic."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.report.curves import Tracks, cost_curves
from fedmoe_jax.report.figures import CURVES, Picture, find_chance
from fedmoe_jax.report.runs import Run
from fedmoe_jax.report.summary import TRAFFIC, spend_so_far
from fedmoe_jax.train.writers import ACCURACIES


class Cost(NamedTuple):
    """What accuracy is drawn against.

    Attributes:
      name: ends the pictures' file names.
      fields: of a row, added up over fields and rounds.
      unit: by which the sum is divided.
      label: name and unit.
      caption: what to look for.
      without: why a run has no such cost at all.
    """

    name: str
    fields: tuple[str, ...]
    unit: float
    label: str
    caption: str
    without: str


COSTS = (
    Cost(
        "time",
        ("simulated_seconds",),
        60.0,
        "Simulated time (min)",
        "against the simulated time of all rounds so far. A round lasts as long as its "
        "slowest client is waited for, so who is behind over rounds may be ahead here "
        "with shorter ones.",
        "simulates no device",
    ),
    Cost(
        "traffic",
        TRAFFIC,
        1e6,
        "Traffic up and down (MB)",
        "against the bytes that all clients have sent and received so far, lost ones "
        "too. At one amount of traffic, who is higher has made more of it.",
        "exchanges nothing",
    ),
)
COMPARED = ("global_accuracy", "personal_accuracy")


def track(run: Run, field: str, cost: Cost) -> tuple[np.ndarray, np.ndarray] | None:
    """Costs [P] and values [P] in percent at the evaluations; None if there are none.

    There are none either where the whole run has no such cost.
    """
    spent = spend_so_far(run.rows, cost.fields) / cost.unit
    measured = [row.get(field) is not None for row in run.rows]
    if not any(measured) or not spent[-1] > 0:
        return None
    values = [row[field] for row in run.rows if row.get(field) is not None]
    return spent[measured], 100 * np.array(values, float)


def _tracks(
    place: int, label: str, group: Sequence[Run], field: str, cost: Cost
) -> list[Tracks]:
    """The curve of one label; empty where no run of it has values."""
    found = [track(run, field, cost) for run in group]
    seeds = [seed for seed in found if seed is not None]
    return [Tracks(place, label, seeds)] if seeds else []


def _single(group: Sequence[Run], cost: Cost) -> Iterator[Picture]:
    """All accuracies of one strategy in one picture."""
    lines = []
    for place, (field, title) in enumerate(ACCURACIES.items()):
        lines += _tracks(place, title, group, field, cost)
    if lines:
        label, chance = "Test accuracy (%)", find_chance(group)
        figure = cost_curves(lines, cost.label, label, chance)
        caption = f"Test accuracy {cost.caption}"
        yield Picture(f"accuracy_{cost.name}", caption, figure)


def _compared(
    groups: Mapping[str, Sequence[Run]], field: str, cost: Cost
) -> Iterator[Picture]:
    """One accuracy of all strategies that have the cost."""
    lines, missing = [], []
    for place, (label, group) in enumerate(groups.items()):
        found = _tracks(place, label, group, field, cost)
        lines += found
        missing += [] if found else [label]
    if lines:
        _, label, _ = CURVES[field]
        runs = [run for group in groups.values() for run in group]
        chance = find_chance(runs) if field == "global_accuracy" else None
        caption = f"{ACCURACIES[field]} accuracy {cost.caption}"
        if missing:
            caption += f" Left out: {', '.join(missing)}, which {cost.without}."
        figure = cost_curves(lines, cost.label, label, chance)
        yield Picture(f"{field}_{cost.name}", caption, figure)


def cost_pictures(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """Accuracy against time and traffic; with one strategy all accuracies together."""
    if len(groups) == 1:
        for cost in COSTS:
            yield from _single(next(iter(groups.values())), cost)
    else:
        for field in COMPARED:
            for cost in COSTS:
                yield from _compared(groups, field, cost)
