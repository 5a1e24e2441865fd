"""Scheduling ragged clients on devices: each once, and devices end together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.runtime import scheduling
from fedmoe_jax.runtime.scheduling import chunk_size

pytestmark = pytest.mark.slow

schedule = jax.jit(scheduling.schedule, static_argnums=(1, 2))
wasted_share = jax.jit(scheduling.wasted_share, static_argnums=(1, 2))


def device_loads(steps, scheduled):
    """Steps of every device [D]: of each chunk those of its longest client."""
    padded = np.zeros(scheduled.size, int)
    padded[: len(steps)] = steps
    return padded[np.asarray(scheduled)].max(-1).sum(-1)


@pytest.mark.parametrize(
    ("cohort", "devices", "asked", "chunk"),
    [(20, 1, 4, 4), (20, 8, 4, 3), (3, 8, 4, 1), (3, 2, 50, 2), (8, 8, 1, 1)],
)
def test_chunk_size_is_at_most_the_share_of_a_device(cohort, devices, asked, chunk):
    assert chunk_size(cohort, devices, asked) == chunk


def test_schedule_of_two_devices_by_hand():
    steps = jnp.array([5, 1, 4, 2, 3, 3])
    # Hands of 5 and 4, 3 and 3, 2 and 1; the device that has less gets the larger:
    # 5 | 4, then 5 + 3 | 4 + 3, then 8 + 1 | 7 + 2.
    scheduled = schedule(steps, 2, 1)
    assert scheduled.tolist() == [[[0], [5], [1]], [[2], [4], [3]]]
    assert device_loads(steps, scheduled).tolist() == [9, 9]
    assert wasted_share(steps, 2, 1) == 0


def test_schedule_of_chunks_of_similar_clients_by_hand():
    steps = jnp.array([1, 5, 2])
    assert schedule(steps, 1, 2).tolist() == [[[1, 2], [0, 3]]]  # position 3 pads
    # Chunks of 5 and 1 steps, each for two clients, of which 8 are wanted.
    np.testing.assert_allclose(wasted_share(steps, 1, 2), 1 - 8 / 12, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "devices", "chunk", "share"),
    [
        ([4, 4, 2], 8, 1, 1 - 10 / 32),  # five devices have nothing to do
        ([7, 7, 7, 7], 2, 2, 0.0),
        ([1, 1, 1, 9], 2, 2, 1 - 12 / 36),
        ([1, 1, 1, 9], 1, 1, 0.0),  # alone and one by one nobody waits
    ],
)
def test_wasted_share_by_hand(steps, devices, chunk, share):
    found = wasted_share(jnp.array(steps), devices, chunk)
    np.testing.assert_allclose(found, share, atol=1e-6)


cohorts = st.lists(st.integers(1, 60), min_size=1, max_size=24)
meshes = st.sampled_from([(1, 1), (1, 4), (2, 1), (3, 2), (8, 1), (8, 3)])


@settings(max_examples=60)
@given(cohorts, meshes)
def test_schedule_places_every_client_once_and_devices_end_together(steps, mesh):
    num_devices, chunk = mesh
    scheduled = schedule(jnp.array(steps), num_devices, chunk)
    assert scheduled.dtype == jnp.int32 and scheduled.shape[::2] == mesh
    assert scheduled.shape[1] == -(-len(steps) // (num_devices * chunk))
    assert sorted(scheduled.ravel().tolist()) == list(range(scheduled.size))
    loads = device_loads(steps, scheduled)
    assert loads.max() <= loads.mean() + max(steps)
    assert loads.max() - loads.min() <= max(steps)
    expected = 1 - sum(steps) / (loads.max() * num_devices * chunk)
    found = wasted_share(jnp.array(steps), num_devices, chunk)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=20)
@given(st.integers(1, 24), st.integers(1, 9), meshes)
def test_schedule_keeps_the_order_of_equal_clients(count, steps, mesh):
    scheduled = schedule(jnp.full(count, steps), *mesh)
    walked = scheduled.swapaxes(0, 1).ravel()
    np.testing.assert_array_equal(walked, np.arange(scheduled.size))


def test_schedule_beats_the_order_of_the_cohort():
    steps = np.round(np.random.default_rng(0).lognormal(2, 1, 64)).astype(int) + 1
    in_order = device_loads(steps, np.arange(64).reshape(8, 2, 4))
    scheduled = device_loads(steps, schedule(jnp.asarray(steps), 8, 4))
    assert scheduled.max() < 0.75 * in_order.max()
