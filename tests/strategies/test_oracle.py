"""The oracle: every client's own expert first, of its main stratum."""

import jax
import jax.numpy as jnp
import numpy as np
from factories import SIZES, make_hyper, plan_run, prepare_strategy, start_run

from fedmoe_jax.strategies.oracle import assign, look, prefer_own


def test_assign_gives_the_expert_of_the_stratum_first():
    _, evidence = prepare_strategy("oracle")
    stratum = jnp.arange(SIZES.num_clients) + 3  # beyond E, too
    evidence = evidence.replace(state={"stratum": stratum})
    keys = jax.random.split(jax.random.key(0), 50)
    found = [assign(evidence, make_hyper(), SIZES, key) for key in keys]
    for each in found:
        expected = stratum[evidence.client] % SIZES.num_experts
        np.testing.assert_array_equal(each.held[:, 0], expected)
        np.testing.assert_array_equal(each.slot.sum(axis=1), evidence.capacity)
    others = {int(e) for each in found for e in np.asarray(each.held)[:, 1]}
    assert others == set(range(SIZES.num_experts))


def test_prefer_own_is_1_of_the_clients_own_expert():
    _, evidence = prepare_strategy("oracle")
    evidence = evidence.replace(state={"stratum": jnp.arange(SIZES.num_clients) + 3})
    found = prefer_own(evidence, make_hyper())
    own = (evidence.client + 3) % SIZES.num_experts
    np.testing.assert_array_equal(found, np.eye(SIZES.num_experts)[own])


def test_look_finds_the_main_stratum_of_every_client():
    plan = plan_run(strategy="oracle")
    run = start_run(plan, plan.program)
    mix = np.asarray(run.federation.label_mix)
    given = run.state, run.federation, run.hyper, jax.random.key(0)
    state, frozen = look(*given, sizes=plan.program.sizes)
    stratum = state.align.strategy["stratum"]
    assert stratum.dtype == jnp.int32
    np.testing.assert_array_equal(stratum[0], mix.argmax(axis=1))
    assert frozen is run.federation.frozen


def test_look_finds_the_group_of_every_client():
    """Groups are no classes: the commonest class of each is another one."""
    groups = {"groups.kind": "permuted", "groups.count": 3, "groups.skew": 1.0}
    plan = plan_run(strategy="oracle", **groups, **{"partition.kind": "dirichlet"})
    run = start_run(plan, plan.program)
    group = np.asarray(plan.partition.index[:, 0]) // (len(plan.data.stratum) // 3)
    assert np.bincount(group).tolist() == [5, 3, 2]
    np.testing.assert_array_equal(run.state.align.strategy["stratum"][0], group)
