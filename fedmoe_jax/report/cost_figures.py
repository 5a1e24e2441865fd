"""The pictures of accuracy against what it cost: simulated time and traffic."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import FINAL, Curve, Measure
from fedmoe_jax.report.curves import Tracks, cost_curves
from fedmoe_jax.report.figures import Picture, find_chance, find_reference
from fedmoe_jax.report.rows import measured, spend_so_far
from fedmoe_jax.report.runs import Run, join_measures


class Cost(NamedTuple):
    """The axis of a cost, against which accuracy is drawn.

    Attributes:
      name: ends the pictures' file names.
      spent: the measure that is added up over rounds.
      label: name and unit.
      caption: the end of a sentence that begins with the accuracy's name.
      without: why a run has no such cost at all.
    """

    name: str
    spent: Measure
    label: str
    caption: str
    without: str


COSTS = (
    Cost(
        "time",
        MEASURES["simulated_minutes"],
        "Simulated time (min)",
        "against the simulated time of all rounds so far. A round lasts as long as its "
        "slowest client is waited for, so a strategy that is behind over rounds may be "
        "ahead here with shorter ones.",
        "simulates no device",
    ),
    Cost(
        "traffic",
        MEASURES["megabytes"],
        "Traffic up and down (MB)",
        "against the bytes that all clients have sent and received so far, lost ones "
        "too. At one amount of traffic the better curve has made more of it.",
        "exchanges nothing",
    ),
)


def track(
    run: Run, measure: Measure, cost: Cost
) -> tuple[np.ndarray, np.ndarray] | None:
    """Costs [P] and shown values [P] at the evaluations; None if there are none.

    There are none either where the whole run has no such cost.
    """
    spent = spend_so_far(run.rows, cost.spent.fields) / cost.spent.unit
    points = dict(measured(run.rows, *measure.fields))
    if not points or not spent[-1] > 0:
        return None
    seen = [row["round"] in points for row in run.rows]
    values = np.array(list(points.values()), float)
    return spent[seen], measure.scale / measure.unit * values


def _tracks(
    place: int, label: str, group: Sequence[Run], measure: Measure, cost: Cost
) -> list[Tracks]:
    """The curve of one label; empty where no run of it has values."""
    found = [track(run, measure, cost) for run in group]
    seeds = [seed for seed in found if seed is not None]
    return [Tracks(place, label, seeds)] if seeds else []


def _single(
    group: Sequence[Run], measures: Iterable[Measure], cost: Cost
) -> Iterator[Picture]:
    """All accuracies of one strategy in one picture."""
    lines = []
    for place, measure in enumerate(measures):
        lines += _tracks(place, measure.line, group, measure, cost)
    if lines:
        label, chance = "Test accuracy (%)", find_chance(group)
        figure = cost_curves(lines, cost.label, label, chance)
        caption = f"Test accuracy {cost.caption}"
        yield Picture(f"accuracy_{cost.name}", caption, figure)


def _compared(
    groups: Mapping[str, Sequence[Run]], measure: Measure, curve: Curve, cost: Cost
) -> Iterator[Picture]:
    """One measure of all strategies that have the cost."""
    lines, missing = [], []
    for place, (label, group) in enumerate(groups.items()):
        found = _tracks(place, label, group, measure, cost)
        lines += found
        missing += [] if found else [label]
    if lines:
        runs = [run for group in groups.values() for run in group]
        reference = find_reference(runs, curve)
        name = f"{measure.line} accuracy" if measure.line else curve.label
        caption = f"{name} {cost.caption}"
        if missing:
            caption += f" Left out: {', '.join(missing)}, which {cost.without}."
        figure = cost_curves(lines, cost.label, curve.label, reference)
        yield Picture(f"{measure.field}_{cost.name}", caption, figure)


def cost_pictures(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """Accuracy against time and traffic; with one strategy all accuracies together."""
    measures = join_measures(run for group in groups.values() for run in group).values()
    if len(groups) == 1:
        accuracies = [m for m in measures if m.line and m.over == FINAL]
        for cost in COSTS:
            yield from _single(next(iter(groups.values())), accuracies, cost)
    else:
        for measure in measures:
            if measure.curve and measure.curve.costs:
                for cost in COSTS:
                    yield from _compared(groups, measure, measure.curve, cost)
