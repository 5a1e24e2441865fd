"""The dense warm-up: who holds what, whose copies experts are, what learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import assert_same, plan_run, start_run, tiny_config

from fedmoe_jax.options import UserError
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.train import plan as planning
from fedmoe_jax.types import Assignment
from fedmoe_jax.upcycle import hold_first

WARM = 2


def play(rounds, **changes):
    """State and metrics after some chunks of rounds."""
    plan = plan_run(**{"upcycle.rounds": WARM, "server.optimizer": "adam"} | changes)
    run, run_rounds = start_run(plan, plan.program), build_run_rounds(plan.program)
    state, metrics = run.state, {}
    for _ in range(rounds // plan.config.chunk_rounds):
        state, metrics = run_rounds(state, run.federation, run.hyper)
    return state, metrics


def spread(tree):
    """By how much the rows of experts differ, at most."""
    return max(
        float(jnp.ptp(x, axis=0).max()) for x in jax.tree.leaves(tree["experts"])
    )


def test_hold_first_gives_expert_0_alone_and_no_calibration():
    held, slot = jnp.array([[[2, 1]], [[3, 0]]]), jnp.array([[[1, 1]], [[1, 0]]], bool)
    own = Assignment(held, slot)
    warm = hold_first(own, jnp.array(True))
    np.testing.assert_array_equal(warm.held, np.zeros((2, 1, 2)))
    np.testing.assert_array_equal(warm.slot, [[[True, False]]] * 2)
    np.testing.assert_array_equal(warm.calibration, np.zeros((2, 1)))
    after = hold_first(own, jnp.array(False))
    assert_same((after.held, after.slot), (held, slot))
    np.testing.assert_array_equal(after.calibration, np.ones((2, 1)))
    asked = jnp.array([[[0, 1, 1, 0]], [[1, 1, 0, 0]]], bool)
    own = own.replace(asked=asked, assigned=~asked)
    warm, after = (hold_first(own, jnp.array(warming)) for warming in (True, False))
    for found in (warm.asked, warm.assigned):
        np.testing.assert_array_equal(found, [[[1, 0, 0, 0]]] * 2)
    np.testing.assert_array_equal(after.asked, asked)
    np.testing.assert_array_equal(after.assigned, ~asked)


@pytest.mark.slow
def test_experts_are_copies_in_the_warm_up_and_differ_after_it():
    state, metrics = play(WARM)
    for tree in (state.params, state.server_opt):
        assert spread(tree) == 0
    load = np.asarray(metrics["expert_load"])
    assert (load[:, 0] > 0).all() and (load[:, 1:] == 0).all()
    assert np.isnan(metrics["load_cv"]).all()
    later, metrics = play(2 * WARM)
    assert spread(later.params) > 0
    assert np.isfinite(metrics["load_cv"]).all()


@pytest.mark.slow
def test_scores_learn_nothing_in_the_warm_up():
    plan = plan_run(**{"upcycle.rounds": WARM, "strategy": "flex_moe"})
    before = start_run(plan, plan.program).state.align
    after = play(WARM, strategy="flex_moe")[0].align
    assert_same(after, before)


def give_first(evidence, hyper, sizes, key):
    held = jnp.zeros((sizes.cohort_size, sizes.max_held), jnp.int32)
    return Assignment(held, jnp.zeros(held.shape, bool).at[:, 0].set(True))


@pytest.mark.slow
def test_a_warm_up_trains_what_a_strategy_of_one_expert_trains():
    state, _ = play(WARM)
    plan = plan_run(**{"server.optimizer": "adam", "loss.calibration": 0.0})
    strategy = plan.program.strategy._replace(assign=give_first)
    run = start_run(plan, plan.program._replace(strategy=strategy))
    twin, _ = build_run_rounds(run.program)(run.state, run.federation, run.hyper)
    first = lambda params: (
        params | {"experts": jax.tree.map(lambda leaf: leaf[0], params["experts"])}
    )
    assert_same(first(state.params), first(twin.params), atol=1e-6)
    assert_same(
        state.params["gate"], start_run(plan, plan.program).state.params["gate"]
    )


@pytest.mark.parametrize("name", ["pfedmoe", "fedmoe_da", "heterofl"])
def test_experts_that_are_not_the_servers_are_refused(name):
    config = tiny_config(strategy=name, **{"upcycle.rounds": WARM})
    with pytest.raises(UserError, match=r"upcycle\.rounds=2 is not allowed with .*: 0"):
        planning.plan_run(config, build_mesh(1))


def test_a_warm_up_without_an_end_is_refused():
    config = tiny_config(**{"upcycle.rounds": 4, "num_rounds": 4})
    told = r"upcycle\.rounds=4 is not allowed, .*; allowed: 0 to num_rounds - 1 = 3"
    with pytest.raises(UserError, match=told):
        planning.plan_run(config, build_mesh(1))


def test_dense_controls_have_no_warm_up():
    for name in ("fedavg", "local_active", "centralised"):
        assert not plan_run(
            strategy=name, **{"upcycle.rounds": WARM}
        ).program.static.upcycled
    assert plan_run(**{"upcycle.rounds": WARM}).program.static.upcycled
    assert not plan_run().program.static.upcycled
