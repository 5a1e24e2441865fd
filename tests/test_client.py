"""One client's round against a hand-written loop of gradient steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from fedmoe_jax import client, program
from fedmoe_jax.aggregate import GATE_WEIGHTS, weigh
from fedmoe_jax.client import (
    ClientInput,
    add_prox,
    all_finite,
    build_client_update,
    freeze_others,
    normalise,
    step_weights,
    take_submodel,
)
from fedmoe_jax.cohort import build_train_cohort, renew_variate, train_own
from fedmoe_jax.federation import count_steps
from fedmoe_jax.loss import nothing_seen, see_batch, summarise_feedback
from fedmoe_jax.models.image_moe import build_model
from fedmoe_jax.program import longest
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.types import Federation, Hyper, Sizes
from fedmoe_jax.world.outcome import BROKEN, MERGED, Outcome

SIZES = Sizes(
    num_clients=5,
    cohort_size=5,
    num_experts=5,
    max_held=3,
    num_active=2,
    local_steps=3,
    batch_size=4,
    expert_width=6,
    num_classes=3,
    max_capacity=3,
)
CLIENT, PADDED = 1, 9  # the second client owns 7 of the 9 places of its row
IMAGE, MOMENTUM = (4, 4, 1), 0.9


def make_model(sizes, dropout=0.0):
    return build_model(
        stem="mlp",
        stem_width=8,
        expert="mlp",
        expert_width=sizes.expert_width,
        feature_width=6,
        stem_dropout=dropout,
        expert_dropout=dropout,
        num_experts=sizes.num_experts,
        num_classes=sizes.num_classes,
        image_shape=IMAGE,
    )


def fill(shapes, seed=0):
    """Random params in NumPy, without compiling `init`."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, shapes)


def make_params(sizes, seed=0):
    return fill(jax.eval_shape(make_model(sizes).init, jax.random.key(0)), seed)


def make_hyper(**changes):
    fields = dict.fromkeys(Hyper.__dataclass_fields__, 0.0)
    fields |= {"client_learning_rate": 0.1} | changes
    hyper = {name: jnp.float32(value) for name, value in fields.items()}
    return Hyper(**hyper | {"strategy": jnp.int32(0), "own": {}, "world": {}})


def make_rules(**changes):
    rules = program.make_rules(default.get_config(), SIZES.num_experts)
    return rules._replace(**{"prox": True, "momentum": MOMENTUM} | changes)


def make_federation():
    rng = np.random.default_rng(0)
    size = np.array([9, 7, 5, 2, 1], np.int32)
    index = np.zeros((5, PADDED), np.int32)
    for row, (end, count) in enumerate(zip(size.cumsum(), size, strict=True)):
        index[row, :count] = end - count + np.arange(count)
    arrays = Federation(
        x=rng.integers(0, 256, (24, *IMAGE), np.uint8),
        y=rng.integers(0, 3, 24, np.int32),
        index=index,
        size=size,
        steps=np.full(5, SIZES.local_steps, np.int32),
        label_mix=np.full((5, 3), 1 / 3, np.float32),
        public=np.zeros(0, np.int32),
        test_x=np.zeros((1, *IMAGE), np.uint8),
        test_y=np.zeros(1, np.int32),
        mean=np.full(IMAGE, 0.4, np.float32),
        std=np.full(IMAGE, 0.3, np.float32),
        devices=None,
        drift_source=np.arange(5),
    )
    return jax.tree.map(jnp.asarray, arrays)


def make_input(params, held=(4, 1, 4), slot=(True, True, False)):
    """The last slot is invalid and repeats an expert that is held."""
    return ClientInput(
        client=jnp.int32(CLIENT),
        steps=jnp.int32(SIZES.local_steps),
        budget=jnp.int32(sum(slot)),
        scale=jnp.float32(1),
        held=jnp.array(held, jnp.int32),
        slot=jnp.array(slot),
        calibration=jnp.float32(1),
        correction={},
        own={"gate": params["gate"]},
    )


