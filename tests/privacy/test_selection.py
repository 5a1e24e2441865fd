"""Private selection: its distribution against the peeling exponential mechanism."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_evidence, make_hyper

from fedmoe_jax.privacy.selection import RANGE, hide_fitness
from fedmoe_jax.strategies.greedy import assign
from fedmoe_jax.types import make_keys

DRAWS, E = 40_000, 4
KEYS = make_keys(jax.random.key(0), 3)
QUALITY = np.array([0.9, 0.5, 0.1, 1.7])  # the last one is clipped to 1


def peel(quality, epsilon, count):
    """The probability of every set of `count` experts, one pick after the other."""
    merit = np.exp(epsilon * np.clip(quality, 0, 1) / RANGE)
    found = dict.fromkeys(itertools.combinations(range(E), count), 0.0)
    for order in itertools.permutations(range(E), count):
        left, chance = merit.sum(), 1.0
        for expert in order:
            chance *= merit[expert] / left
            left -= merit[expert]
        found[tuple(sorted(order))] += chance
    return found


@pytest.mark.slow
def test_hide_fitness_makes_greedy_the_peeling_mechanism_under_capacity():
    """Half of the clients hold one expert, half hold two."""
    sizes = SIZES._replace(
        num_clients=DRAWS, cohort_size=DRAWS, num_experts=E, max_held=2
    )
    hyper = make_hyper(privacy={"selection": 3.0})
    client = jnp.arange(DRAWS, dtype=jnp.int32)
    fitness = jnp.tile(jnp.asarray(QUALITY, jnp.float32), (DRAWS, 1, 1))
    noisy = hide_fitness(fitness, client, hyper, KEYS)[:, 0]
    evidence = make_evidence(sizes, fitness=noisy, usage=np.zeros(E))
    assert set(np.array(evidence.capacity)) == {1, 2}
    assignment = jax.jit(assign, static_argnums=2)(
        evidence, hyper, sizes, jax.random.key(1)
    )
    held, capacity = np.sort(assignment.held, axis=1), np.array(evidence.capacity)
    first = np.array(assignment.held)[:, 0]
    for count in (1, 2):
        rows = held[capacity == 2] if count == 2 else first[capacity == 1][:, None]
        total = sum(peel(QUALITY, 3.0, count).values())
        np.testing.assert_allclose(total, 1)
        for chosen, chance in peel(QUALITY, 3.0, count).items():
            share = (rows == np.array(chosen)).all(1).mean()
            error = np.sqrt(chance * (1 - chance) / len(rows))
            assert abs(share - chance) < 4.5 * error, (chosen, share, chance)


def test_hide_fitness_draws_by_client_and_round_and_not_by_cohort():
    hyper, fitness = make_hyper(privacy={"selection": 1.0}), jnp.zeros((3, 2, E))
    noisy = hide_fitness(fitness, jnp.array([4, 7, 9]), hyper, KEYS)
    alone = hide_fitness(fitness[:1], jnp.array([7]), hyper, KEYS)
    np.testing.assert_array_equal(noisy[1], alone[0])
    later = hide_fitness(fitness, jnp.array([4, 7, 9]), hyper, make_keys(KEYS.run, 4))
    assert (np.abs(np.array(noisy - later)) > 0).all()
    assert len(np.unique(noisy)) == noisy.size


def test_hide_fitness_of_a_large_epsilon_only_clips():
    hyper = make_hyper(privacy={"selection": 1e9})
    fitness = jnp.array([[[-1.0, 0.25, 3.0]]])
    noisy = hide_fitness(fitness, jnp.array([0]), hyper, KEYS)
    np.testing.assert_allclose(noisy, [[[0.0, 0.25, 1.0]]], atol=1e-6)
