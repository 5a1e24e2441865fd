"""Capacities by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import COSTS, make_devices

from fedmoe_jax.world.costs import TRAINING_COPIES, Traffic, client_flops
from fedmoe_jax.world.limits import find_room, limit_probes, true_capacity

# Deadline 100 s, half of it for the network, 5 examples, no buffer:
# memory m: (m / 4 - 500) / 1000; network both ways at r: (50 r / 2 - 500) / 1000;
# compute f: (50 f / 5 - 10) / 20.
SETTING = dict(
    deadline=100.0, communication_share=0.5, examples=5.0, max_capacity=4, probed=0
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
def test_true_capacity_by_hand(limits, expected):
    devices = make_devices(1, **limits)
    got = true_capacity(devices, COSTS, buffer=0.0, **SETTING)
    assert got.dtype == jnp.int32 and got.tolist() == [expected]


# 400 of the 500 bytes and 9 of the 10 FLOPs are frozen: memory m: (m - 400) / 4 - 100
# over 1,000; network: (50 r / 2 - 100) / 1000; compute: (50 f / 5 - 1 - 9 / 3) / 20.
FROZEN = COSTS._replace(
    stem_bytes=0.0, head_bytes=0.0, frozen_bytes=400.0, frozen_flops=9.0
)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (dict(memory=12_900.0), 3),  # 3.025
        (dict(memory=12_700.0), 2),  # 2.975
        (dict(rate=85.0), 2),  # 2.025
        (dict(rate=83.0), 1),  # 1.975
        (dict(flops=6.5), 3),  # 3.05
        (dict(flops=6.3), 2),  # 2.95
    ],
)
def test_true_capacity_beside_frozen_parts(limits, expected):
    """They are held once, have travelled, and have no backward pass."""
    devices = make_devices(1, **limits)
    got = true_capacity(devices, FROZEN, buffer=0.0, **SETTING)
    assert got.tolist() == [expected]


@pytest.mark.parametrize("buffer", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("expert", [1000.0, 16_640.0, 5_767_168.0])
def test_true_capacity_of_what_just_suffices_is_exact(expert, buffer):
    """Memory, rate and speed for exactly k experts, as a device's float32."""
    costs = COSTS._replace(expert_bytes=expert, expert_flops=expert / 7)
    setting = SETTING | {"max_capacity": 99, "buffer": jnp.float32(buffer)}
    held = np.arange(1, 41)
    size = costs.shared_bytes + costs.gate_bytes + held * expert
    work = 5 * (costs.shared_flops + held * costs.expert_flops)
    exact = {
        "memory": TRAINING_COPIES * size,
        "rate": 2 * size / 50,
        "flops": work / 50,
    }
    capacity = jax.jit(lambda devices: true_capacity(devices, costs, **setting))
    for name, amount in exact.items():
        for share, expected in ((1, held), (0.9999, held - 1)):
            limit = {name: np.float32(share * amount / (1 - buffer))}
            devices = make_devices(40, **dict.fromkeys(exact, 1e15) | limit)
            np.testing.assert_array_equal(capacity(devices), expected, name)


@pytest.mark.parametrize("limit", [{"memory": 14e3}, {"rate": 140.0}, {"flops": 8.0}])
def test_true_capacity_with_a_buffer_is_as_good_as_less_of_every_resource(limit):
    devices = make_devices(1, **limit)
    less = jax.tree.map(lambda leaf: 0.75 * leaf, devices)
    with_buffer = true_capacity(devices, COSTS, buffer=0.25, **SETTING)
    without = true_capacity(less, COSTS, buffer=0.0, **SETTING)
    full = true_capacity(devices, COSTS, buffer=0.0, **SETTING)
    assert with_buffer.tolist() == without.tolist() and with_buffer[0] < full[0]


