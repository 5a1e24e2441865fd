"""Greedy, which decides by fitness alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_evidence, make_hyper

from fedmoe_jax.align.fitness import idle_rule, update_fitness
from fedmoe_jax.strategies.greedy import GREEDY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "last"), [("decay", 0), ("keep", 2), ("prior", 2)], ids=str
)
def test_greedy_locks_in_its_first_pick_only_under_decay(rule, last):
    """Expert 0 starts a hair ahead and is mediocre; expert 2 is the good one."""
    quality = jnp.array([0.45, 0.40, 0.90, 0.42])
    sizes = SIZES._replace(num_clients=1, cohort_size=1, num_experts=4, max_held=1)
    hyper = make_hyper(fitness={"rate": 0.3, "idle_decay": 0.9, "prior": 0.5})
    decay, target = idle_rule(rule, hyper)

    def one_round(fitness, _):
        evidence = make_evidence(sizes, fitness=fitness, usage=jnp.zeros(4))
        got = GREEDY.assign(evidence, hyper, sizes, jax.random.key(0))
        fitness = update_fitness(
            *(fitness, evidence.client, got, quality[got.held], got.slot),
            rate=hyper.fitness.rate,
            idle_decay=decay,
            idle_target=target,
        )
        return fitness, got.held[0, 0]

    start = jnp.array([[0.501, 0.5, 0.5, 0.5]])
    held = np.asarray(jax.lax.scan(one_round, start, None, length=40)[1])
    assert held[0] == 0 and held[-1] == last
    if rule == "decay":
        assert set(held) == {0}
