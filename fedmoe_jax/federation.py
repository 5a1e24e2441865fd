"""From a config and its data to the federation: every client's examples and device."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.asides import Shares, hide_clients, set_aside
from fedmoe_jax.data.groups import (
    count_strata,
    draw_groups,
    move_clients,
    move_tests,
    take_base,
)
from fedmoe_jax.data.partition import list_examples, pool, renumber, split
from fedmoe_jax.options import UserError
from fedmoe_jax.probe import count_held_out
from fedmoe_jax.strategies import does_probe, find_strategy
from fedmoe_jax.tasks import find_task
from fedmoe_jax.types import Devices, Federation, Lists, Partition, Pool
from fedmoe_jax.world.devices import (
    draw_devices,
    follow_labels,
    read_devices,
    unlimited_device,
)
from fedmoe_jax.world.drift import draw_drift_sources

POOL_BLOCK = 256  # pools are padded to multiples, so that seeds share a program


def count_trained(config: ConfigDict, size: np.ndarray) -> np.ndarray:
    """Examples [N] that clients train on, of those that they own, int [N].

    Raises:
      UserError: a client has too few to hold some out.
    """
    share = config.fitness.probe_share
    if not does_probe(config) or not share:
        return size
    if size.min() < 2:
        raise UserError(
            f"fitness.probe_share={share} is not allowed with a client that owns "
            f"{size.min()} example; allowed: 0, or clients with 2 or more, as "
            "partition.min_size=2 gives them"
        )
    return size - count_held_out(size, np.float32(share))


def count_steps(config: ConfigDict, size: np.ndarray) -> np.ndarray:
    """Local steps of every client in a round, [N] int32 >= 1, from what it trains on.

    Passes over its own data where `local_epochs` is set, the last batch filled up
    from the start of the pass; else `local_steps` for each. The owner of pooled data
    takes the steps of a whole cohort.
    """
    if not config.local_epochs:
        each = config.cohort_size if find_strategy(config.strategy).pooled else 1
        return np.full(size.shape, each * config.local_steps, np.int32)
    if find_strategy(config.strategy).pooled:
        size = size * (config.cohort_size / config.num_clients)
    batches = np.ceil(config.local_epochs * size / config.batch_size - 1e-6)
    return np.maximum(batches, 1).astype(np.int32)


def make_partition(config: ConfigDict, data: Data, taken_gb: float = 0.0) -> Partition:
    """Divides the training examples among the clients and the server's public slice.

    There are `partition.unseen` clients beyond `num_clients`, which never take part.
    Where the data have copies for groups, they are divided as without any, and then
    each client owns its examples in its group's copy; the public slice is of copy 0.

    Args:
      config: of the run.
      data: its data set, with the copies.
      taken_gb: gigabytes of the partitions of other runs that are in memory.

    Raises:
      UserError: the data cannot be divided so, or the lists of the clients' examples
        are beyond `run.memory_limit_gb`, with those of other runs.
    """
    options, copies = config.partition, data
    data = take_base(copies)
    total, public = len(data.stratum), config.data.public
    clients, named = config.num_clients, f"num_clients={config.num_clients}"
    if options.unseen:
        clients += options.unseen
        named += f" + partition.unseen={options.unseen}"
    most = total - (1 if options.overlap else clients * options.min_size)
    if public > max(most, 0):
        raise UserError(
            f"data.public={public} is not allowed; allowed: 0 to {max(most, 0)}, which "
            + (
                f"leaves one of the {total} training examples to the clients"
                if options.overlap
                else f"leaves {named} clients partition.min_size={options.min_size} of "
                f"the {total} training examples each"
            )
        )
    rng = np.random.default_rng([config.seed, 2])
    order = rng.permutation(total).astype(np.int32)
    aside, rest = np.sort(order[:public]), np.sort(order[public:])
    owner, test_owner = assign_owners(config, data)
    partition = split(
        options.kind,
        data.stratum[rest],
        num_clients=clients,
        num_strata=len(data.stratum_names),
        alpha=options.alpha,
        classes_per_client=options.classes_per_client,
        min_size=options.min_size,
        seed=config.seed,
        owner=None if owner is None else owner[rest],
        unseen=options.unseen,
        overlap=options.overlap,
        limit_gb=config.run.memory_limit_gb,
        taken_gb=taken_gb,
    )
    partition = renumber(partition, rest)._replace(public=aside)
    shares = Shares(options.unseen, options.test_share, options.validation_share)
    if copies.group_names:
        return divide_groups(config, copies, partition, shares, test_owner)
    return set_aside(partition, data.stratum, shares, config.seed, test_owner)


def divide_groups(
    config: ConfigDict,
    data: Data,
    partition: Partition,
    shares: Shares,
    test_owner: np.ndarray | None,
) -> Partition:
    """The partition with every client in a group, and what is set aside, as without.

    Args:
      config: of the run.
      data: with the copies.
      partition: of their first copy, among all clients.
      shares: see `set_aside`.
      test_owner: see `set_aside`, of the first copy.
    """
    count, base = len(data.group_names), take_base(data)
    hidden, _ = hide_clients(len(partition.size), shares.unseen, config.seed)
    group = draw_groups(count, config.groups.skew, hidden, config.seed)
    partition = move_clients(partition, group, len(base.stratum))
    # By the labels of the first copy, so that the draws are those without groups.
    stratum = np.tile(base.stratum, count)
    partition = set_aside(partition, stratum, shares, config.seed, test_owner)
    return move_tests(count_strata(partition, data), group[~hidden], data)


def assign_owners(
    config: ConfigDict, data: Data
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The client of each training and test example that has a natural one.

    Where the data have more clients than the run, each client of the run has as many of
    them as others, or one more, at random.

    Returns:
      [X] and [X'] int, None each where there is none.
    """
    options = config.partition
    if options.kind != "natural" or data.owner is None:
        return None, None
    found, clients = int(data.owner.max()) + 1, config.num_clients + options.unseen
    client = np.arange(found)
    if found > clients:
        client = np.random.default_rng([config.seed, 6]).permutation(found) % clients
    test_owner = data.test_owner
    return client[data.owner], None if test_owner is None else client[test_owner]