@pytest.mark.parametrize("expert", [20.0, 16_640.0, 5_767_168.0])
@pytest.mark.parametrize("frozen", [0.0, 4.0])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_true_capacity_has_room_for_the_probes_of_just_so_many(expert, frozen, layers):
    """As `client_flops` charges them: 8 examples of every layer for each expert."""
    fields = dict(expert_flops=expert, frozen_flops=frozen, num_layers=layers)
    fields |= dict(fixed_flops=frozen / 4, fixed_expert_flops=frozen * expert / 20)
    costs = COSTS._replace(**fields)
    held = np.arange(1, 41)
    one = jnp.asarray(held, jnp.float32)
    traffic = Traffic(*[one] * 7, probed=layers * 8 * one)
    work = np.asarray(client_flops(costs, traffic, 5.0), np.float64)
    setting = SETTING | {"max_capacity": 99, "probed": layers * 8}
    for share, expected in ((1.0001, held), (0.9999, held - 1)):
        devices = make_devices(40, rate=1e15, memory=1e15, flops=share * work / 50)
        got = true_capacity(devices, costs, buffer=0.0, **setting)
        np.testing.assert_array_equal(got, expected)
    without = true_capacity(devices, costs, buffer=0.0, **setting | {"probed": 0})
    assert np.all(without > got)


def test_find_room_with_a_spread_has_probes_of_all_that_is_held():
    devices = make_devices(1, flops=1e3)
    work = dict(buffer=jnp.float32(0.0), examples=jnp.full(1, 10.0), deadline=1e3)
    work |= dict(communication_share=0.5)
    room = lambda **more: float(find_room(devices, COSTS, **work, **more)[0])
    twice = room(probed=5, spread=jnp.float32(2.0))
    assert 0 < twice == room(probed=10) < room(probed=5)


@pytest.mark.slow
@pytest.mark.parametrize("saving", [0.0, 0.6, 1.0])
def test_true_capacity_has_room_for_pruned_experts(saving):
    """Twice as many, each with half of the FLOPs that pruning can save."""
    costs = COSTS._replace(fixed_expert_flops=3.0)
    held = np.arange(1, 21)
    one = jnp.asarray(held, jnp.float32)
    density = jnp.full(20, 2 * (1 - saving / 2))
    traffic = Traffic(*[one] * 7, saved=0 * one, slots=2 * one, density=density)
    work = np.asarray(client_flops(costs, traffic, 5.0), np.float64)
    setting = SETTING | {"max_capacity": 99, "spread": 2.0, "saving": saving}
    for share, expected in ((1.0001, held), (0.9999, held - 1)):
        devices = make_devices(20, rate=1e15, memory=1e15, flops=share * work / 50)
        got = true_capacity(devices, costs, buffer=0.0, **setting)
        np.testing.assert_array_equal(got, expected)


def test_limit_probes_by_hand():
    """3 examples are run forward for each that is trained, 10 FLOPs shared and 20.

    A third of training is forward, so that the probe of one of k experts takes
    10 + 20 FLOPs of one layer, 10 + 10 (k + 1) of two, beside the 20 of its training.
    """
    find = lambda layers, experts: limit_probes(
        *(jnp.float32(experts), jnp.float32(3)),
        *(COSTS._replace(num_layers=layers), trained),
    )
    trained = 20.0
    np.testing.assert_allclose(find(1, 10), 4)  # 4 + 4 * 1.5
    np.testing.assert_allclose(find(2, 16), 4, rtol=1e-6)  # 4 + 4 * (20 + 10 * 4) / 20
    assert find(1, -1) == find(2, -1) == 0
    trained = 40.0  # of more experts, pruned ones: beside half of 3 passes
    np.testing.assert_allclose(find(1, 7), 4)  # 4 + 4 * 0.75


def test_true_capacity_of_a_device_too_slow_for_anything_is_none_with_probes():
    devices = make_devices(1, flops=1e-3)
    got = true_capacity(devices, COSTS, buffer=0.0, **SETTING | {"probed": 8})
    assert got.tolist() == [0]


@pytest.mark.parametrize(("flops", "expected"), [(4.1, 4), (3.9, 0)])
def test_true_capacity_of_a_single_expert_counted_with_the_rest(flops, expected):
    """50 f / 5 against 30 FLOPs of training and 5 / 5 passes forward of 10."""
    whole = COSTS._replace(shared_flops=30.0, expert_flops=0.0)
    setting = SETTING | {"probed": 5}
    got = true_capacity(make_devices(1, flops=flops), whole, buffer=0.0, **setting)
    assert got.tolist() == [expected]


def test_true_capacity_counts_both_upload_and_download():
    devices = make_devices(1, upload=51.0)
    got = true_capacity(devices, COSTS, buffer=0.0, **SETTING)
    assert got.tolist() == [2]  # (50 * 51 - 500) / 1000 = 2.05, download is free
