"""The examples of each client, and its local steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_data, tiny_config

from fedmoe_jax.api import run
from fedmoe_jax.data.groups import copy_groups
from fedmoe_jax.data.images import label_images
from fedmoe_jax.data.load import DATASETS, load_dataset
from fedmoe_jax.evaluation.own_tests import take_rows
from fedmoe_jax.federation import (
    assign_owners,
    count_steps,
    count_trained,
    make_federation,
    make_partition,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Partition


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        (0.0, [5, 5, 5, 5, 5]),
        (1.0, [1, 1, 1, 2, 3]),
        (2.0, [1, 2, 2, 3, 5]),
        (0.1, [1, 1, 1, 1, 1]),
        (2.5, [1, 2, 3, 3, 6]),
    ],
)
def test_count_steps_by_hand(epochs, steps):
    config = tiny_config(local_epochs=epochs, local_steps=5, batch_size=32)
    size = np.array([1, 20, 32, 33, 65])
    found = count_steps(config, size)
    assert found.tolist() == steps and found.dtype == np.int32


def test_count_steps_of_thirds_of_an_epoch_does_not_round_up():
    config = tiny_config(local_epochs=1 / 3, batch_size=10)
    assert count_steps(config, np.array([30, 90, 91])).tolist() == [1, 3, 4]


def test_count_trained_by_hand():
    size, clients = np.array([2, 3, 10, 65], np.int32), {"fitness.feedback": "probe"}
    found = lambda **changes: count_trained(tiny_config(**changes), size).tolist()
    assert found(**clients) == [2, 3, 10, 65]
    assert found(**clients, **{"fitness.probe_share": 0.1}) == [1, 2, 9, 58]  # 6.5
    assert found(**clients, **{"fitness.probe_share": 0.5}) == [1, 1, 5, 32]
    assert found(**{"fitness.probe_share": 0.5}) == [2, 3, 10, 65]  # not read
    chooses = {"strategy": "ifca", "fitness.probe_share": 0.5}
    assert found(**chooses) == [1, 1, 5, 32]


def test_count_trained_refuses_a_client_of_one_example():
    config = tiny_config(
        **{"fitness.feedback": "relative_probe", "fitness.probe_share": 0.1}
    )
    with pytest.raises(UserError, match="probe_share=0.1 .*1 example; allowed: 0"):
        count_trained(config, np.array([5, 1]))
    config.fitness.probe_share = 0.0
    assert count_trained(config, np.array([5, 1])).tolist() == [5, 1]


# Examples of three classes that each of two clients owns, and each client's histogram:
# its own examples are the whole, not those of a class.
COUNTS = [[1, 3, 0], [2, 2, 4]]
LABEL_MIX = [[1 / 4, 3 / 4, 0], [1 / 4, 1 / 4, 1 / 2]]


@pytest.mark.parametrize("strategy", ["load_balanced", "centralised"])
def test_make_federation_gives_every_client_its_histogram(strategy):
    """Pooled data have one owner, but the histograms stay those of the clients."""
    partition = Partition(
        index=np.arange(16, dtype=np.int32).reshape(2, 8),
        size=np.array([4, 8], np.int32),
        label_counts=np.array(COUNTS, np.int32),
        public=np.zeros(0, np.int32),
    )
    config = tiny_config(strategy=strategy, num_clients=2, cohort_size=2)
    federation = make_federation(config, make_data(3), partition)
    assert federation.label_mix.dtype == np.float32
    np.testing.assert_allclose(federation.label_mix, LABEL_MIX, rtol=1e-6)
    sizes = {"load_balanced": [4, 8], "centralised": [12]}[strategy]
    assert federation.size.tolist() == sizes


@pytest.mark.parametrize("source", ["tiers", "csv"])
def test_devices_by_labels_are_weaker_the_lower_a_clients_labels(source, tmp_path):
    changes = {"devices.order": "labels", "partition.unseen": 2, "num_clients": 6}
    changes |= {"cohort_size": 6, "partition.alpha": 0.3}
    if source == "csv":
        path = tmp_path / "devices.csv"
        rows = [f"{memory}e9,1e11,5e6,15e6,0,0,0" for memory in (4, 9, 2, 8, 1, 7)]
        head = "memory,flops,upload,download,latency,power,radio"
        path.write_text("\n".join([head, *rows]))
        changes["devices.csv"] = str(path)
    config = tiny_config(**changes)
    data = load_dataset(config.data)
    partition = make_partition(config, data)
    federation = make_federation(config, data, partition)
    labels = federation.label_mix @ np.arange(federation.label_mix.shape[1])
    weakest = np.argsort(np.asarray(federation.devices.memory))
    assert len(labels) == 6 and np.ptp(labels) > 0.5
    assert (np.diff(labels[weakest]) >= 0).all()
    plain = tiny_config(**changes | {"devices.order": "random"})
    same = make_federation(plain, data, partition).devices.memory
    assert sorted(same.tolist()) == sorted(federation.devices.memory.tolist())
    assert same.tolist() != federation.devices.memory.tolist()
    pooled = tiny_config(**changes, strategy="centralised")
    assert len(make_federation(pooled, data, partition).devices.memory) == 1


def make_natural(owner, test_owner, **changes):
    """Data of natural clients, and a config that takes them as they are."""
    y = np.arange(len(owner), dtype=np.int32) % 3
    test_y = np.arange(len(test_owner), dtype=np.int32) % 3
    images = lambda y: np.full((len(y), 8, 8, 1), y[:, None, None, None], np.uint8)
    data = label_images(images(y), y, images(test_y), test_y, ("a", "b", "c"))
    config = tiny_config(**{"partition.kind": "natural", "partition.min_size": 1})
    config.update_from_flattened_dict(changes)
    return config, data._replace(owner=owner, test_owner=test_owner)


def test_assign_owners_shares_natural_clients_out_evenly():
    owner, test_owner = np.arange(60) % 15, np.arange(30) % 15
    config, data = make_natural(owner, test_owner, num_clients=4, cohort_size=4)
    client, test_client = assign_owners(config, data)
    groups = [set(owner[client == c]) for c in range(4)]
    assert sorted(map(len, groups)) == [3, 4, 4, 4]
    assert set.union(*groups) == set(range(15))
    np.testing.assert_array_equal(test_client, client[:30])
    config.seed = 1
    assert (assign_owners(config, data)[0] != client).any()
    config.num_clients = 15
    np.testing.assert_array_equal(assign_owners(config, data)[0], owner)
    config.partition.kind = "iid"
    assert assign_owners(config, data) == (None, None)


@pytest.mark.slow
def test_make_federation_gives_every_client_its_own_test_examples():
    owner, test_owner = np.arange(60) % 5, np.array([0, 0, 1, 2, 4, 4, 4])
    config, data = make_natural(owner, test_owner, num_clients=5, cohort_size=5)
    partition = make_partition(config, data)
    federation = make_federation(config, data, partition)
    assert federation.own_test.size.tolist() == [2, 1, 1, 0, 3]
    for client, row in enumerate(federation.own_test.index):
        ids = row[: federation.own_test.size[client]]
        np.testing.assert_array_equal(ids - 60, np.flatnonzero(test_owner == client))
        rows = take_rows(jax.tree.map(jnp.asarray, federation), jnp.asarray(ids))
        np.testing.assert_array_equal(rows["y"], data.test["y"][ids - 60])
    rows = take_rows(jax.tree.map(jnp.asarray, federation), jnp.arange(67))
    for name, leaf in rows.items():
        both = np.concatenate([data.train[name], data.test[name]])
        np.testing.assert_array_equal(leaf, both)
    assert federation.train is data.train
    owned = federation.index[np.arange(16) < federation.size[:, None]]
    everything = np.concatenate([owned, federation.public])
    assert sorted(everything) == list(range(60))  # nobody trains on them


def test_make_federation_leaves_out_the_test_examples_of_unseen_clients():
    owner, test_owner = np.arange(60) % 6, np.arange(18) % 6
    sizes = {"num_clients": 4, "cohort_size": 4, "partition.unseen": 2}
    config, data = make_natural(owner, test_owner, **sizes)
    partition = make_partition(config, data)
    assert np.bincount(partition.own_test_client).tolist() == [3] * 4
    of_natural = lambda ids: {int(i) % 6 for i in ids}
    for client in range(4):
        trains = of_natural(partition.index[client, : partition.size[client]])
        tests = partition.own_test[partition.own_test_client == client] - 60
        assert trains == of_natural(tests) and len(trains) == 1
    assert of_natural(partition.unseen).isdisjoint(of_natural(partition.own_test - 60))


def test_own_test_examples_are_not_set_aside_twice():
    config, data = make_natural(np.arange(60) % 5, np.arange(5), num_clients=5)
    config.partition.test_share = 0.1
    with pytest.raises(UserError, match="partition.test_share=0.1 .* allowed: 0"):
        make_partition(config, data)


@pytest.mark.slow
def test_natural_clients_with_test_examples_are_scored_on_them():
    sizes = {"num_clients": 5, "cohort_size": 5, "num_rounds": 2, "eval_every": 2}
    config, data = make_natural(np.arange(60) % 5, np.arange(4), **sizes)
    config.data.name = "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "mine", lambda options: data)
        rows = run(config).rows
    assert rows["own_test_clients"][-1] == 4
    assert 0 <= rows["own_test_accuracy"][-1] <= 1


GROUPED = {
    "num_clients": 9,
    "cohort_size": 9,
    "groups.kind": "permuted",
    "groups.count": 3,
    "groups.skew": 1.0,
    "data.public": 30,
    "partition.min_size": 5,
}
ASIDE = {
    "partition.test_share": 0.2,
    "partition.validation_share": 0.2,
    "partition.unseen": 3,
}


@pytest.fixture(scope="module")
def images():
    return DATASETS["synthetic"](None)


def list_rows(partition):
    return [row[:n] for row, n in zip(partition.index, partition.size, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"partition.kind": "dirichlet"} | ASIDE,
        {"partition.kind": "classes"} | ASIDE,
        {"partition.kind": "iid"},
        {"partition.kind": "classes", "partition.overlap": 400},
    ],
)
def test_clients_own_examples_of_their_group_alone(changes, images):
    """All is as without groups, but for the copy that each client's ids are in."""
    config = tiny_config(**GROUPED | changes)
    total, classes = len(images.stratum), len(images.stratum_names)
    data = copy_groups(images, "permuted", 3)
    plain, found = make_partition(config, images), make_partition(config, data)
    group = np.array([row[0] // total for row in list_rows(found)])
    assert np.bincount(group).tolist() == [5, 2, 2]
    for mine, row, base in zip(group, list_rows(found), list_rows(plain), strict=True):
        np.testing.assert_array_equal(row, mine * total + base)
    beyond = np.arange(found.index.shape[1]) >= found.size[:, None]
    assert not found.index[beyond].any()
    np.testing.assert_array_equal(found.public, plain.public)
    assert found.public.max() < total and len(found.public) == 30
    # Own tests and validation are of the same clients.
    own = found.own_test_client
    np.testing.assert_array_equal(own, plain.own_test_client)
    np.testing.assert_array_equal(found.own_test, group[own] * total + plain.own_test)
    np.testing.assert_array_equal(found.validation % total, plain.validation)
    nothing = dict.fromkeys(("partition.test_share", "partition.validation_share"), 0.0)
    whole = make_partition(tiny_config(**GROUPED | changes | nothing), data)
    owned = np.concatenate(list_rows(whole))
    assert np.isin(found.validation, owned).all()
    assert len(found.validation) > 100 or not config.partition.validation_share
    # Unseen clients are in groups of their own, one each of three.
    np.testing.assert_array_equal(found.unseen % total, plain.unseen)
    np.testing.assert_array_equal(found.unseen_client, plain.unseen_client)
    pairs = set(zip(found.unseen_client, found.unseen // total, strict=True))
    assert len(pairs) == len({client for client, _ in pairs})
    assert found.label_counts.shape == (9, 3 * classes)
    for counts, mine, row in zip(
        found.label_counts, group, list_rows(found), strict=True
    ):
        by_label = np.bincount(data.train["y"][row], minlength=classes)
        np.testing.assert_array_equal(counts.reshape(3, classes)[mine], by_label)
        assert counts.sum() == len(row)
    for one, other in zip(found, make_partition(config, data), strict=True):
        np.testing.assert_array_equal(one, other)


def test_groups_depend_on_the_seed_and_data_do_not(images):
    data = copy_groups(images, "rotation", 2)
    config = tiny_config(**{"num_clients": 12, "cohort_size": 6, "data.public": 0})
    total, found = len(images.stratum), []
    for config.seed in range(6):
        rows = list_rows(make_partition(config, data))
        found.append(tuple(int(row[0]) // total for row in rows))
    assert len(set(found)) > 3 and {sum(groups) for groups in found} == {6}


def test_own_test_examples_of_natural_clients_are_of_their_group():
    owner, test_owner = np.arange(60) % 6, np.arange(18) % 6
    config, data = make_natural(owner, test_owner, num_clients=6, cohort_size=6)
    copied = copy_groups(data, "rotation", 3)
    plain, found = make_partition(config, data), make_partition(config, copied)
    group = found.index[:, 0] // 60
    assert np.bincount(group).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(found.own_test_client, plain.own_test_client)
    place = plain.own_test - 60 + 18 * group[plain.own_test_client]
    np.testing.assert_array_equal(found.own_test, 180 + place)
    federation = make_federation(config, copied, found)
    rows = take_rows(jax.tree.map(jnp.asarray, federation), jnp.asarray(found.own_test))
    np.testing.assert_array_equal(rows["x"], copied.test["x"][place])
