"""The memory estimate by hand, and the refusal that it leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax import experiment, memory, train
from fedmoe_jax.sharding import build_mesh
from fedmoe_jax.types import UserError


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
            "run.num_devices": 2,
        }
    )
    return train.build_parts(config)


# digits: 64 pixels, 10 classes. Stem: Dense 64 -> 8 and a LayerNorm; expert: 8 -> 6
# -> 3; gate: 4 rows of 8 and a bias; head: 3 -> 10. Four bytes a number.
STEM = 4 * (64 * 8 + 8 + 2 * 8)
EXPERT = 4 * (8 * 6 + 6 + 6 * 3 + 3)
GATE = 4 * (4 * 8 + 4)
HEAD = 4 * (3 * 10 + 10)
PARAMS = STEM + 4 * EXPERT + GATE + HEAD


def test_estimate_by_hand(parts):
    needed = memory.estimate_memory(parts.state, parts.federation, parts.setup, 1000.0)
    # 1437 examples on 4 clients: up to 360 each, padded to 512.
    train_bytes = 1437 * (64 + 4) + 360 * (64 + 4)
    client_bytes = 4 * 4 * (512 + 1 + 10 + 5)  # index, size, label mix, device
    data = train_bytes + client_bytes + 4 * 2  # mean and standard deviation
    # fitness, times held: 4 bytes, held: 1 byte for each of 4 x 4; usage; round; key
    state = PARAMS + 16 * (4 + 4 + 1) + 4 * 4 + 4 + 8
    submodel = STEM + 2 * EXPERT + GATE + HEAD
    clients = 2 * (memory.CLIENT_COPIES * submodel + 5 * 1000)  # one on each device
    expected = {
        "data": 2 * data,
        "state": 2 * (2 * state + PARAMS),
        "clients": clients,
    }
    assert needed == expected


def test_cohort_limits_the_clients_at_once(parts):
    rules = parts.setup.rules._replace(client_chunk=50)
    wide = parts.setup._replace(rules=rules)
    of = lambda setup: memory.estimate_memory(
        parts.state, parts.federation, setup, 1000.0
    )
    # Three clients on two devices: two on each, one of them padding.
    assert of(wide)["clients"] == 2 * of(parts.setup)["clients"]


def test_shapes_will_do_for_arrays(parts):
    shapes = jax.eval_shape(lambda: (parts.state, parts.federation))
    assert memory.count_bytes(shapes[0]) == memory.count_bytes(parts.state)
    assert memory.count_bytes(shapes[1]) == memory.count_bytes(parts.federation)


def test_count_bytes_by_hand():
    tree = {"a": np.zeros((3, 2), np.uint8), "b": jnp.zeros(5), "c": np.float64(0)}
    assert memory.count_bytes(tree) == 6 + 20 + 8
    assert memory.count_bytes(jax.random.key(0)) == 8


def test_activations_by_hand(parts):
    count = lambda held: experiment.count_activation_bytes(
        parts.setup.model, (8, 8, 1), held
    )
    # One more expert adds its hidden units before and after bias and relu, and its
    # outputs before and after bias, and a row of the stack; forward and backward.
    more = count(2) - count(1)
    assert more >= 2 * 4 * (3 * 6 + 2 * 3)
    assert more <= 2 * 4 * (3 * 6 + 4 * 3)
    assert count(3) - count(2) == more


def test_refusal_tells_the_numbers():
    needed = {"data": 1.5e9, "state": 0.25e9, "clients": 4e9}
    memory.check_memory(needed, 5.75)
    with pytest.raises(UserError) as caught:
        memory.check_memory(needed, 5.0)
    text = str(caught.value)
    for part in ("memory_limit_gb=5 ", "5.75 GB", "data 1.50", "state 0.25", "least 6"):
        assert part in text
    assert "clients 4.00" in text and "\n" not in text


def test_run_beyond_the_limit_is_refused_before_it_is_built():
    config = default.get_config("smoke")
    config.run.num_devices = 1
    config.model.expert_width = 10**7  # tens of gigabytes of experts
    with pytest.raises(UserError, match="run.memory_limit_gb=8 is too low"):
        train.build_parts(config)
    assert build_mesh(1).size == 1
