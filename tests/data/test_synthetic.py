"""The synthetic task has the known answer that it was made for."""

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from fedmoe_jax.data.synthetic import best_group, load_synthetic, synthetic_group


def test_load_synthetic_has_a_known_answer():
    task = load_synthetic()
    assert task.train["x"].shape == (4096, 8, 8, 1)
    np.testing.assert_array_equal(np.bincount(task.train["y"]), [256] * 16)
    np.testing.assert_array_equal(np.bincount(task.test["y"]), [64] * 16)
    x, test_x = (
        np.reshape(a / 255, (len(a), -1)) for a in (task.train["x"], task.test["x"])
    )
    y, test_y = task.train["y"], task.test["y"]
    group, test_group = synthetic_group(y), synthetic_group(test_y)

    pooled = RidgeClassifier().fit(x, y).score(test_x, test_y)
    experts = [RidgeClassifier().fit(x[group == g], y[group == g]) for g in range(4)]
    pairs = [(test_x[test_group == g], test_y[test_group == g]) for g in range(4)]
    own = [e.score(*pair) for e, pair in zip(experts, pairs, strict=True)]
    linear_group = RidgeClassifier().fit(x, group).score(test_x, test_group)

    assert min(own) > 0.97
    assert pooled < 0.4
    assert linear_group < 0.35


def test_load_synthetic_gives_every_pattern_another_meaning_in_each_group():
    task = load_synthetic()
    # The bright bar of the lower half, found without the labels.
    bars = task.train["x"][:, 4:, :, 0].reshape(-1, 4, 4, 2).mean((1, 3)).argmax(1)
    group = synthetic_group(task.train["y"])
    meaning = np.zeros((4, 4), int)
    for g in range(4):
        for bar in range(4):
            chosen = task.train["y"][(group == g) & (bars == bar)] % 4
            meaning[g, bar] = np.bincount(chosen).argmax()
    np.testing.assert_array_equal(
        meaning, [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    )


def test_best_group_is_the_largest_share():
    counts = np.zeros((3, 16), int)
    counts[0, [3, 4, 5]] = [5, 3, 3]  # 5 of group 0, 6 of group 1
    counts[1, 15] = 1
    counts[2, [0, 8]] = 2  # a tie goes to the lower group
    np.testing.assert_array_equal(best_group(counts), [1, 3, 0])


def test_best_group_refuses_counts_of_other_labels():
    with pytest.raises(AssertionError):
        best_group(np.ones((3, 10), int))


def test_synthetic_group_keeps_the_shape():
    labels = np.arange(16).reshape(2, 8)
    groups = [[0, 0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3, 3]]
    np.testing.assert_array_equal(synthetic_group(labels), groups)
