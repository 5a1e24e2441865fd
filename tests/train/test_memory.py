"""The memory estimate by hand, and the refusal that it leads to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax.models.flops import count_activation_bytes
from fedmoe_jax.options import UserError, replace
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.state import init_state
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train import memory
from fedmoe_jax.train.plan import plan_run
from fedmoe_jax.train.run import train
from fedmoe_jax.types import Federation, SimState


class Parts(NamedTuple):
    """A run and the shapes of its state."""

    program: Program
    federation: Federation
    state: SimState


@pytest.fixture(scope="module")
def parts():
    config = default.get_config("smoke")
    config.update_from_flattened_dict(
        {
            "num_clients": 4,
            "cohort_size": 3,
            "num_experts": 4,
            "max_held": 2,
            "batch_size": 5,
            "partition.kind": "iid",
            "model.stem_width": 8,
            "model.expert_width": 6,
            "model.feature_width": 3,
            "client.optimizer": "sgd",
        }
    )
    plan = plan_run(config, build_mesh(2))
    key = jax.random.key(0)
    state, _ = jax.eval_shape(lambda k: init_state(k, plan.hyper, plan.program), key)
    return Parts(plan.program, plan.federation, state)


def estimate(parts, activations, num_runs=1, program=None):
    return memory.estimate_memory(
        parts.state,
        parts.federation,
        program or parts.program,
        training_bytes=activations,
        evaluation_bytes=activations / 2,
        num_runs=num_runs,
    )


# digits: 64 pixels, 10 classes. Stem: Dense 64 -> 8 and a LayerNorm; expert: 8 -> 6
# -> 3; gate: 4 rows of 8 and a bias; head: 3 -> 10. Four bytes a number.
STEM = 4 * (64 * 8 + 8 + 2 * 8)
EXPERT = 4 * (8 * 6 + 6 + 6 * 3 + 3)
GATE = 4 * (4 * 8 + 4)
HEAD = 4 * (3 * 10 + 10)
PARAMS = STEM + 4 * EXPERT + GATE + HEAD


SURVEYS = [("prototypes", (10, 8)), ("update_groups", (1, 512))]
SUBMODEL = STEM + 2 * EXPERT + GATE + HEAD
# 1437 training and 360 test images with labels, mean and standard deviation, and the
# strata of the test images.
IMAGES = (1437 + 360) * (64 + 4) + 2 * 64 * 4 + 360 * 4
# 1437 examples on 4 clients: up to 360 each, padded to 512; size, steps, label mix of
# 10 classes, 8 numbers of the device, sample_order, drift_source.
PER_RUN = 4 * 4 * (512 + 1 + 1 + 10 + 8 + 1 + 1)
# Fitness, times held: 4 bytes, held: 1 byte for each of 4 x 4; usage; round; key; the
# belief and the participation: three numbers and a bit of 4 clients and, of 3, who,
# what, when and what of it.
STATE = (
    PARAMS
    + 16 * (4 + 4 + 1)
    + 4 * 4
    + 4
    + 8
    + 4 * (3 * 4 + 1)
    + 3 * 4 * (1 + 1 + 3 + 3)
)


@pytest.mark.parametrize(
    ("activations", "compute"),
    [
        (10.0, memory.CLIENT_COPIES * SUBMODEL + 5 * 10),  # training needs more
        (10000.0, 180 * 10000 / 2),  # evaluation does: 360 images on two devices
    ],
)
def test_estimate_by_hand(parts, activations, compute):
    expected = {
        "data": IMAGES + PER_RUN,  # both CPU devices share the host's copy
        "state": 2 * (2 * STATE + PARAMS),
        "compute": 2 * compute,  # one client on each device
    }
    assert estimate(parts, activations) == expected


@pytest.mark.parametrize(("platform", "at_once"), [("cpu", 1), ("gpu", 3)])
def test_runs_of_a_sweep_by_hand(parts, platform, at_once):
    """Six runs on 2 x 2 devices, three on each; on CPU one after the other."""
    program = parts.program._replace(mesh=build_mesh(4, num_runs=2), platform=platform)
    expected = {
        "data": IMAGES + 6 * PER_RUN
        if platform == "cpu"
        else 4 * IMAGES + 6 * 2 * PER_RUN,
        "state": 6 * 2 * 2 * STATE + 4 * at_once * PARAMS,
        "compute": 4 * at_once * (memory.CLIENT_COPIES * SUBMODEL + 5 * 10),
    }
    assert estimate(parts, 10.0, num_runs=6, program=program) == expected


@pytest.mark.parametrize(("strategy", "shape"), SURVEYS)
def test_a_search_for_groups_needs_the_most_where_clients_are_many(
    parts, strategy, shape
):
    """Means of 8 features of each of 10 labels; or one sketch, and rotations."""
    sizes = parts.program.sizes._replace(num_clients=10**5)
    program = parts.program._replace(sizes=sizes, strategy=STRATEGIES[strategy])
    found = estimate(parts, 10.0, program=program)
    numbers = 7 * 10**5 * shape[0] * (shape[1] + 1) + (20 + 4) * 10**5 * 4
    numbers += 14 * 10**10 if shape[0] == 1 else 0
    assert found["compute"] == 2 * 4 * numbers
    alone = program._replace(sizes=sizes._replace(num_experts=1, max_held=1))
    assert estimate(parts, 10.0, program=alone)["compute"] < found["compute"] / 10


def test_cohort_limits_the_clients_at_once(parts):
    static = replace(parts.program.static, run={"client_chunk": 50})
    wide = estimate(parts, 10.0, program=parts.program._replace(static=static))
    # Three clients on two devices: two on each, one of them padding.
    assert wide["compute"] == 2 * estimate(parts, 10.0)["compute"]


def test_shapes_will_do_for_arrays(parts):
    arrays = jax.tree.map(jnp.asarray, parts.federation)
    shapes = jax.eval_shape(lambda: arrays)
    assert memory.count_bytes(shapes) == memory.count_bytes(parts.federation)
    assert memory.count_bytes(shapes) == IMAGES + PER_RUN


def test_count_bytes_by_hand():
    tree = {"a": np.zeros((3, 2), np.uint8), "b": jnp.zeros(5), "c": np.float64(0)}
    assert memory.count_bytes(tree) == 6 + 20 + 8
    assert memory.count_bytes(jax.random.key(0)) == 8


def test_activations_by_hand(parts):
    program = parts.program
    count = lambda held: count_activation_bytes(program.model, program.batch, held)
    # One more expert adds its hidden units before and after bias and relu, and its
    # outputs before and after bias, and a row of the stack.
    more = count(2) - count(1)
    assert more >= 4 * (3 * 6 + 2 * 3)
    assert more <= 4 * (3 * 6 + 4 * 3)
    assert count(3) - count(2) == more


def test_refusal_tells_the_numbers():
    needed = {"data": 1.5e9, "state": 0.25e9, "compute": 4e9}
    memory.check_memory(needed, 5.75)
    with pytest.raises(UserError) as caught:
        memory.check_memory(needed, 5.0)
    text = str(caught.value)
    for part in ("memory_limit_gb=5 ", "5.75 GB", "data 1.50", "state 0.25", "least 6"):
        assert part in text
    assert "compute 4.00" in text and "\n" not in text


def test_what_fits_is_not_refused():
    assert memory.fits({"data": 1e9, "state": 1e9}, 2.0)
    assert not memory.fits({"data": 1e9, "state": 1.1e9}, 2.0)


@pytest.mark.slow
def test_run_beyond_the_limit_is_refused_before_it_is_built(tmp_path):
    config = default.get_config("smoke")
    config.run.num_devices = 1
    config.model.expert_width = 10**7  # tens of gigabytes of experts
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="run.memory_limit_gb=8 is too low"):
        train(config, folder, stop=lambda: True, label="", profile=False)
    assert not folder.exists()
