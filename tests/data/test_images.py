"""Labelled images as the data of a task: the label is the stratum."""

import numpy as np
import pytest

from fedmoe_jax.data.images import label_images, name_numbers
from fedmoe_jax.options import UserError

TRAIN, TEST = np.zeros((3, 4, 5, 1), np.uint8), np.ones((2, 4, 5, 1), np.uint8)
TRAIN_Y, TEST_Y = np.int32([1, 0, 1]), np.int32([0, 1])


def test_label_images_makes_the_labels_the_strata():
    data = label_images(TRAIN, TRAIN_Y, TEST, TEST_Y, ("cat", "dog"))
    assert data.train.keys() == data.test.keys() == {"x", "y"}
    assert data.train["x"] is TRAIN and data.test["x"] is TEST
    assert data.train["y"] is data.stratum is TRAIN_Y
    assert data.test["y"] is data.test_stratum is TEST_Y
    assert data.stratum_names == ("cat", "dog") and data.task == "images"
    assert data.owner is None  # the partition decides


@pytest.mark.parametrize(
    ("train_x", "train_y"),
    [
        (TRAIN[..., 0], TRAIN_Y),
        (TRAIN.astype(np.float64), TRAIN_Y),
        (TRAIN.astype(np.int32), TRAIN_Y),
        (TRAIN, TRAIN_Y.astype(np.int64)),
    ],
    ids=["no channels", "wide floats", "whole numbers", "wide labels"],
)
def test_label_images_refuses_other_shapes_and_types(train_x, train_y):
    with pytest.raises(AssertionError):
        label_images(train_x, train_y, TEST, TEST_Y, ("cat", "dog"))


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        ([0, 1], [1], "01"),
        ([1], [0], "01"),
        ([0, 3], [3], "0123"),
        ([1, 1], [1], "01"),
        ([0], [0], "0"),
    ],
)
def test_name_numbers_names_every_label_from_0(train, test, names):
    assert name_numbers((np.array(train), np.array(test)), "here") == tuple(names)


@pytest.mark.parametrize(
    ("labels", "found", "most"),
    [
        ([0, 4, 0], "2 different labels from 0 to 4", 1),
        ([2], "1 different labels from 2 to 2", 0),
        ([-1, 0, 1], "3 different labels from -1 to 1", 2),
        ([0, 1_500_000_000], "2 different labels from 0 to 1500000000", 1),
        ([0, 2**62], f"2 different labels from 0 to {2**62}", 1),
    ],
)
def test_name_numbers_refuses_what_are_no_classes(labels, found, most):
    with pytest.raises(UserError) as error:
        name_numbers((np.array(labels), np.array(labels[:1])), "here", ", or names")
    assert str(error.value) == (
        f"here has {found}; allowed: 0 to {most}, as at least half of the numbers "
        "from 0 to the largest label have to occur, or names"
    )
