"""Gates by hand and against a slow loop, and the losses of the gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_hyper
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmoe_jax.base import Route
from fedmoe_jax.models import routing
from fedmoe_jax.models.routing import (
    calibrate_gate,
    gate_logits,
    latency_loss,
    make_gates,
    pool,
    route,
)
from fedmoe_jax.options import UserError

BATCH, EXPERTS = 3, 5
ROUTE = jax.jit(route, static_argnums=2)
calibration_loss = jax.jit(routing.calibration_loss)
load_loss = jax.jit(routing.load_loss)
z_loss = jax.jit(routing.z_loss)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def test_gate_logits_average_positions():
    features = draw(BATCH, 2, 3, 4)
    gate = {"kernel": draw(EXPERTS, 4, seed=1), "bias": draw(EXPERTS, seed=2)}
    pooled = np.asarray(features).reshape(BATCH, 6, 4).mean(1)
    np.testing.assert_allclose(pool(features), pooled, atol=1e-6)
    expected = pooled @ np.asarray(gate["kernel"]).T + np.asarray(gate["bias"])
    np.testing.assert_allclose(gate_logits(gate, features), expected, atol=1e-5)
    flat = gate_logits(gate, jnp.asarray(pooled))
    np.testing.assert_allclose(flat, expected, atol=1e-5)


def test_route_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0], [8.0, 1.0, 1.0, 2.0]]))
    gates = ROUTE(logits, jnp.ones(4, bool), 2)
    expected = [[0, 0, 3 / 7, 4 / 7], [0.8, 0, 0, 0.2]]
    np.testing.assert_allclose(gates, expected, atol=1e-6)
    held = ROUTE(logits, jnp.array([True, True, True, False]), 2)
    expected = [[0, 2 / 5, 3 / 5, 0], [8 / 9, 1 / 9, 0, 0]]  # a tie: the lower index
    np.testing.assert_allclose(held, expected, atol=1e-6)
    alone = ROUTE(logits, jnp.array([False, True, False, False]), 2)
    np.testing.assert_array_equal(alone, [[0, 1, 0, 0]] * 2)


def gates_by(gating, odds, held, num_active):
    """The gates of examples with such odds, one way or another."""
    how = Route(num_active, gating=gating)
    return make_gates(jnp.log(jnp.array(odds)), jnp.array(held), how)


def test_gates_that_are_kept_are_not_renormalised():
    odds = [[1.0, 2.0, 3.0, 4.0], [8.0, 1.0, 1.0, 2.0]]
    found = gates_by("all", odds, [True] * 4, 2)
    expected = [[0, 0, 3 / 10, 4 / 10], [8 / 12, 0, 0, 2 / 12]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    found = gates_by("all", odds, [True, True, True, False], 2)
    np.testing.assert_allclose(found[0], [0, 2 / 6, 3 / 6, 0], atol=1e-6)


def test_gates_of_a_sum_ask_nothing_and_scale_what_is_held():
    odds = [[1.0, 2.0, 3.0, 4.0], [8.0, 1.0, 1.0, 2.0]]
    np.testing.assert_array_equal(gates_by("sum", odds, [True] * 4, 4), np.ones((2, 4)))
    found = gates_by("sum", odds, [True, False, False, False], 4)
    np.testing.assert_array_equal(found, [[4, 0, 0, 0]] * 2)


@pytest.mark.parametrize(("gating", "over"), [("chosen", 2 + 3), ("all", 2 + 3 + 1.5)])
def test_a_bias_changes_what_is_chosen_and_how_much_it_counts(gating, over):
    """The odds of the first double; the last one is not held, whatever its bias."""
    logits, held = jnp.log(jnp.array([[1.0, 3.0, 1.5, 8.0]])), jnp.arange(4) < 3
    plain = Route(2, gating=gating)
    assert (make_gates(logits, held, plain) > 0).tolist() == [[0, 1, 1, 0]]
    biased = plain._replace(bias=jnp.log(jnp.array([2.0, 1.0, 1.0, 9.0])))
    found = make_gates(logits, held, biased)
    np.testing.assert_allclose(found, [[2 / over, 3 / over, 0, 0]], atol=1e-6)


def test_make_gates_takes_the_bias_of_one_layer():
    how = Route(1, bias=jnp.zeros((2, 3)).at[1, 2].set(1.0))
    logits, held = jnp.zeros((4, 3)), jnp.ones(3, bool)
    chosen = lambda layer: make_gates(logits, held, how.of_layer(layer)).argmax(1)
    assert chosen(0).tolist() == [0] * 4 and chosen(1).tolist() == [2] * 4
    with pytest.raises(UserError, match=r"with a bias .*\[2, 3\]; allowed: "):
        make_gates(logits, held, how)
    assert Route(1).of_layer(1) == Route(1)


def test_make_gates_refuses_an_unknown_gating():
    with pytest.raises(UserError, match="gating='odd' is unknown; allowed: chosen, al"):
        gates_by("odd", [[1.0, 2.0]], [True, True], 1)


def slow_route(logits, mask, num_active):
    """Gates one example at a time."""
    gates = np.zeros(logits.shape)
    for row, out in zip(logits, gates, strict=True):
        allowed = [e for e in range(len(row)) if mask[e]]
        chosen = sorted(allowed, key=lambda e: (-row[e], e))[:num_active]
        out[chosen] = softmax(row[chosen])
    return gates


whole_logits = hnp.arrays(np.int64, (BATCH, EXPERTS), elements=st.integers(-4, 4))
any_mask = st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).filter(any)


@settings(max_examples=60)
@given(whole_logits, any_mask, st.sampled_from([1, 2, EXPERTS]))
def test_route_equals_the_slow_loop(logits, mask, num_active):
    gates = ROUTE(jnp.float32(logits), jnp.array(mask), num_active)
    gates = np.asarray(gates)
    np.testing.assert_allclose(gates, slow_route(logits, mask, num_active), atol=1e-6)
    np.testing.assert_allclose(gates.sum(1), 1.0, atol=1e-6)
    assert np.all((gates > 0).sum(1) == min(num_active, sum(mask)))
    assert np.all(gates[:, ~np.array(mask)] == 0)  # never an unheld expert


def test_route_passes_gradients_to_the_chosen_rows_only():
    features = jnp.abs(draw(BATCH, 8)) + 0.1
    kernel = jnp.array([3.0, 0.0, 2.0, 1.0, 0.5])[:, None] * jnp.ones((EXPERTS, 8))
    gate = {"kernel": kernel, "bias": jnp.zeros(EXPERTS)}
    values = jnp.arange(1.0, EXPERTS + 1)  # what each expert would answer

    def answer(gate, mask):
        gates = route(gate_logits(gate, features), mask, 2)
        return jnp.einsum("be,e->b", gates, values).sum()

    grad = jax.jit(jax.grad(answer))
    for held, chosen in [([1, 1, 1, 1, 1], [0, 2]), ([0, 1, 0, 1, 1], [3, 4])]:
        grads = grad(gate, jnp.array(held, bool))
        for leaf in grads.values():
            moved = np.abs(np.asarray(leaf)).reshape(EXPERTS, -1).max(1)
            assert np.all(moved[chosen] > 1e-3)
            assert np.all(np.delete(moved, chosen) == 0)


# ---- auxiliary losses


def test_calibration_loss_by_hand():
    uniform = jnp.zeros((2, 3))
    one, two = jnp.array([False, True, False]), jnp.array([True, True, False])
    np.testing.assert_allclose(
        calibration_loss(uniform, None, one), np.log(3), rtol=1e-6
    )
    masses = jnp.log(jnp.array([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]]))
    assert calibration_loss(masses, None, jnp.ones(3, bool)) == 0
    expected = -(np.log(3 / 8) + np.log(6 / 8)) / 2
    np.testing.assert_allclose(calibration_loss(masses, None, two), expected, rtol=1e-6)


def test_calibration_loss_moves_mass_to_held_experts():
    logits, held = draw(BATCH, EXPERTS), np.array([1, 0, 1, 0, 0], bool)
    grad = jax.jit(jax.grad(calibration_loss))(logits, None, jnp.array(held))
    among_held = softmax(np.where(held, logits, -np.inf))
    expected = (softmax(logits) - among_held) / BATCH
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    assert np.all(np.asarray(grad)[:, held] < 0)


def test_load_loss_by_hand():
    every, some = jnp.ones(4, bool), jnp.array([True, True, True, False])
    np.testing.assert_allclose(
        load_loss(jnp.zeros((4, 4)), None, every), 1.0, rtol=1e-6
    )
    np.testing.assert_allclose(load_loss(jnp.zeros((4, 4)), None, some), 1.0, rtol=1e-6)
    confident = 100 * jnp.eye(4)  # every expert is chosen once: balanced
    np.testing.assert_allclose(load_loss(confident, None, every), 1.0, rtol=1e-6)
    collapsed = confident[np.zeros(4, int)]
    np.testing.assert_allclose(load_loss(collapsed, None, every), 4.0, rtol=1e-6)
    rows = np.array([[6.0, 3.0, 1.0, 90.0], [2.0, 7.0, 1.0, 90.0]])
    # f = (1/2, 1/2, 0) and P = (0.4, 0.5, 0.1) among the three allowed
    loss = load_loss(jnp.log(jnp.float32(rows[[0, 1, 0, 1]])), None, some)
    np.testing.assert_allclose(loss, 3 * 0.45, rtol=1e-5)


def test_z_loss_by_hand():
    some = jnp.array([True, True, True, False])
    np.testing.assert_allclose(
        z_loss(jnp.zeros((2, 4)), None, some), np.log(3) ** 2, rtol=1e-6
    )
    masses = jnp.log(jnp.array([[1.0, 2.0, 5.0, 90.0], [3.0, 3.0, 4.0, 90.0]]))
    expected = (np.log(8) ** 2 + np.log(10) ** 2) / 2
    np.testing.assert_allclose(z_loss(masses, None, some), expected, rtol=1e-5)


def test_latency_loss_and_its_gradient_by_hand():
    """`d/dz_i of p T = p_i (T_i - p T)`, over the two allowed experts of three."""
    logits = jnp.log(jnp.array([[1.0, 3.0, 9.0], [1.0, 1.0, 5.0]]))
    time = jnp.array([[0.8, 0.4, 0.0], [0.2, 0.6, 0.0]])
    mask, weight = jnp.array([True, True, False]), jnp.array([3.0, 1.0])
    loss = lambda logits, weight: latency_loss(logits, weight, mask, time)
    first, second = 0.25 * 0.8 + 0.75 * 0.4, 0.5 * 0.2 + 0.5 * 0.6
    near = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(loss(logits, None), (first + second) / 2, **near)
    weighted = (3 * first + second) / 4
    np.testing.assert_allclose(loss(logits, weight), weighted, **near)
    of_first = [0.25 * (0.8 - first), 0.75 * (0.4 - first), 0]
    of_second = [0.5 * (0.2 - second), 0.5 * (0.6 - second), 0]
    expected = [0.75 * np.array(of_first), 0.25 * np.array(of_second)]
    np.testing.assert_allclose(jax.grad(loss)(logits, weight), expected, **near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibration_loss", "load_loss", "z_loss"])
def test_losses_of_the_gate_count_positions_by_their_weights(name):
    """Padding counts nothing, and a weight of 2 as the position twice."""
    loss, held = getattr(routing, name), jnp.array([1, 0, 1, 1, 0], bool)
    logits = draw(4, EXPERTS)
    found = loss(logits, jnp.array([1.0, 0.0, 2.0, 0.0]), held)
    expected = loss(logits[jnp.array([0, 2, 2])], None, held)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(found - loss(logits, None, held)) > 1e-3


@pytest.mark.slow
def test_calibrate_gate_adds_the_losses_with_their_weights():
    logits, held = draw(BATCH, EXPERTS), jnp.array([1, 0, 1, 1, 0], bool)
    hyper = make_hyper(loss={"calibration": 0.2, "load": 0.3, "z": 0.1})
    terms = [loss(logits, None, held) for loss in (calibration_loss, load_loss, z_loss)]
    expected = 0.2 * 0.5 * terms[0] + 0.3 * terms[1] + 0.1 * terms[2]
    found = calibrate_gate(logits, None, held, jnp.float32(0.5), hyper)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len({float(term) for term in terms}) == 3
