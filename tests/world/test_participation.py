"""Participation of the clients so far, by hand."""

import jax.numpy as jnp
import numpy as np
from factories import SIZES

from fedmoe_jax.world.outcome import OUTCOMES, Outcome
from fedmoe_jax.world.participation import init_participation, jain, record


def test_record_equips_clients_that_began_to_train():
    ends = {  # how far download, training and upload got, and whether that equips
        "merged": ([1, 1, 1], True),
        "lost_unreachable": ([0, 0, 0], False),
        "dropped": ([0.5, 0, 0], False),
        "lost_memory": ([1, 0, 0], True),
        "lost_outage": ([1, 0, 0], False),  # on the way down, found at its end
        "lost_dropout": ([1, 0.5, 0], True),
    }
    ends = [*ends.items(), ("lost_outage", ([1, 1, 1], True))]  # on the way up
    count = len(ends)
    outcome = Outcome(
        code=jnp.array([OUTCOMES.index(name) for name, _ in ends]),
        phases=jnp.ones((count, 3)),
        spent=jnp.array([spent for _, (spent, _) in ends], jnp.float32),
    )
    sizes = SIZES._replace(num_clients=count, cohort_size=count)
    nothing = jnp.zeros(count, jnp.int32)
    participation = record(
        init_participation(sizes), jnp.arange(count), nothing, outcome
    )
    assert participation.equipped.tolist() == [equips for _, (_, equips) in ends]


def test_jain_by_hand():
    assert float(jain(jnp.array([2, 2, 2]))) == 1.0
    np.testing.assert_allclose(jain(jnp.array([1, 0, 0, 0])), 0.25)
    np.testing.assert_allclose(jain(jnp.array([3, 1])), 16 / 20)
    assert float(jain(jnp.zeros(3, int))) == 1.0
