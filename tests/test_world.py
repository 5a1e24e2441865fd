"""Cohorts, devices and capacities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.costs import Costs
from fedmoe_jax.profile import profile
from fedmoe_jax.types import Devices, Hyper, UserError
from fedmoe_jax.world.availability import sample_cohort
from fedmoe_jax.world.capacity import TIERS, draw_devices, true_capacity

NAMES = ("phone", "laptop", "workstation")


def rng():
    return np.random.default_rng(7)


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


# --- devices


@pytest.mark.parametrize(
    ("num_clients", "shares", "counts"),
    [
        (10, (0.4, 0.4, 0.2), [4, 4, 2]),
        (7, (0.5, 0.25, 0.25), [3, 2, 2]),  # 3.5 1.75 1.75
        (3, (0.0, 1.0, 0.0), [0, 3, 0]),
        (100, (0.29, 0.57, 0.14), [29, 57, 14]),
    ],
)
def test_tiers_are_dealt_by_largest_remainder(num_clients, shares, counts):
    devices = draw_devices(rng(), num_clients, NAMES, shares, 0.0)
    assert np.bincount(devices.tier, minlength=3).tolist() == counts


def test_without_spread_every_device_is_the_median_of_its_tier():
    devices = draw_devices(rng(), 20, NAMES, (0.4, 0.4, 0.2), 0.0)
    assert len(np.unique(devices.tier[:8])) > 1  # shuffled, not in blocks
    for field in ("memory", "flops", "upload", "download"):
        medians = np.array([getattr(TIERS[name], field) for name in NAMES], np.float32)
        np.testing.assert_array_equal(getattr(devices, field), medians[devices.tier])


def test_values_are_log_normal_within_a_tier():
    devices = draw_devices(rng(), 4000, ("phone",), (1.0,), 0.3)
    logs = np.log(np.stack([devices.memory / 4e9, devices.upload / 5e6]))
    np.testing.assert_allclose(logs.mean(axis=1), 0.0, atol=0.02)
    np.testing.assert_allclose(logs.std(axis=1), 0.3, atol=0.02)
    assert abs(np.corrcoef(logs)[0, 1]) < 0.06  # drawn apart
    assert devices.memory.dtype == np.float32 and devices.tier.dtype == np.int32


def test_devices_repeat_with_the_seed():
    first, second = (draw_devices(rng(), 9, NAMES, (0.5, 0.3, 0.2), 0.3) for _ in "ab")
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("tiers", "shares", "spread", "message"),
    [
        (("phone", "toaster"), (0.5, 0.5), 0.1, "devices.tiers.*'toaster'.*phone"),
        (("phone", "laptop"), (1.0,), 0.1, "devices.shares.*2 devices.tiers"),
        (("phone", "laptop"), (0.5, 0.6), 0.1, "devices.shares.*sum to 1"),
        (("phone", "laptop"), (1.5, -0.5), 0.1, "devices.shares.*>= 0"),
        (("phone",), (float("nan"),), 0.1, "devices.shares"),
        (("phone",), (1.0,), -0.1, "devices.spread=-0.1"),
    ],
)
def test_bad_device_settings_are_refused(tiers, shares, spread, message):
    with pytest.raises(UserError, match=message):
        draw_devices(rng(), 4, tiers, shares, spread)


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


def one_device(memory, flops, rate):
    row = lambda value: jnp.full((1,), value, jnp.float32)
    return Devices(row(memory), row(flops), row(rate), row(rate), jnp.zeros(1, int))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (dict(), 4),  # no limit but K
        (dict(memory=14_100.0), 3),  # 3.025
        (dict(memory=13_900.0), 2),  # 2.975
        (dict(rate=101.0), 2),  # 2.025
        (dict(rate=99.0), 1),  # 1.975
        (dict(flops=7.1), 3),  # 3.05
        (dict(flops=6.9), 2),  # 2.95
        (dict(memory=14_100.0, rate=101.0, flops=7.1), 2),  # the least counts
        (dict(memory=1.0), 1),  # never less than one
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


def test_profile_is_the_true_capacity_less_a_traced_buffer():
    devices = draw_devices(rng(), 12, NAMES, (0.4, 0.4, 0.2), 0.5)
    costs = Costs(*(1e6 * cost for cost in COSTS))
    fields = dict.fromkeys(Hyper.__dataclass_fields__, jnp.float32(0))
    buffers = jnp.array([0.0, 0.5, 0.9])

    def believe(buffer):
        return profile(
            devices, costs, Hyper(**(fields | {"buffer": buffer})), **SETTING
        )

    got = jax.jit(jax.vmap(believe))(buffers)
    for row, buffer in zip(got, buffers, strict=True):
        expected = true_capacity(devices, costs, buffer=buffer, **SETTING)
        np.testing.assert_array_equal(row, expected)
    assert np.all(np.diff(got, axis=0) <= 0) and got[0].sum() > got[2].sum()
