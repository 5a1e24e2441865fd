"""The examples of a pass: dealt once, padded, and read from where they lie."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_data, make_federation, make_program, make_windows

from fedmoe_jax.configs import default
from fedmoe_jax.evaluation.sources import (
    choose_batch,
    read_examples,
    schedule_examples,
    take_pool,
    take_test,
)
from fedmoe_jax.models.flops import count_activation_bytes
from fedmoe_jax.types import Pool

PROGRAM = make_program(make_data(3))
FEDERATION = make_federation(
    train={"x": jnp.zeros((5, 8, 8, 1)), "y": jnp.array([2, 1, 0, 2, 1])},
    test={"x": jnp.zeros((3, 8, 8, 1)), "y": jnp.array([2, 0, 1])},
    test_stratum=jnp.array([1, 0, 2]),
    statistics={"mean": jnp.zeros((8, 8, 1)), "std": jnp.ones((8, 8, 1))},
)


def read(source, position, num_groups):
    return read_examples(source, FEDERATION, position, None, num_groups, PROGRAM)


def test_images_are_evaluated_in_batches_of_500():
    assert choose_batch(PROGRAM) == 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "batch"), [(3, 500), (32, 64), (256, 8), (1024, 2), (4096, 1)]
)
def test_long_windows_are_evaluated_in_small_batches(length, batch):
    """Of the default widths, up to 1024 tokens, a batch needs less than half a GB."""
    data = make_windows(np.zeros((2, length + 1), np.int32), 256)
    whole = default.get_config().model
    fields = {f"model.{name}": whole[name] for name in ("stem_width", "expert_width")}
    fields |= {"model.kind": "transformer", "num_experts": 8}
    program = make_program(data, **fields)
    assert choose_batch(program) == batch
    if length <= 1024:
        each = count_activation_bytes(program.model, program.batch, 8)
        assert batch * each < 0.5e9


@pytest.mark.parametrize(
    ("devices", "most", "batches", "size"),
    [(1, 500, 1, 21), (2, 500, 1, 11), (8, 2, 2, 2), (1, 10, 3, 7)],
)
def test_schedule_examples_deals_each_once(devices, most, batches, size):
    shares = [schedule_examples(21, most, d, devices) for d in range(devices)]
    assert np.shape(shares) == (devices, batches, size)
    position = np.sort(np.ravel(shares))
    np.testing.assert_array_equal(position, np.arange(len(position)))


def test_read_examples_marks_padding():
    examples = read(take_test(FEDERATION), jnp.array([0, 2, 3]), 3)
    assert examples.real.tolist() == [True, True, False]
    assert examples.batch["y"].tolist() == [0, 1, 1]  # in the order of strata
    assert examples.stratum.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_read_examples_of_a_pool_are_grouped_as_it_says():
    """Examples 3 and 0 of client 1 and example 4 of client 0; the last one pads."""
    pool = Pool(jnp.array([3, 0, 4, 0]), jnp.array([2, 2, 1, 0]))
    examples = read(take_pool(FEDERATION, pool), jnp.arange(5), 2)
    assert examples.real.tolist() == [True, True, True, False, False]
    assert examples.batch["y"][:3].tolist() == [2, 2, 1]
    assert examples.stratum[:3].tolist() == [[0, 1], [0, 1], [1, 0]]
    assert not examples.stratum[3:].any()
