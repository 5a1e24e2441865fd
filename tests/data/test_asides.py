"""Examples set aside: counts by hand, strata as evenly as can be, nothing twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from fedmoe_jax.data import partition
from fedmoe_jax.data.asides import Shares, count_asides, pick_evenly, set_aside
from fedmoe_jax.data.images import label_images
from fedmoe_jax.federation import make_partition
from fedmoe_jax.options import UserError

LABELS = np.random.default_rng(7).permutation(np.repeat(np.arange(4), 50))


def split(num_clients, kind="dirichlet", min_size=1):
    return partition.split(
        kind,
        LABELS,
        num_clients=num_clients,
        num_strata=4,
        alpha=0.5,
        classes_per_client=2,
        min_size=min_size,
        seed=0,
    )


def owned(drawn):
    return [r[:n] for r, n in zip(drawn.index, drawn.size, strict=True)]


def test_count_asides_by_hand():
    size = np.array([1, 2, 3, 4, 10, 100])
    tests, validations = count_asides(size, Shares(0, 0.2, 0.3))
    assert tests.tolist() == [0, 1, 1, 1, 2, 20]
    # Of two, one is a test and one is left to train on; 0.9 and 1.2 are rounded to 1.
    assert validations.tolist() == [0, 0, 1, 1, 3, 30]
    tests, validations = count_asides(size, Shares(0, 0.0, 0.5))
    assert tests.tolist() == [0] * 6
    assert validations.tolist() == [0, 1, 2, 2, 5, 50]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), clients=st.integers(1, 6), share=st.floats(0, 1))
def test_pick_evenly_takes_from_each_stratum_its_part(seed, clients, share):
    rng = np.random.default_rng(seed)
    owner, stratum = rng.integers(clients, size=90), rng.integers(3, size=90)
    size = np.bincount(owner, minlength=clients)
    count = np.floor(share * size).astype(int)
    picked = pick_evenly(owner, stratum, count, rng)
    np.testing.assert_array_equal(np.bincount(owner[picked], minlength=clients), count)
    for client in range(clients):
        for label in range(3):
            these = (owner == client) & (stratum == label)
            part = count[client] * these.sum() / max(size[client], 1)
            assert abs(picked[these].sum() - part) < 1


def test_pick_evenly_picks_any_example():
    """Each of four examples of one client and stratum is picked by some seed."""
    owner, stratum = np.zeros(4, int), np.zeros(4, int)
    found = [
        pick_evenly(owner, stratum, np.array([1]), np.random.default_rng(seed)).argmax()
        for seed in range(40)
    ]
    assert set(found) == {0, 1, 2, 3}


@pytest.mark.parametrize("shares", [(0, 0.2, 0.0), (0, 0.0, 0.2), (3, 0.25, 0.25)])
def test_set_aside_uses_each_example_once(shares, tmp_path):
    whole = split(9)
    aside = set_aside(whole, LABELS, Shares(*shares), 0)
    taking_part = 9 - shares[0]
    assert aside.index.shape[0] == len(aside.size) == taking_part
    parts = [*owned(aside), aside.own_test, aside.validation, aside.unseen]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(200))
    counts = [np.bincount(LABELS[row], minlength=4) for row in owned(aside)]
    np.testing.assert_array_equal(aside.label_counts, counts)
    assert aside.size.min() >= 1 and {a.dtype for a in aside} == {np.dtype(np.int32)}
    # What a client tests on it owned, and the unseen clients keep all of theirs.
    rows = [set(row.tolist()) for row in owned(whole)]
    for client in range(shares[0]):
        assert set(aside.unseen[aside.unseen_client == client].tolist()) in rows
    for client, trained in enumerate(owned(aside)):
        tested = aside.own_test[aside.own_test_client == client].tolist()
        (before,) = [row for row in rows if set(trained.tolist()) <= row]
        assert set(tested) <= before
        assert len(tested) >= (shares[1] > 0 and len(before) > 1)
    for row in owned(aside):
        assert (np.diff(row) > 0).all()  # as `split` orders them
    path = tmp_path / "partition.npz"
    partition.save_partition(path, aside)
    for a, b in zip(aside, partition.load_partition(path), strict=True):
        np.testing.assert_array_equal(a, b)


def test_set_aside_without_shares_is_the_same_partition():
    whole = split(5)
    assert set_aside(whole, LABELS, Shares(0, 0.0, 0.0), 0) is whole


def test_set_aside_is_drawn_from_the_seed():
    shares = Shares(2, 0.3, 0.0)
    first, again, other = (set_aside(split(9), LABELS, shares, s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.own_test, again.own_test)
    assert set(first.unseen.tolist()) != set(other.unseen.tolist())


def test_set_aside_leaves_something_to_train_on():
    with pytest.raises(UserError) as error:
        set_aside(split(5), LABELS, Shares(0, 0.5, 0.5), 0)
    assert str(error.value) == (
        "partition.test_share=0.5 is not allowed with partition.validation_share=0.5; "
        "allowed: less than 1 together"
    )


def make_study(**changes):
    """60 images of two classes, and a config of five clients."""
    images, labels = (
        np.zeros((60, 2, 2, 1), np.uint8),
        np.arange(60, dtype=np.int32) % 2,
    )
    data = label_images(images, labels, images, labels, ("a", "b"))
    config = default.get_config()
    fields = {"num_clients": 5, "partition.min_size": 5, "partition.kind": "iid"}
    config.update_from_flattened_dict(fields | changes)
    return config, data


def test_unseen_clients_are_beyond_those_that_take_part():
    config, data = make_study(**{"partition.unseen": 3, "data.public": 4})
    drawn = make_partition(config, data)
    assert drawn.size.tolist() == [7] * 5 and len(drawn.public) == 4
    assert np.bincount(drawn.unseen_client).tolist() == [7] * 3
    ids = np.concatenate([*owned(drawn), drawn.public, drawn.unseen])
    np.testing.assert_array_equal(np.sort(ids), np.arange(60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"partition.min_size": 8},
            "partition.min_size=8 is not allowed; allowed: num_clients=5 + "
            "partition.unseen=3 times it at most 60 examples",
        ),
        (
            {"data.public": 30},
            "which leaves num_clients=5 + partition.unseen=3 clients",
        ),
        (
            {"partition.kind": "natural"},
            "num_clients=5 + partition.unseen=3 is not allowed with partition.kind="
            "'natural'; allowed: at most 6, the data's clients",
        ),
    ],
)
def test_messages_name_both_kinds_of_clients(changes, message):
    config, data = make_study(**{"partition.unseen": 3} | changes)
    with pytest.raises(UserError) as error:
        make_partition(config, data._replace(owner=np.arange(60) % 6))
    assert message in str(error.value) and "\n" not in str(error.value)
