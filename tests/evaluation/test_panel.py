"""The clients that evaluation scores, and the models that they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import assert_same, plan_run, start_run, use_linear_model

from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.evaluation.panel import (
    count_possible_sets,
    draw_sample,
    gather_panel,
    is_sampled,
)
from fedmoe_jax.options import replace
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

CLIENTS, MOST = 40, 9


def start_study(strategy="greedy", **changes):
    """A run whose clients hold few different sets; some never took part."""
    plan = plan_run(strategy=strategy, num_clients=CLIENTS, **changes)
    program = use_linear_model(plan.program)
    run = start_run(plan, program)
    sizes, rng = program.sizes, np.random.default_rng(0)
    noise = lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape)
    params, personal = jax.tree.map(noise, (run.state.params, run.state.personal))
    order = rng.random((CLIENTS, 1, sizes.num_experts)).argsort(axis=2)
    held = jnp.asarray(order < sizes.max_held).at[::5].set(False)
    rounds = jnp.asarray(rng.integers(0, 3, CLIENTS), jnp.int32)
    state = run.state.replace(
        params=params,
        personal=personal,
        align=run.state.align.replace(held=held),
        participation=run.state.participation.replace(rounds=rounds),
    )
    return run._replace(state=state)


def start_pooled():
    """A run of which one client has all data, before its first round."""
    plan = plan_run(strategy="centralised", num_clients=CLIENTS)
    return start_run(plan, use_linear_model(plan.program))


def set_most(program, clients):
    """The program that scores at most so many clients."""
    static = replace(program.static, evaluation={"clients": clients})
    return program._replace(static=static)


def gather(run, program):
    """The panel of a run's state, on the host."""

    @jax.jit
    def find(state):
        view = observe(state.world, run.federation, run.hyper, program.processes)
        return gather_panel(state, view, None, program)

    return jax.device_get(find(run.state))


def evaluate(run, program, state=None):
    return build_evaluate(program)(state or run.state, run.federation, run.hyper)


def alone(run, client):
    """The accuracy of a client where every other one holds all experts."""
    others = jnp.arange(CLIENTS) != client
    held = run.state.align.held | others[:, None, None]
    state = run.state.replace(align=run.state.align.replace(held=held))
    return evaluate(run, run.program, state)["client_accuracy"][client]


@pytest.mark.parametrize("every", [16, 2])
@pytest.mark.parametrize("drift", ["none", "contrast"])
def test_sets_scored_once_are_clients_scored_by_themselves(every, drift):
    fields = {"evaluation.dense_experts": every, "drift.images": drift}
    run = start_study(**fields, **{"drift.share": 0.5, "drift.strength": 0.8})
    found = evaluate(run, run.program)["client_accuracy"]
    slow = [alone(run, client) for client in range(CLIENTS)]
    np.testing.assert_array_equal(found, slow)
    assert len(np.unique(found)) > 10


def test_shared_models_are_the_distinct_sets():
    run = start_study()
    panel = gather(run, run.program)
    held = np.array(run.state.align.held)
    held[::5] = True  # one that has not held any may use all
    held[np.array(run.state.participation.rounds) == 0] = True
    assert panel.models.count == len(np.unique(held, axis=0)) < 10
    shared, wanted = panel.models.view.held[panel.model], panel.models.view.wanted
    np.testing.assert_array_equal(shared, held)
    own = np.array(run.federation.label_mix) > 0
    for number in range(int(panel.models.count)):
        mine = own[np.array(panel.model) == number].any(0)
        np.testing.assert_array_equal(wanted[number], mine)


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("strategy", ["pfedmoe", "fedmix", "greedy"])
def test_a_sample_is_a_part_of_all_clients(strategy, parts):
    """Of greedy eleven sets are possible, of the others every client has a model."""
    run = start_study(strategy)
    program = run.program
    if not parts:
        program = program._replace(model=program.model._replace(parts=None))
    whole = jax.device_get(evaluate(run, set_most(program, 0)))
    found = jax.device_get(evaluate(run, set_most(program, MOST)))
    scored = ~np.isnan(found["client_accuracy"])
    assert scored.sum() == MOST == found["clients_counted"]
    assert not np.isnan(whole["client_accuracy"]).any()
    accuracy = whole["client_accuracy"][scored]
    np.testing.assert_allclose(found["client_accuracy"][scored], accuracy, atol=1e-6)
    rounds = np.array(run.state.participation.rounds)
    took_part = np.array(run.state.align.held).any((1, 2)) & (rounds > 0)
    order = np.array(run.federation.sample_order)
    if not program.strategy.personal:  # the server's model serves all
        took_part[:] = True
    assert whole["clients_counted"] == took_part.sum()
    expected = [client for client in order if took_part[client]][:MOST]
    assert set(np.flatnonzero(scored)) == set(expected)
    np.testing.assert_allclose(found["personal_accuracy"], accuracy.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["worst_decile_accuracy"], accuracy.min(), 1e-5)
    if not program.strategy.personal:
        np.testing.assert_allclose(found["global_accuracy"], whole["global_accuracy"])


