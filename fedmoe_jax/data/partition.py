"""The owner of each training example, drawn once on the host.

Every rule gives an owner to every example, so each example is used exactly once. With
`overlap` every client draws its examples among all instead, see `data.overlap`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import numpy as np

from fedmoe_jax.data.overlap import KINDS as OVERLAPPING
from fedmoe_jax.data.overlap import draw_examples, draw_mix, draw_sizes
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import write_arrays
from fedmoe_jax.types import Partition

MAX_DRAWS = 100
SHOWN = 5  # clients that a message names
DRAW_BYTES = 48  # six whole numbers of 64 bits
OF_CLASSES = ("classes", "shards")  # kinds that read `classes_per_client`


class Options(NamedTuple):
    """The numbers that the rules depend on; fields as in `split`.

    `num_clients` are all clients, of which `unseen` never take part.
    """

    num_clients: int
    num_strata: int
    alpha: float
    classes_per_client: int
    min_size: int
    owner: np.ndarray | None
    unseen: int
    overlap: int

    @property
    def clients(self) -> str:
        """The field, or the two fields, that give the number of clients."""
        seen = f"num_clients={self.num_clients - self.unseen}"
        return f"{seen} + partition.unseen={self.unseen}" if self.unseen else seen


# (strata [X], options, rng) -> owner [X] int in [0, N)
OwnerFn = Callable[[np.ndarray, Options, np.random.Generator], np.ndarray]


def split(
    kind: str,
    stratum: np.ndarray,
    *,
    num_clients: int,
    num_strata: int,
    alpha: float,
    classes_per_client: int,
    min_size: int,
    seed: int,
    owner: np.ndarray | None = None,
    unseen: int = 0,
    overlap: int = 0,
    limit_gb: float = math.inf,
    taken_gb: float = 0.0,
) -> Partition:
    """Divides the training examples among the clients.

    Args:
      kind: `dirichlet` (label skew; Hsu et al., arXiv:1909.06335, with proportions
        drawn per class), `shards` (McMahan et al., arXiv:1602.05629, section 3),
        `classes` (exactly so many classes for every client), `quantity` (size skew, IID
        labels), `iid`, or `natural` (as the data say).
      stratum: [X] int labels in [0, L), or whatever else the clients are skewed in.
      num_clients: N >= 1, with those that never take part.
      num_strata: L.
      alpha: > 0, concentration of `dirichlet` and `quantity`; small is skewed.
      classes_per_client: in [1, L], shards of each client, of `shards`. A shard
        that straddles two labels adds one more. Of `classes` the classes of each
        client, none of them twice.
      min_size: >= 1, examples that every client gets at least. A random rule is
        drawn anew up to 100 times for it; then each short client takes examples,
        drawn at random, from the client that is largest then. `classes` and `natural`
        let no client take what is not its own.
      seed: >= 0; the same arguments always give the same partition.
      owner: [X] int in [0, N), of `natural`, which leaves every client what it has.
      unseen: how many never take part, for messages.
      overlap: 0, or how many examples each client draws among all, on average, with
        replacement; fewer are left where it drew one twice. Of `dirichlet`, `classes`,
        `quantity` and `iid`.
      limit_gb: gigabytes that the partition may take, with those before it.
      taken_gb: gigabytes of the partitions of other runs that are in memory.

    Returns:
      The partition. M is the largest size rounded up to a power of two, so that
      most seeds share one compiled program.

    Raises:
      UserError: an argument is outside its range, N * min_size > X, the data have no
        natural clients, or not these, the classes cannot be dealt to these clients, the
        rule has no overlap, or the partition would be beyond `limit_gb`.
    """
    options = Options(
        *(num_clients, num_strata, alpha, classes_per_client, min_size, owner, unseen),
        overlap=overlap,
    )
    stratum = np.asarray(stratum)
    _check(kind, stratum, options, seed)
    if kind == "natural":
        _check_natural(options)
    if kind == "classes":
        _check_classes(stratum, options)
    rng = np.random.default_rng(seed)
    if overlap:
        _check_draws(options, limit_gb, taken_gb)
        drawn, example = _own_overlap(kind, stratum, options, rng)
        _check_size(drawn, options, limit_gb, taken_gb)
        return _pack(drawn, example, stratum, options)
    for _ in range(MAX_DRAWS):
        drawn = KINDS[kind](stratum, options, rng)
        if np.bincount(drawn, minlength=num_clients).min() >= min_size:
            break
    else:
        if kind == "classes":
            _refuse_size(kind, drawn, options)
        drawn = _fill_up(drawn, options, rng)
    _check_size(drawn, options, limit_gb, taken_gb)
    return _pack(drawn, np.arange(len(drawn)), stratum, options)


def _check(kind: str, stratum: np.ndarray, options: Options, seed: int) -> None:
    chex.assert_rank(stratum, 1)
    num_strata, needed = options.num_strata, options.num_clients * options.min_size
    finite = math.isfinite(options.alpha)
    rules = (
        (kind in KINDS, "partition.kind", kind, ", ".join(KINDS)),
        (options.num_clients >= 1, "num_clients", options.num_clients, ">= 1"),
        (finite and options.alpha > 0, "partition.alpha", options.alpha, "> 0"),
        (
            kind not in OF_CLASSES or 1 <= options.classes_per_client <= num_strata,
            "partition.classes_per_client",
            options.classes_per_client,
            f"1 to {num_strata}, the number of classes",
        ),
        (options.min_size >= 1, "partition.min_size", options.min_size, ">= 1"),
        (
            bool(options.overlap) or needed <= len(stratum),
            "partition.min_size",
            options.min_size,
            f"{options.clients} times it at most {len(stratum)} examples",
        ),
        (
            not options.overlap or kind in OVERLAPPING,
            "partition.kind",
            kind,
            f"with partition.overlap: {', '.join(OVERLAPPING)}",
        ),
        (seed >= 0, "seed", seed, ">= 0"),
    )
    for is_valid, field, value, allowed in rules:
        if not is_valid:
            raise UserError(f"{field}={value!r} is not allowed; allowed: {allowed}")


def _check_natural(options: Options) -> None:
    """Raises UserError unless the data name these clients, all large enough."""
    if options.owner is None:
        others = ", ".join(kind for kind in KINDS if kind != "natural")
        raise UserError(
            "partition.kind='natural' is not allowed with data that do not name the "
            f"owner of each example; allowed: {others}"
        )
    size = np.bincount(options.owner)
    if len(size) != options.num_clients:
        raise UserError(
            f"{options.clients} is not allowed with partition.kind='natural'; "
            f"allowed: at most {len(size)}, the data's clients"
        )
    empty = np.flatnonzero(size == 0)
    if len(empty):
        raise UserError(
            "partition.kind='natural' is not allowed with clients that have no "
            f"training example beside data.public: {_list_few(empty)}; allowed: at "
            f"least partition.min_size={options.min_size} for each client"
        )
    if size.min() < options.min_size:
        _refuse_size("natural", options.owner, options)


def _list_few(numbers: np.ndarray) -> str:
    """The first of these numbers, and whether there are more."""
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = len(numbers) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _refuse_size(kind: str, owner: np.ndarray, options: Options) -> None:
    """Raises UserError, as the smallest client has less than `min_size`."""
    least = np.bincount(owner, minlength=options.num_clients).min()
    drawn = f", partition.overlap={options.overlap}" if options.overlap else ""
    raise UserError(
        f"partition.min_size={options.min_size} is not allowed with "
        f"partition.kind={kind!r}{drawn}; allowed: at most {least}, the examples of "
        "the smallest client"
    )


def _check_classes(stratum: np.ndarray, options: Options) -> None:
    """Raises UserError unless every class has a holder and each holder an example."""
    places = options.num_clients * options.classes_per_client
    if places < options.num_strata:
        least = math.ceil(options.num_strata / options.num_clients)
        raise UserError(
            f"partition.classes_per_client={options.classes_per_client} is not allowed "
            f"with {options.clients} and partition.kind='classes'; "
            f"allowed: at least {least}, as there are {options.num_strata} classes"
        )
    count = np.bincount(stratum, minlength=options.num_strata)
    holders = 1 if options.overlap else math.ceil(places / options.num_strata)
    if count.min() < holders:
        raise UserError(
            f"{options.clients} is not allowed with partition.kind='classes' and "
            f" partition.classes_per_client={options.classes_per_client}: "
            f"class {count.argmin()} has {count.min()} training examples; allowed: at "
            f"most {count.min() * options.num_strata} for both multiplied"
        )


def _own_dirichlet(
    stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """Each class is shared out in Dirichlet(alpha) proportions of its own."""
    owner = np.zeros(len(stratum), np.int64)
    for label in range(options.num_strata):
        members = np.flatnonzero(stratum == label)
        owner[members] = _own_quantity(members, options, rng)
    return owner


def _own_quantity(
    stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """Sizes in Dirichlet(alpha) proportions, examples at random."""
    shares = rng.dirichlet(np.full(options.num_clients, options.alpha))
    middles = (np.arange(len(stratum)) + 0.5) / max(len(stratum), 1)
    # The last edge is 1 but for rounding, so it is left out.
    return rng.permutation(np.searchsorted(np.cumsum(shares)[:-1], middles))


def _own_shards(
    stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """Examples sorted by label, cut into equal shards, which clients draw at random."""
    shuffled = rng.permutation(len(stratum))
    by_label = shuffled[np.argsort(stratum[shuffled], kind="stable")]
    clients = np.arange(options.num_clients)
    deal = rng.permutation(np.repeat(clients, options.classes_per_client))
    owner = np.zeros(len(stratum), np.int64)
    owner[by_label] = deal[np.arange(len(stratum)) * len(deal) // len(stratum)]
    return owner


def _own_classes(
    stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """The examples of each class in equal shares, at random, among its holders."""
    held = _deal_classes(options, rng)
    owner = np.zeros(len(stratum), np.int64)
    for label in range(options.num_strata):
        members = rng.permutation(np.flatnonzero(stratum == label))
        holders = rng.permutation(np.flatnonzero(held[:, label]))
        owner[members] = holders[np.arange(len(members)) % len(holders)]
    return owner


def _deal_classes(options: Options, rng: np.random.Generator) -> np.ndarray:
    """[N, L] bool: each client in turn takes the classes that have fewest holders.

    Of equals it takes any. So no two classes differ by more than one holder.
    """
    held = np.zeros((options.num_clients, options.num_strata), bool)
    holders = np.zeros(options.num_strata)
    for row, lots in zip(held, rng.random(held.shape), strict=True):
        fewest = np.argsort(holders + lots)[: options.classes_per_client]
        row[fewest] = True
        holders += row
    return held


def _own_iid(
    stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """Equal sizes, examples at random."""
    return rng.permutation(np.arange(len(stratum)) % options.num_clients)


def _own_overlap(
    kind: str, stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Owner and id of the examples that clients draw among all, client by client.

    Raises:
      UserError: a client is left with fewer than `min_size`.
    """
    share = np.bincount(stratum, minlength=options.num_strata) / len(stratum)
    held = np.ones((options.num_clients, options.num_strata), bool)
    if kind == "classes":
        held = _deal_classes(options, rng)
    mix = draw_mix(kind, held, share, options.alpha, rng)
    counts = options.num_clients, options.overlap, options.alpha
    size = draw_sizes(kind, *counts, rng)
    owner, example = draw_examples(stratum, size, mix, rng)
    if np.bincount(owner, minlength=options.num_clients).min() < options.min_size:
        _refuse_size(kind, owner, options)
    return owner, example


