"""Groups of clients whose data differ by a known transformation.

The data have a copy of all their examples for each of Q groups, transformed as that
group sees them, and a client owns examples of its own group's copy alone. Example i is
row `g * X + i` of group g, and its stratum is `g * (L / Q)` and its class. Copy 0 is as
the data were loaded. The settings are those that clustered federated learning is tried
on: rotated images (Ghosh et al., arXiv:2006.04088, section 6) and permuted labels
(Sattler et al., arXiv:1910.01991).
"""

import math

import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.data.partition import list_owners
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Partition

NONE, INVERSION = "none", "inversion"
ROTATING = ("rotation", "rotation_permuted")
PERMUTING = ("permuted", "rotation_permuted")
KINDS = (NONE, "rotation", INVERSION, "permuted", "rotation_permuted")
MOST = {"rotation": 4, INVERSION: 2, "rotation_permuted": 4}  # groups that differ


def check_groups(kind: str, count: int, data: Data, name: str, limit_gb: float) -> None:
    """Raises UserError unless the data can be copied for groups.

    Args:
      kind: in `KINDS`, but `none`.
      count: Q >= 2.
      data: as they were loaded.
      name: of the data set.
      limit_gb: gigabytes that the data and their copies may take.
    """
    where = f"groups.kind={kind!r} is not allowed with data.name={name!r}"
    if data.task != "images":
        raise UserError(
            f"{where}, which are no labelled images (their languages, topics or "
            "speakers are groups already); allowed: none"
        )
    parts = (data.train, data.stratum), (data.test, data.test_stratum)
    if not all(np.array_equal(rows["y"], stratum) for rows, stratum in parts):
        raise UserError(f"{where}, whose strata are not the labels; allowed: none")
    height, width = data.train["x"].shape[1:3]
    if kind in ROTATING and height != width:
        others = ", ".join(other for other in KINDS if other not in ROTATING)
        raise UserError(f"{where} of {height} x {width} pixels; allowed: {others}")
    classes = len(data.stratum_names)
    if kind in PERMUTING and count > classes:
        raise UserError(
            f"groups.count={count} is not allowed with groups.kind={kind!r} and "
            f"{classes} classes; allowed: 2 to {classes}"
        )
    leaves = (*data.train.values(), *data.test.values())
    needed = (count + 1) * sum(leaf.nbytes for leaf in leaves) / 1e9
    if needed > limit_gb:
        raise UserError(
            f"run.memory_limit_gb={limit_gb:g} is too low: the data and a copy of them "
            f"for each of groups.count={count} need {needed:.2f} GB; allowed: at least "
            f"{math.ceil(needed)}, or fewer groups"
        )