@pytest.mark.parametrize("strategy", ["greedy", "centralised"])
def test_priors_of_groups_are_of_their_classes(strategy):
    """Equal logits: a client answers its commonest class in every group alike."""
    groups = {"groups.kind": "permuted", "groups.count": 3}
    split = {"partition.kind": "dirichlet", "partition.alpha": 0.5}
    plan = plan_run(strategy=strategy, **groups, **split)
    run = start_run(plan, plan.program)
    mix = np.asarray(run.federation.label_mix)
    classes = sum(np.split(mix, 3, axis=1))
    panel = gather(run, run.program)
    priors = panel.priors.log_share[np.argsort(panel.priors.row)]
    np.testing.assert_allclose(priors, np.log(classes + 1e-3), rtol=1e-5)
    blank = jax.tree.map(jnp.zeros_like, run.state.params)
    state = run.state.replace(params=blank)
    found = evaluate(run, run.program, state)
    best = classes.max(axis=1).mean()
    np.testing.assert_allclose(found["personal_prior_accuracy"], best, rtol=1e-4)
    np.testing.assert_allclose(
        found["personal_accuracy"], classes[:, 0].mean(), rtol=1e-4
    )
    assert 0.0 == found["expert_group_information"]  # before any round
    assert found["stratum_accuracy"].shape == (3 * classes.shape[1],)


@pytest.mark.parametrize("strategy", ["fedavg", "centralised"])
def test_priors_of_a_common_model_are_of_a_sample(strategy):
    """All are scored by the one model; with priors the first of the seed's order."""
    run = start_study(strategy) if strategy == "fedavg" else start_pooled()
    program = set_most(run.program, MOST)
    assert not is_sampled(program)
    found, whole = evaluate(run, program), evaluate(run, run.program)
    assert found["personal_accuracy"] == whole["personal_accuracy"]
    row = gather(run, program).priors.row
    expected = np.array(run.federation.sample_order)[:MOST]
    assert sorted(row.tolist()) == sorted(expected.tolist())
    assert found["personal_prior_accuracy"] != whole["personal_prior_accuracy"]
    mixes = run.federation.label_mix[jnp.sort(row)]
    few = run.federation.replace(label_mix=mixes, sample_order=jnp.arange(MOST))
    if strategy == "centralised":  # its state has no axis of clients
        alone = build_evaluate(program)(run.state, few, run.hyper)
        names = ("personal_prior_accuracy", "worst_decile_prior_accuracy")
        for name in names:
            np.testing.assert_allclose(found[name], alone[name], rtol=1e-6)


def test_a_sample_of_all_clients_is_all_of_them():
    run = start_study("pfedmoe")
    whole, most = (set_most(run.program, count) for count in (0, CLIENTS))
    assert not is_sampled(whole) and not is_sampled(most)
    assert_same(evaluate(run, whole), evaluate(run, most))


@pytest.mark.parametrize(
    ("strategy", "most", "sampled"),
    [
        ("greedy", 11, False),  # 1 + 4 + 6 sets of at most two of four experts
        ("greedy", 10, True),
        ("greedy", 0, False),
        ("pfedmoe", 39, True),
        ("pfedmoe", 40, False),
        ("fedavg", 1, True),  # one expert: all of it, or none yet
        ("fedavg", 2, False),
        ("centralised", 1, False),
    ],
)
def test_is_sampled_by_hand(strategy, most, sampled):
    plan = plan_run(strategy=strategy, num_clients=CLIENTS)
    assert is_sampled(set_most(plan.program, most)) == sampled


def test_count_possible_sets_multiplies_layers():
    program = plan_run().program
    sizes = program.sizes._replace(num_layers=3)
    assert count_possible_sets(program) == 11
    assert count_possible_sets(program._replace(sizes=sizes)) == 11**3


def test_draw_sample_by_hand():
    order = jnp.array([3, 0, 4, 1, 2])
    counted = jnp.array([1, 0, 0, 1, 1], bool)
    assert draw_sample(order, counted, 2).tolist() == [3, 0]
    assert draw_sample(order, counted, 5).tolist() == [3, 0, 4, 1, 2]
    counted = jnp.array([0, 1, 1, 0, 0], bool)
    assert draw_sample(order, counted, 3).tolist() == [1, 2, 3]


def test_the_order_of_the_sample_is_the_seeds():
    orders = [
        plan_run(seed=seed, num_clients=CLIENTS).federation.sample_order
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(CLIENTS))
