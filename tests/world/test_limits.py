"""Cohorts and capacities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.types import Devices
from fedmoe_jax.world.availability import sample_cohort
from fedmoe_jax.world.costs import Costs
from fedmoe_jax.world.limits import true_capacity

# --- availability


def test_a_full_cohort_is_everyone():
    assert sample_cohort(jax.random.key(0), 5, 5).tolist() == [0, 1, 2, 3, 4]


def test_cohorts_are_sorted_distinct_and_fair():
    keys = jax.random.split(jax.random.key(0), 500)
    draw = jax.jit(jax.vmap(lambda key: sample_cohort(key, 10, 4)))
    cohorts = np.asarray(draw(keys))
    assert cohorts.dtype == np.int32 and cohorts.shape == (500, 4)
    assert np.all(np.diff(cohorts, axis=1) > 0)
    share = np.bincount(cohorts.ravel(), minlength=10) / 500
    np.testing.assert_allclose(share, 0.4, atol=0.1)


@pytest.mark.parametrize("size", [0, 6])
def test_impossible_cohorts_are_refused(size):
    with pytest.raises(UserError, match=f"cohort_size={size}.*num_clients=5"):
        sample_cohort(jax.random.key(0), 5, size)


# --- capacity

COSTS = Costs(
    stem_bytes=300.0,
    head_bytes=100.0,
    gate_bytes=100.0,
    expert_bytes=1000.0,
    stem_flops=4.0,
    shared_flops=10.0,
    expert_flops=20.0,
)
# Deadline 100 s, half of it for the network, 5 examples, no buffer:
# memory m: (m / 4 - 500) / 1000; network both ways at r: (50 r / 2 - 500) / 1000;
# compute f: (50 f / 5 - 10) / 20.
SETTING = dict(deadline=100.0, communication_share=0.5, examples=5.0, max_capacity=4)
PLENTY = dict(memory=1e9, flops=1e9, rate=1e9)


def one_device(memory, flops, rate, latency=0.0):
    row = lambda value: jnp.full((1,), value, jnp.float32)
    return Devices(
        memory=row(memory),
        flops=row(flops),
        upload=row(rate),
        download=row(rate),
        latency=row(latency),
        power=row(1.0),
        radio=row(1.0),
        tier=jnp.zeros(1, int),
    )


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (dict(), 4),  # no limit but K
        (dict(memory=14_100.0), 3),  # 3.025
        (dict(memory=13_900.0), 2),  # 2.975
        (dict(rate=101.0), 2),  # 2.025
        (dict(rate=99.0), 1),  # 1.975
        (dict(rate=101.0, latency=1.0), 1),  # 48 s are left: 1.924
        (dict(flops=7.1), 3),  # 3.05
        (dict(flops=6.9), 2),  # 2.95
        (dict(memory=14_100.0, rate=101.0, flops=7.1), 2),  # the least counts
        (dict(memory=1.0), 0),
    ],
)
def test_capacity_by_hand(limits, expected):
    devices = one_device(**(PLENTY | limits))
    got = true_capacity(devices, COSTS, buffer=0.0, **SETTING)
    assert got.dtype == jnp.int32 and got.tolist() == [expected]


@pytest.mark.parametrize("limit", [{"memory": 14e3}, {"rate": 140.0}, {"flops": 8.0}])
def test_buffer_is_as_good_as_less_of_every_resource(limit):
    devices = one_device(**(PLENTY | limit))
    less = jax.tree.map(lambda leaf: 0.75 * leaf, devices)
    with_buffer = true_capacity(devices, COSTS, buffer=0.25, **SETTING)
    without = true_capacity(less, COSTS, buffer=0.0, **SETTING)
    full = true_capacity(devices, COSTS, buffer=0.0, **SETTING)
    assert with_buffer.tolist() == without.tolist() and with_buffer[0] < full[0]


def test_upload_and_download_both_count():
    devices = one_device(**PLENTY).replace(upload=jnp.array([51.0]))
    got = true_capacity(devices, COSTS, buffer=0.0, **SETTING)
    assert got.tolist() == [2]  # (50 * 51 - 500) / 1000 = 2.05, download is free
