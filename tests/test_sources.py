"""The examples of a pass: dealt once, padded, and read from where they lie."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_data, make_federation, make_program

from fedmoe_jax.sources import (
    read_examples,
    schedule_examples,
    take_pool,
    take_test,
)
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
    assert examples.batch["y"].tolist() == [2, 1, 1]
    assert examples.stratum.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_read_examples_of_a_pool_are_grouped_as_it_says():
    """Examples 3 and 0 of client 1 and example 4 of client 0; the last one pads."""
    pool = Pool(jnp.array([3, 0, 4, 0]), jnp.array([2, 2, 1, 0]))
    examples = read(take_pool(FEDERATION, pool), jnp.arange(5), 2)
    assert examples.real.tolist() == [True, True, True, False, False]
    assert examples.batch["y"][:3].tolist() == [2, 2, 1]
    assert examples.stratum[:3].tolist() == [[0, 1], [0, 1], [1, 0]]
    assert not examples.stratum[3:].any()
