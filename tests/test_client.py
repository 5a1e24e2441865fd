"""One client's round against a hand-written loop of gradient steps."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    fill,
    make_data,
    make_federation,
    make_hyper,
    make_inputs,
    make_logit_model,
    make_program,
    tiny_config,
    use_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax import client
from fedmoe_jax import probe as probe_file
from fedmoe_jax.align.fitness import PROBES as probe_kinds
from fedmoe_jax.align.fitness import SCORES
from fedmoe_jax.base import PARTS, Route
from fedmoe_jax.client import all_finite, build_client_update, choose_slots
from fedmoe_jax.cohort import build_train_cohort
from fedmoe_jax.federation import count_steps
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.optimizers import step_weights
from fedmoe_jax.options import replace
from fedmoe_jax.probe import hold_out, probe_experts
from fedmoe_jax.reply import renew_variate
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.strategies.ifca import choose_best
from fedmoe_jax.tasks.images import IMAGES, score_labels
from fedmoe_jax.world.outcome import BROKEN, MERGED, Outcome

pytestmark = pytest.mark.slow

CLIENT, PADDED = 1, 9  # the second client owns 7 of the 9 places of its row
IMAGE, CLASSES, MOMENTUM = (4, 4, 1), 3, 0.9
CHANGES = {
    "num_clients": 5,
    "cohort_size": 5,
    "num_experts": 5,
    "max_held": 3,
    "num_active": 2,
    "local_steps": 3,
    "batch_size": 4,
    "model.expert_width": 6,
    "model.feature_width": 6,
    "client.momentum": MOMENTUM,
    "client.prox": 0.7,  # that the term is in the program; hyper has its coefficient
}


def build(steps=None, **changes):
    return make_program(make_data(CLASSES, IMAGE), steps, **CHANGES | changes)


def with_dropout(rate):
    return {"model.stem_dropout": rate, "model.expert_dropout": rate}


def use_strategy(program, **changes):
    return program._replace(strategy=program.strategy._replace(**changes))


def rate_hyper(**changes):
    """No losses but the task's, unless they are given."""
    numbers = {"learning_rate": 0.1, "prox": 0.0}
    losses = {"calibration": 0.0, "load": 0.0, "z": 0.0}
    take = lambda fields: {k: changes.get(k, v) for k, v in fields.items()}
    return make_hyper(client=take(numbers), loss=take(losses))


def draw_federation():
    rng = np.random.default_rng(0)
    size = np.array([9, 7, 5, 2, 1], np.int32)
    index = np.zeros((5, PADDED), np.int32)
    for row, (end, count) in enumerate(zip(size.cumsum(), size, strict=True)):
        index[row, :count] = end - count + np.arange(count)
    images = {
        "x": rng.integers(0, 256, (24, *IMAGE), np.uint8),
        "y": rng.integers(0, CLASSES, 24, np.int32),
    }
    pixels = {
        "mean": np.full(IMAGE, 0.4, np.float32),
        "std": np.full(IMAGE, 0.3, np.float32),
    }
    federation = make_federation(
        train=images, index=index, size=size, statistics=pixels, frozen={}
    )
    return jax.tree.map(jnp.asarray, federation)


PROGRAM = build()
SIZES = PROGRAM.sizes
PARAMS = fill(shape_params(PROGRAM.model)[0])


def make_cohort(clients, steps, held=(4, 1, 4), slot=(True, True, False), **changes):
    """The last slot is invalid and repeats an expert that is held."""
    count = len(clients)
    rows = lambda row, dtype: np.broadcast_to(np.array(row, dtype), (count, 1, 3))
    gates = jax.tree.map(lambda leaf: np.stack([leaf] * count), PARAMS["gate"])
    fields = dict(
        client=np.array(clients, np.int32),
        steps=np.array(steps, np.int32),
        personal={"gate": gates},
    )
    return make_inputs(rows(held, np.int32), rows(slot, bool), **fields | changes)


def make_input(**changes):
    inputs = make_cohort([CLIENT], [SIZES.local_steps])
    return jax.tree.map(lambda leaf: leaf[0], inputs).replace(**changes)


FEDERATION = draw_federation()
INPUT = make_input()
KEY = jax.random.key(5)
HYPER = rate_hyper()
draw_batches = jax.jit(client.draw_batches, static_argnums=3)


