"""The pictures of a report, each with a caption that says how to read it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from fedmoe_jax.options import EXPERTS, FINAL, ROUNDS, Curve, Measure
from fedmoe_jax.report import plots
from fedmoe_jax.report.clients import name_tiers
from fedmoe_jax.report.curves import Reference, Series, curves
from fedmoe_jax.report.rows import measured, name_experts, stack_experts
from fedmoe_jax.report.runs import (
    NAN,
    Run,
    chance_of,
    interval,
    join_measures,
    limit_of,
    num_experts,
    numbers,
    varies,
)


class Picture(NamedTuple):
    """A figure with its file name, without suffix, and its caption."""

    name: str
    caption: str
    figure: Figure


def measure_series(
    place: int, label: str, group: Sequence[Run], measure: Measure
) -> list[Series]:
    """A measure over the rounds of a group's runs; empty where no run has it."""
    tracks = [dict(measured(run.rows, *measure.fields)) for run in group]
    rounds = sorted(set().union(*tracks))
    values = np.array([[t.get(r, NAN) for r in rounds] for t in tracks], float)
    seen = np.isfinite(values).any(axis=0)
    if not seen.any():
        return []
    values = measure.scale / measure.unit * values[:, seen]
    return [Series(place, label, np.array(rounds)[seen], values)]


def find_chance(runs: Iterable[Run]) -> tuple[float, str] | None:
    """Accuracy in percent of guessing, where a finished run has its classes."""
    known = [chance for chance in map(chance_of, runs) if chance is not None]
    return (100 * known[0], "chance") if known else None


def find_reference(runs: Sequence[Run], curve: Curve) -> Reference:
    """What a curve is compared with: guessing, or the limit of every model."""
    limit = limit_of(runs) if curve.limit else None
    if limit is not None:
        return limit, "limit"
    return find_chance(runs) if curve.chance else None


def _accuracy_picture(
    group: Sequence[Run], measures: Iterable[Measure]
) -> Iterator[Picture]:
    """All accuracies of one strategy in one picture."""
    lines, drifted = [], False
    for place, measure in enumerate(measures):
        found = measure_series(place, measure.line, group, measure)
        lines += found
        drifted |= bool(found) and measure.field == "drifted_accuracy"
    if lines:
        caption = (
            "Test accuracy. Global: all experts on the whole test set, top-A routed or "
            "as a soft mixture; personal: each client's experts on its own classes. A "
            "wide gap between them is specialisation that the gate does not exploit."
        )
        if drifted:
            caption += (
                " Drifted: the global accuracy on test images that have drifted as far "
                "as the clients' own."
            )
        figure = curves(lines, "Test accuracy (%)", find_chance(group))
        yield Picture("accuracy", caption, figure)


