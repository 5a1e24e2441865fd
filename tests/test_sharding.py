"""One device or many, one client at a time or several: the same numbers."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import default
from fedmoe_jax import train
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.sharding import CLIENTS, build_mesh
from fedmoe_jax.types import UserError

DEVICES = 8
COHORT = 3  # divisible neither by 8 devices nor by 2 devices with chunks of 3


@functools.cache
def run_on(num_devices, client_chunk):
    """Params, alignment state and metrics after two rounds."""
    config = default.get_config("smoke")
    config.update_from_flattened_dict(
        {
            # the sizes of tests/test_train.py, whose compiled programs then serve here
            "chunk_rounds": 1,
            "num_clients": 4,
            "cohort_size": COHORT,
            "num_experts": 3,
            "max_held": 2,
            "batch_size": 4,
            "partition.alpha": 1.0,
            "model.stem_width": 4,
            "model.expert_width": 4,
            "model.feature_width": 4,
            "run.num_devices": num_devices,
            "run.client_chunk": client_chunk,
        }
    )
    parts = train.build_parts(config)
    setup = parts.setup
    assert setup.mesh.size == (num_devices or DEVICES)
    run_rounds = build_run_rounds(setup)
    state, metrics = parts.state, []
    for _ in range(2):
        state, new = run_rounds(state, parts.federation, parts.hyper)
        metrics.append(new)
    return jax.device_get((state.params, state.align, metrics))


def assert_close(left, right, rtol):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5)
    jax.tree.map(close, left, right)


def test_enough_devices():
    assert jax.device_count() == DEVICES


@pytest.mark.parametrize(("num_devices", "client_chunk"), [(0, 1), (2, 3)])
def test_devices_and_chunks_change_nothing(num_devices, client_chunk):
    params, align, metrics = run_on(num_devices, client_chunk)
    params_1, align_1, metrics_1 = run_on(1, 1)
    assert_close(params, params_1, rtol=0)
    assert_close(align.fitness, align_1.fitness, rtol=0)
    np.testing.assert_array_equal(align.times_held, align_1.times_held)
    assert_close(metrics, metrics_1, rtol=1e-5)  # bytes and losses are larger than 1


@pytest.mark.parametrize("num_devices", [-1, DEVICES + 1])
def test_mesh_of_devices_that_are_not_there_is_refused(num_devices):
    with pytest.raises(UserError, match=rf"run.num_devices={num_devices}\b.*to 8"):
        build_mesh(num_devices)


@pytest.mark.parametrize(("asked", "size"), [(0, DEVICES), (1, 1), (3, 3)])
def test_mesh_has_the_devices_asked_for(asked, size):
    mesh = build_mesh(asked)
    assert mesh.shape == {CLIENTS: size}
    assert mesh.axis_types == (AxisType.Auto,)
    assert list(mesh.devices) == jax.devices()[:size]