def copy_groups(data: Data, kind: str, count: int) -> Data:
    """The data with a copy of each example for each group, as `check_groups` allows.

    Args:
      data: images with labels, X examples of L classes.
      kind: `rotation` turns the images of group g by 90 g degrees, anticlockwise,
        `inversion` inverts the pixels of group 1, `permuted` permutes the labels, see
        `permute_labels`, `rotation_permuted` does both.
      count: Q.

    Returns:
      Q X examples of Q L strata; labels `y` stay in [0, L).
    """
    classes, x = len(data.stratum_names), data.train["x"]
    labels = np.tile(np.arange(classes, dtype=np.int32), (count, 1))
    if kind in PERMUTING:
        labels = permute_labels(count, classes)
    span = x.dtype.type(255 if x.dtype == np.uint8 else x.max() + x.min())

    def copy_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        copies = {name: np.concatenate([leaf] * count) for name, leaf in rows.items()}
        images = [transform(rows["x"], kind, group, span) for group in range(count)]
        return copies | {
            "x": np.concatenate(images),
            "y": labels[:, rows["y"]].ravel(),
        }

    train, test = copy_rows(data.train), copy_rows(data.test)
    tile = lambda owner: None if owner is None else np.tile(owner, count)
    number = lambda y: (
        y + np.repeat(classes * np.arange(count, dtype=np.int32), len(y) // count)
    )
    groups = name_groups(kind, count)
    return data._replace(
        train=train,
        test=test,
        stratum=number(train["y"]),
        test_stratum=number(test["y"]),
        stratum_names=tuple(
            f"{g}: {name}" for g in groups for name in data.stratum_names
        ),
        owner=tile(data.owner),
        test_owner=tile(data.test_owner),
        group_names=groups,
    )


def transform(x: np.ndarray, kind: str, group: int, span: np.generic) -> np.ndarray:
    """Images [X, H, W, F] as a group sees them; `span` less a pixel is inverted."""
    if kind in ROTATING:
        return np.rot90(x, group, axes=(1, 2))
    return span - x if kind == INVERSION and group else x


def permute_labels(count: int, classes: int) -> np.ndarray:
    """The label [Q, L] int32 that each class has in each group, always the same.

    All are powers of one cycle through all classes, so that any two groups disagree on
    every class; in group 0 classes are what they were.

    Args:
      count: Q <= L.
      classes: L.
    """
    cycle = np.random.default_rng(0).permutation(classes)
    place = np.argsort(cycle)[None] + np.arange(count)[:, None]
    return cycle[place % classes].astype(np.int32)


def name_groups(kind: str, count: int) -> tuple[str, ...]:
    """What is done to the data of each group, in words."""
    if kind == INVERSION:
        return "not inverted", "inverted"
    turns = [f"rotated {90 * group}" for group in range(count)]
    permutes = [f"labels {group}" for group in range(count)]
    if kind == "rotation_permuted":
        return tuple(map(", ".join, zip(turns, permutes, strict=True)))
    return tuple(turns if kind in ROTATING else permutes)


def take_base(data: Data) -> Data:
    """The data as they were before they were copied, but for the strata's names."""
    count = len(data.group_names)
    if not count:
        return data
    first = lambda leaf: None if leaf is None else leaf[: len(leaf) // count]
    return data._replace(
        train={name: first(leaf) for name, leaf in data.train.items()},
        test={name: first(leaf) for name, leaf in data.test.items()},
        stratum=first(data.stratum),
        test_stratum=first(data.test_stratum),
        stratum_names=first(data.stratum_names),
        owner=first(data.owner),
        test_owner=first(data.test_owner),
        group_names=(),
    )


def size_groups(num_clients: int, count: int, skew: float, least: int) -> np.ndarray:
    """Clients [Q] int of each group, in proportion to (g + 1) ** -skew, rounded.

    Args:
      num_clients: n >= least * Q.
      count: Q.
      skew: >= 0; 0 for equal sizes.
      least: clients that every group has.
    """
    share = np.arange(1.0, count + 1) ** -skew
    wanted = num_clients * share / share.sum()
    size = np.maximum(np.floor(wanted), least).astype(int)
    while size.sum() < num_clients:
        size[np.argmax(wanted - size)] += 1
    while size.sum() > num_clients:
        size[np.argmax(np.where(size > least, size - wanted, -np.inf))] -= 1
    return size


def draw_groups(count: int, skew: float, hidden: np.ndarray, seed: int) -> np.ndarray:
    """The group of each client, [n] int in [0, Q), at random.

    Args:
      count: Q.
      skew: see `size_groups`.
      hidden: [n] bool, clients that never take part; they are divided among the groups
        by themselves, and every group has one at least of the others.
      seed: >= 0.
    """
    rng, group = np.random.default_rng([seed, 7]), np.zeros(len(hidden), int)
    for clients, least in ((~hidden, 1), (hidden, 0)):
        size = size_groups(clients.sum(), count, skew, least)
        group[clients] = rng.permutation(np.repeat(np.arange(count), size))
    return group


def move_clients(partition: Partition, group: np.ndarray, total: int) -> Partition:
    """The partition with each client's examples those of its group's copy.

    Args:
      partition: of n clients, without anything set aside; its counts stay.
      group: [n] int.
      total: X, examples of a copy.
    """
    index = partition.index + (total * group[:, None]).astype(np.int32)
    owned = np.arange(index.shape[1])[None] < partition.size[:, None]
    return partition._replace(index=np.where(owned, index, 0))


def count_strata(partition: Partition, data: Data) -> Partition:
    """The partition with counts of the copied data's strata, [N, L]."""
    owner, example = list_owners(partition)
    counts = np.zeros((len(partition.size), len(data.stratum_names)), np.int32)
    np.add.at(counts, (owner, data.stratum[example]), 1)
    return partition._replace(label_counts=counts)


def move_tests(partition: Partition, group: np.ndarray, data: Data) -> Partition:
    """The partition with own test sets that are test examples in the groups' copies.

    Args:
      partition: their numbers are those of copy 0, after all training examples.
      group: [N] int.
      data: with all copies.
    """
    tested = len(data.test_stratum) // len(data.group_names)
    moved = partition.own_test + tested * group[partition.own_test_client]
    own = np.where(partition.own_test < len(data.stratum), partition.own_test, moved)
    return partition._replace(own_test=own.astype(np.int32))
