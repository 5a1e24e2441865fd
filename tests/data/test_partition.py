"""Every rule uses each example once and does what its name says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from fedmoe_jax.data import partition
from fedmoe_jax.data.images import label_images
from fedmoe_jax.federation import make_partition
from fedmoe_jax.options import UserError

OF_EACH = "partition.classes_per_client"
DRAWN = [kind for kind in partition.KINDS if kind != "natural"]
ARGUMENTS = {
    "num_clients": 5,
    "num_strata": 4,
    "alpha": 0.5,
    "classes_per_client": 2,
    "min_size": 3,
    "seed": 0,
}
LABELS = np.random.default_rng(7).permutation(np.repeat(np.arange(4), 50))


def split(kind, y=LABELS, **changes):
    return partition.split(kind, y, **{**ARGUMENTS, **changes})


def owned(drawn):
    """The examples of each client, padding removed."""
    pairs = zip(drawn.index, drawn.size, strict=True)
    return [row[:size] for row, size in pairs]


@pytest.mark.parametrize("kind", DRAWN)
@settings(max_examples=25, deadline=None)
@given(
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
    classes_per_client=st.integers(1, 4),
    min_size=st.integers(1, 16),
    seed=st.integers(0, 2**32),
)
def test_each_example_once_and_counts_agree(
    kind, num_clients, alpha, classes_per_client, min_size, seed
):
    if kind == "classes":  # else refused; the smallest has a ninth of two classes
        classes_per_client = max(classes_per_client, -(-4 // num_clients))
        min_size = min(min_size, 50 // num_clients)
    drawn = split(
        kind,
        num_clients=num_clients,
        alpha=alpha,
        classes_per_client=classes_per_client,
        min_size=min_size,
        seed=seed,
    )
    rows = owned(drawn)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(200))
    assert drawn.size.min() >= min_size
    padded = np.arange(drawn.index.shape[1]) >= drawn.size[:, None]
    assert not drawn.index[padded].any()
    counts = [np.bincount(LABELS[row], minlength=4) for row in rows]
    np.testing.assert_array_equal(drawn.label_counts, counts)
    assert {a.dtype for a in drawn} == {np.dtype(np.int32)}


@pytest.mark.parametrize("kind", DRAWN)
def test_seed_decides(kind):
    first, again, other = split(kind), split(kind), split(kind, seed=1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = zip(owned(first), owned(other), strict=True)
    assert any(set(a) != set(b) for a, b in rows)


@settings(max_examples=50, deadline=None)
@given(
    num_clients=st.integers(1, 12),
    classes=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_classes_by_their_laws(num_clients, classes, seed):
    """Exactly so many classes each, holders and their shares as even as can be."""
    classes = max(classes, -(-4 // num_clients))
    counts = split(
        "classes",
        num_clients=num_clients,
        classes_per_client=classes,
        min_size=1,
        seed=seed,
    ).label_counts
    held = counts > 0
    assert (held.sum(1) == classes).all()
    holders = held.sum(0)
    assert holders.min() >= 1 and np.ptp(holders) <= 1
    for label in range(4):
        assert np.ptp(counts[held[:, label], label]) <= 1


def test_classes_by_hand():
    """Of six clients with one of four classes each, two classes have two holders."""
    counts = split("classes", num_clients=6, classes_per_client=1).label_counts
    sizes = sorted(counts.max(1).tolist())
    assert sizes == [25, 25, 25, 25, 50, 50]
    one = split("classes", num_clients=1, classes_per_client=4).label_counts
    assert one.tolist() == [[50, 50, 50, 50]]


def test_classes_are_dealt_in_any_pairs():
    """Shards of one label in two give some clients one class; here all pairs occur."""
    held = split("classes", num_clients=60, min_size=1).label_counts > 0
    assert len(np.unique(held, axis=0)) == 6


@pytest.mark.parametrize(("num_clients", "width"), [(1, 256), (3, 128), (200, 1)])
def test_width_is_the_next_power_of_two(num_clients, width):
    drawn = split("iid", num_clients=num_clients, min_size=1)
    assert drawn.index.shape == (num_clients, width)


def test_large_alpha_is_nearly_iid():
    y = np.repeat(np.arange(10), 500)
    drawn = split("dirichlet", y, num_strata=10, alpha=1e4)
    share = drawn.label_counts / drawn.label_counts.sum(1, keepdims=True)
    np.testing.assert_allclose(share, 0.1, atol=0.01)
    np.testing.assert_allclose(drawn.size, 1000, rtol=0.05)


def test_dirichlet_100_is_closer_to_iid_than_a_tenth():
    y = np.repeat(np.arange(10), 500)

    def worst(alpha):
        counts = split("dirichlet", y, num_strata=10, alpha=alpha).label_counts
        return (counts / counts.sum(1, keepdims=True)).max()

    assert worst(100.0) < 0.15
    assert worst(0.1) > 0.5


def test_dirichlet_proportions_have_the_right_spread():
    # The share p of one of N clients is Beta(alpha, (N - 1) alpha), whose variance
    # is (1/N) (1 - 1/N) / (N alpha + 1): here 0.16 / 3.5.
    y = np.repeat(np.arange(1000), 40)
    drawn = split("dirichlet", y, num_strata=1000)
    share = drawn.label_counts / 40
    np.testing.assert_allclose(share.mean(1), 0.2, atol=0.03)
    np.testing.assert_allclose(share.var(1), 0.16 / 3.5, rtol=0.15)


def test_shards_hold_few_classes_and_equal_sizes():
    # 4 clients, 2 shards each: 8 shards of 25, two of each label of 50.
    drawn = split("shards", num_clients=4)
    np.testing.assert_array_equal(drawn.size, 50)
    assert set(drawn.label_counts.ravel()) <= {0, 25, 50}
    one = split("shards", num_clients=4, classes_per_client=1)
    np.testing.assert_array_equal(np.sort(one.label_counts, axis=0)[-1], 50)
    np.testing.assert_array_equal((one.label_counts > 0).sum(1), 1)


def test_quantity_skews_sizes_and_not_labels():
    y = np.repeat(np.arange(4), 5000)
    drawn = split("quantity", y, alpha=0.5, min_size=200)
    assert drawn.size.max() > 2 * drawn.size.min()
    share = drawn.label_counts / drawn.size[:, None]
    np.testing.assert_allclose(share, 0.25, atol=0.1)


def test_iid_sizes_differ_by_at_most_one():
    drawn = split("iid", num_clients=7)
    assert set(drawn.size) == {28, 29}


def test_natural_clients_keep_what_is_theirs():
    owner = np.arange(200) % 5
    drawn = split("natural", owner=owner, min_size=40)
    for client, row in enumerate(owned(drawn)):
        np.testing.assert_array_equal(row, np.arange(client, 200, 5))


def test_public_slice_is_taken_from_natural_clients():
    images = np.zeros((60, 2, 2, 1), np.uint8)
    labels = np.arange(60, dtype=np.int32) % 2
    data = label_images(images, labels, images, labels, ("a", "b"))
    data = data._replace(owner=np.repeat(np.arange(3), 20))
    config = default.get_config()
    config.num_clients, config.data.public = 3, 12
    config.partition.kind, config.partition.min_size = "natural", 1
    drawn = make_partition(config, data)
    assert len(drawn.public) == 12 and drawn.size.sum() == 48
    for client, row in enumerate(owned(drawn)):
        assert set(data.owner[row]) == {client}


def test_repair_reaches_the_tightest_fit():
    # Alpha this small gives each class to one client, so no draw can succeed, and
    # 40 * 5 = 200 leaves exactly one answer for the sizes.
    drawn = split("dirichlet", alpha=1e-4, min_size=40)
    np.testing.assert_array_equal(drawn.size, 40)


def make_options(**changes):
    options = dict(num_strata=4, alpha=0.5, classes_per_client=2, owner=None)
    return partition.Options(**options, unseen=0, overlap=0, **changes)


def test_repair_takes_from_the_largest_only():
    owner = np.repeat([0, 1, 2], [9, 6, 1])
    options = make_options(num_clients=3, min_size=4)
    filled = partition._fill_up(owner, options, np.random.default_rng(0))
    # Sizes 9 6 1 -> 8 6 2 -> 7 6 3 -> 6 6 4, by hand.
    np.testing.assert_array_equal(np.bincount(filled), [6, 6, 4])
    np.testing.assert_array_equal(filled[9:], owner[9:])


def fill_slowly(owner, options, rng):
    """One example at a time, from the first of the largest clients."""
    size = np.bincount(owner, minlength=options.num_clients)
    shuffled = rng.permutation(len(owner))
    by_owner = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rows = [list(row) for row in np.split(by_owner, np.cumsum(size)[:-1])]
    owner = owner.copy()
    for client in np.flatnonzero(size < options.min_size):
        while size[client] < options.min_size:
            largest = size.argmax()
            owner[rows[largest].pop()] = client
            size[largest] -= 1
            size[client] += 1
    return owner


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_repair_moves_what_the_slow_twin_moves(sizes, seed, data):
    total = sum(sizes)
    least = data.draw(st.integers(0, total // len(sizes)))
    owner = np.random.default_rng(seed).permutation(np.repeat(range(len(sizes)), sizes))
    options = make_options(num_clients=len(sizes), min_size=least)
    filled, slow = (
        fill(owner.astype(int), options, np.random.default_rng(seed))
        for fill in (partition._fill_up, fill_slowly)
    )
    np.testing.assert_array_equal(filled, slow)


@pytest.mark.slow
def test_repair_of_many_clients_with_one_owner_of_all():
    """Alpha 1e-38 of 50,000 clients: nearly all have nothing before the repair."""
    y = np.arange(50_000) % 10
    drawn = split(
        "dirichlet", y, num_strata=10, num_clients=50_000, alpha=1e-38, min_size=1
    )
    assert drawn.index.shape == (50_000, 1) and (drawn.size == 1).all()


@pytest.mark.slow
def test_lists_beyond_the_limit_are_refused_before_they_are_made():
    """One client has nearly all of 2^20 examples, the lists of all would have room."""
    y = np.zeros(2**20, int)
    with pytest.raises(UserError) as error:
        split("quantity", y, num_clients=10**5, alpha=1e-38, min_size=1, limit_gb=8.0)
    # 2^20 - 99,999 examples, rounded up to 2^20; size and four strata beside them.
    needed = 10**5 * (2**20 + 1 + 4) * 4 / 1e9
    text = str(error.value)
    assert f"need {needed:.2f} GB" in text and "\n" not in text
    assert (
        text.startswith("run.memory_limit_gb=8 is too low") and "at least 420" in text
    )
    fits = split("iid", y, num_clients=2, limit_gb=2 * (2**19 + 5) * 4 / 1e9)
    assert fits.index.shape == (2, 2**19)


def test_renumber_by_hand():
    drawn = partition.Partition(
        np.array([[0, 2], [1, 0]], np.int32), np.array([2, 1], np.int32), None, None
    )
    index = partition.renumber(drawn, np.array([7, 8, 9], np.int32)).index
    assert index.tolist() == [[7, 9], [8, 0]] and index.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"alpha": 0.0}, "partition.alpha", "0.0"),
        ({"alpha": float("nan")}, "partition.alpha", "nan"),
        ({"alpha": float("inf")}, "partition.alpha", "inf"),
        ({"min_size": 41}, "partition.min_size", "41"),
        ({"min_size": 0}, "partition.min_size", "0"),
        ({"kind": "shards", "classes_per_client": 5}, OF_EACH, "5"),
        ({"kind": "classes", "classes_per_client": 0}, OF_EACH, "0"),
        ({"num_clients": 0}, "num_clients", "0"),
        ({"seed": -1}, "seed", "-1"),
        ({"kind": "own"}, "partition.kind", "'own'"),
        ({"kind": "natural"}, "partition.kind", "'natural'"),
        (
            {"kind": "classes", "num_clients": 3, "classes_per_client": 1},
            "partition.classes_per_client",
            "1",
        ),
        ({"kind": "classes", "y": np.arange(5) % 4, "min_size": 1}, "num_clients", "5"),
        ({"kind": "classes", "min_size": 40}, "partition.min_size", "40"),
        ({"kind": "natural", "owner": LABELS}, "num_clients", "5"),
        (
            {"kind": "natural", "owner": np.arange(200) // 199, "num_clients": 2},
            "partition.min_size",
            "3",
        ),
        (
            {"kind": "natural", "owner": np.maximum(LABELS, 1), "num_clients": 4},
            "partition.kind",
            "'natural'",
        ),
    ],
)
def test_wrong_arguments_are_named_on_one_line(changes, field, value):
    with pytest.raises(UserError) as error:
        split(**{"kind": "dirichlet", **changes})
    message = str(error.value)
    assert message.startswith(f"{field}={value} ")
    assert "allowed: " in message and "\n" not in message


@pytest.mark.parametrize(
    ("owner", "clients"),
    [
        ([0, 0, 2], "1"),
        ([3, 3, 5], "0, 1, 2, 4"),
        ([8, 8, 8], "0, 1, 2, 3, 4 and 3 more"),
    ],
)
def test_natural_clients_without_an_example_are_named(owner, clients):
    counts = {"num_clients": 1 + max(owner), "num_strata": 1, "min_size": 2}
    with pytest.raises(UserError) as error:
        split("natural", y=np.zeros(27, int), owner=np.repeat(owner, 9), **counts)
    assert str(error.value) == (
        "partition.kind='natural' is not allowed with clients that have no training "
        f"example beside data.public: {clients}; allowed: at least "
        "partition.min_size=2 for each client"
    )


def test_classes_per_client_binds_kinds_that_read_it_alone():
    drawn = split("iid", y=np.zeros(200, int), num_strata=1, classes_per_client=2)
    assert drawn.size.sum() == 200


def test_round_trip_leaves_one_file(tmp_path):
    drawn = split("dirichlet")
    path = tmp_path / "partition.npz"
    partition.save_partition(path, split("iid"))
    partition.save_partition(str(path), drawn)
    for a, b in zip(drawn, partition.load_partition(path), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "partition.npz"
    partition.save_partition(path, split("iid"))
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError):
        partition.save_partition(path, split("dirichlet"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_file_is_never_read_as_another_partition(tmp_path):
    path = tmp_path / "partition.npz"
    drawn = split("dirichlet")
    partition.save_partition(path, drawn)
    whole = path.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", whole[:-1]]
    for place in range(0, len(whole), 37):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = partition.load_partition(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # a flip in a date or a file attribute is harmless
            for a, b in zip(drawn, found, strict=True):
                np.testing.assert_array_equal(a, b)
    assert refused > len(damaged) / 2


def test_missing_and_inconsistent_files_are_refused(tmp_path):
    path = tmp_path / "partition.npz"
    with pytest.raises(UserError, match="FileNotFoundError"):
        partition.load_partition(path)
    drawn = split("iid")
    twice = drawn.index.copy()
    twice[0, 0] = twice[0, 1]
    partition.save_partition(path, drawn._replace(index=twice))
    with pytest.raises(UserError, match="AssertionError"):
        partition.load_partition(path)


def test_pooled_data_have_one_owner():
    pooled = partition.pool(split("dirichlet"))
    assert pooled.index.shape == (1, 200) and pooled.size.tolist() == [200]
    np.testing.assert_array_equal(pooled.index[0], np.arange(200))
    np.testing.assert_array_equal(pooled.label_counts, [[50] * 4])


def test_a_public_slice_leaves_every_client_its_least():
    images = np.zeros((60, 2, 2, 1), np.uint8)
    labels = np.arange(60, dtype=np.int32) % 2
    data = label_images(images, labels, images, labels, ("a", "b"))
    config = default.get_config()
    config.num_clients, config.partition.min_size = 5, 10
    config.data.public = 10
    drawn = make_partition(config, data)
    assert drawn.size.tolist() == [10] * 5 and len(drawn.public) == 10
    config.data.public = 11
    with pytest.raises(UserError) as error:
        make_partition(config, data)
    assert str(error.value) == (
        "data.public=11 is not allowed; allowed: 0 to 10, which leaves num_clients=5 "
        "clients partition.min_size=10 of the 60 training examples each"
    )
