"""Pruned sub-models in whole rounds: room, bytes, merging, importance."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import E, K, assert_same, plan_run, start_run, tiny_config

from fedmoe_jax.aggregate import accumulate, accumulate_chunk, merge, weigh, zero_sums
from fedmoe_jax.align_layers import assign
from fedmoe_jax.broadcast import broadcast, gather_evidence, set_conditions
from fedmoe_jax.capacity import measure_capacity
from fedmoe_jax.client import build_client_update
from fedmoe_jax.config import validate
from fedmoe_jax.evaluation.evaluate import build_evaluate_share
from fedmoe_jax.evaluation.finetune import build_finetune_share
from fedmoe_jax.optimizers import server_optimizer
from fedmoe_jax.options import UserError
from fedmoe_jax.prune import (
    Pruned,
    expect_shares,
    prune_cohort,
    save_shared,
    share_pruned_stem,
    spread_room,
)
from fedmoe_jax.round import build_round, build_run_rounds
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.state import init_state
from fedmoe_jax.types import Assignment, ClientInput, make_keys
from fedmoe_jax.world.costs import client_bytes, client_flops, client_parameters
from fedmoe_jax.world.outcome import Conditions
from fedmoe_jax.world.step import observe

LAMP = {"pruning.kind": "lamp", "pruning.parts": "all", "model.stem": "mlp"}
LAMP |= {"pruning.spread": 2.0, "data.name": "digits", "evaluation.finetune": True}


class Round(NamedTuple):
    """A first round until clients train."""

    program: object
    run: object
    pruned: Pruned
    inputs: ClientInput
    conditions: Conditions


@functools.cache
def first_round():
    plan = plan_run(**LAMP)
    program = plan.program
    run = start_run(plan, program)
    cohort = jnp.arange(program.sizes.cohort_size)

    def decide(state, federation, hyper):
        view, keys = observe({}, federation, hyper, ()), make_keys(state.key, 0)
        capacity = measure_capacity(
            state.belief, view, hyper, program, state.round, keys
        )
        believed = capacity.belief, hyper, program
        evidence = gather_evidence(state, view, cohort, *believed)
        assignment = assign(evidence, hyper, program, keys.align)
        pruned = prune_cohort(state, evidence, assignment, hyper, program)
        decided = evidence, assignment, pruned
        inputs = broadcast(state, view, *decided, program)
        conditions = set_conditions(state, view, *decided, hyper, program)
        return pruned, inputs, conditions

    found = jax.jit(decide)(run.state, run.federation, run.hyper)
    return Round(program, run, *found)


@functools.cache
def train_all():
    """The updates of the cohort, and their weights."""
    now, run = first_round(), first_round().run
    client_update = build_client_update(now.program)

    def train(inputs, federation, hyper):
        size = federation.size[inputs.client]
        key = jax.random.fold_in(jax.random.key(1), inputs.client)
        update = client_update(run.state.params, inputs, federation, hyper, key)
        return update, weigh(inputs, update, size, hyper, now.program.strategy)

    over = jax.vmap(train, in_axes=(0, None, None))
    return jax.jit(over)(now.inputs, run.federation, run.hyper)


def entries_of(now, client):
    """Bytes of ONE client's sub-model, each unit counted in NumPy: experts, stem."""
    masks = jax.tree.map(lambda leaf: np.asarray(leaf[client]), now.pruned.masks)
    slot = np.asarray(now.inputs.slot[client])
    stem = expert = 0
    for each in now.program.units:
        kept = masks[each.name]
        if each.part == "stem":
            stem += each.entries * kept.sum()
        else:
            expert += each.entries * (kept * slot[..., None]).sum()
    return 4 * (expert + now.program.rest_entries * slot.sum()), 4 * stem


