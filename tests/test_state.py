"""The state before the first round, and the stages between rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from factories import make_federation, make_hyper, make_program

from fedmoe_jax.state import BEFORE_ROUNDS, init_align, init_state, run_stage

KEY = jax.random.key(0)


def test_init_align_of_a_million_clients_is_less_than_a_gigabyte():
    """Counted from shapes only."""
    program = make_program(num_clients=1_000_000, num_experts=64)
    start = functools.partial(init_align, program=program)
    leaves = jax.tree.leaves(jax.eval_shape(start, KEY, make_hyper()))
    assert 4 * 64e6 < sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) < 1e9


def test_init_align_draws_other_scores_for_every_layer():
    program = make_program(**{"strategy": "fedmix", "reaction.kind": "reset"})
    several = program._replace(sizes=program.sizes._replace(num_layers=3))
    one, three = (init_align(KEY, make_hyper(), p) for p in (program, several))
    np.testing.assert_array_equal(three.fitness[:, :1], one.fitness)
    assert len({row.tobytes() for row in np.moveaxis(three.fitness, 1, 0)}) == 3
    assert three.usage.shape == (3, 4) and three.held.shape == (10, 3, 4)
    assert three.strategy["mass"].shape == (3, 10, 4)
    assert three.detector.evidence.shape == (3, 10, 4)


def test_run_stage_acts_once_with_a_key_of_its_own():
    acted = []

    def act(state, federation, hyper, key, *, model, task, sizes):
        acted.append((key, model, task, sizes))
        return state.replace(round=state.round + 10), {"stem": federation.frozen}

    program = make_program()
    stages = (0, act), (3, act)
    program = program._replace(strategy=program.strategy._replace(stages=stages))
    state, _ = init_state(KEY, make_hyper(), program)
    federation = make_federation(frozen="given")
    for number in (0, 1):
        after, frozen = run_stage(state, federation, make_hyper(), program, number)
        assert int(after.round) == 10 and frozen == {"stem": "given"}
    first, second = acted
    before = jax.random.fold_in(state.key, jnp.uint32(BEFORE_ROUNDS))
    expected = before, jax.random.fold_in(before, 3)
    for (key, *static), own in zip(acted, expected, strict=True):
        assert jax.random.key_data(key).tolist() == jax.random.key_data(own).tolist()
        assert static == [program.model, program.task, program.sizes]
    assert jax.random.key_data(first[0]).tolist() != (
        jax.random.key_data(second[0]).tolist()
    )