def run(program, hyper=HYPER, inputs=INPUT, params=PARAMS, federation=FEDERATION):
    update = jax.jit(build_client_update(program))
    return update(params, inputs, federation, hyper, KEY)


# ---- the slow twin: one example at a time, only the valid experts 4 and 1


def twin_example(submodel, x, y, hyper):
    """Cross-entropy + calibration + z of ONE example, and what was seen."""
    parts, gate = PROGRAM.model.parts, submodel["gate"]["moe"]
    batch = {"x": (x[None] / 255 - 0.4) / 0.3}
    features = parts.stem(submodel["stem"], batch, None)
    scores = gate["kernel"] @ features[0] + gate["bias"]
    own = jnp.exp(jnp.stack([scores[4], scores[1]]))
    gates = own / own.sum()
    experts = submodel["experts"]["moe"]
    rows = [jax.tree.map(lambda w, k=k: w[k], experts) for k in (0, 1)]
    mixed = sum(gates[k] * parts.expert(rows[k], features, None)[0] for k in (0, 1))
    odds = jnp.exp(mixed @ submodel["head"]["kernel"] + submodel["head"]["bias"])
    entropy = jnp.log(odds.sum() / odds[y])
    calibration = jnp.log(jnp.exp(scores).sum() / own.sum())
    loss = entropy + hyper.loss.calibration * calibration
    loss += hyper.loss.z * jnp.log(own.sum()) ** 2
    return loss, (entropy, jnp.argmax(odds) == y, gates)


@jax.jit
def twin_gradient(submodel, ids, hyper):
    def loss(submodel):
        example = functools.partial(twin_example, submodel, hyper=hyper)
        x = FEDERATION.train["x"][ids].astype(jnp.float32)
        losses, seen = jax.vmap(example)(x, FEDERATION.train["y"][ids])
        gates = seen[2]
        first = jnp.stack([gates[:, 0] > gates[:, 1], gates[:, 1] > gates[:, 0]])
        load = 2 * (first.mean(1, dtype=jnp.float32) * gates.mean(0)).sum()
        return losses.mean() + hyper.loss.load * load, seen

    return jax.grad(loss, has_aux=True)(submodel)


def twin_received():
    """The sub-model that holds the valid experts and nothing else."""
    experts = jax.tree.map(lambda leaf: leaf[np.array([4, 1])], PARAMS["experts"])
    return PARAMS | {"experts": experts}


def twin_batches(client, steps, key):
    """Example ids of the client's own number of steps."""
    index, size = FEDERATION.index[client], FEDERATION.size[client]
    sizes = SIZES._replace(local_steps=max(steps, 1))
    draw_key = jax.random.split(key)[0]
    return np.asarray(draw_batches(draw_key, index, size, sizes))[:steps]


def twin_step(submodel, ids, hyper):
    """Gradient and what was seen, in NumPy."""
    return jax.tree.map(np.asarray, twin_gradient(submodel, ids, hyper))


def twin_update(hyper, client=CLIENT, steps=SIZES.local_steps, key=KEY):
    """Deltas after the client's steps of momentum SGD, and everything seen."""
    rate, prox = float(hyper.client.learning_rate), float(hyper.client.prox)
    received = submodel = twin_received()
    velocity, seen = jax.tree.map(np.zeros_like, received), []
    for ids in twin_batches(client, steps, key):
        grads, step_seen = twin_step(submodel, ids, hyper)
        grads = jax.tree.map(
            lambda g, w, r: g + prox * (w - r), grads, submodel, received
        )
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
        submodel = jax.tree.map(lambda w, v: w - rate * v, submodel, velocity)
        seen.append(step_seen)
    delta = jax.tree.map(np.subtract, submodel, received)
    return delta, [np.stack(part) for part in zip(*seen, strict=True)]


UPDATE = jax.jit(build_client_update(PROGRAM))


