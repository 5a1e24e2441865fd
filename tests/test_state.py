"""The state before the first round, and the stages between rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_federation, make_hyper, make_program, prepare_state

from fedmoe_jax.state import BEFORE_ROUNDS, init_align, init_state

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


@pytest.mark.slow
def test_prepare_state_acts_in_round_zero_alone_with_a_key_of_its_own():
    acted = []

    def act(state, federation, hyper, key, **static):
        acted.append((jax.random.key_data(key), static))
        frozen = {"stages": federation.frozen["stages"] + 1}
        return state.replace(round=state.round + 10), frozen

    program = make_program()
    stages = (0, act), (3, act), (0, act)
    program = program._replace(strategy=program.strategy._replace(stages=stages))
    state, frozen = init_state(KEY, make_hyper(), program)
    assert frozen == {}
    federation = make_federation(frozen={"stages": 0})
    prepared, frozen = prepare_state(state, federation, make_hyper(), program)
    assert int(prepared.round) == 20 and frozen == {"stages": 2}
    assert len(acted) == 2
    first = jax.random.fold_in(state.key, jnp.uint32(BEFORE_ROUNDS))
    expected = first, jax.random.fold_in(first, 2)  # the number of the stage
    names = "model", "task", "sizes"
    for (key, static), own in zip(acted, expected, strict=True):
        np.testing.assert_array_equal(key, jax.random.key_data(own))
        assert static == {name: getattr(program, name) for name in names}


def test_init_state_leaves_frozen_parts_out_of_what_is_trained():
    changes = {"strategy": "fedjets_frozen_stem", "server.optimizer": "adam"}
    program = make_program(**changes)
    state, frozen = init_state(KEY, make_hyper(), program)
    assert set(state.params) == {"gate", "experts", "head"} and set(frozen) == {"stem"}
    assert set(state.server_opt) == set(state.params)
    plain = program._replace(strategy=program.strategy._replace(frozen=()))
    whole, nothing = init_state(KEY, make_hyper(), plain)
    assert nothing == {}
    jax.tree.map(np.testing.assert_array_equal, whole.params, state.params | frozen)


def test_init_state_freezes_a_copy_of_the_stem_for_the_gate():
    state, frozen = init_state(KEY, make_hyper(), make_program(strategy="fedjets"))
    assert set(state.params) == {"stem", "gate", "experts", "head"}
    assert set(frozen) == {"gate_stem"}
    jax.tree.map(
        np.testing.assert_array_equal, frozen["gate_stem"], state.params["stem"]
    )
