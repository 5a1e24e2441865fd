"""One device or many, one client at a time or several: the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SMALL, make_federation, start_run
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import (
    CLIENTS,
    RUNS,
    build_mesh,
    map_runs,
    replicate,
    runs_at_once,
    spread,
)
from fedmoe_jax.train import plan as planning
from fedmoe_jax.types import PER_RUN

pytestmark = pytest.mark.slow

DEVICES = 8
COHORT = 3  # divisible neither by 8 devices nor by 2 devices with chunks of 3


@functools.cache
def run_on(num_devices, client_chunk, **changes):
    """Params, alignment state and metrics after two rounds."""
    config = default.get_config("smoke")
    devices = {"run.num_devices": num_devices, "run.client_chunk": client_chunk}
    config.update_from_flattened_dict(SMALL | devices | changes)
    mesh = build_mesh(num_devices)
    assert mesh.size == (num_devices or DEVICES)
    plan = planning.plan_run(config, mesh)
    program, state, *inputs = start_run(plan, plan.program)
    run_rounds, metrics = build_run_rounds(program), []
    for _ in range(2):
        state, new = run_rounds(state, *inputs)
        metrics.append(new)
    return jax.device_get((state.params, state.align, metrics))


def without_waste(rows):
    return [
        {name: value for name, value in row.items() if name != "wasted_share"}
        for row in rows
    ]


def assert_close(left, right, rtol):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5)
    jax.tree.map(close, left, right)


def test_there_are_enough_devices():
    assert jax.device_count() == DEVICES


@pytest.mark.parametrize(
    ("num_devices", "client_chunk", "local_epochs"), [(0, 1, 0.0), (2, 3, 0.125)]
)
def test_devices_and_chunks_change_nothing(num_devices, client_chunk, local_epochs):
    found = run_on(num_devices, client_chunk, local_epochs=local_epochs)
    params, align, metrics = found
    params_1, align_1, metrics_1 = run_on(1, 1, local_epochs=local_epochs)
    # What devices wait for depends on how many there are, and on nothing else.
    assert all(0 < row["wasted_share"] < 1 for row in metrics)
    assert all(row["wasted_share"] == 0 for row in metrics_1)
    metrics, metrics_1 = (without_waste(rows) for rows in (metrics, metrics_1))
    assert_close(params, params_1, rtol=0)
    assert_close(align.fitness, align_1.fitness, rtol=0)
    np.testing.assert_array_equal(align.times_held, align_1.times_held)
    assert_close(metrics, metrics_1, rtol=1e-5)  # bytes and losses are larger than 1


@pytest.mark.parametrize("num_devices", [-1, DEVICES + 1])
def test_build_mesh_refuses_devices_that_are_not_there(num_devices):
    with pytest.raises(UserError, match=rf"run.num_devices={num_devices}\b.*to 8"):
        build_mesh(num_devices)


@pytest.mark.parametrize(("asked", "size"), [(0, DEVICES), (1, 1), (3, 3)])
def test_build_mesh_has_the_devices_asked_for(asked, size):
    mesh = build_mesh(asked)
    assert mesh.shape == {RUNS: 1, CLIENTS: size}
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert list(mesh.devices.ravel()) == jax.devices()[:size]


def test_build_mesh_divides_the_devices_among_runs():
    mesh = build_mesh(0, num_runs=4)
    assert mesh.shape == {RUNS: 4, CLIENTS: 2}
    assert mesh.devices.tolist() == np.reshape(jax.devices(), (4, 2)).tolist()


def test_spread_lets_functions_know_their_device():
    def number(x):
        device = jax.lax.axis_index(RUNS) * 2 + jax.lax.axis_index(CLIENTS)
        return (x + device)[None], jax.lax.psum(device, CLIENTS)[None]

    mesh = build_mesh(0, num_runs=4)
    both = P((RUNS, CLIENTS))
    run = jax.jit(spread(number, mesh, out_specs=(both, P(RUNS))))
    devices, sums = run(jnp.zeros((), jnp.int32))
    assert devices.tolist() == list(range(8))
    # Runs do not mix: 0 + 1, 2 + 3, 4 + 5, 6 + 7.
    assert sums.tolist() == [1, 5, 9, 13]


def test_replicate_puts_trees_on_every_device():
    mesh = build_mesh(3)
    leaf = replicate({"x": np.arange(4)}, mesh)["x"]
    assert leaf.sharding.is_fully_replicated and leaf.devices() == set(
        mesh.devices.flat
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_map_runs_gives_every_run_its_clients_and_shares_the_images(platform):
    rows = jnp.arange(4.0)[:, None] * jnp.ones((4, 2))
    federation = make_federation(
        train=jnp.arange(3.0), statistics=jnp.ones(()), **dict.fromkeys(PER_RUN, rows)
    )

    def one_run(state, federation, rate):
        own = sum(getattr(federation, name) for name in PER_RUN)  # [2]
        assert own.shape == (2,) and federation.train.shape == (3,)
        return state + rate * own.sum() + federation.train.sum()

    states, rates = jnp.array([0.0, 10, 20, 30]), jnp.array([1.0, 1, 2, 0])
    found = jax.jit(map_runs(one_run, platform))(states, federation, rates)
    # Each field of run s holds s twice; the images of all add 0 + 1 + 2.
    twice = 2 * len(PER_RUN)
    expected = [3, 10 + twice + 3, 20 + 2 * 2 * twice + 3, 30 + 3]
    np.testing.assert_allclose(found, expected)
    mesh = build_mesh(0, num_runs=2)
    assert runs_at_once(6, mesh, platform) == (1 if platform == "cpu" else 3)