FEDERATION = make_federation()
PARAMS = make_params(SIZES)
TASK = make_input(PARAMS)
KEY = jax.random.key(5)
HYPER = make_hyper()
draw_batches = jax.jit(client.draw_batches, static_argnums=3)


# ---- the slow twin: one example at a time, only the valid experts 4 and 1


def twin_example(submodel, x, y, hyper):
    """Cross-entropy + calibration + z of ONE example, and what was seen."""
    model = make_model(SIZES)
    features = model.stem(submodel["stem"], (x[None] / 255 - 0.4) / 0.3, None)
    scores = submodel["gate"]["kernel"] @ features[0] + submodel["gate"]["bias"]
    own = jnp.exp(jnp.stack([scores[4], scores[1]]))
    gates = own / own.sum()
    rows = [jax.tree.map(lambda w, k=k: w[k], submodel["experts"]) for k in (0, 1)]
    mixed = sum(gates[k] * model.expert(rows[k], features, None)[0] for k in (0, 1))
    odds = jnp.exp(mixed @ submodel["head"]["kernel"] + submodel["head"]["bias"])
    entropy = jnp.log(odds.sum() / odds[y])
    calibration = jnp.log(jnp.exp(scores).sum() / own.sum())
    loss = entropy + hyper.calibration * calibration
    loss += hyper.z_loss * jnp.log(own.sum()) ** 2
    return loss, (entropy, jnp.argmax(odds) == y, gates)


@jax.jit
def twin_gradient(submodel, ids, hyper):
    def loss(submodel):
        example = functools.partial(twin_example, submodel, hyper=hyper)
        x = FEDERATION.x[ids].astype(jnp.float32)
        losses, seen = jax.vmap(example)(x, FEDERATION.y[ids])
        gates = seen[2]
        first = jnp.stack([gates[:, 0] > gates[:, 1], gates[:, 1] > gates[:, 0]])
        load = 2 * (first.mean(1, dtype=jnp.float32) * gates.mean(0)).sum()
        return losses.mean() + hyper.load_loss * load, seen

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
    rate, prox = float(hyper.client_learning_rate), float(hyper.prox)
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


UPDATE = jax.jit(build_client_update(make_model(SIZES), SIZES, make_rules()))


