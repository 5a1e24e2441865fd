"""Weak devices that are out of reach more often: by hand, and the stationary law."""

import jax
import jax.numpy as jnp
import numpy as np
from factories import SIZES, choose, make_devices, make_federation, make_hyper

from fedmoe_jax.types import make_keys
from fedmoe_jax.world.capacity_bias import count_stronger
from fedmoe_jax.world.step import init_world, observe, step_world


def test_count_stronger_by_hand():
    memory = jnp.array([3.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(count_stronger(memory), [0, 0.75, 0.25, 0.25])
    assert count_stronger(jnp.ones(3)).tolist() == [0, 0, 0]


def test_clients_are_there_as_often_as_their_memory_says_in_spells():
    """Four sizes of memory, 5,000 clients each; w is 3/4, 1/2, 1/4 and 0."""
    numbers = {"capacity_bias": 0.8, "persistence": 0.7}
    hyper, count = make_hyper(availability=numbers), 20_000
    memory = jnp.arange(count) // 5000 + 1.0
    federation = make_federation(devices=make_devices(count, memory=memory))
    sizes, chain = SIZES._replace(num_clients=count), choose("bias")
    start = init_world(jax.random.key(3), hyper, sizes, chain)

    def step(world, round):
        keys = make_keys(jax.random.key(3), round)
        world = step_world(world, keys, round, hyper, chain)
        there = observe(world, federation, hyper, chain).events.reachable
        return world, (world["bias"], there)

    _, (latent, there) = jax.lax.scan(step, start, jnp.arange(6))
    expected = np.array([0.4, 0.6, 0.8, 1.0])  # 1 - 0.8 w
    for now in np.asarray(there):  # four standard errors are 0.03 at most
        np.testing.assert_allclose(now.reshape(4, -1).mean(1), expected, atol=0.03)
    lag = lambda k: np.corrcoef(latent[0], latent[k])[0, 1]
    np.testing.assert_allclose([lag(1), lag(3)], [0.7, 0.343], atol=0.03)
    stays = np.mean(there[0][:5000] & there[1][:5000])
    assert stays > 0.4**2 + 0.05


def test_a_client_out_of_reach_for_another_reason_stays_so():
    federation = make_federation(devices=make_devices(4))
    states = {"busy": jnp.arange(4) == 1, "bias": jnp.full(4, -9.0)}
    hyper = make_hyper(availability={"capacity_bias": 0.9})
    events = observe(states, federation, hyper, choose("bias", "busy")).events
    assert events.reachable.tolist() == [True, False, True, True]
