"""Clients' histories, as an attacker has them from what was observed; on the host."""

from collections.abc import Mapping

import numpy as np

# Numbers of the feedback that the attacker adds to the history.
FEATURES = ("accuracy", "loss", "frequency", "load", "peak", "probe")

Observed = Mapping[str, np.ndarray]  # leaves [rounds, C, ...], see `observer.see_round`


def sum_rounds(
    values: np.ndarray, client: np.ndarray, num_clients: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each client's numbers over rounds, and how many there are.

    Args:
      values: [rounds, C, ...] float; NaN is left out.
      client: [rounds, C] int, whose they are.
      num_clients: N.

    Returns:
      [N, ...] float64 and [N, ...] int.
    """
    known = np.isfinite(values)
    total = np.zeros((num_clients, *values.shape[2:]))
    count = np.zeros(total.shape, int)
    np.add.at(total, client, np.where(known, values, 0.0))
    np.add.at(count, client, known)
    return total, count


def count_assignments(
    observed: Observed, num_clients: int, name: str = "held"
) -> np.ndarray:
    """The share of its rounds in which each client held each expert, [N, G E].

    0 for a client that was never seen.

    Args:
      observed: of a whole run.
      num_clients: N.
      name: `held` or `assigned`.
    """
    held = observed[name].astype(float)
    seen = held.max(axis=(2, 3), keepdims=True) > 0  # one out of reach shows nothing
    held = np.where(seen, held, np.nan)
    total, count = sum_rounds(held, observed["client"], num_clients)
    return (total / np.maximum(count, 1)).reshape(num_clients, -1)


def average_feedback(observed: Observed, num_clients: int) -> np.ndarray:
    """The mean of each number that clients reported of experts, [N, features G E].

    Of an expert that a client never reported on, the mean of the others' means.
    """
    found = []
    for name in (each for each in FEATURES if each in observed):
        total, count = sum_rounds(observed[name], observed["client"], num_clients)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        mean = mean.reshape(num_clients, -1)
        known = np.isfinite(mean)
        usual = np.where(known, mean, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        found.append(np.where(known, mean, usual[None]))
    return np.concatenate(found, axis=1)


def make_histories(observed: Observed, num_clients: int, feedback: bool) -> np.ndarray:
    """What an attacker knows of each client, [N, features].

    Args:
      observed: of a whole run.
      num_clients: N.
      feedback: whether the attacker is the server, which has the reports, too, and
        knows what it has assigned, and not only a listener on the link.
    """
    if not feedback:
        return count_assignments(observed, num_clients)
    name = "assigned" if "assigned" in observed else "held"
    held = count_assignments(observed, num_clients, name)
    return np.concatenate([held, average_feedback(observed, num_clients)], axis=1)