def assert_close(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(
        jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-6)


# ---- client_update

FULL_HYPER = dict(prox=0.7, calibration=0.2, load=0.3, z=0.1)


def first_slots(delta):
    """Drops the invalid third slot."""
    return delta | {
        "experts": jax.tree.map(lambda d: np.asarray(d)[:2], delta["experts"])
    }


@pytest.fixture(scope="module")
def full_run():
    """Hyperparameters with every term of the objective, and the client's update."""
    hyper = rate_hyper(**FULL_HYPER)
    return hyper, UPDATE(PARAMS, INPUT, FEDERATION, hyper, KEY)


def test_client_update_equals_hand_written_sgd(full_run):
    hyper, update = full_run
    delta, (entropy, correct, gates) = twin_update(hyper)
    assert_close(first_slots(update.delta), delta)
    for leaf in jax.tree.leaves(delta):
        assert np.abs(leaf).max() > 1e-4  # nothing is equal because nothing moved
    np.testing.assert_allclose(update.loss, entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(update.accuracy, correct.mean(), rtol=1e-6)
    assert update.finite
    (load,), (frequency,) = update.feedback.load, update.feedback.frequency
    np.testing.assert_array_equal(load[:2], (gates > 0).sum((0, 1)))
    expected = gates.sum((0, 1)) / gates.sum()
    np.testing.assert_allclose(frequency[:2], expected, rtol=1e-5)


def test_count_weight_is_of_positions_or_their_weights_and_never_0():
    sums = lambda weight: SimpleNamespace(weight=weight)
    assert client.count_weight(sums(None), 3, PROGRAM) == 3 * SIZES.batch_size
    assert client.count_weight(sums(None), 0, PROGRAM) == 1
    assert client.count_weight(sums(jnp.float32(2.5)), 3, PROGRAM) == 2.5
    assert client.count_weight(sums(jnp.float32(0)), 1, PROGRAM) > 0


def test_the_first_loss_is_that_of_the_params_as_received(full_run):
    hyper, update = full_run
    assert update.first_loss is None
    _, (entropy, _, _) = twin_update(hyper)
    found = run(build(**{"fairness.power": 1.0}), hyper)
    np.testing.assert_allclose(found.first_loss, entropy[0].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.loss, entropy.mean(), rtol=1e-5)
    assert not np.isclose(found.first_loss, found.loss, rtol=0.01)


def test_client_update_of_invalid_slots_is_exactly_zero(full_run):
    _, update = full_run
    for leaf in jax.tree.leaves(update.delta["experts"]):
        moved = np.abs(np.asarray(leaf)).reshape(3, -1).max(1)
        assert moved[2] == 0 and np.all(moved[:2] > 0)
    for part in jax.tree.leaves(update.feedback):
        assert part.shape == (1, 3) and part[0, 2] == 0 and np.all(np.isfinite(part))


def test_client_update_says_that_it_diverged():
    update = UPDATE(PARAMS, INPUT, FEDERATION, rate_hyper(learning_rate=1e38), KEY)
    assert not update.finite


def test_client_update_costs_the_held_experts_only():
    def lower(num_experts):
        program = build(**{"num_experts": num_experts, "model.expert_width": 64})
        params, _ = shape_params(program.model)
        inputs = INPUT.replace(personal={})
        arguments = (params, inputs, FEDERATION, HYPER, KEY)
        update = build_client_update(program)
        delta = jax.eval_shape(update, *arguments).delta
        flops = jax.jit(update).lower(*arguments).cost_analysis()["flops"]
        return delta["experts"], flops

    (few, few_flops), (many, many_flops) = lower(5), lower(80)
    assert few == many
    assert {leaf.shape[0] for leaf in jax.tree.leaves(few)} == {SIZES.max_held}
    assert many_flops < 1.5 * few_flops  # only the gate grew


# ---- ragged clients


def ragged_steps():
    """One and a half passes over 9, 7, 5, 2 and 1 examples in batches of four."""
    config = tiny_config(local_epochs=1.5, batch_size=SIZES.batch_size)
    return count_steps(config, np.asarray(FEDERATION.size))


STEPS = ragged_steps()
EPOCHS = {"local_epochs": 1.5}
MOST = build(STEPS, **EPOCHS).sizes.local_steps


def judge_by_numbers(conditions, sent, finite):
    """No client is late or lost; one whose numbers are broken does not count."""
    code = jnp.where(finite, MERGED, BROKEN).astype(jnp.int32)
    return Outcome(code, jnp.ones(3), jnp.ones(3))


def train(program, num_devices, inputs, hyper):
    """Sums and replies of a cohort on a mesh."""
    update = build_client_update(program)
    cohort = build_train_cohort(update, judge_by_numbers, program)
    conditions = {"client": inputs.client}
    run = jax.jit(spread(cohort, build_mesh(num_devices)))
    found = run(PARAMS, inputs, conditions, FEDERATION, hyper, KEY)
    return jax.block_until_ready(found)


@functools.cache
def train_on(num_devices, client_chunk, dropout=0.0):
    """Sums and replies of all clients on a mesh."""
    changes = EPOCHS | with_dropout(dropout) | {"run.client_chunk": client_chunk}
    program, inputs = build(STEPS, **changes), make_cohort(range(5), STEPS)
    (sums,), replies = train(program, num_devices, inputs, rate_hyper(**FULL_HYPER))
    return jax.device_get((sums, replies))


def test_count_steps_of_the_clients():
    assert MOST == 4
    assert STEPS.tolist() == [4, 3, 2, 1, 1]  # 13.5, 10.5, 7.5, 3 and 1.5 by four


@pytest.fixture(scope="module")
def twins():
    """Deltas and what was seen of every client, by the slow twin."""
    hyper = rate_hyper(**FULL_HYPER)
    return [
        twin_update(hyper, client, int(steps), jax.random.fold_in(KEY, client))
        for client, steps in enumerate(STEPS)
    ]


def test_train_cohort_of_ragged_clients_equals_their_twins(twins):
    sums, replies = train_on(1, 1)
    for c, (_, (entropy, correct, gates)) in enumerate(twins):
        assert entropy.shape == (STEPS[c], SIZES.batch_size)
        np.testing.assert_allclose(replies.loss[c], entropy.mean(), rtol=1e-4)
        np.testing.assert_allclose(replies.accuracy[c], correct.mean(), rtol=1e-5)
        load = (gates > 0).sum((0, 1))
        np.testing.assert_array_equal(replies.feedback.load[c, 0, :2], load)
    size = np.asarray(FEDERATION.size, np.float64)
    weigh = lambda *deltas: sum(w * d for w, d in zip(size, deltas, strict=True))
    expected = jax.tree.map(weigh, *[delta for delta, _ in twins])
    experts = jax.tree.map(np.zeros_like, PARAMS["experts"])
    for whole, rows in zip(
        jax.tree.leaves(experts), jax.tree.leaves(expected["experts"]), strict=True
    ):
        whole[[4, 1]] = rows
    assert_close(sums.delta, expected | {"experts": experts})
    assert sums.weight["stem"] == size.sum() and replies.arrived.all()


MESHES = [(1, 3), (1, 5), (2, 3), (8, 1)]


def assert_same_sums(found, expected):
    weight = expected[0].weight["stem"]
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one / weight, other / weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_devices", "client_chunk"), MESHES)
def test_train_cohort_of_ragged_clients_on_any_devices_and_chunks(
    num_devices, client_chunk
):
    assert_same_sums(train_on(num_devices, client_chunk), train_on(1, 1))


@pytest.mark.parametrize("ragged", [True, False])
def test_train_cohort_gets_nothing_from_a_client_without_steps(ragged):
    """Whichever it is; the cohort of 4 is padded to two chunks of 3 as well."""
    changes = EPOCHS if ragged else {"local_steps": MOST}
    changes = changes | {"gate.mode": "personal", "run.client_chunk": 3}
    program = build(STEPS if ragged else None, **changes)
    assert program.static.ragged is ragged
    cohorts = (
        ((0, 1, 2, 4), (MOST, MOST, MOST, 0)),
        ((0, 3, 1, 2), (MOST, 0, *[MOST] * 2)),
    )
    hyper = rate_hyper(**FULL_HYPER)
    ((sums,), replies), ((with_idle,), longer) = (
        train(program, 1, make_cohort(*cohort), hyper) for cohort in cohorts
    )
    assert_same_sums((with_idle,), (sums,))
    assert sums.weight["stem"] == 9 + 7 + 5
    first = jax.tree.map(lambda leaf: leaf[:3], replies)
    others = jax.tree.map(lambda leaf: leaf[np.array([0, 2, 3])], longer)
    for one, other in zip(jax.tree.leaves(others), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    if ragged:
        assert longer.loss[1] == 0 and longer.arrived[1]
        assert not np.any(longer.feedback.load[1])
        for name, leaf in longer.personal["gate"]["moe"].items():
            np.testing.assert_array_equal(leaf[1], PARAMS["gate"]["moe"][name])


def test_client_update_of_equal_steps_is_the_same_ragged_or_not():
    hyper = rate_hyper(**FULL_HYPER)
    ragged = build(np.array([SIZES.local_steps]), local_epochs=1.0)
    assert ragged.static.ragged
    found = run(ragged, hyper)
    assert_close(found, UPDATE(PARAMS, INPUT, FEDERATION, hyper, KEY))


# ---- dropout


def test_train_cohort_draws_the_same_dropout_on_any_mesh():
    expected = train_on(1, 1, dropout=0.5)
    assert_same_sums(train_on(2, 3, dropout=0.5), expected)
    with pytest.raises(AssertionError):
        assert_same_sums(train_on(1, 1), expected)


def test_train_cohort_gives_every_client_step_and_expert_its_own_mask(monkeypatch):
    stems, experts = [], []

    def spy(function, keys):
        def spied(params, x, key):
            data = jax.random.key_data(key)
            jax.debug.callback(lambda d: keys.append(tuple(d.tolist())), data)
            return function(params, x, key)

        return spied

    program = build(STEPS, **EPOCHS)
    parts = program.model.parts
    parts = parts._replace(
        stem=spy(parts.stem, stems), expert=spy(parts.expert, experts)
    )
    apply = functools.partial(program.model.apply, parts=parts)
    program = program._replace(model=program.model._replace(apply=apply))
    train(program, 2, make_cohort(range(5), STEPS), HYPER)
    jax.effects_barrier()
    assert len(stems) == STEPS.sum() and len(experts) == SIZES.max_held * STEPS.sum()
    assert len(set(stems + experts)) == len(stems) + len(experts)


def test_client_update_without_prox_is_one_with_coefficient_zero():
    program, hyper = build(**{"client.prox": 0.0}), rate_hyper(prox=0.7)
    assert not program.static.prox
    zero = UPDATE(PARAMS, INPUT, FEDERATION, HYPER, KEY)
    assert_close(run(program, hyper), zero)
    with pytest.raises(AssertionError):
        assert_close(UPDATE(PARAMS, INPUT, FEDERATION, hyper, KEY), zero)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_sees_one_bad_number(bad):
    tree = {"a": jnp.ones((2, 2)), "b": jnp.array([1.0, 2.0])}
    assert all_finite(tree)
    assert not all_finite(tree | {"b": jnp.array([1.0, bad])})


# ---- batches

sizes_and_seeds = given(st.integers(1, PADDED), st.integers(0, 1000))


def make_index(size, padded=PADDED, padding=-7):
    """Ids 100, 101, ... and padding that no client owns."""
    places = np.arange(padded)
    return jnp.asarray(np.where(places < size, 100 + places, padding), jnp.int32)


@settings(max_examples=30)
@sizes_and_seeds
def test_draw_batches_are_passes_over_the_clients_examples(size, seed):
    batches = draw_batches(jax.random.key(seed), make_index(size), size, SIZES)
    assert batches.shape == (SIZES.local_steps, SIZES.batch_size)
    draws = np.asarray(batches).ravel()
    for start in range(0, draws.size, size):
        one_pass = draws[start : start + size]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(100, 100 + size))
    if size <= draws.size:
        assert set(draws[:size]) == set(range(100, 100 + size))


@settings(max_examples=15)
@sizes_and_seeds
def test_draw_batches_does_not_depend_on_the_padding(size, seed):
    key = jax.random.key(seed)
    short = draw_batches(key, make_index(size), size, SIZES)
    long = draw_batches(key, make_index(size, 4 * PADDED, padding=3), size, SIZES)
    np.testing.assert_array_equal(short, long)


def test_draw_batches_depends_on_the_key_and_all_orders_occur():
    index, orders = make_index(3), []
    for key in jax.random.split(jax.random.key(0), 200):
        orders.append(np.asarray(draw_batches(key, index, 3, SIZES)).ravel()[:3])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert counts.size == 6 and counts.min() > 15  # 33 expected of each


draw_apart = jax.jit(client.draw_apart, static_argnums=4)
choose_held_out = jax.jit(hold_out)


@settings(max_examples=40)
@given(
    size=st.integers(1, PADDED),
    share=st.floats(0, 0.5, width=32, allow_subnormal=False),
    seed=st.integers(0, 1000),
)
def test_draw_apart_never_trains_on_what_is_held_out(size, share, seed):
    """Over rounds, so that everything that can be drawn is."""
    index, hold_key = make_index(size), jax.random.key(seed)
    held_out = choose_held_out(hold_key, index, size, share)
    kept = set(np.asarray(index)[np.asarray(held_out)].tolist())
    trained, probed = set(), set()
    for key in jax.random.split(jax.random.key(seed + 1), 6):
        batches, probe = draw_apart(key, index, size, held_out, SIZES)
        assert batches.shape == (SIZES.local_steps, SIZES.batch_size)
        assert probe.shape == (SIZES.batch_size,)
        draws = np.asarray(probe)[: len(kept) or size]
        assert len(set(draws)) == len(draws)  # a pass, before anything comes again
        trained |= set(np.asarray(batches).ravel().tolist())
        probed |= set(np.asarray(probe).tolist())
        if not kept:
            same = draw_batches(key, index, size, SIZES)
            np.testing.assert_array_equal(batches, same)
    owned = set(range(100, 100 + size))
    assert trained == owned - kept and probed <= (kept or owned)
    if share > 0 and size > 1:
        assert kept and probed <= kept


# ---- probes

PROBES = {"fitness.feedback": "relative_probe"}
HOLD_KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(9), jnp.arange(5))


def make_prober(**changes):
    return make_input(hold_key=HOLD_KEYS[CLIENT], **changes)


def spy_ids(monkeypatch, program, inputs, hyper):
    """The ids of the examples of every batch of a client's round, the probe's first."""
    seen, take = [], client.take_batch

    def spied(rows, ids, *rest):
        jax.debug.callback(lambda found: seen.append(np.asarray(found)), ids)
        return take(rows, ids, *rest)

    for module in (client, probe_file):
        monkeypatch.setattr(module, "take_batch", spied)
    update = jax.block_until_ready(run(program, hyper, inputs))
    jax.effects_barrier()
    return update, seen


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_client_update_probes_what_it_does_not_train_on(monkeypatch, share):
    hyper = replace(HYPER, fitness={"probe_share": jnp.float32(share)})
    program, inputs = build(**PROBES), make_prober()
    update, seen = spy_ids(monkeypatch, program, inputs, hyper)
    size = int(FEDERATION.size[CLIENT])
    own = np.asarray(FEDERATION.index[CLIENT])[:size]
    chosen = choose_held_out(inputs.hold_key, FEDERATION.index[CLIENT], size, share)
    kept = set(np.asarray(FEDERATION.index[CLIENT])[np.asarray(chosen)].tolist())
    assert len(kept) == (3 if share else 0)  # 2.8 of 7
    trained = [ids for ids in seen if set(ids.tolist()) <= set(own) - kept]
    if share:
        (probe,) = [ids for ids in seen if set(ids.tolist()) <= kept]
        assert len(trained) == SIZES.local_steps and len(seen) == 1 + len(trained)
        received = take_submodel(PARAMS, inputs.personal, inputs.held, 0)
        expected = probe_experts(received, inputs, FEDERATION, probe, program)
        np.testing.assert_allclose(update.feedback.probe, expected, rtol=1e-5)
    else:  # the same steps as without probes
        assert len(trained) == 1 + SIZES.local_steps
        plain = UPDATE(PARAMS, INPUT, FEDERATION, HYPER, KEY)
        assert_close(update.delta, plain.delta)
        assert_close(update.feedback.replace(probe=None), plain.feedback)
    probe = np.asarray(update.feedback.probe)
    assert probe.shape == (1, 3) and np.all(np.isfinite(probe)) and probe.min() > 0


def trace(**changes):
    """The jaxpr of a client's update, as text."""
    program = build(**changes)
    inputs = make_prober() if program.static.probes else INPUT
    update = build_client_update(program)
    return str(jax.make_jaxpr(update)(PARAMS, inputs, FEDERATION, HYPER, KEY))


def test_client_update_that_does_not_probe_is_the_same_for_any_share():
    plain, products = trace(), "dot_general["
    for kind in set(SCORES) - set(probe_kinds):
        assert trace(**{"fitness.feedback": kind, "fitness.probe_share": 0.3}) == plain
    # Beside the steps' products a probe has those of one pass forward.
    probing = trace(**PROBES).count(products) - plain.count(products)
    forward = lambda *model: PROGRAM.model.apply(*model, Route(2), None)
    shapes = PARAMS, {}, {"x": jnp.zeros((4, *IMAGE))}, INPUT.held, INPUT.slot
    held = PARAMS | {"experts": jax.tree.map(lambda leaf: leaf[:3], PARAMS["experts"])}
    one_pass = str(jax.make_jaxpr(forward)(held, *shapes[1:])).count(products)
    assert probing == one_pass > 0
    assert UPDATE(PARAMS, INPUT, FEDERATION, HYPER, KEY).feedback.probe is None


@pytest.mark.parametrize(("num_devices", "client_chunk"), [(1, 3), (2, 3), (8, 1)])
def test_train_cohort_probes_alike_on_any_devices_and_chunks(num_devices, client_chunk):
    hyper = replace(HYPER, fitness={"probe_share": jnp.float32(0.4)})

    def probe(num_devices, client_chunk):
        changes = PROBES | EPOCHS | {"run.client_chunk": client_chunk}
        program, inputs = build(STEPS, **changes), make_cohort(range(5), STEPS)
        inputs = inputs.replace(hold_key=HOLD_KEYS)
        return train(program, num_devices, inputs, hyper)[1].feedback.probe

    expected = probe(1, 1)
    assert expected.shape == (5, 1, 3)
    np.testing.assert_allclose(probe(num_devices, client_chunk), expected, rtol=1e-5)


# ---- what a client chooses


def choose_second(probe, slot, hyper, key):
    """The second best, of the invalid slots, too."""
    return jnp.argsort(jnp.argsort(probe)) == 1


def test_choose_slots_by_hand():
    probe, slot = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]), jnp.ones((2, 3), bool)
    slot = slot.at[1, 2].set(False)
    found = choose_slots(probe, slot, HYPER, KEY, choose_second)
    assert found.tolist() == [[False, True, False], [False, False, False]]


