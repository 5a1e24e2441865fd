"""Prototype alignment: the messages, the scores, the decision, and its costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SIZES,
    assert_same,
    list_held,
    make_hyper,
    plan_run,
    prepare_strategy,
    start,
    start_run,
)

from fedmoe_jax.align.prototypes import Found
from fedmoe_jax.models.routing import pool
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.state import run_stage
from fedmoe_jax.strategies.prototypes import (
    count_features,
    describe_features,
    keep_numbers,
    score_experts,
)
from fedmoe_jax.tasks.batches import take_batch

pytestmark = pytest.mark.slow
TEXT = {
    "data.name": "markov",
    "partition.kind": "classes",
    "partition.classes_per_client": 1,
    "num_clients": 8,
    "cohort_size": 8,
    "num_experts": 4,
    "model.kind": "transformer",
    "model.stem_width": 16,
    "model.expert_width": 8,
}


@functools.cache
def base(**changes):
    plan = plan_run(strategy="prototypes", **changes)
    return plan, start(plan, plan.program)


def describe(run, client):
    """The message of one client, whole."""
    program = run.program
    parts = program.model, program.task, program.sizes
    make = jax.jit(lambda *args: describe_features(*args, *parts))
    own = run.federation.index[client], run.federation.size[client]
    return make(run.state.params, run.federation, *own)


def test_a_message_is_the_mean_feature_of_every_label():
    _, run = base()
    program, federation = run.program, run.federation
    for client in (0, 3):
        means = describe(run, client)
        ids = np.asarray(federation.index[client])[: int(federation.size[client])]
        batch = take_batch(
            federation.train, jnp.asarray(ids), federation.statistics, program.task
        )
        stem = program.model.parts.stem
        feature = pool(stem(run.state.params["stem"], batch, None))
        label = np.asarray(batch["y"])
        for one in range(program.sizes.num_classes):
            own = np.asarray(feature)[label == one]
            assert means.count[0, one] == len(own)
            expected = own.mean(axis=0) if len(own) else np.zeros(feature.shape[1])
            np.testing.assert_allclose(means.feature[0, one], expected, atol=1e-5)


def test_a_message_of_text_is_one_mean_in_every_layer_without_padding():
    _, run = base(**TEXT)
    means = describe(run, 0)
    layers, width = run.program.sizes.num_layers, run.program.sizes.gate_width
    assert means.feature.shape == (layers, 1, width)
    ids = np.asarray(run.federation.index[0])[: int(run.federation.size[0])]
    length = np.asarray(run.federation.train["length"])[ids]
    np.testing.assert_array_equal(means.count, np.full((layers, 1), (length - 1).sum()))
    assert layers > 1 and not np.allclose(means.feature[0], means.feature[1])


def test_score_experts_by_hand():
    """Three groups and five experts: 0 and 3, 1 and 4, 2."""
    inf = jnp.inf
    distance = jnp.array([[0.0, 1.0, 4.0, inf], [2.0, 1.0, 3.0, inf]])
    found = Found(jnp.int32(3), distance, jnp.ones(()), jnp.ones(()))
    scores = score_experts(found, 5)
    expected = [[1, 0.75, 0, 0.999, 0.749], [0.5, 1, 0, 0.499, 0.999]]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    none = found._replace(count=jnp.int32(1))
    np.testing.assert_array_equal(score_experts(none, 5), np.zeros((2, 5)))


def test_groups_keep_the_numbers_that_their_clients_had():
    """Groups 0, 1, 2 of now are mostly the clients of 2, 0, 1 before."""
    now = jnp.array([0, 0, 1, 1, 2, 2])
    distance = 1.0 - jax.nn.one_hot(now, 4)
    distance = distance.at[:, 3].set(jnp.inf)
    found = Found(jnp.int32(3), distance, jnp.ones(()), jnp.ones(()))
    before = jax.nn.one_hot(jnp.array([2, 2, 0, 0, 1, 2]), 4)
    kept = keep_numbers(found, before).distance
    np.testing.assert_array_equal(kept.argmin(axis=1), [2, 2, 0, 0, 1, 1])
    assert np.isinf(kept[:, 3]).all()
    same = keep_numbers(found, jnp.zeros((6, 4))).distance
    np.testing.assert_array_equal(same, distance)


def test_asked_again_clients_keep_their_experts():
    plan, run = base(**TEXT)
    ask = jax.jit(run_stage, static_argnums=(3, 4))
    rest = run.federation, run.hyper, plan.program, 0
    first, _ = ask(run.state, *rest)
    again, _ = ask(first.replace(round=first.round + 7), *rest)
    best = [s.align.strategy["score"].argmax(axis=-1) for s in (first, again)]
    np.testing.assert_array_equal(*best)


def test_one_expert_has_nothing_to_ask_for():
    plan = plan_run(strategy="prototypes", num_experts=1, max_held=1, num_active=1)
    run = start(plan, plan.program)
    state, _ = run_stage(run.state, run.federation, run.hyper, plan.program, 0)
    assert_same(state.align, run.state.align)


def test_assign_holds_the_experts_of_the_own_group_first():
    decide, evidence = prepare_strategy("prototypes")
    scores = jax.random.uniform(jax.random.key(1), evidence.state["score"].shape)
    known = evidence.state | {"score": scores, "groups": jnp.float32(2)}
    evidence = evidence.replace(state=known)
    held = list_held(decide(evidence, make_hyper(), key=jax.random.key(0)))
    for row, client, capacity in zip(
        held, evidence.client, evidence.capacity, strict=True
    ):
        best = np.argsort(-np.asarray(scores[client]))[: int(capacity)]
        assert row == best.tolist()


def test_assign_gives_all_clients_one_expert_where_no_groups_are_known():
    decide, evidence = prepare_strategy("prototypes")
    held = list_held(decide(evidence, make_hyper(), key=jax.random.key(0)))
    assert held == [[0]] * len(evidence.client)


def test_assign_bounded_draws_afresh_where_no_groups_are_known():
    decide, evidence = prepare_strategy("prototypes_bounded")
    keys = jax.random.split(jax.random.key(0), 20)
    found = [list_held(decide(evidence, make_hyper(), key=key)) for key in keys]
    assert len({str(each) for each in found}) > 10
    held = {expert for each in found for row in each for expert in row}
    assert held == set(range(SIZES.num_experts))


def test_assign_bounded_keeps_every_expert_in_use():
    """All clients want expert 0, and half of the mean load is the least of each."""
    decide, evidence = prepare_strategy("prototypes_bounded")
    wanted = jnp.zeros_like(evidence.state["score"]).at[:, 0].set(1.0)
    known = evidence.state | {"score": wanted, "groups": jnp.float32(2)}
    one = jnp.ones_like(evidence.capacity)
    evidence = evidence.replace(state=known, capacity=one)
    hyper = make_hyper(flex_moe={"low": 1.0, "high": 1.0, "deficit": 0.0})
    held = list_held(decide(evidence, hyper, key=jax.random.key(0)))
    load = np.bincount([row[0] for row in held], minlength=SIZES.num_experts)
    assert load.max() - load.min() <= 1


def test_languages_are_found_in_every_layer():
    plan, run = base(**TEXT)
    state, frozen = jax.jit(run_stage, static_argnums=(3, 4))(
        run.state, run.federation, run.hyper, plan.program, 0
    )
    own = state.align.strategy
    np.testing.assert_array_equal(own["groups"], [4, 4])
    language = np.asarray(run.federation.label_mix).argmax(axis=1)
    for layer in range(2):
        best = np.asarray(own["score"][layer]).argmax(axis=1)
        assert len(set(zip(language.tolist(), best.tolist(), strict=True))) == 4
    assert_same(frozen, run.federation.frozen)


@pytest.mark.parametrize(
    ("first", "period", "rounds"), [(0, 0, [0]), (2, 0, [2]), (2, 4, [2, 6, 10])]
)
def test_clients_are_asked_at_these_rounds(first, period, rounds):
    numbers = {"period": period, "shrink": 5.0}
    hyper, sizes = make_hyper(prototypes=numbers, upcycle={"rounds": first}), SIZES
    sent = [float(count_features(jnp.int32(r), hyper, sizes)[0]) for r in range(12)]
    each = sizes.num_layers * sizes.num_classes * (sizes.gate_width + 1)
    assert sent == [each if r in rounds else 0 for r in range(12)]
    fields = {"upcycle.rounds": first, "prototypes.period": period}
    stages = plan_run(
        strategy="prototypes", num_rounds=12, **fields
    ).program.strategy.stages
    assert [when for when, _ in stages if when < 12] == rounds


def test_messages_are_among_the_costs_of_the_round_after_them():
    plan, _ = base()
    run = start_run(plan, plan.program)
    _, metrics = build_run_rounds(plan.program)(run.state, run.federation, run.hyper)
    costs, sizes = plan.program.costs, plan.program.sizes
    silent = plan.program._replace(
        strategy=plan.program.strategy._replace(message=None)
    )
    run = start_run(plan, plan.program)
    _, without = build_run_rounds(silent)(run.state, run.federation, run.hyper)
    extra = {
        name: np.asarray(metrics[name]) - without[name]
        for name in without
        if name in ("bytes_up", "bytes_down", "client_flops")
    }
    up = sizes.num_clients * 4 * sizes.num_classes * (sizes.gate_width + 1)
    down = sizes.num_clients * (costs.shared_bytes + costs.expert_bytes)
    flops = costs.dense_flops / 3 * float(run.federation.size.sum())
    np.testing.assert_allclose(extra["bytes_up"], [up, 0])
    np.testing.assert_allclose(extra["bytes_down"], [down, 0])
    np.testing.assert_allclose(extra["client_flops"], [flops, 0], rtol=1e-5)


def test_a_stage_sees_the_examples_that_clients_own_by_then():
    drift = {"drift.labels": 1.0, "drift.start": 1, "drift.rounds": 1}
    plan, run = base(**drift)
    seen = []

    def act(state, federation, hyper, key, **static):
        seen.append(federation.index)
        return state, federation.frozen

    strategy = plan.program.strategy._replace(stages=((0, act),))
    program = plan.program._replace(strategy=strategy)
    run_stage(run.state, run.federation, run.hyper, program, 0)
    later, _ = build_run_rounds(plan.program)(
        jax.tree.map(jnp.copy, run.state), run.federation, run.hyper
    )
    run_stage(later, run.federation, run.hyper, program, 0)
    assert_same(seen[0], run.federation.index)
    assert not np.array_equal(seen[0], seen[1])
