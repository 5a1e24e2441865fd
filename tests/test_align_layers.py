"""Decisions and learning of several MoE layers, against a loop over the layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    assert_same,
    make_align,
    make_evidence,
    make_feedback,
    make_hyper,
    make_program,
    make_replies,
)

from fedmoe_jax.align.affinity import bias_slots, by_fitness
from fedmoe_jax.align.drift_detector import init_detector
from fedmoe_jax.align.learn import RESET, count_load, learn
from fedmoe_jax.align.queues import TierPressure, lift_tiers
from fedmoe_jax.align_layers import assign, learn_layers
from fedmoe_jax.moe_layers import LAYER
from fedmoe_jax.options import replace
from fedmoe_jax.privacy.request import request
from fedmoe_jax.types import Assignment, SimState, make_keys
from fedmoe_jax.world.outcome import OUTAGE

pytestmark = pytest.mark.slow

HYPER = make_hyper(
    fitness={"exploration": 0.5},
    reaction={"threshold": 0.1, "evidence": 0},
    gate={"bias": 2.0},
)
ARRIVED = np.array([True, True, False, True])
layers = pytest.mark.parametrize("num_layers", [1, 3])


def make_layers(num_layers, strategy):
    """A program of so many layers, and random evidence and state of each of them."""
    program = make_program(**{"strategy": strategy, "reaction.kind": "reset"})
    sizes = program.sizes._replace(num_layers=num_layers)
    rows = [draw_layer(layer, sizes, program) for layer in range(num_layers)]
    return program._replace(sizes=sizes), rows


def draw_layer(layer, sizes, program):
    rng = np.random.default_rng(layer)
    shape = sizes.num_clients, sizes.num_experts
    fitness = rng.random(shape).astype(np.float32)
    state = jax.tree.map(np.asarray, program.strategy.init(sizes))
    align = make_align(
        *shape,
        fitness=fitness,
        usage=rng.random(sizes.num_experts).astype(np.float32),
        held=rng.random(shape) < 0.5,
        strategy=jax.tree.map(lambda leaf: leaf + np.float32(rng.random()), state),
        detector=jax.device_get(init_detector(*shape)),
    )
    evidence = make_evidence(sizes, usage=align.usage, state=align.strategy)
    client = np.asarray(evidence.client)
    times_held = np.asarray(align.times_held)[client]
    known = dict(fitness=fitness[client], held=align.held[client])
    return align, evidence.replace(times_held=times_held, **known)


def join_evidence(rows):
    """Evidence of all layers, as `gather_evidence` gives it."""
    every = [evidence for _, evidence in rows]
    join = lambda name, axis: jax.tree.map(
        lambda *leaves: np.stack(leaves, axis), *(getattr(e, name) for e in every)
    )
    axes = {"fitness": 1, "held": 1, "times_held": 1, "usage": 0, "state": 0}
    return every[0].replace(**{name: join(name, axis) for name, axis in axes.items()})


def take_layer(align, layer):
    """The alignment state of one layer, on the host."""
    align = jax.device_get(align)
    client = lambda leaf: leaf[:, layer]
    own = lambda tree: jax.tree.map(lambda leaf: leaf[layer], tree)
    return align.replace(
        fitness=client(align.fitness),
        usage=align.usage[layer],
        held=client(align.held),
        times_held=client(align.times_held),
        strategy=own(align.strategy),
        detector=own(align.detector),
    )


def join_align(rows):
    every = [align for align, _ in rows]
    stack = lambda axis, *leaves: np.stack(leaves, axis)
    first = jax.tree.map(lambda *leaves: stack(0, *leaves), *every)
    names = "fitness", "held", "times_held"
    return first.replace(
        **{name: stack(1, *(getattr(a, name) for a in every)) for name in names}
    )


def lose_download(outcome):
    """The outcomes of a cohort whose last client received nothing."""
    code = outcome.code.at[-1].set(OUTAGE)
    return outcome.replace(code=code, spent=outcome.spent.at[-1, 1:].set(0.0))


def keys_by_hand(key, num_layers):
    fold = lambda layer: jax.random.fold_in(key, LAYER + layer) if layer else key
    return [fold(layer) for layer in range(num_layers)]


@layers
@pytest.mark.parametrize("strategy", ["load_balanced", "fedmix", "flex_moe"])
def test_assign_is_a_loop_over_layers(strategy, num_layers):
    program, rows = make_layers(num_layers, strategy)
    key = jax.random.key(2)
    found = jax.jit(lambda e: assign(e, HYPER, program, key))(join_evidence(rows))
    found, one = (
        jax.device_get(found),
        jax.jit(program.strategy.assign, static_argnums=2),
    )
    for layer, key_of in enumerate(keys_by_hand(key, num_layers)):
        _, evidence = rows[layer]
        expected = one(evidence, HYPER, program.sizes, key_of)
        assert_same(jax.tree.map(lambda leaf, g=layer: leaf[:, g], found), expected)


@layers
def test_assign_yields_to_the_tiers_of_each_layer_before_gates_get_their_bias(
    num_layers,
):
    program, rows = make_layers(num_layers, "greedy")
    affinity = lambda evidence, hyper: evidence.fitness
    strategy = program.strategy._replace(affinity=affinity)
    program, sizes = program._replace(strategy=strategy), program.sizes
    rng, key = np.random.default_rng(3), jax.random.key(2)
    queue = 5.0 * (rng.random((num_layers, sizes.max_capacity)) < 0.7)
    top = rng.random((num_layers, sizes.num_experts)).argsort(1) < 2
    pressure = TierPressure(jnp.asarray(queue, jnp.float32), jnp.asarray(top))
    evidence, changed = join_evidence(rows), 0
    decide = jax.jit(lambda *given: assign(evidence, HYPER, program, key, *given))
    found, plain, pressure = jax.device_get((decide(pressure), decide(), pressure))
    lift = jax.jit(lift_tiers, static_argnums=5)
    for layer in range(num_layers):
        of_layer = lambda tree, g=layer: jax.tree.map(lambda leaf: leaf[:, g], tree)
        own = jax.tree.map(lambda leaf, g=layer: leaf[g], pressure)
        fitness, before = rows[layer][1].fitness, of_layer(plain)
        rest = evidence.capacity, own, HYPER.fairness.tradeoff, 0
        expected = np.asarray(lift(before, fitness, *rest).held)
        np.testing.assert_array_equal(of_layer(found).held, expected)
        bias = HYPER.gate.bias * np.take_along_axis(fitness, expected, axis=1)
        np.testing.assert_allclose(of_layer(found).bias, bias)
        changed += (expected != before.held).sum()
    assert changed > 0


@layers
def test_assign_asks_for_each_layer_by_itself(num_layers):
    """And its bias is of the experts in the slots as they are then."""
    program, rows = make_layers(num_layers, "greedy")
    private = program.static.privacy._replace(flip=True)
    static = program.static._replace(privacy=private)
    strategy = program.strategy._replace(affinity=by_fitness)
    program = program._replace(static=static, strategy=strategy)
    hyper = replace(HYPER, privacy={"flip": jnp.float32(0.5)}, gate={"bias": 2.0})
    key, asks = jax.random.key(2), []
    found = jax.jit(lambda e: assign(e, hyper, program, key))(join_evidence(rows))
    found = jax.device_get(found)

    @jax.jit
    def ask(evidence, key):
        wish = program.strategy.assign(evidence, hyper, program.sizes, key)
        experts = {"num_experts": program.sizes.num_experts, "local_experts": 0}
        asked = request(wish, evidence.client, hyper, key, **experts)
        return bias_slots(asked, evidence, hyper, strategy)

    for layer, key_of in enumerate(keys_by_hand(key, num_layers)):
        expected = ask(rows[layer][1], key_of)
        assert_same(
            jax.tree.map(lambda leaf, g=layer: leaf[:, g], found), expected, atol=1e-6
        )
        asks.append(np.array(expected.asked))
    assert all((asks[0] != other).any() for other in asks[1:])


def test_learn_layers_measures_what_was_trained_and_learns_what_was_reported():
    program, rows = make_layers(2, "greedy")
    slots = program.sizes.cohort_size, 2, program.sizes.max_held
    held = jnp.broadcast_to(jnp.array([3, 1], jnp.int32), slots)
    assignment = Assignment(held, jnp.ones(slots, bool).at[0, 1, 1].set(False))
    feedback = make_feedback(jnp.full(slots, 7.0), accuracy=jnp.full(slots, 0.5))
    load = jnp.broadcast_to(jnp.array([4.0, 2.0]), slots)
    replies = make_replies(feedback, ARRIVED, load=load)  # three of four arrive
    fields = dict.fromkeys(SimState.__dataclass_fields__)
    align = join_align(rows)
    fields |= {"align": align, "key": jax.random.key(4), "round": jnp.int32(7)}
    given = SimState(**fields), join_evidence(rows), assignment, replies
    found, measured = jax.jit(lambda *given: learn_layers(*given, HYPER, program))(
        *given
    )
    assert measured.tolist() == [[0, 6, 0, 12], [0, 4, 0, 12]]
    used = found.usage - HYPER.usage.decay * align.usage
    np.testing.assert_allclose(used, [[0, 21, 0, 21], [0, 14, 0, 21]], atol=1e-5)


@layers
@pytest.mark.parametrize("chooses", [False, True])
def test_learn_layers_is_a_loop_over_layers(num_layers, chooses):
    program, rows = make_layers(num_layers, "fedmix")
    sizes, rng = program.sizes, np.random.default_rng(9)
    slots = sizes.cohort_size, num_layers, sizes.max_held
    draw = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)
    held = rng.random((*slots[:2], sizes.num_experts)).argsort(-1)[..., : slots[2]]
    held = jnp.asarray(held, jnp.int32)
    assignment = Assignment(held, jnp.ones(slots, bool).at[1, :, 1].set(False))
    feedback = make_feedback(10 * draw(*slots), accuracy=0.1 * draw(*slots))
    report = draw(*slots[:2], sizes.num_experts)
    chosen = jnp.asarray(np.eye(2, dtype=bool)[rng.integers(2, size=slots[:2])])
    chosen = chosen & assignment.slot if chooses else None
    replies = make_replies(feedback, ARRIVED, report=report, chosen=chosen)
    trained = assignment
    if chosen is not None:  # the last client receives nothing, and has chosen nothing
        replies = replies.replace(outcome=lose_download(replies.outcome))
        trained = assignment.replace(slot=chosen.at[-1].set(False))
    fields = dict.fromkeys(SimState.__dataclass_fields__)
    align, key, round = join_align(rows), jax.random.key(4), jnp.int32(7)
    state = SimState(**fields | {"align": align, "key": key, "round": round})
    given = state, join_evidence(rows), assignment, replies
    found, load = jax.jit(lambda *given: learn_layers(*given, HYPER, program))(*given)
    one = jax.jit(functools.partial(learn, hyper=HYPER, static=program.static))
    assignment, trained, feedback, report = jax.device_get(
        (assignment, trained, feedback, report)
    )
    reset_key = make_keys(key, round).of(RESET)
    for layer, key_of in enumerate(keys_by_hand(reset_key, num_layers)):
        of_layer = lambda tree, g=layer: jax.tree.map(lambda leaf: leaf[:, g], tree)
        align, evidence = rows[layer]
        mine = of_layer(assignment), of_layer(feedback)
        held = of_layer(trained)
        loads = count_load(mine[1], replies.arrived, held, sizes.num_experts)
        expected = one(
            *(align, evidence.client, mine[0], held, mine[1]),
            *(replies.arrived, replies.outcome.received, loads, key_of),
        )
        # A client whose update was lost keeps the mass that it last reported.
        arrived = np.asarray(replies.arrived)
        mass = align.strategy["mass"].copy()
        mass[np.asarray(evidence.client)[arrived]] = of_layer(report)[arrived]
        expected = expected.replace(strategy={"mass": mass})
        assert_same(take_layer(found, layer), expected, atol=1e-6)
        np.testing.assert_array_equal(load[layer], loads)
    assert float(found.detector.alarms.sum()) > 0  # the keys were used
