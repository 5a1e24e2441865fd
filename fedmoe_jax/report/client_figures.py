"""The pictures of clients' accuracies: all of them, and against their capacity."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedmoe_jax.report.clients import Clients, find_clients, name_tiers
from fedmoe_jax.report.curves import Series, curves
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.plots import accuracy_bars, quantile_dots
from fedmoe_jax.report.runs import NAN, Run, num_experts

WHOSE = (
    "Accuracy at the end of each client that was evaluated, with its own experts and "
    "on its own classes"
)
DOTS = "a dot is a client, or a twentieth of them where there are more; a bar is their "
AXIS = "Client's accuracy (%)"


def counted(run: Run) -> Clients | None:
    """The clients that have an accuracy; None without any."""
    found = find_clients(run)
    if found is None:
        return None
    shown = np.isfinite(found.accuracy)
    chosen = [values[shown] if len(values) else values for values in found]
    return Clients(*chosen) if shown.any() else None


def find_groups(
    groups: Mapping[str, Sequence[Run]],
) -> dict[str, list[tuple[Run, Clients]]]:
    """Every label's runs that have counted clients, with these."""
    pairs = {label: [(run, counted(run)) for run in g] for label, g in groups.items()}
    known = {k: [(run, c) for run, c in g if c is not None] for k, g in pairs.items()}
    return {label: group for label, group in known.items() if group}


def by_capacity(clients: Sequence[Clients]) -> dict[int, np.ndarray]:
    """Accuracies in percent by capacity, rising; of all runs together."""
    found = [one for one in clients if len(one.capacity)]
    if not found:
        return {}
    capacity = np.concatenate([one.capacity for one in found])
    percent = np.concatenate([100 * one.accuracy for one in found])
    return {int(k): percent[capacity == k] for k in np.unique(capacity)}


def _single(group: Sequence[tuple[Run, Clients]]) -> Iterator[Picture]:
    """The clients of one strategy: by tier, and by capacity."""
    runs, clients = zip(*group, strict=True)
    percent = np.concatenate([100 * one.accuracy for one in clients])
    names, places = ["all"], np.zeros(len(percent), int)
    if all(len(one.tier) for one in clients):
        names = list(dict.fromkeys(name for run in runs for name in name_tiers(run)))
        tiers = np.concatenate([one.tier for one in clients])
        places = np.array([names.index(name) for name in tiers])
    caption = f"{WHOSE}. A tail on the left is a group that the mean hides."
    yield Picture(
        "client_accuracy", caption, accuracy_bars(AXIS, percent, places, names)
    )
    found = by_capacity(clients)
    if len(found) > 1:
        labels = [f"holds {k} (n = {len(values)})" for k, values in found.items()]
        yield Picture(
            "accuracy_by_capacity",
            f"{WHOSE}, by the experts that its device can hold: {DOTS}median. Weak "
            "devices far on the left pay for what they cannot hold.",
            quantile_dots(labels, list(found.values()), AXIS, coloured=False),
        )


def _compared(
    groups: Mapping[str, Sequence[tuple[Run, Clients]]], labels: Sequence[str]
) -> Iterator[Picture]:
    """The clients of several strategies, which keep their colours of `labels`."""
    percent = [
        np.concatenate([100 * one.accuracy for _, one in groups.get(label, ())])
        if label in groups
        else np.zeros(0)
        for label in labels
    ]
    yield Picture(
        "client_accuracy",
        f"{WHOSE}, of all seeds: {DOTS}median. A long tail on the left is a group "
        "that the mean hides.",
        quantile_dots(labels, percent, AXIS, coloured=True),
    )
    lines = []
    for place, label in enumerate(labels):
        group = groups.get(label, ())
        if any(num_experts(run) > 1 for run, _ in group):
            lines += _capacity_series(place, label, [one for _, one in group])
    if lines:
        yield Picture(
            "accuracy_by_capacity",
            f"{WHOSE}, by the experts that its device can hold: mean of such clients, "
            "the band from the lowest to the highest seed. Where it rises, clients "
            "with weak devices lose accuracy. One with room for no expert trains one.",
            curves(lines, AXIS, None, "Experts a client can hold"),
        )


def _capacity_series(
    place: int, label: str, clients: Sequence[Clients]
) -> list[Series]:
    """Mean accuracy of every seed's clients by capacity; empty with fewer than two."""
    capacities = list(by_capacity(clients))
    seeds = [by_capacity([one]) for one in clients]
    values = [
        [seed[k].mean() if k in seed else NAN for k in capacities] for seed in seeds
    ]
    if len(capacities) < 2:
        return []
    return [Series(place, label, np.array(capacities), np.array(values))]


def client_pictures(groups: Mapping[str, Sequence[Run]]) -> Iterator[Picture]:
    """Accuracies of clients; none where no finished run has them."""
    found = find_groups(groups)
    if not found:
        return
    if len(groups) == 1:
        yield from _single(next(iter(found.values())))
    else:
        yield from _compared(found, list(groups))