def assert_close(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(
        jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-6)


# ---- client_update


def first_slots(delta):
    """Drops the invalid third slot."""
    return delta | {
        "experts": jax.tree.map(lambda d: np.asarray(d)[:2], delta["experts"])
    }


@pytest.fixture(scope="module")
def full_run():
    """Hyperparameters with every term of the objective, and the client's update."""
    hyper = make_hyper(prox=0.7, calibration=0.2, load_loss=0.3, z_loss=0.1)
    return hyper, UPDATE(PARAMS, TASK, FEDERATION, hyper, KEY)


def test_update_equals_hand_written_sgd(full_run):
    hyper, update = full_run
    delta, (entropy, correct, gates) = twin_update(hyper)
    assert_close(first_slots(update.delta), delta)
    for leaf in jax.tree.leaves(delta):
        assert np.abs(leaf).max() > 1e-4  # nothing is equal because nothing moved
    np.testing.assert_allclose(update.loss, entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(update.accuracy, correct.mean(), rtol=1e-6)
    assert update.finite
    np.testing.assert_array_equal(update.feedback.load[:2], (gates > 0).sum((0, 1)))
    expected = gates.sum((0, 1)) / gates.sum()
    np.testing.assert_allclose(update.feedback.frequency[:2], expected, rtol=1e-5)


def test_invalid_slots_have_exactly_zero_delta_and_feedback(full_run):
    _, update = full_run
    for leaf in jax.tree.leaves(update.delta["experts"]):
        moved = np.abs(np.asarray(leaf)).reshape(3, -1).max(1)
        assert moved[2] == 0 and np.all(moved[:2] > 0)
    for part in jax.tree.leaves(update.feedback.replace(mass=None)):
        assert part.shape == (3,) and part[2] == 0 and np.all(np.isfinite(part))


def test_a_diverged_client_says_so():
    hyper = make_hyper(client_learning_rate=1e38)
    update = UPDATE(PARAMS, TASK, FEDERATION, hyper, KEY)
    assert not update.finite


def test_a_client_pays_for_the_experts_it_holds_only():
    def lower(num_experts):
        sizes = SIZES._replace(num_experts=num_experts, expert_width=64)
        model = make_model(sizes)
        params = jax.eval_shape(model.init, jax.random.key(0))
        update = build_client_update(model, sizes, make_rules())
        inputs = make_input(params)
        arguments = (params, inputs, FEDERATION, make_hyper(), KEY)
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
    config = default.get_config()
    config.local_epochs, config.batch_size = 1.5, SIZES.batch_size
    return count_steps(config, np.asarray(FEDERATION.size))


STEPS = ragged_steps()
RAGGED = SIZES._replace(local_steps=longest(STEPS, ragged=True))
FULL_HYPER = dict(prox=0.7, calibration=0.2, load_loss=0.3, z_loss=0.1)


def build_ragged(model, ragged=True, gate_mode="global", client_chunk=1):
    update = build_client_update(model, RAGGED, make_rules(ragged=ragged))
    rules = make_rules(
        client_chunk=client_chunk,
        personal=("gate",) if gate_mode == "personal" else (),
        gate_weight=GATE_WEIGHTS[gate_mode],
    )
    return build_train_cohort(update, judge_by_numbers, rules)


def judge_by_numbers(inputs, sent, finite):
    """Nobody is late or lost; whose numbers are broken does not count."""
    code = jnp.where(finite, MERGED, BROKEN).astype(jnp.int32)
    return Outcome(code, jnp.ones(3), jnp.ones(3))


def make_cohort(clients, steps):
    inputs = [make_input(PARAMS).replace(client=jnp.int32(c)) for c in clients]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    return stacked.replace(steps=jnp.asarray(steps, jnp.int32))


@functools.cache
def train_on(num_devices, client_chunk, dropout=0.0):
    """Sums and reports of everyone on a mesh."""
    train = build_ragged(make_model(RAGGED, dropout), client_chunk=client_chunk)
    train = jax.jit(spread(train, build_mesh(num_devices)))
    hyper, inputs = make_hyper(**FULL_HYPER), make_cohort(range(5), STEPS)
    (sums,), report = train(PARAMS, inputs, FEDERATION, hyper, KEY)
    return jax.device_get((sums, report))


def test_steps_are_counted_from_the_examples():
    assert STEPS.tolist() == [4, 3, 2, 1, 1]  # 13.5, 10.5, 7.5, 3 and 1.5 by four


@pytest.fixture(scope="module")
def twins():
    """Deltas and what was seen of every client, by the slow twin."""
    hyper = make_hyper(**FULL_HYPER)
    return [
        twin_update(hyper, client, int(steps), jax.random.fold_in(KEY, client))
        for client, steps in enumerate(STEPS)
    ]


def test_ragged_clients_equal_their_twins(twins):
    sums, report = train_on(1, 1)
    for c, (_, (entropy, correct, gates)) in enumerate(twins):
        assert entropy.shape == (STEPS[c], SIZES.batch_size)
        np.testing.assert_allclose(report.loss[c], entropy.mean(), rtol=1e-4)
        np.testing.assert_allclose(report.accuracy[c], correct.mean(), rtol=1e-5)
        load = (gates > 0).sum((0, 1))
        np.testing.assert_array_equal(report.feedback.load[c, :2], load)
    size = np.asarray(FEDERATION.size, np.float64)
    weigh = lambda *deltas: sum(w * d for w, d in zip(size, deltas, strict=True))
    expected = jax.tree.map(weigh, *[delta for delta, _ in twins])
    experts = jax.tree.map(np.zeros_like, PARAMS["experts"])
    for whole, rows in zip(
        jax.tree.leaves(experts), jax.tree.leaves(expected["experts"]), strict=True
    ):
        whole[[4, 1]] = rows
    assert_close(sums.delta, expected | {"experts": experts})
    assert sums.weight["stem"] == size.sum() and report.arrived.all()


MESHES = [(1, 3), (1, 5), (2, 3), (8, 1)]


def assert_same_sums(found, expected):
    weight = expected[0].weight["stem"]
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one / weight, other / weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_devices", "client_chunk"), MESHES)
def test_devices_and_chunks_do_not_change_ragged_clients(num_devices, client_chunk):
    assert_same_sums(train_on(num_devices, client_chunk), train_on(1, 1))


@pytest.mark.parametrize("ragged", [True, False])
def test_a_client_without_steps_adds_nothing(ragged):
    """Whoever it is; the cohort of 4 is padded to two chunks of 3 as well."""
    train = build_ragged(make_model(RAGGED), ragged, "personal", client_chunk=3)
    train = jax.jit(spread(train, build_mesh(1)))
    hyper, most = make_hyper(**FULL_HYPER), RAGGED.local_steps
    run = lambda *cohort: train(PARAMS, make_cohort(*cohort), FEDERATION, hyper, KEY)
    (sums,), report = run((0, 1, 2, 4), (most, most, most, 0))
    (with_idle,), longer = run((0, 3, 1, 2), (most, 0, most, most))
    assert_same_sums((with_idle,), (sums,))
    assert sums.weight["stem"] == 9 + 7 + 5
    first = jax.tree.map(lambda leaf: leaf[:3], report)
    others = jax.tree.map(lambda leaf: leaf[np.array([0, 2, 3])], longer)
    for one, other in zip(jax.tree.leaves(others), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    if ragged:
        assert longer.loss[1] == 0 and longer.arrived[1]
        assert not np.any(longer.feedback.load[1])
        for name, leaf in longer.own["gate"].items():
            np.testing.assert_array_equal(leaf[1], PARAMS["gate"][name])


def test_equal_steps_are_the_same_ragged_or_not():
    hyper = make_hyper(**FULL_HYPER)
    ragged = build_client_update(make_model(SIZES), SIZES, make_rules(ragged=True))
    found = jax.jit(ragged)(PARAMS, TASK, FEDERATION, hyper, KEY)
    expected = UPDATE(PARAMS, TASK, FEDERATION, hyper, KEY)
    assert_close(found, expected)


# ---- dropout


def test_devices_and_chunks_do_not_change_dropout():
    expected = train_on(1, 1, dropout=0.5)
    assert_same_sums(train_on(2, 3, dropout=0.5), expected)
    with pytest.raises(AssertionError):
        assert_same_sums(train_on(1, 1), expected)


def test_every_client_step_and_expert_draws_its_own_mask():
    model, stems, experts = make_model(RAGGED), [], []

    def spy(function, keys):
        def spied(params, x, key):
            data = jax.random.key_data(key)
            jax.debug.callback(lambda d: keys.append(tuple(d.tolist())), data)
            return function(params, x, key)

        return spied

    model = model._replace(
        stem=spy(model.stem, stems), expert=spy(model.expert, experts)
    )
    train = jax.jit(spread(build_ragged(model), build_mesh(2)))
    inputs = make_cohort(range(5), STEPS)
    jax.block_until_ready(train(PARAMS, inputs, FEDERATION, make_hyper(), KEY))
    jax.effects_barrier()
    assert len(stems) == STEPS.sum() and len(experts) == SIZES.max_held * STEPS.sum()
    assert len(set(stems + experts)) == len(stems) + len(experts)


def test_a_program_without_prox_is_one_with_coefficient_zero():
    update = build_client_update(
        make_model(SIZES),
        SIZES,
        make_rules(prox=False),
    )
    hyper = make_hyper(prox=0.7)
    without = jax.jit(update)(PARAMS, TASK, FEDERATION, hyper, KEY)
    zero = UPDATE(PARAMS, TASK, FEDERATION, make_hyper(prox=0.0), KEY)
    assert_close(without, zero)
    with pytest.raises(AssertionError):
        some = UPDATE(PARAMS, TASK, FEDERATION, make_hyper(prox=0.7), KEY)
        assert_close(some, zero)


# ---- the parts


def test_take_submodel_gathers_rows():
    submodel = take_submodel(
        PARAMS, {"gate": {"kernel": jnp.ones(2)}}, jnp.array([3, 0, 3]), 0
    )
    for name, leaf in submodel["experts"]["Dense_0"].items():
        whole = np.asarray(PARAMS["experts"]["Dense_0"][name])
        np.testing.assert_array_equal(leaf, whole[[3, 0, 3]])
    assert submodel["gate"].keys() == {"kernel"}
    assert submodel["stem"] is PARAMS["stem"] and submodel["head"] is PARAMS["head"]


def test_normalise_by_hand():
    x = jnp.array([0, 51, 255, 102], jnp.uint8).reshape(1, 2, 1, 2)
    mean, std = jnp.array([[[0.5, 0.2]]] * 2), jnp.array([[[0.25, 0.1]]] * 2)
    out = normalise(x, mean, std)
    np.testing.assert_allclose(out.reshape(-1), [-2, 0, 2, 2], atol=1e-5)


def test_prox_gradient_is_the_gradient_of_the_penalty():
    shapes = {"a": np.zeros((2, 3)), "b": np.zeros(4)}
    weights, received, grads = (fill(shapes, seed) for seed in range(3))

    @jax.jit
    def penalty_gradient(weights):
        def penalty(weights):
            gap = jax.tree.map(lambda w, r: jnp.square(w - r).sum(), weights, received)
            return 0.7 / 2 * (gap["a"] + gap["b"])

        return jax.grad(penalty)(weights)

    expected = jax.tree.map(np.add, grads, penalty_gradient(weights))
    assert_close(add_prox(grads, weights, received, 0.7), expected)


def test_prox_pulls_a_quadratic_between_its_optimum_and_what_was_received():
    # 1/2 |w - a|^2 + mu/2 |w - r|^2 is least at w = (a + mu r) / (1 + mu)
    optimum, received, prox = np.array([4.0, 1.0]), np.array([1.0, -5.0]), 2.0
    weights = received
    for _ in range(50):
        weights = weights - 0.2 * add_prox(weights - optimum, weights, received, prox)
    np.testing.assert_allclose(weights, [2.0, -3.0], rtol=1e-6)


def two_updates(name, momentum, grads):
    """The updates of two equal gradients from one of the local optimisers."""
    tx = client.client_optimizer(name, jnp.float32(0.01), momentum)

    @jax.jit
    def step(grads):
        first, opt_state = tx.update(grads, tx.init(grads), grads)
        return first, tx.update(grads, opt_state, grads)[0]

    return step(jnp.asarray(grads))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_momentum_by_hand(momentum):
    grads = np.array([5.0, -0.2, 0.0], np.float32)
    first, second = two_updates("sgd", momentum, grads)
    np.testing.assert_allclose(first, -0.01 * grads, rtol=1e-6)
    np.testing.assert_allclose(second, -0.01 * (1 + momentum) * grads, rtol=1e-6)


def test_adam_steps_by_its_rate_and_leaves_what_has_no_gradient():
    for update in two_updates("adam", 0.0, [5.0, -0.2, 0.0]):
        np.testing.assert_allclose(update, [-0.01, 0.01, 0], rtol=1e-4)
        assert update[2] == 0


def test_feedback_by_hand():
    gates = jnp.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])  # [B=2, K=3]
    seen = see_batch(
        jnp.array([2.0, 4.0]), jnp.array([1.0, 0.0]), gates, jnp.array([0.25, 0.75])
    )
    assert (seen.total_loss, seen.total_right) == (6, 1)
    feedback = summarise_feedback(seen)
    np.testing.assert_allclose(feedback.accuracy, [1 / 1.25, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(feedback.loss, [3 / 1.25, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(feedback.frequency, [0.625, 0.375, 0], rtol=1e-6)
    np.testing.assert_array_equal(feedback.load, [2, 1, 0])


def test_what_was_seen_adds_up_over_batches():
    rng = np.random.default_rng(0)
    parts = rng.random(8), rng.integers(0, 2, 8), rng.random((8, 3))
    entropy, correct, gates = (jnp.asarray(part, jnp.float32) for part in parts)
    seen = nothing_seen(3, 2)
    for start in (0, 2, 4, 6):
        batch = (part[start : start + 2] for part in (entropy, correct, gates))
        mass = jnp.array([start / 6, 1 - start / 6])
        seen = jax.tree.map(jnp.add, seen, see_batch(*batch, mass))
    whole = see_batch(entropy, correct, gates, mass)
    apart = {"peak": seen.peak, "mass": seen.mass, "batches": seen.batches}
    assert_close(seen, whole.replace(**apart))
    feedback = summarise_feedback(seen)
    peaks = np.asarray(gates).reshape(4, 2, 3).max(1)
    np.testing.assert_allclose(feedback.peak, peaks.mean(0), rtol=1e-6)
    np.testing.assert_allclose(feedback.mass, [0.5, 0.5], rtol=1e-6)


def test_nothing_seen_is_no_feedback_and_no_nan():
    for part in jax.tree.leaves(summarise_feedback(nothing_seen(3, 2))):
        np.testing.assert_array_equal(part, np.zeros(part.shape))


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
def test_batches_are_passes_over_the_clients_examples(size, seed):
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
def test_batches_do_not_depend_on_the_padding(size, seed):
    key = jax.random.key(seed)
    short = draw_batches(key, make_index(size), size, SIZES)
    long = draw_batches(key, make_index(size, 4 * PADDED, padding=3), size, SIZES)
    np.testing.assert_array_equal(short, long)


def test_batches_depend_on_the_key_and_all_orders_occur():
    index, orders = make_index(3), []
    for key in jax.random.split(jax.random.key(0), 200):
        orders.append(np.asarray(draw_batches(key, index, 3, SIZES)).ravel()[:3])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert counts.size == 6 and counts.min() > 15  # 33 expected of each


# ---- what stays with the client, and what corrects it


def test_personal_parts_replace_the_servers():
    own = jax.tree.map(lambda leaf: leaf + 100, {k: PARAMS[k] for k in PARAMS})
    held = jnp.array([4, 1, 2])  # of five experts, the last two are local
    submodel = take_submodel(PARAMS, own, held, 2)
    assert submodel["stem"] is own["stem"] and submodel["head"] is own["head"]
    for name, leaf in submodel["experts"]["Dense_0"].items():
        server = np.asarray(PARAMS["experts"]["Dense_0"][name])
        np.testing.assert_array_equal(leaf[0], server[4] + 100)
        np.testing.assert_array_equal(leaf[1:], server[[1, 2]])


def test_local_experts_are_trained_on_the_client_only():
    rules = make_rules(personal=("experts",), local_experts=2)
    update = jax.tree.map(jnp.asarray, UPDATE(PARAMS, TASK, FEDERATION, HYPER, KEY))
    own = {"experts": jax.tree.map(jnp.asarray, PARAMS["experts"])}
    inputs = make_input(PARAMS, held=(4, 1, 4)).replace(own=own)
    trained = train_own(inputs, update, rules.local_experts)["experts"]["Dense_0"]
    before, delta = PARAMS["experts"]["Dense_0"], update.delta["experts"]["Dense_0"]
    for name, leaf in trained.items():
        np.testing.assert_allclose(leaf[4], before[name][4] + delta[name][0], rtol=1e-6)
        np.testing.assert_array_equal(leaf[:4], before[name][:4])
    weights = weigh(inputs, update, jnp.int32(7), HYPER, rules)
    assert weights["experts"].tolist() == [0, 7, 0]  # the second is shared
    assert weights["stem"] == 7 and weights["head"] == 7


def test_focus_trains_the_most_valuable_experts_only():
    """Of the held experts 4 and 1 there is room for one."""
    for value, still in (([1.0, 2.0, 9.0], 0), ([2.0, 1.0, 9.0], 1)):
        rules = make_rules(prox=False, focus=lambda gates, _, v=value: jnp.array(v))
        update = jax.jit(build_client_update(make_model(SIZES), SIZES, rules))
        inputs = make_input(PARAMS).replace(budget=jnp.int32(1))
        delta = update(PARAMS, inputs, FEDERATION, HYPER, KEY).delta
        for leaf in jax.tree.leaves(delta["experts"]):
            moved = np.abs(leaf).reshape(3, -1).max(1)
            assert moved[still] == 0 and moved[1 - still] > 0
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(delta["stem"]))


def test_no_gradient_passes_through_experts_without_focus():
    outputs = jnp.arange(12.0).reshape(2, 3, 2)  # [B, K, O]
    rules = make_rules(focus=lambda gates, hyper: jnp.array([1.0, 3.0, 2.0]))
    inputs = make_input(PARAMS).replace(
        slot=jnp.array([True, True, True]), budget=jnp.int32(2)
    )
    total = lambda outputs: freeze_others(outputs, None, inputs, HYPER, rules).sum()
    value, grads = jax.value_and_grad(total)(outputs)
    assert value == outputs.sum()
    np.testing.assert_array_equal(grads[:, 0], 0)
    np.testing.assert_array_equal(grads[:, 1:], 1)


def test_frozen_parts_stay_as_they_are():
    update = build_client_update(make_model(SIZES), SIZES, make_rules(frozen=("stem",)))
    delta = jax.jit(update)(PARAMS, TASK, FEDERATION, HYPER, KEY).delta
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(delta["stem"]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(delta["head"]))


def test_a_correction_is_added_to_every_gradient():
    sizes = SIZES._replace(local_steps=1)
    rules = make_rules(prox=False, momentum=0.0)
    update = jax.jit(build_client_update(make_model(sizes), sizes, rules))
    plain = update(PARAMS, TASK, FEDERATION, HYPER, KEY)
    correction = fill(plain.delta, 5)
    inputs = TASK.replace(correction=correction)
    corrected = update(PARAMS, inputs, FEDERATION, HYPER, KEY)
    rate = float(HYPER.client_learning_rate)
    expected = jax.tree.map(lambda d, c: d - rate * c, plain.delta, correction)
    assert_close(corrected.delta, expected)
    # From no correction the new variate is the gradient; corrected, it is so again.
    gradient = jax.tree.map(lambda d: -d / rate, plain.delta)
    zero = jax.tree.map(jnp.zeros_like, correction)
    for used, result in ((zero, plain), (correction, corrected)):
        sent = TASK.replace(correction=used, steps=jnp.int32(1))
        assert_close(renew_variate(sent, result, HYPER, 0.0), gradient)
    scaled = renew_variate(sent.replace(steps=jnp.int32(4)), corrected, HYPER, 0.9)
    uses = step_weights(jnp.int32(4), 0.9)
    wanted = lambda c, d: -c - d / (rate * uses)
    assert_close(scaled, jax.tree.map(wanted, correction, corrected.delta))