def test_spread_room_by_hand():
    sizes = first_round().program.sizes._replace(max_capacity=4)
    room = jnp.array([-1.0, 0.3, 1.5, 9.0])

    def spread_of(round, **numbers):
        values = {"spread": 2.0, "ramp": 0} | numbers
        pruning = type("Numbers", (), {k: jnp.asarray(v) for k, v in values.items()})
        hyper = type("Hyper", (), {"pruning": pruning})
        return list(np.asarray(spread_room(room, jnp.int32(round), hyper, sizes)))

    assert spread_of(0) == [1, 1, 3, 4]
    assert spread_of(0, ramp=10) == [1, 1, 2, 4]
    # 1 + (1 - 0.7^3) = 1.657, times 1.5 = 2.49; 1 + (1 - 0.3^3) = 1.973
    assert spread_of(3, ramp=10, spread=2.0) == [1, 1, 3, 4]
    assert spread_of(1, ramp=10, spread=2.0) == [1, 1, 2, 4]  # 1.271 times 1.5
    assert spread_of(99, ramp=10) == [1, 1, 3, 4]


@pytest.mark.slow
def test_prune_cohort_keeps_to_the_bytes_of_each_client():
    now = first_round()
    costs, program = now.program.costs, now.program
    stem = 4 * sum(u.entries * u.count for u in program.units if u.part == "stem")
    rooms, tight = now.pruned, 0
    belief = measure_rooms(now)
    for client in range(program.sizes.cohort_size):
        experts, own_stem = entries_of(now, client)
        most = belief[client] * costs.expert_bytes + stem
        floors = 4 * sum(u.entries for u in program.units) * (K + 1)
        assert experts + own_stem <= most * (1 + 1e-5) or experts <= floors
        tight += most < K * costs.expert_bytes + stem
    assert tight and rooms is not None


def measure_rooms(now):
    view = observe({}, now.run.federation, now.run.hyper, ())
    keys, state = make_keys(now.run.state.key, 0), now.run.state
    capacity = measure_capacity(
        state.belief, view, now.run.hyper, now.program, state.round, keys
    )
    return np.asarray(capacity.belief.room)


@pytest.mark.slow
def test_expect_shares_is_what_clients_keep_that_hold_all_experts():
    plan = plan_run(**{"data.name": "digits", "pruning.kind": "lamp", "max_held": E})
    program, run = plan.program, start_run(plan, plan.program)
    cohort = jnp.arange(program.sizes.cohort_size)
    view = observe({}, run.federation, run.hyper, ())
    belief = run.state.belief
    evidence = gather_evidence(run.state, view, cohort, belief, run.hyper, program)
    room, capacity = jnp.linspace(2.0, E - 0.5, len(cohort)), jnp.full(len(cohort), E)
    evidence = evidence.replace(room=room, capacity=capacity)
    expected = expect_shares(run.state, evidence, run.hyper, program)
    held = jnp.broadcast_to(jnp.arange(E), (len(cohort), 1, E))
    whole = Assignment(held, jnp.ones(held.shape, bool))
    found = prune_cohort(run.state, evidence, whole, run.hyper, program)
    np.testing.assert_allclose(expected, found.share[:, 0], atol=1e-6)
    assert (np.diff(np.asarray(expected).mean(1)) > 0).all()
    assert np.ptp(np.asarray(expected[0])) > 0.01


def test_traffic_counts_bytes_from_the_masks():
    now = first_round()
    costs, traffic = now.program.costs, now.conditions.traffic
    down = np.asarray(client_bytes(costs, traffic)[1])
    memory = 4 * np.asarray(client_parameters(costs, traffic))
    fixed = costs.head_bytes + costs.gate_bytes
    units = sum(u.entries * u.count for u in now.program.units if u.part == "stem")
    rest = costs.stem_bytes - 4 * units
    for client in range(len(down)):
        experts, stem = entries_of(now, client)
        whole = fixed + rest + stem + experts
        np.testing.assert_allclose(down[client], whole, rtol=1e-5)
        np.testing.assert_allclose(memory[client], whole, rtol=1e-5)


