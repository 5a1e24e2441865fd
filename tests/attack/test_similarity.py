"""The attack on similar clients, by hand, on a planted leak and on noise."""

import numpy as np

from fedmoe_jax.attack.similarity import attack_similarity, compare_rows, share_out

LABELS = np.repeat(np.arange(4), 10)
MIX = 0.8 * np.eye(4)[LABELS] + 0.05


def test_compare_rows_by_hand():
    rows = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, -1.0]])
    found = compare_rows(rows)  # less the mean [1.5, 0.5]
    half = np.sqrt(0.5)
    expected = [[1, -1, -1, 1], [-1, 1, 1, -1], [-1, 1, 1, -1], [1, -1, -1, 1]]
    assert abs(rows.mean(0) - [1.5, 0.5]).max() == 0 and half < 1
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not compare_rows(np.ones((3, 2))).any()


def test_share_out_forgets_capacity():
    found = share_out(np.array([[1.0, 1.0], [0.2, 0.2], [0.0, 0.0]]))
    assert found.tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0]]


def test_attack_similarity_finds_a_leak():
    found = attack_similarity(np.eye(4)[LABELS], MIX)
    assert found.auc == 1 and found.spearman > 0.99


def test_attack_similarity_of_noise_is_chance():
    found = [
        attack_similarity(np.random.default_rng(seed).random((40, 6)), MIX)
        for seed in range(20)
    ]
    auc, spearman = np.array(found).T
    error = auc.std(ddof=1) / np.sqrt(20)
    assert abs(auc.mean() - 0.5) < 4 * error and error < 0.02
    assert abs(spearman.mean()) < 0.05


def test_attack_similarity_of_what_is_all_alike():
    found = attack_similarity(np.ones((40, 3)), MIX)
    assert found.auc == 0.5 and np.isnan(found.spearman)
    same = attack_similarity(np.eye(4)[LABELS], np.tile([0.7, 0.3], (40, 1)))
    assert np.isnan(same.auc)