def test_choose_slots_draws_for_each_layer_and_each_client():
    probe, slot = jnp.zeros((3, 4)), jnp.ones((3, 4), bool)
    keys = jax.random.split(KEY, 20)
    find = lambda key: choose_slots(probe, slot, HYPER, key, choose_best)
    places = np.asarray(jax.jit(jax.vmap(find))(keys).argmax(2))
    assert all(set(layer) == {0, 1, 2, 3} for layer in places.T.tolist())
    assert len(set(map(tuple, places.tolist()))) > 12  # not one draw for all layers
    alone = choose_slots(probe[:1], slot[:1], HYPER, keys[0], choose_best)
    assert alone.argmax() == places[0, 0]


def test_client_update_trains_what_it_chooses_as_if_it_held_nothing_else():
    program, inputs = build(**PROBES), make_prober()
    worst = lambda probe, slot, *_: probe == jnp.where(slot, probe, 0.0).max()
    found = run(use_strategy(program, choose=worst), inputs=inputs)
    (probe,) = np.asarray(found.feedback.probe)
    assert probe[1] > probe[0] and found.chosen.tolist() == [[False, True, False]]
    alone = run(program, inputs=inputs.replace(slot=found.chosen))
    assert alone.chosen is None
    assert_close(found.delta, alone.delta)
    assert_close(found.feedback.replace(probe=None), alone.feedback.replace(probe=None))
    (load,) = found.feedback.load
    assert load.tolist() == [0, SIZES.local_steps * SIZES.batch_size, 0]