def test_traffic_counts_flops_from_the_masks():
    """Of the stem's one product, and of both of an expert: in and out of its units."""
    now = first_round()
    costs, params = now.program.costs, now.run.state.params
    flops = np.asarray(client_flops(costs, now.conditions.traffic, 1.0))
    (expert,) = params["experts"].values()
    size = lambda kernel: 3 * 2 * math.prod(kernel.shape[-2:])
    stem = size(params["stem"]["Dense_0"]["kernel"])
    hidden = size(expert["Dense_0"]["kernel"]) + size(expert["Dense_1"]["kernel"])
    stem_mask, masks = (np.asarray(now.pruned.masks[n]) for n in ("stem0", "expert"))
    slot = np.asarray(now.inputs.slot)
    for client in range(len(flops)):
        left = costs.shared_flops - stem * (1 - stem_mask[client].mean())
        each = costs.expert_flops - hidden * (1 - masks[client].mean(-1))
        whole = left + (each * slot[client]).sum()
        np.testing.assert_allclose(flops[client], whole, rtol=1e-5)
    assert stem_mask.mean() < 1 and (masks.mean(-1)[slot] < 1).any()


def test_a_stem_that_stays_with_clients_is_pruned_in_flops_alone():
    now = first_round()
    strategy = now.program.strategy._replace(personal=("stem",))
    program = now.program._replace(strategy=strategy)
    client = int(now.pruned.saved.argmax())
    masks = jax.tree.map(lambda leaf: leaf[client], now.pruned.masks)
    assert share_pruned_stem(masks, program) is None
    saved = save_shared(masks, program)
    assert 0 < saved == save_shared(masks, now.program)
    np.testing.assert_allclose(saved, now.pruned.saved[client], rtol=1e-6)


@pytest.mark.slow
def test_updates_leave_pruned_units_alone():
    now, (update, _) = first_round(), train_all()
    for part, keep in update.keep.items():
        for factor, delta in zip(
            jax.tree.leaves(keep), jax.tree.leaves(update.delta[part]), strict=True
        ):
            dead = jnp.broadcast_to(factor, delta.shape) == 0
            assert not bool((jnp.where(dead, delta, 0.0) != 0).any())
    mask = now.pruned.masks["expert"]
    assert bool((update.importance["expert"][mask] > 0).any())
    np.testing.assert_array_equal(update.importance["expert"][~mask], 0)


def add_up(function):
    now, (updates, weights) = first_round(), train_all()
    start = zero_sums(now.run.state.params, now.program.units)
    start = jax.tree.map(lambda leaf: leaf[None], start)
    return jax.tree.map(lambda leaf: leaf[0], function(start, updates, weights))


@functools.cache
def sums_one_by_one():
    now = first_round()

    def loop(sums, updates, weights):
        for client in range(len(now.inputs.client)):
            take = lambda leaf, client=client: leaf[client]
            one = jax.tree.map(take, (now.inputs, updates, weights))
            sums = accumulate(sums, 0, *one)
        return sums

    return add_up(jax.jit(loop))


