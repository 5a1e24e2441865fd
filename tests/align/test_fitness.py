"""Fitness, against hand numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_feedback, make_hyper
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.align.fitness import (
    PROBES,
    idle_rule,
    init_fitness,
    score,
    update_fitness,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Assignment


@functools.partial(jax.jit, static_argnames="rule")
def update_once(fitness, client, assignment, score, counted, hyper, rule):
    decay, target = idle_rule(rule, hyper)
    return update_fitness(
        *(fitness, client, assignment, score, counted),
        rate=hyper.fitness.rate,
        idle_decay=decay,
        idle_target=target,
    )


def test_init_fitness_is_the_prior_plus_bounded_noise():
    fitness = np.asarray(init_fitness(jax.random.key(0), 50, 8, 0.5, 0.01))
    assert fitness.shape == (50, 8) and fitness.dtype == np.float32
    assert np.all(np.abs(fitness - 0.5) <= 0.01 + 1e-6)
    assert len(np.unique(fitness)) > 390 and abs(fitness.mean() - 0.5) < 0.001


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("accuracy", 0.8),
        ("loss", np.exp(-2 * 0.5)),
        ("mixed", 0.75 * 0.8 + 0.25 * 0.4),
        ("probe", np.exp(-2 * 0.3)),
    ],
)
def test_score_by_hand(kind, expected):
    leaf = lambda value: jnp.full((1, 1), value)
    numbers = dict(accuracy=leaf(0.8), loss=leaf(0.5), frequency=leaf(0.4))
    feedback = make_feedback(leaf(7.0), **numbers, peak=leaf(0.6), probe=leaf(0.3))
    hyper = make_hyper(fitness={"loss_scale": 2.0, "frequency_share": 0.25})
    found = score(kind, feedback, leaf(True), hyper)
    np.testing.assert_allclose(found, [[expected]], rtol=1e-6)


def test_relative_scores_by_hand():
    """Clients with three, one and no trained expert; untrained slots do not count."""
    load = jnp.array([[4.0, 4.0, 2.0, 0.0], [0.0, 8.0, 0.0, 0.0], [0.0] * 4])
    accuracy = jnp.array([[0.9, 0.6, 0.6, 0.0], [0.0, 0.3, 0.0, 0.0], [0.0] * 4])
    loss = jnp.array([[1.0, 2.0, 3.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0] * 4])
    feedback = make_feedback(load, accuracy=accuracy, loss=loss)
    hyper = make_hyper(fitness={"loss_scale": 2.0})
    slot = jnp.ones((3, 4), bool)
    found = score("relative", feedback, slot, hyper)
    np.testing.assert_allclose(found[0, :3], [0.6, 0.45, 0.45], rtol=1e-6)  # mean 0.7
    np.testing.assert_allclose([found[1, 1], *found[2]], [0.5] * 5)
    found = score("relative_loss", feedback, slot, hyper)
    logistic = lambda x: 1 / (1 + np.exp(-x))
    expected = [logistic(2), 0.5, logistic(-2)]
    np.testing.assert_allclose(found[0, :3], expected, rtol=1e-6)  # mean 2
    np.testing.assert_allclose([found[1, 1], *found[2]], [0.5] * 5)


def test_relative_probe_by_hand():
    """Clients with three and one expert, none of them trained; others do not count."""
    slot = jnp.array([[True, True, True, False], [True, False, False, False]])
    probe = jnp.array([[1.0, 2.0, 3.0, jnp.nan], [5.0, 9.0, jnp.inf, 0.0]])
    feedback = make_feedback(jnp.zeros((2, 4)), probe=probe)
    hyper = make_hyper(fitness={"loss_scale": 2.0})
    found = score("relative_probe", feedback, slot, hyper)
    logistic = lambda x: 1 / (1 + np.exp(-x))
    expected = [logistic(2), 0.5, logistic(-2)]
    np.testing.assert_allclose(found[0, :3], expected, rtol=1e-6)  # mean 2
    assert found[1, 0] == 0.5


@pytest.mark.slow
@given(st.lists(st.floats(0, 20, width=32), min_size=2, max_size=4))
def test_probes_rank_the_experts_of_a_client_by_their_losses(losses):
    probe = jnp.asarray([losses], jnp.float32)
    feedback = make_feedback(jnp.zeros(probe.shape), probe=probe)
    order = np.argsort(np.asarray(probe[0]), kind="stable")
    for kind in PROBES:
        found = score(kind, feedback, jnp.ones(probe.shape, bool), make_hyper())
        assert np.all((found >= 0) & (found <= 1))
        assert np.all(np.diff(found[0][order]) <= 0)


@pytest.mark.parametrize("kind", ["relative", "relative_loss", "relative_probe"])
def test_relative_scores_leave_out_what_a_clients_experts_share(kind):
    rng = np.random.default_rng(0)
    values = 0.5 * rng.random((2, 3))
    feedback = make_feedback(jnp.ones((2, 3)))
    scores = lambda rows: score(
        kind,
        feedback.replace(
            **dict.fromkeys(("accuracy", "loss", "probe"), jnp.asarray(rows))
        ),
        jnp.ones((2, 3), bool),
        make_hyper(),
    )
    shared = jnp.array([[0.0], [0.5]])
    np.testing.assert_allclose(scores(values + shared), scores(values), atol=1e-6)


def test_score_refuses_unknown_feedback():
    with pytest.raises(UserError, match="fitness.feedback='x'.*accuracy, loss, mixed"):
        score("x", None, None, None)


def test_idle_rule_refuses_unknown_kinds():
    with pytest.raises(UserError, match="fitness.idle='x'.*keep, decay, prior"):
        idle_rule("x", make_hyper())


@pytest.mark.parametrize(
    ("rule", "idle_from_one"),
    [("keep", 1.0), ("decay", 0.8), ("prior", 0.8 * 1 + 0.2 * 0.5)],
)
def test_update_fitness_by_hand(rule, idle_from_one):
    hyper = make_hyper(fitness={"rate": 0.3, "idle_decay": 0.8, "prior": 0.5})
    assignment = Assignment(  # client 2 holds 1 and 0, client 0 holds 2 (and not 1)
        held=jnp.array([[1, 0], [2, 1]]), slot=jnp.array([[True, True], [True, False]])
    )
    scores = jnp.array([[0.0, 0.5], [0.2, 0.9]])
    counted = jnp.array([[True, False], [True, True]])
    cohort = jnp.array([2, 0]), assignment, scores, counted
    got = update_once(jnp.ones((3, 3)), *cohort, hyper, rule)
    idle = idle_from_one
    expected = [
        [idle, idle, 0.7 * 1 + 0.3 * 0.2],
        [idle, idle, idle],  # outside the cohort
        [1.0, 0.7 * 1 + 0.3 * 0.0, idle],  # expert 0: held, no evidence, kept
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_update_fitness_keeps_exactly_and_never_takes_bad_scores():
    fitness = init_fitness(jax.random.key(1), 5, 4, 0.5, 0.3)
    hyper = make_hyper(fitness={"rate": 1.0})
    held = jnp.array([[0, 1, 2]])
    assignment = Assignment(held, jnp.ones((1, 3), bool))
    bad = jnp.array([[jnp.nan, jnp.inf, -jnp.inf]])
    everything = jnp.ones((1, 3), bool)
    cohort = jnp.array([3]), assignment, bad, everything
    got = update_once(fitness, *cohort, hyper, "keep")
    np.testing.assert_array_equal(got, fitness)