# ---- what is not trained, and what corrects the gradients


@pytest.mark.parametrize(("value", "still"), [([1, 2, 9], 0), ([2, 1, 9], 1)])
def test_client_update_trains_the_most_valuable_experts_only(value, still):
    """Of the held experts 4 and 1 there is room for one; 9 is of the invalid slot."""
    priority = lambda gates, weight, hyper: jnp.array(value, jnp.float32)
    program = use_strategy(build(), expert_priority=priority)
    delta = run(program, inputs=make_input(budget=jnp.int32(1))).delta
    for leaf in jax.tree.leaves(delta["experts"]):
        moved = np.abs(leaf).reshape(3, -1).max(1)
        assert moved[still] == 0 and moved[1 - still] > 0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(delta["stem"]))


@pytest.mark.parametrize("parts", [("stem",), ("stem", "head")])
def test_client_update_trains_around_frozen_parts(parts):
    """One step moves the other parts as if nothing were frozen."""
    program = build(local_steps=1)
    whole = run(program).delta
    frozen = {part: PARAMS[part] for part in parts}
    params = {part: PARAMS[part] for part in PARTS if part not in parts}
    federation = FEDERATION.replace(frozen=frozen)
    program = use_strategy(program, frozen=parts)
    delta = run(program, params=params, federation=federation).delta
    assert_close(delta, {part: whole[part] for part in params})


