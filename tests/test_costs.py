"""Bytes, FLOPs and seconds by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.costs import (
    Costs,
    client_bytes,
    client_flops,
    client_seconds,
    count_costs,
    scale_costs,
)
from fedmoe_jax.types import Devices

COSTS = Costs(
    shared_bytes=400.0,
    gate_bytes=100.0,
    expert_bytes=1000.0,
    shared_flops=10.0,
    expert_flops=20.0,
)
SLOTS = jnp.array([1, 3])


def test_costs_are_counted_from_the_params():
    params = {
        "stem": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)},  # 20 floats
        "gate": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(4)},  # 24 floats
        "experts": {"a": jnp.zeros((4, 5, 7)), "b": jnp.zeros((4, 7), jnp.bfloat16)},
        "head": {"kernel": jnp.zeros((7, 2))},  # 14 floats
    }
    expected = Costs(
        shared_bytes=4 * (20 + 14),
        gate_bytes=4 * 24,
        expert_bytes=4 * 35 + 2 * 7,
        shared_flops=3 * 11,  # backward is twice forward
        expert_flops=3 * 13,
    )
    assert count_costs(params, 11, 13) == expected
    shapes = jax.eval_shape(lambda: params)
    assert count_costs(shapes, 11, 13) == expected


def test_scaling_multiplies_every_cost():
    assert scale_costs(COSTS, 3) == Costs(1200.0, 300.0, 3000.0, 30.0, 60.0)


@pytest.mark.parametrize(("personal", "gate"), [(False, 100), (True, 0)])
def test_bytes_by_hand(personal, gate):
    up, down = client_bytes(COSTS, SLOTS, personal_gate=personal)
    assert down.tolist() == [400 + gate + 1000, 400 + gate + 3000]
    assert up.tolist() == [400 + gate + 1016, 400 + gate + 3048]


def test_bytes_beyond_int32():
    up, down = client_bytes(scale_costs(COSTS, 10**7), SLOTS, personal_gate=False)
    np.testing.assert_allclose(down, [1.5e10, 3.5e10], rtol=1e-6)
    assert np.all(up > 2.0**31)


def test_costs_of_whole_numbers_beyond_int32_can_be_traced():
    params = dict.fromkeys(("stem", "gate", "experts", "head"), jnp.zeros((2, 2)))
    costs = scale_costs(count_costs(params, 10**12, 10**12), 10**4)
    flops = jax.jit(lambda slots: client_flops(costs, slots, 2.0))(SLOTS)
    np.testing.assert_allclose(flops, [12e16, 24e16], rtol=1e-6)


def test_flops_by_hand():
    one_size = client_flops(COSTS, SLOTS, jnp.float32(5))
    assert one_size.tolist() == [5 * (10 + 20), 5 * (10 + 60)]
    each_its_own = client_flops(COSTS, SLOTS, jnp.array([5.0, 1.0]))
    assert each_its_own.tolist() == [150, 70]


def test_seconds_by_hand():
    devices = Devices(
        memory=jnp.ones(2),
        flops=jnp.array([15.0, 70.0]),
        upload=jnp.array([1516.0, 3548.0]),
        download=jnp.array([1500.0, 7000.0]),
        tier=jnp.zeros(2, jnp.int32),
    )
    seconds = jax.jit(client_seconds, static_argnames="personal_gate")(
        devices, COSTS, SLOTS, jnp.float32(5), personal_gate=False
    )
    # download 1500 and 3500 bytes, train 150 and 350 FLOPs, upload 1516 and 3548 bytes
    np.testing.assert_allclose(seconds, [1 + 10 + 1, 0.5 + 5 + 1], rtol=1e-6)
