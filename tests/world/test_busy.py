"""Clients that still work for the last round while the next one begins."""

import jax.numpy as jnp
import numpy as np
from factories import C, N, choose, make_devices, make_federation

from fedmoe_jax.world.availability import Reach
from fedmoe_jax.world.outcome import Outcome
from fedmoe_jax.world.step import close_round, observe


def test_mark_busy_marks_the_late_clients_of_the_last_cohort_alone():
    world = {"pressure": jnp.arange(N) % 2 == 0, "busy": jnp.arange(N) == 0}
    cohort, late = jnp.array([1, 4, 7, 9]), jnp.array([False, True, False, True])
    outcome = Outcome(jnp.zeros(C, jnp.int32), jnp.ones((C, 3)), jnp.ones((C, 3)))
    chain = choose("pressure", "busy")
    after = close_round(world, cohort, outcome, late, None, chain)
    assert np.flatnonzero(after["busy"]).tolist() == [4, 9]
    np.testing.assert_array_equal(after["pressure"], world["pressure"])


def test_apply_busy_puts_clients_at_work_out_of_reach():
    federation = make_federation(devices=make_devices(N))
    here = jnp.arange(N) < 3
    states = {"reach": Reach(jnp.zeros(N), here), "busy": jnp.arange(N) == 0}
    events = observe(states, federation, None, choose("reach", "busy")).events
    assert np.flatnonzero(events.reachable).tolist() == [1, 2]
    alone = observe(states, federation, None, choose("busy")).events
    assert np.flatnonzero(~alone.reachable).tolist() == [0]