@pytest.mark.slow
def test_accumulate_chunk_is_one_client_after_the_other():
    now = first_round()
    which = jnp.zeros(len(now.inputs.client), jnp.int32)
    chunk = lambda sums, *rest: accumulate_chunk(sums, which, now.inputs, *rest)
    assert_same(add_up(jax.jit(chunk)), sums_one_by_one(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_merge_averages_every_entry_over_those_that_trained_it():
    """A loop in NumPy over clients, slots and entries."""
    now, (update, weights) = first_round(), train_all()
    params = now.run.state.params
    tx = server_optimizer(now.program.static.server, jnp.float32(1.0))
    merged, _ = merge(params, now.run.state.server_opt, sums_one_by_one(), tx)
    old = np.asarray(params["experts"]["moe"]["Dense_1"]["kernel"])
    total, amount = np.zeros_like(old), np.zeros_like(old)
    delta = np.asarray(update.delta["experts"]["moe"]["Dense_1"]["kernel"])
    mask = np.asarray(now.pruned.masks["expert"])
    for client in range(len(delta)):
        for k, expert in enumerate(np.asarray(now.inputs.held[client, 0])):
            own = float(weights["experts"][client, 0, k])
            kept = mask[client, 0, k]
            total[expert][:, kept] += own * delta[client, k][:, kept]
            amount[expert][:, kept] += own
    expected = old + total / np.where(amount > 0, amount, 1)
    found = merged["experts"]["moe"]["Dense_1"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (amount == 0).any() and (amount > 0).any()


def play(**changes):
    plan = plan_run(**LAMP | changes)
    run, run_rounds = start_run(plan, plan.program), build_run_rounds(plan.program)
    return run_rounds(run.state, run.federation, run.hyper), plan, run


@pytest.mark.slow
def test_all_units_kept_is_the_run_without_pruning():
    whole = {"devices.model_scale": 1.0}  # every client has room for all
    (state, metrics), *_ = play(**whole)
    (plain, known), *_ = play(**whole, **{"pruning.kind": "none"})
    assert_same(state.params, plain.params, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(metrics["bytes_down"], known["bytes_down"])
    np.testing.assert_allclose(metrics["client_flops"], known["client_flops"])
    np.testing.assert_array_equal(metrics["kept_share"], 1)
    assert plain.pruning == {} and plain.belief.room is None
    assert "kept_share" not in known


@pytest.mark.slow
def test_pruned_rounds_learn_and_report_what_they_cover():
    (state, metrics), plan, run = play()
    assert not metrics["capacity_violations"].any()
    assert 0 < float(metrics["kept_share"][-1]) < 1
    assert (metrics["mask_overlap"] <= 1).all()
    assert bool((state.pruning["expert"] > 0).any())
    share = jax.jit(spread(build_finetune_share(plan.program), plan.program.mesh))
    values = jnp.zeros((1, plan.program.sizes.num_clients))
    found = share(state, run.federation, run.hyper, values)
    assert 0 < float(found["personal_submodel_accuracy"]) <= 1


@pytest.mark.slow
def test_a_program_without_pruning_has_no_trace_of_it():
    """It reads no number, and neither state nor inputs have masks."""
    plan = plan_run(**LAMP | {"pruning.kind": "none"})
    program, hyper = plan.program, plan.hyper._replace(pruning=None)
    state, frozen = jax.eval_shape(
        lambda key: init_state(key, hyper, program), jax.random.key(0)
    )
    federation = plan.federation.replace(frozen=frozen)
    for build in (build_round, build_evaluate_share, build_finetune_share):
        values = () if build is not build_finetune_share else (jnp.zeros((1, 6)),)
        step = spread(build(program), program.mesh)
        jax.eval_shape(step, state, federation, hyper, *values)
    assert state.pruning == {} and state.belief.room is None
    assert program.units == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pruning.floor": 0.0}, "pruning.floor=0.0 is not allowed"),
        ({"pruning.floor": 1.5}, "pruning.floor=1.5 is not allowed"),
        ({"pruning.spread": 0.5}, "pruning.spread=0.5 is not allowed"),
        ({"pruning.rotation": 1.0}, "pruning.rotation=1.0 is not allowed"),
        ({"pruning.rate": 0.0}, "pruning.rate=0.0 is not allowed"),
        ({"pruning.kind": "best"}, "pruning.kind='best' is not allowed"),
    ],
)
def test_validate_refuses_numbers_of_pruning(changes, text):
    with pytest.raises(UserError, match=text) as caught:
        validate(tiny_config(**changes))
    assert "allowed: " in str(caught.value)


def test_plan_run_refuses_a_stem_without_units():
    with pytest.raises(UserError, match="pruning.parts='all' is not allowed") as caught:
        plan_run(**LAMP | {"model.stem": "flat"})
    assert "allowed: 'experts'" in str(caught.value)
