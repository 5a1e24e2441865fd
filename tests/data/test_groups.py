"""Copies of the data for groups, and the groups of clients, by hand."""

import numpy as np
import pytest
from factories import make_data, make_windows
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.data.groups import (
    check_groups,
    copy_groups,
    draw_groups,
    name_groups,
    permute_labels,
    size_groups,
    take_base,
)
from fedmoe_jax.data.images import label_images
from fedmoe_jax.options import UserError

SQUARE = [[1, 2], [3, 4]]
NAMES = ("cat", "dog", "elk")


def make_images(*images, dtype=np.uint8):
    """Images of one channel with the labels 0, 1, ..., to train and to test."""
    x = np.array(images, dtype)[..., None]
    y = np.arange(len(x), dtype=np.int32)
    return label_images(x, y, x[::-1].copy(), y[::-1].copy(), NAMES[: len(x)])


def test_copy_groups_rotates_by_hand():
    data = copy_groups(make_images(SQUARE, [[5, 6], [7, 8]]), "rotation", 4)
    turned = [SQUARE, [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    np.testing.assert_array_equal(data.train["x"][::2, ..., 0], turned)
    np.testing.assert_array_equal(data.test["x"][1::2, ..., 0], turned)
    assert data.train["y"].tolist() == [0, 1] * 4 and data.test["y"][0] == 1
    assert data.stratum.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert data.test_stratum.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert data.stratum_names[:3] == (
        "rotated 0: cat",
        "rotated 0: dog",
        "rotated 90: cat",
    )
    assert data.stratum.dtype == data.test_stratum.dtype == np.int32
    assert data.group_names == ("rotated 0", "rotated 90", "rotated 180", "rotated 270")


def test_copy_groups_inverts_by_hand():
    data = copy_groups(make_images([[0, 255], [10, 20]]), "inversion", 2)
    assert data.train["x"].dtype == np.uint8
    inverted = [[[0, 255], [10, 20]], [[255, 0], [245, 235]]]
    np.testing.assert_array_equal(data.train["x"][..., 0], inverted)
    floats = make_images([[-1, 3], [0, 0.5]], dtype=np.float32)
    floats = floats._replace(test={"x": floats.test["x"] + 4, "y": floats.test["y"]})
    data = copy_groups(floats, "inversion", 2)
    assert data.train["x"].dtype == data.test["x"].dtype == np.float32
    # By the range of the training images, -1 to 3, of test images, too.
    np.testing.assert_allclose(data.train["x"][1, ..., 0], [[3, -1], [2, 1.5]])
    np.testing.assert_allclose(data.test["x"][1, ..., 0], [[-1, -5], [-2, -2.5]])
    assert data.stratum_names == ("not inverted: cat", "inverted: cat")


@pytest.mark.parametrize("kind", ["permuted", "rotation_permuted"])
def test_copy_groups_permutes_labels(kind):
    plain = make_images(SQUARE, SQUARE, SQUARE)
    data, labels = copy_groups(plain, kind, 3), permute_labels(3, 3)
    np.testing.assert_array_equal(data.train["y"].reshape(3, 3), labels)
    np.testing.assert_array_equal(data.test["y"].reshape(3, 3), labels[:, ::-1])
    group = np.repeat(np.arange(3), 3)
    np.testing.assert_array_equal(data.stratum, 3 * group + data.train["y"])
    turns = group if kind == "rotation_permuted" else 0 * group
    for image, turn in zip(data.train["x"][..., 0], turns, strict=True):
        np.testing.assert_array_equal(image, np.rot90(SQUARE, turn))
    same = copy_groups(plain, kind, 2)  # of a group it does not matter how many
    np.testing.assert_array_equal(same.train["y"], data.train["y"][:6])


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(2, 30), data=st.data())
def test_permute_labels_disagree_on_every_class(classes, data):
    count = data.draw(st.integers(2, classes))
    labels = permute_labels(count, classes)
    assert labels.dtype == np.int32 and labels[0].tolist() == list(range(classes))
    np.testing.assert_array_equal(np.sort(labels), np.tile(labels[0], (count, 1)))
    for one in range(count):
        for other in range(one):
            assert (labels[one] != labels[other]).all()


def test_name_groups_names_what_is_done():
    assert name_groups("permuted", 2) == ("labels 0", "labels 1")
    expected = ("rotated 0, labels 0", "rotated 90, labels 1")
    assert name_groups("rotation_permuted", 2) == expected


def test_take_base_is_what_was_copied():
    plain = make_images(SQUARE, SQUARE)._replace(owner=np.array([1, 0]))
    assert take_base(plain) is plain
    copied = copy_groups(plain, "rotation_permuted", 2)
    assert copied.owner.tolist() == [1, 0, 1, 0] and copied.test_owner is None
    base = take_base(copied)
    assert base.group_names == () and len(base.stratum_names) == 2
    for name in ("train", "test"):
        for leaf, rows in getattr(base, name).items():
            np.testing.assert_array_equal(rows, getattr(plain, name)[leaf])
            assert np.shares_memory(rows, getattr(copied, name)[leaf])
    assert base.owner.tolist() == [1, 0] and base.stratum.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("clients", "count", "skew", "least", "sizes"),
    [
        (20, 4, 0.0, 1, [5, 5, 5, 5]),
        (22, 4, 0.0, 1, [6, 6, 5, 5]),
        (11, 3, 1.0, 1, [6, 3, 2]),
        (7, 3, 1.0, 1, [4, 2, 1]),
        (10, 4, 50.0, 1, [7, 1, 1, 1]),
        (10, 4, 50.0, 0, [10, 0, 0, 0]),
        (4, 4, 3.0, 1, [1, 1, 1, 1]),
        (2, 4, 0.0, 0, [1, 1, 0, 0]),
        (0, 4, 1.0, 0, [0, 0, 0, 0]),
    ],
)
def test_size_groups_by_hand(clients, count, skew, least, sizes):
    assert size_groups(clients, count, skew, least).tolist() == sizes