def _own_natural(
    stratum: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """The data's own clients."""
    assert options.owner is not None  # `_check_natural`
    return options.owner


KINDS: dict[str, OwnerFn] = {
    "dirichlet": _own_dirichlet,
    "shards": _own_shards,
    "classes": _own_classes,
    "quantity": _own_quantity,
    "iid": _own_iid,
    "natural": _own_natural,
}


def _fill_up(
    owner: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray:
    """Moves random examples of the largest clients to those below `min_size`."""
    size = np.bincount(owner, minlength=options.num_clients)
    shuffled = rng.permutation(len(owner))
    by_owner = shuffled[np.argsort(owner[shuffled], kind="stable")]
    donor = np.repeat(np.arange(options.num_clients), size)
    # The size that its owner has when an example is the next to go. Donors stay above
    # `min_size`, which is at most the mean, so those who take never give.
    level = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size) + 1
    missing = np.maximum(options.min_size - size, 0)
    given = np.lexsort((donor, -level))[: missing.sum()]
    owner = owner.copy()
    owner[by_owner[given]] = np.repeat(np.arange(options.num_clients), missing)
    return owner


def _find_width(size: np.ndarray) -> int:
    """M: the largest of the sizes [N], at least 1, rounded up to a power of two."""
    return 1 << (max(int(size.max()), 1) - 1).bit_length()


def _check_draws(options: Options, limit_gb: float, taken_gb: float) -> None:
    """Raises UserError where the draws of an overlap would be beyond the limit."""
    draws = options.num_clients * options.overlap
    needed = DRAW_BYTES * draws / 1e9
    if taken_gb + needed > limit_gb:
        raise UserError(
            f"run.memory_limit_gb={limit_gb:g} is too low: drawing partition.overlap="
            f"{options.overlap} examples for each of {options.clients} clients needs "
            f"{needed:.2f} GB; allowed: at least {math.ceil(taken_gb + needed)}, or "
            "fewer of both"
        )


def _check_size(
    owner: np.ndarray, options: Options, limit_gb: float, taken_gb: float
) -> None:
    """Raises UserError where the partition would be beyond the limit."""
    size = np.bincount(owner, minlength=options.num_clients)
    width = _find_width(size)
    rows = options.num_clients * (width + 1 + options.num_strata)
    needed = rows * np.dtype(np.int32).itemsize / 1e9
    if taken_gb + needed > limit_gb:
        beside = f" beside the {taken_gb:.2f} of other runs" if taken_gb else ""
        raise UserError(
            f"run.memory_limit_gb={limit_gb:g} is too low: the lists of examples of "
            f"{options.clients} clients, each with room for the "
            f"{size.max()} of the largest (rounded up to {width}), need {needed:.2f} "
            f"GB{beside}; allowed: at least {math.ceil(taken_gb + needed)}, or fewer "
            "clients, or clients that are less skewed in size, or fewer runs at once"
        )


def _pack(
    owner: np.ndarray, example: np.ndarray, stratum: np.ndarray, options: Options
) -> Partition:
    """Lists every client's examples in ascending order, padded with zeros."""
    index, size = list_examples(owner, example, options.num_clients)
    label_counts = np.zeros((options.num_clients, options.num_strata), np.int32)
    np.add.at(label_counts, (owner, stratum[example]), 1)
    return Partition(index, size, label_counts, np.zeros(0, np.int32))


def list_examples(
    owner: np.ndarray, example: np.ndarray, num_clients: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, M] int32 of each owner's examples in their order, and sizes [N] int32.

    Args:
      owner: [X] int in [0, N).
      example: [X] int, ids.
      num_clients: N.
    """
    size = np.bincount(owner, minlength=num_clients)
    index = np.zeros((num_clients, _find_width(size)), np.int32)
    order = np.argsort(owner, kind="stable")
    place = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
    index[owner[order], place] = example[order]
    return index, size.astype(np.int32)


def list_owners(partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    """Owner and id of each example that is owned, [X] each, client by client."""
    places = np.arange(partition.index.shape[1])[None] < partition.size[:, None]
    return np.nonzero(places)[0], partition.index[places]


def pool(partition: Partition) -> Partition:
    """One client that owns what all clients own."""
    owned = np.arange(partition.index.shape[1])[None] < partition.size[:, None]
    index = np.sort(partition.index[owned])[None]
    return partition._replace(
        index=index,
        size=np.array([index.size], np.int32),
        label_counts=partition.label_counts.sum(axis=0, keepdims=True),
    )


def renumber(partition: Partition, ids: np.ndarray) -> Partition:
    """The partition with example i called `ids[i]`; its `index` is written over."""
    index, size = partition.index, partition.size
    owned = np.arange(index.shape[1])[None] < size[:, None]
    index[owned] = ids[index[owned]]
    return partition


def save_partition(path: str | Path, partition: Partition) -> None:
    """Writes a partition as .npz; `path` is whole or as it was before."""
    write_arrays(Path(path), **partition._asdict())


def load_partition(path: str | Path) -> Partition:
    """Reads what `save_partition` wrote.

    Raises:
      UserError: the file is missing, damaged or not a partition.
    """
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            partition = Partition(*(arrays[field] for field in Partition._fields))
        _check_whole(partition)
    # A damaged zip file raises a dozen unrelated kinds of exception.
    except Exception as error:
        raise UserError(
            f"partition file {str(path)!r} cannot be used ({type(error).__name__}); "
            "allowed: an undamaged file written by save_partition"
        ) from error
    return partition


def _check_whole(partition: Partition) -> None:
    """Raises unless no client has an example twice, and all are counted."""
    index, size = partition.index, partition.size
    owned = np.arange(index.shape[1]) < size[:, None]
    client = np.nonzero(owned)[0]
    pairs = np.unique(np.stack([client, index[owned]]), axis=1)
    assert pairs.shape[1] == size.sum()
    np.testing.assert_array_equal(partition.label_counts.sum(1), size)