def test_client_update_adds_the_correction_to_every_gradient():
    program = build(**{"local_steps": 1, "client.prox": 0.0, "client.momentum": 0.0})
    plain = run(program)
    correction = fill(plain.delta, 5)
    corrected = run(program, inputs=make_input(correction=correction))
    rate = float(HYPER.client.learning_rate)
    expected = jax.tree.map(lambda d, c: d - rate * c, plain.delta, correction)
    assert_close(corrected.delta, expected)
    # From no correction the new variate is the gradient; corrected, it is so again.
    gradient = jax.tree.map(lambda d: -d / rate, plain.delta)
    zero = jax.tree.map(np.zeros_like, correction)
    for used, result in ((zero, plain), (correction, corrected)):
        sent = make_input(correction=used, steps=jnp.int32(1))
        assert_close(renew_variate(sent, result, HYPER, 0.0), gradient)
    sent = make_input(correction=correction, steps=jnp.int32(4))
    scaled = renew_variate(sent, corrected, HYPER, 0.9)
    uses = step_weights(jnp.int32(4), 0.9)
    wanted = lambda c, d: -c - d / (rate * uses)
    assert_close(scaled, jax.tree.map(wanted, correction, corrected.delta))


# ---- positions that only pad


def score_but_zero(logits, batch):
    """Labels of class 0 are padding."""
    scores = score_labels(logits, batch)
    return scores._replace(weight=(batch["y"] > 0).astype(jnp.float32))


