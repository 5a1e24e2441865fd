"""Examples that nobody trains on: own test sets, validation, unseen clients."""

from typing import NamedTuple

import numpy as np

from fedmoe_jax.data.partition import list_examples, list_owners
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Partition


class Shares(NamedTuple):
    """The parts of a partition that are set aside; `unseen` counts clients."""

    unseen: int
    test: float
    validation: float


def set_aside(
    partition: Partition,
    stratum: np.ndarray,
    shares: Shares,
    seed: int,
    test_owner: np.ndarray | None = None,
) -> Partition:
    """The partition of the clients that take part, with what they train on.

    Args:
      partition: of N clients and those that are never sampled.
      stratum: [X] int32 in [0, L), of all training examples.
      shares: where all are 0, the partition stays as it is.
      seed: >= 0.
      test_owner: [X'] int, the client of each test example, which are own test sets
        then, numbered after the training examples; None where they have none.

    Returns:
      The partition of N clients. Those that are unseen were drawn at random. Of the
      n examples of each other client `max(1, test * n)` are its own test set and
      `validation * n` are validation, rounded, spread over its strata, but one example
      at least is left to train on.

    Raises:
      UserError: the shares leave nothing to train on, or there are own test sets
        already.
    """
    if test_owner is not None and shares.test:
        raise UserError(
            f"partition.test_share={shares.test:g} is not allowed with data whose test "
            "examples have clients; allowed: 0"
        )
    if test_owner is not None:
        partition = partition._replace(
            own_test=np.arange(len(test_owner), dtype=np.int32) + len(stratum),
            own_test_client=test_owner.astype(np.int32),
        )
    if not any(shares):
        return partition
    if shares.test + shares.validation >= 1:
        raise UserError(
            f"partition.test_share={shares.test:g} is not allowed with "
            f"partition.validation_share={shares.validation:g}; allowed: less than 1 "
            "together"
        )
    hidden, rng = hide_clients(len(partition.size), shares.unseen, seed)
    owner, example = list_owners(partition)
    unseen, unseen_client = take_clients(owner, example, hidden)
    example, owner = take_clients(owner, example, ~hidden)
    tests, validations = count_asides(np.bincount(owner), shares)
    test = pick_evenly(owner, stratum[example], tests, rng)
    own_test, own_test_client = example[test], owner[test]
    if test_owner is not None:
        own = test_owner, partition.own_test
        own_test, own_test_client = take_clients(*own, ~hidden)
    example, owner = example[~test], owner[~test]
    tuning = pick_evenly(owner, stratum[example], validations, rng)
    validation, example, owner = example[tuning], example[~tuning], owner[~tuning]
    index, size = list_examples(owner, example, len(tests))
    counts = np.zeros((len(tests), partition.label_counts.shape[1]), np.int32)
    np.add.at(counts, (owner, stratum[example]), 1)
    return Partition(
        index=index,
        size=size,
        label_counts=counts,
        public=partition.public,
        own_test=own_test,
        own_test_client=own_test_client.astype(np.int32),
        validation=validation,
        unseen=unseen,
        unseen_client=unseen_client.astype(np.int32),
    )


def hide_clients(
    count: int, unseen: int, seed: int
) -> tuple[np.ndarray, np.random.Generator]:
    """The clients that never take part, [n] bool, and the generator after that draw."""
    rng, hidden = np.random.default_rng([seed, 5]), np.zeros(count, bool)
    hidden[rng.permutation(count)[:unseen]] = True
    return hidden, rng


def take_clients(
    owner: np.ndarray, example: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The examples of the chosen clients [n] bool, and their owners numbered anew."""
    number, kept = np.cumsum(chosen) - 1, chosen[owner]
    return example[kept], number[owner[kept]]


def count_asides(size: np.ndarray, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """Examples of each client [n] for its own test, and for validation; [n] int each.

    A client with two examples has a test set wherever clients have one; one example at
    least of each is left.
    """
    share_out = lambda share: np.floor(share * size + 0.5).astype(np.int64)
    least = 1 if shares.test else 0
    tests = np.minimum(np.maximum(share_out(shares.test), least), size - 1)
    return tests, np.minimum(share_out(shares.validation), size - 1 - tests)


def pick_evenly(
    owner: np.ndarray, stratum: np.ndarray, count: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Picks so many examples of each client, as evenly over its strata as can be.

    A client's examples are sorted by stratum, in random order within, and steps of
    equal length are taken along them from a random start.

    Args:
      owner: [X] int in [0, n).
      stratum: [X] int.
      count: [n] int, at most as many as each client has.
      rng: NumPy generator, advanced.

    Returns:
      [X] bool, `count[c]` of client c; of a stratum with m of its n examples the whole
      number below or above `count[c] * m / n`.
    """
    order = np.lexsort((rng.random(len(owner)), stratum, owner))
    size = np.bincount(owner, minlength=len(count))
    start, owned = rng.integers(np.maximum(size, 1)), owner[order]
    place = np.arange(len(owner)) - (np.cumsum(size) - size)[owned]
    reached = lambda place: (place * count[owned] + start[owned]) // size[owned]
    picked = np.zeros(len(owner), bool)
    picked[order] = reached(place + 1) > reached(place)
    return picked
