"""Reported gates: what a client reports, and what is kept of it."""

import jax
import jax.numpy as jnp
import numpy as np
from factories import SIZES, make_evidence

from fedmoe_jax.align.gate_mass import (
    init_mass,
    mass_or_random,
    report_mass,
    update_mass,
)
from fedmoe_jax.base import Routing

TWO = SIZES._replace(num_clients=2, cohort_size=2, num_experts=3, max_held=3)


def test_report_mass_is_the_mean_gate_over_all_experts():
    gates = jnp.array([[0.5, 0.25, 0.25], [0.7, 0.1, 0.2]])
    report = report_mass(Routing(jnp.log(gates), None), None, None)
    np.testing.assert_allclose(report, [0.6, 0.175, 0.225], rtol=1e-5)
    padded = Routing(jnp.log(gates), None, weight=jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(report_mass(padded, None, None), gates[1], rtol=1e-5)


def test_update_mass_keeps_the_last_report_of_a_lost_update():
    mass = jnp.array([0.5, 0.2, 0.3])
    old = jnp.arange(6.0).reshape(2, 3)
    evidence = make_evidence(TWO, state={"mass": old, "anchor": 7})
    reports = jnp.stack([mass, jnp.zeros(3)])  # the second did not arrive
    learnt = update_mass(evidence, None, None, reports, None)
    np.testing.assert_allclose(learnt["mass"], jnp.stack([mass, old[1]]))
    assert learnt["anchor"] == 7


def test_mass_or_random_draws_for_clients_without_a_report():
    state = init_mass(TWO)
    assert not np.any(state["mass"]) and state["mass"].shape == (2, 3)
    known = state["mass"].at[0].set(jnp.array([0.5, 0.2, 0.3]))
    evidence = make_evidence(TWO, state={"mass": known})
    scores, mass, new = mass_or_random(evidence, TWO, jax.random.key(0))
    assert new.tolist() == [False, True]
    np.testing.assert_array_equal(scores[0], known[0])
    assert np.all((scores[1] > 0) & (scores[1] < 1))
    assert len(set(scores[1].tolist())) == 3
    np.testing.assert_array_equal(mass, known)
