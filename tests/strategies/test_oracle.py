"""The oracle: the experts of every client's group first, else of its main stratum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, make_hyper, plan_run, prepare_strategy, start_run

from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.strategies.oracle import assign, look, own_experts, prefer_own


def prepare(count):
    """Evidence of clients whose groups are 3, 4, ... of `count`, and their groups."""
    _, evidence = prepare_strategy("oracle")
    group = (jnp.arange(SIZES.num_clients) + 3) % count
    own = own_experts(group, count, SIZES.num_experts)
    return evidence.replace(state={"own": own}), group[evidence.client]


def test_experts_of_a_group_by_hand():
    few = own_experts(jnp.arange(3), 3, 5)
    assert few.tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]
    many = own_experts(jnp.array([0, 1, 2, 6]), 7, 2)
    assert many.tolist() == [[1, 0], [0, 1], [1, 0], [1, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 9])
def test_assign_gives_the_experts_of_the_group_first(count):
    evidence, group = prepare(count)
    keys = jax.random.split(jax.random.key(0), 50)
    found = [assign(evidence, make_hyper(), SIZES, key) for key in keys]
    for each in found:
        np.testing.assert_array_equal(each.held[:, 0], group % SIZES.num_experts)
        if count == 2:  # the second own one of four experts, before any other
            second = np.asarray(each.held)[:, 1] == group + 2
            assert second[np.asarray(each.slot)[:, 1]].all()
        np.testing.assert_array_equal(each.slot.sum(axis=1), evidence.capacity)
    others = {int(e) for each in found for e in np.asarray(each.held)[:, 1]}
    assert count == 2 or others == set(range(SIZES.num_experts))


@pytest.mark.parametrize("count", [2, 4])
def test_prefer_own_is_1_of_the_groups_experts(count):
    evidence, group = prepare(count)
    found = prefer_own(evidence, make_hyper())
    expected = np.arange(SIZES.num_experts)[None] % count == group[:, None]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_look_finds_the_main_stratum_of_every_client():
    plan = plan_run(strategy="oracle")
    run = start_run(plan, plan.program)
    mix = np.asarray(run.federation.label_mix)
    given = run.state, run.federation, run.hyper, jax.random.key(0)
    state, frozen = look(*given, sizes=plan.program.sizes)
    own = state.align.strategy["own"]
    sizes = plan.program.sizes
    expected = own_experts(mix.argmax(axis=1), mix.shape[1], sizes.num_experts)
    np.testing.assert_array_equal(own[0], expected)
    assert frozen is run.federation.frozen


def test_look_finds_the_group_of_every_client():
    """Groups are no classes: the commonest class of each is another one."""
    groups = {"groups.kind": "permuted", "groups.count": 3, "groups.skew": 1.0}
    plan = plan_run(strategy="oracle", **groups, **{"partition.kind": "dirichlet"})
    run = start_run(plan, plan.program)
    group = np.asarray(plan.partition.index[:, 0]) // (len(plan.data.stratum) // 3)
    assert np.bincount(group).tolist() == [5, 3, 2]
    expected = np.arange(plan.program.sizes.num_experts)[None] % 3 == group[:, None]
    np.testing.assert_array_equal(run.state.align.strategy["own"][0], expected)


def test_references_know_what_no_server_could():
    references = {name for name, each in STRATEGIES.items() if each.reference}
    pooled = {f"centralised{size}" for size in ("", "_active", "_smallest")}
    assert references == {"oracle", *pooled}
    assert all(STRATEGIES[name].needs for name in references)
