"""Noisy feedback: what gets noise, how much, and what stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
from factories import (
    K,
    make_feedback,
    make_hyper,
    make_inputs,
    make_update,
)

from fedmoe_jax.privacy.feedback import (
    LEAST,
    blur,
    blur_feedback,
    blur_report,
    hide_feedback,
)

KEY = jax.random.key(0)
SLOT = jnp.array([[True, False]])
EXACT = make_feedback(
    jnp.array([[6.0, 0.0]]),
    accuracy=jnp.array([[0.7, 0.0]]),
    loss=jnp.array([[0.5, 0.0]]),
    frequency=jnp.array([[1.0, 0.0]]),
    routed=jnp.array([[0.75, 0.0]]),
    peak=jnp.array([[0.9, 0.0]]),
)


def test_blur_feedback_without_noise_keeps_the_numbers():
    found = blur_feedback(EXACT, SLOT, jnp.float32(8.0), jnp.float32(0.0), KEY)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, rtol=1e-6), found, EXACT
    )


def test_blur_feedback_draws_every_number_apart_and_no_invalid_slot():
    deviation = jnp.float32(0.05)
    found = blur_feedback(EXACT, SLOT, jnp.float32(8.0), deviation, KEY)
    assert found.probe is None
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(EXACT), strict=True):
        assert new[0, 1] == old[0, 1] == 0
    moved = [found.accuracy - EXACT.accuracy, found.peak - EXACT.peak]
    moved.append(jnp.exp(-found.loss) - jnp.exp(-EXACT.loss))
    moved.append(found.routed - EXACT.routed)
    moved = np.array(moved)[:, 0, 0]
    assert (np.abs(moved) > 1e-4).all() and len(set(moved.round(6))) == 4
    np.testing.assert_allclose(found.load, 8 * found.routed * SLOT, rtol=1e-6)


def test_blur_feedback_hides_whether_a_slot_was_used():
    unused = jax.tree.map(jnp.zeros_like, EXACT)
    found = blur_feedback(unused, SLOT, jnp.float32(8.0), jnp.float32(0.5), KEY)
    assert found.load[0, 0] >= 8 * LEAST > 0


def test_blur_feedback_gives_probes_of_all_slots_noise():
    exact = EXACT.replace(probe=jnp.array([[0.5, 1.5]]))
    found = blur_feedback(exact, SLOT, jnp.float32(8.0), jnp.float32(0.01), KEY)
    assert (jnp.abs(found.probe - exact.probe) > 0).all()
    np.testing.assert_allclose(found.probe, exact.probe, atol=0.2)


def test_blur_has_the_deviation_of_its_noise_and_stays_within_bounds():
    values = jnp.full(20_000, 0.5)
    found = np.array(blur(values, jnp.float32(0.1), KEY))
    np.testing.assert_allclose([found.mean(), found.std()], [0.5, 0.1], atol=3e-3)
    wild = np.array(blur(values, jnp.float32(9.0), KEY))
    assert wild.min() == 0 and wild.max() == 1
    # A number beyond its bounds says no more than one at them.
    far, near = (blur(jnp.full(5, x), jnp.float32(0.1), KEY) for x in (7.0, 1.0))
    np.testing.assert_array_equal(far, near)


def test_blur_keeps_what_is_broken():
    assert np.isnan(blur(jnp.array([jnp.nan]), jnp.float32(0.1), KEY)).all()


def test_blur_report_of_every_form():
    assert blur_report(None, jnp.float32(0.1), KEY) is None
    report = {"mass": jnp.full((1, 3), 0.5), "more": jnp.full((1, 3), 0.5)}
    found = blur_report(report, jnp.float32(0.1), KEY)
    both = np.array([found["mass"], found["more"]])
    assert len(np.unique(both)) == 6 and (np.abs(both - 0.5) < 0.5).all()


def test_hide_feedback_draws_from_the_clients_key():
    hyper = make_hyper(privacy={"feedback_noise": 0.1})
    held = np.zeros((1, 1, K), np.int32)
    inputs = make_inputs(held, np.ones((1, 1, K), bool))
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    feedback = make_feedback(jnp.full((1, K), 0.5))
    update = make_update({}, feedback, finite=True)
    numbers = inputs, jnp.float32(8.0), hyper
    find = lambda key: hide_feedback(update, *numbers, key).feedback
    one, other = find(KEY), find(jax.random.key(1))
    np.testing.assert_allclose(one.load, 8 * one.routed, rtol=1e-6)
    assert (np.array(one.accuracy) != np.array(other.accuracy)).all()
    np.testing.assert_array_equal(one.accuracy, find(KEY).accuracy)