def list_own_tests(config: ConfigDict, partition: Partition) -> Lists | None:
    """Every client's own test set; None where there is none."""
    if not config.partition.test_share and not len(partition.own_test):
        return None
    owned = partition.own_test_client, partition.own_test
    on_host: Any = list_examples(*owned, config.num_clients)
    return Lists(*on_host)


def pool_examples(example: np.ndarray, group: np.ndarray) -> Pool:
    """The examples [Q] and their groups [Q], padded to a multiple of 256."""
    padding = 0, -len(example) % POOL_BLOCK
    on_host: Any = [np.pad(each, padding) for each in (example, group + 1)]
    return Pool(*on_host)


def pool_asides(
    config: ConfigDict, data: Data, partition: Partition
) -> dict[str, Pool | None]:
    """`validation` by stratum and `unseen` by client; None where none is set aside."""
    pools: dict[str, Pool | None] = {"validation": None, "unseen": None}
    if config.partition.validation_share:
        stratum = data.stratum[partition.validation]
        pools["validation"] = pool_examples(partition.validation, stratum)
    if config.partition.unseen:
        pools["unseen"] = pool_examples(partition.unseen, partition.unseen_client)
    return pools


def make_devices(config: ConfigDict) -> tuple[Devices, tuple[str, ...]]:
    """Every client's device, from presets or the user's file; names of the tiers.

    Raises:
      UserError: device tiers or shares that are not allowed, or a file that is not.
    """
    options = config.devices
    rng = np.random.default_rng([config.seed, 1])  # not the stream of the partition
    if options.csv:
        return read_devices(options.csv, config.num_clients, rng, options.free_memory)
    tiers = tuple(options.tiers)
    devices = draw_devices(
        rng,
        config.num_clients,
        tiers,
        tuple(options.shares),
        options.spread,
        options.free_memory,
    )
    return devices, tiers


def make_federation(config: ConfigDict, data: Data, partition: Partition) -> Federation:
    """Everything a round reads, still on the host; `replicate` puts it on devices.

    What is frozen comes with the state, see `state.init_state`.

    Where a strategy pools the data, one client owns all of it, on a device without
    limits; `label_mix` is still that of the clients.

    Raises:
      UserError: device tiers or shares that are not allowed.
    """
    counts = partition.label_counts.astype(np.float32)
    devices, _ = make_devices(config)
    if config.devices.order == "labels":
        devices = follow_labels(devices, partition.label_counts)
    drift_source = draw_drift_sources(
        np.random.default_rng([config.seed, 3]), config.num_clients, config.drift.share
    )
    rng = np.random.default_rng([config.seed, 4])
    sample_order = rng.permutation(config.num_clients).astype(np.int32)
    own_test = list_own_tests(config, partition)
    if find_strategy(config.strategy).pooled:
        partition, devices = pool(partition), unlimited_device()
        drift_source = np.zeros(1, np.int32)
    on_host: dict[str, Any] = dict(
        train=data.train,
        index=partition.index,
        size=partition.size,
        steps=count_steps(config, count_trained(config, partition.size)),
        label_mix=counts / counts.sum(axis=1, keepdims=True),
        public=partition.public,
        test=data.test,
        test_stratum=data.test_stratum,
        statistics=find_task(data.task).statistics(data),
        devices=devices,
        frozen={},
        sample_order=sample_order,
        drift_source=drift_source,
        own_test=own_test,
        **pool_asides(config, data, partition),
    )
    return Federation(**on_host)
