"""The attack on label mixes: finds a planted leak, and nothing where there is none."""

import numpy as np
import pytest

from fedmoe_jax.attack.label_mix import MODELS, attack_mixes, find_mixes, judge, to_mix

N, L = 60, 5


def draw(leak, seed=0):
    """Histories that say `leak` of each client's mix, in noise, and the mixes."""
    rng = np.random.default_rng(seed)
    mix = rng.dirichlet(np.full(L, 0.3), N)
    return leak * mix + 0.05 * rng.normal(size=(N, L)), mix


def test_to_mix_by_hand():
    usual = np.array([0.5, 0.25, 0.25])
    found = to_mix(np.array([[3.0, 1.0, -2.0], [-1.0, 0.0, -1.0]]), usual)
    assert found.tolist() == [[0.75, 0.25, 0], usual.tolist()]


def test_judge_by_hand():
    mix = np.array([[1.0, 0.0], [0.5, 0.5]])
    found = judge(np.array([[0.5, 0.5], [0.4, 0.6]]), mix)
    np.testing.assert_allclose([found.distance, found.majority], [0.3, 0.5])


@pytest.mark.parametrize("model", MODELS)
def test_find_mixes_finds_a_leak_and_nothing_else(model):
    history, mix = draw(leak=1.0)
    usual = judge(find_mixes(history, mix, None), mix)
    near = judge(find_mixes(history, mix, model), mix)
    assert near.distance < 0.3 * usual.distance and near.majority > 0.9
    noise, mix = draw(leak=0.0)
    far = judge(find_mixes(noise, mix, model), mix)
    assert far.distance > 0.9 * usual.distance and far.majority < 0.45


def test_find_mixes_knows_no_client_that_it_attacks():
    """A client's own mix changes what is found for others alone."""
    history, mix = draw(leak=0.0)
    other = mix.copy()
    other[7] = np.eye(L)[0]
    for model in (None, "ridge"):
        one, two = (find_mixes(history, m, model) for m in (mix, other))
        np.testing.assert_array_equal(one[7], two[7])
        assert (one != two).any()
    np.testing.assert_allclose(one.sum(1), 1)


def test_attack_mixes_of_few_clients_says_nothing():
    history, mix = draw(leak=1.0)
    assert set(attack_mixes(history, mix)) == {"mean", *MODELS}
    assert attack_mixes(history[:9], mix[:9]) == {}
