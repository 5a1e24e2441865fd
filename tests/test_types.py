"""Keys of rounds and purposes, and what the runs of a sweep have for themselves."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.types import PER_RUN, Assignment, Federation, make_keys

PURPOSES = "round", "cohort", "align", "train"


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def test_make_keys_are_distinct_over_purposes_and_rounds():
    run = jax.random.key(3)
    rounds = [make_keys(run, number) for number in range(3)]
    found = [bits(getattr(keys, name)) for keys in rounds for name in PURPOSES]
    assert len({*found, bits(run)}) == 3 * 4 + 1
    assert all(bits(keys.run) == bits(run) for keys in rounds)


def test_make_keys_of_a_traced_round_are_the_same():
    run = jax.random.key(3)
    traced = jax.jit(make_keys)(run, jnp.int32(7))
    for key, expected in zip(traced, make_keys(run, 7), strict=True):
        assert bits(key) == bits(expected)


def test_keys_of_a_purpose_are_new_in_every_round_and_always_are_not():
    first, second = (make_keys(jax.random.key(0), number) for number in (1, 2))
    assert bits(first.of(5)) != bits(second.of(5))
    assert bits(first.of(5)) != bits(first.of(6))
    assert bits(first.always(5)) == bits(second.always(5))
    assert bits(first.always(5)) != bits(first.of(5))


def test_per_run_fields_are_of_the_federation():
    fields = Federation.__dataclass_fields__
    assert set(PER_RUN) < set(fields) and len(set(PER_RUN)) == len(PER_RUN)
    assert not {"train", "test", "statistics"} & set(PER_RUN)  # shared by a sweep


def test_assignment_has_a_leaf_of_calibration_only_where_it_is_given():
    held, slot = np.zeros((3, 2), np.int32), np.ones((3, 2), bool)
    plain = Assignment(held, slot)
    weighted = plain.replace(calibration=np.ones(3, np.float32))
    assert [len(jax.tree.leaves(one)) for one in (plain, weighted)] == [2, 3]
    row = jax.tree.map(lambda leaf: leaf[1], plain)
    assert row.calibration is None and row.held.shape == (2,)