@pytest.mark.parametrize(("steps", "batch", "rate"), [(1, 4, 0.5), (4, 3, 0.0)])
def test_client_update_ignores_padding(steps, batch, rate):
    """Bare logits learn the labels 0, 1, 2, 1, of which the first is padding.

    Where nothing moves, batches with different amounts of padding are one large batch.
    """
    odds, labels = np.array([1, 2, 5], np.float32), np.array([0, 1, 2, 1])
    sizes = {"num_active": 1, "max_held": 1, "local_steps": steps, "batch_size": batch}
    program = build(**sizes)._replace(task=IMAGES._replace(loss=score_but_zero))
    program = use_model(program, make_logit_model(5, CLASSES))
    params, _ = program.model.init(jax.random.key(0))
    params["experts"] = {"moe": {"logits": jnp.log(jnp.tile(odds, (5, 1)))}}
    federation = FEDERATION.replace(
        train={"x": FEDERATION.train["x"], "y": jnp.tile(labels, 6)},
        index=jnp.arange(4)[None],
        size=jnp.array([4]),
    )
    one = (1, 1, 1)
    inputs = make_inputs(np.full(one, 3, np.int32), np.ones(one, bool))
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    hyper = rate_hyper(learning_rate=rate)
    found = run(program, hyper, inputs, params, federation)
    passes, loss = steps * batch / 4, -(2 * np.log(2 / 8) + np.log(5 / 8)) / 3
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(found.feedback.loss, [[loss]], rtol=1e-5)
    np.testing.assert_allclose(found.feedback.accuracy, [[1 / 3]], rtol=1e-5)
    assert found.feedback.load == 3 * passes and found.feedback.frequency == 1
    gradient = np.array([[1 / 8, 2 / 8 - 2 / 3, 5 / 8 - 1 / 3]])
    delta = found.delta["experts"]["moe"]["logits"]
    np.testing.assert_allclose(delta, -rate * gradient, rtol=1e-5)