def curve_pictures(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """One picture per measure; with one strategy its accuracies share a picture."""
    runs = [run for group in groups.values() for run in group]
    measures = join_measures(runs).values()
    alone = len(groups) == 1
    if alone:
        yield from _accuracy_picture(runs, [m for m in measures if m.line])
    for measure in measures:
        if measure.curve and not (alone and measure.line):
            yield from _curve_picture(groups, runs, measure, measure.curve)


def _curve_picture(
    groups: Mapping[str, Sequence[Run]],
    runs: Sequence[Run],
    measure: Measure,
    curve: Curve,
) -> Iterator[Picture]:
    """One measure of all strategies; none where no run has it."""
    if measure.varies_over == ROUNDS and not any(varies(run, measure) for run in runs):
        return
    lines = []
    for place, (label, group) in enumerate(groups.items()):
        if measure.of != EXPERTS or num_experts(group[0]) != 1:
            lines += measure_series(place, label, group, measure)
    if lines:
        figure = curves(lines, curve.label, find_reference(runs, curve))
        yield Picture(measure.field, curve.caption, figure)


def title_final(measure: Measure, bits: bool) -> str:
    """A measure's name in the picture of final numbers; empty for none.

    With its unit, but for bits, which the caption names, as the names are long.

    Args:
      measure: of the runs.
      bits: whether they are on text, of which bits say more than accuracies.
    """
    if measure.over != FINAL:
        return ""
    if bits:
        shown = measure.field.endswith("_bits") and "validation" not in measure.field
        return measure.title.removesuffix(", bits") if shown else ""
    return f"{measure.line} (%)" if measure.line else ""


def has_bits(runs: Iterable[Run]) -> bool:
    """Whether runs are on text, of which bits say more than accuracies."""
    runs = list(runs)
    measures = join_measures(runs)
    known = [numbers(run, measures, {}).get("final_global_bits", NAN) for run in runs]
    return bool(np.isfinite(known).any())


def final_picture(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """Final accuracies of every strategy, or bits of text, seed by seed."""
    runs = [run for group in groups.values() for run in group]
    measures, bits = join_measures(runs), has_bits(runs)
    found = [[numbers(run, measures, {}) for run in group] for group in groups.values()]
    panels = []
    for key, measure in measures.items():
        if not (title := title_final(measure, bits)):
            continue
        points = [
            np.array([measure.scale * one.get(key, NAN) for one in each])
            for each in found
        ]
        finite = [values[np.isfinite(values)] for values in points]
        spans = [interval(v) if len(v) else (NAN, NAN) for v in finite]
        mean, half = np.array(spans).T
        if np.isfinite(mean).any():
            panels.append(plots.Dots(title, finite, mean, half))
    if panels:
        what = "Final bits, where less is better" if bits else "Final accuracies"
        caption = (
            f"{what}: a dot per seed, a bar at the mean, a line over its 95 % "
            "t-interval. Where lines overlap, the order may be chance."
        )
        yield Picture("final_accuracy", caption, plots.dots(list(groups), panels))


def population_pictures(run: Run) -> Iterator[Picture]:
    """The clients of one run: their examples and their capacity."""
    arrays, names = run.arrays, run.arrays["label_names"]
    yield Picture(
        "partition",
        "Examples of each client by class, as areas of bubbles. Lone large bubbles "
        "mean strongly non-IID clients, which one shared model serves badly.",
        plots.partition_bubbles(arrays["label_counts"], names),
    )
    if len(arrays["capacity"]) < len(arrays["label_counts"]):
        return  # all data in one place, and no devices
    yield Picture(
        "capacity",
        "Experts that each device can hold under its memory, compute and network, in "
        "the last round where they change. Many clients at one expert leave the server "
        "little to decide.",
        plots.capacity_bars(arrays["capacity"], arrays["tier"], name_tiers(run)),
    )


def add_layer(values: np.ndarray, axis: int) -> np.ndarray:
    """Gives an array of one MoE layer its axis G; others have three axes already."""
    return np.expand_dims(values, axis) if values.ndim == 2 else values


def _training_pictures(run: Run) -> Iterator[Picture]:
    rows = [row for row in run.rows if row.get("expert_load")]
    yield Picture(
        "load",
        "Share of each round's training examples by expert. Dark rows are starved "
        "experts; a fair share is one colour all over.",
        plots.load_map(
            np.array([row["round"] for row in rows]), stack_experts(rows, "expert_load")
        ),
    )
    rows = [row for row in run.rows if row.get("expert_accuracy")]
    if rows:
        alone = stack_experts(rows, "expert_accuracy")  # [R, G, E]
        rounds = np.array([row["round"] for row in rows])
        names = name_experts(*alone.shape[1:])
        values = 100 * alone.reshape(len(rows), -1).T
        lines = [
            Series(place, name, rounds, values[place : place + 1])
            for place, name in enumerate(names)
        ]
        yield Picture(
            "expert_accuracy",
            "Each expert alone on the whole test set. Low is fine for a specialist; a "
            "flat curve with little load is an expert that never learnt.",
            curves(lines, "Accuracy alone (%)", None),
        )


def join_classes(shares: np.ndarray, count: int) -> np.ndarray:
    """Shares [G, E, L] of each stratum's gate mass as those of each group [G, E, Q].

    Every class of a group that was tested counts alike.
    """
    joined = shares.reshape(*shares.shape[:2], count, -1).sum(axis=3)
    return joined / np.maximum(joined.sum(axis=1, keepdims=True), 1e-9)


def share_rounds(run: Run) -> np.ndarray:
    """The share of the rounds in which clients of each group held each expert.

    Returns:
      [G, E, Q] in [0, 1], 0 for a group without clients.
    """
    counts, count = run.arrays["label_counts"], len(run.arrays["group_names"])
    group = counts.reshape(len(counts), count, -1).sum(axis=2).argmax(axis=1)
    of_group = group[:, None] == np.arange(count)[None]  # [N, Q]
    held = add_layer(run.arrays["times_held"], 1) / max(len(run.rows), 1)
    total = np.einsum("nge,nq->geq", held, of_group)
    return total / np.maximum(of_group.sum(axis=0), 1)[None, None]


def _alignment_pictures(run: Run) -> Iterator[Picture]:
    arrays = run.arrays
    shares, what = add_layer(arrays["specialisation"], 0), "Class"
    names = arrays["label_names"]
    if "group_names" in arrays:
        what, names = "Group", arrays["group_names"]
        shares = join_classes(shares, len(names))
    each = " in every layer" if len(shares) > 1 else ""
    yield Picture(
        "specialisation",
        f"Where the gate sends each {what.lower()}'s test images; columns sum to 100 "
        f"%{each}. One bright cell per column, in different rows, is specialisation; "
        "an even column is none, and a bright row is one expert that takes everything.",
        plots.expert_map(shares, names, what, "gate mass"),
    )
    if "group_names" in arrays:
        yield Picture(
            "groups",
            "Share of the rounds in which a client of the group held the expert, the "
            "mean over its clients. One bright cell per column, in different rows, is "
            "a strategy that has found the groups; even columns are one that has not.",
            plots.expert_map(share_rounds(run), names, what, "rounds"),
        )
    yield Picture(
        "pairs",
        "Left: share of the rounds in which the client held the expert. Bright single "
        "cells are lasting pairs; even colour is assignment without preference. Right: "
        "the fitness that the server has learnt. Bright there and dark on the left is "
        "a pair that load kept apart.",
        plots.pair_maps(
            add_layer(arrays["times_held"], 1),
            len(run.rows),
            add_layer(arrays["fitness"], 1),
        ),
    )


def run_pictures(run: Run) -> Iterator[Picture]:
    """Pictures of one run; alignment says nothing about a model with one expert."""
    if num_experts(run) > 1:
        yield from _training_pictures(run)
        if run.arrays:
            yield from _alignment_pictures(run)