@settings(max_examples=100, deadline=None)
@given(clients=st.integers(8, 300), count=st.integers(1, 8), skew=st.floats(0, 4))
def test_size_groups_give_each_group_a_client_and_no_later_one_more(
    clients, count, skew
):
    size = size_groups(clients, count, skew, 1)
    assert size.sum() == clients and size.min() >= 1
    assert (np.diff(size) <= 0).all()


def test_draw_groups_divides_unseen_clients_by_themselves():
    hidden = np.arange(11) % 3 == 0  # 4 of 11
    group = draw_groups(3, 1.0, hidden, 0)
    assert np.bincount(group[~hidden]).tolist() == [4, 2, 1]
    assert np.bincount(group[hidden]).tolist() == [2, 1, 1]
    others = [draw_groups(3, 1.0, hidden, seed).tolist() for seed in range(8)]
    assert others[0] == group.tolist() and len(set(map(tuple, others))) > 4


@pytest.mark.parametrize(
    ("kind", "count", "data", "told"),
    [
        ("rotation", 2, make_data(3, (8, 6, 1)), "8 x 6 pixels; allowed: none, inver"),
        ("permuted", 4, make_data(3), "groups.count=4 .* 3 classes; allowed: 2 to 3$"),
        (
            "inversion",
            2,
            make_windows(np.zeros((2, 4), np.int32), 9),
            "groups.kind='inversion' .* data.name='mine', .* allowed: none$",
        ),
        (
            "inversion",
            2,
            make_data(3)._replace(stratum=np.zeros(3, np.int32)),
            "strata are not the labels; allowed: none$",
        ),
        ("inversion", 2, make_data(9, (99, 99, 1)), "groups.count=2 .* at least 1, or"),
    ],
)
def test_check_groups_refuses(kind, count, data, told):
    with pytest.raises(UserError, match=told):
        check_groups(kind, count, data, "mine", 5e-4)


@pytest.mark.parametrize("kind", ["rotation", "permuted", "rotation_permuted"])
def test_check_groups_allows_what_can_be_copied(kind):
    data = make_data(4)
    check_groups(kind, 4, data, "mine", 1e-4)
    with pytest.raises(UserError, match="run.memory_limit_gb=2e-06 is too low"):
        check_groups(kind, 4, data, "mine", 2e-6)
