"""Models with one MoE layer: experts one by one, mixtures, and what they freeze."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw, draw_params, make_image_model

from fedmoe_jax.base import Route
from fedmoe_jax.models.one_layer import (
    apply_experts,
    choose_trained,
    freeze_others,
    mix_outputs,
    mix_probabilities,
    split_rows,
    take_gate_stem,
)
from fedmoe_jax.models.routing import gate_logits, route

pytestmark = pytest.mark.slow

BATCH, EXPERTS, LABELS, FEATURES = 3, 5, 4, 6


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def params():
    return draw_params(make_image_model())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("expert", ["mlp", "conv"])
def test_apply_experts_equals_one_by_one(expert, platform):
    model = make_image_model("resnet8", expert, stem_width=2)
    parts, experts = model.parts, draw_params(model)["experts"]["moe"]
    features = draw(BATCH, 2, 2, 8, seed=9)
    # The loop of one platform and the vmap of the other must be the same function.
    there = parts._replace(platform=platform)
    outputs = jax.jit(lambda e, x: apply_experts(there, e, x, None))(experts, features)
    one = jax.jit(lambda e, x: parts.expert(e, x, None))
    for i in range(EXPERTS):
        alone = one(jax.tree.map(lambda leaf, i=i: leaf[i], experts), features)
        np.testing.assert_allclose(outputs[:, i], alone, rtol=1e-5, atol=1e-5)


def test_split_rows_are_the_rows_with_their_gradients():
    experts = {"kernel": draw(3, 4, 2), "bias": draw(3, 2, seed=1)}
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], experts)
    rows = [take(i) for i in range(3)]
    jax.tree.map(np.testing.assert_array_equal, split_rows(experts), rows)

    def weighted(experts):  # every row once, with a factor of its own
        rows = split_rows(experts)
        sums = [sum(leaf.sum() for leaf in jax.tree.leaves(row)) for row in rows]
        return sums[0] + 2 * sums[1] + 4 * sums[2]

    grads = jax.grad(weighted)(experts)
    factors = np.array([1, 2, 4], np.float32)
    np.testing.assert_array_equal(grads["bias"], np.tile(factors[:, None], (1, 2)))
    expected = np.broadcast_to(factors[:, None, None], (3, 4, 2))
    np.testing.assert_array_equal(grads["kernel"], expected)


def test_mixing_outputs_equals_mixing_logits(params):
    parts = make_image_model().parts
    outputs = draw(BATCH, EXPERTS, FEATURES)
    gates = jnp.asarray(softmax(draw(BATCH, EXPERTS, seed=1)), jnp.float32)
    head = {"kernel": params["head"]["kernel"], "bias": draw(LABELS, seed=2)}
    mixed = parts.head(head, jnp.einsum("be,beo->bo", gates, outputs))
    separate = jnp.einsum("be,bel->bl", gates, parts.head(head, outputs))
    np.testing.assert_allclose(mixed, separate, rtol=1e-5, atol=1e-5)


def apply(model, params, held, slot, active, **route):
    """Predictions and routing of 3 images by a client that holds some experts."""
    batch, held = {"x": draw(BATCH, 8, 8, 1)}, jnp.array([held])
    experts = jax.tree.map(lambda leaf: leaf[held[0]], params["experts"])
    submodel = params | {"experts": experts}
    slots = held, jnp.array([slot], bool)
    return model.apply(submodel, {}, batch, *slots, Route(active, **route), None)


def answer_slowly(model, params, mix):
    """Predictions of the dense softmax mixture of all experts, one by one."""
    parts, total = model.parts, 0.0
    features = parts.stem(params["stem"], {"x": draw(BATCH, 8, 8, 1)}, None)
    gates = softmax(gate_logits(params["gate"]["moe"], features))
    for e in range(EXPERTS):
        row = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"]["moe"])
        logits = parts.head(params["head"], parts.expert(row, features, None))
        answer = softmax(logits) if mix == "probabilities" else np.asarray(logits)
        total = total + gates[:, [e]] * answer
    return np.log(total) if mix == "probabilities" else total


@pytest.mark.parametrize("mix", ["outputs", "probabilities"])
def test_apply_of_all_experts_is_the_dense_softmax_mixture(params, mix):
    model, every = make_image_model(), range(EXPERTS)
    found, routing = apply(model, params, [*every], [1] * EXPERTS, EXPERTS, mix=mix)
    np.testing.assert_allclose(
        found, answer_slowly(model, params, mix), rtol=1e-5, atol=1e-5
    )
    assert routing.logits.shape == routing.gates.shape == (1, BATCH, EXPERTS)
    np.testing.assert_allclose(routing.gates[0], softmax(routing.logits[0]), atol=1e-6)


def test_apply_routes_among_the_held_experts(params):
    model = make_image_model()
    _, routing = apply(model, params, [4, 1, 4], [1, 1, 0], 2)
    assert routing.logits.shape == (1, BATCH, EXPERTS)
    own = jnp.take(routing.logits[0], jnp.array([4, 1, 4]), axis=1)
    expected = route(own, jnp.array([True, True, False]), 2)
    np.testing.assert_array_equal(routing.gates[0], expected)


@pytest.mark.parametrize("mix", ["outputs", "probabilities"])
def test_apply_with_a_bias_is_that_of_a_shifted_gate_but_for_its_logits(params, mix):
    model, slots = make_image_model(), ([4, 1, 0, 4], [1, 1, 1, 0], 2)
    bias = jnp.array([[2.0, 0.0, 3.0, 1.0]])
    found, routing = apply(model, params, *slots, mix=mix, bias=bias)
    plain, before = apply(model, params, *slots, mix=mix)
    gate = params["gate"]["moe"]
    own = gate["bias"].at[jnp.array([4, 0])].add(jnp.array([2.0, 3.0]))
    shifted = params | {"gate": {"moe": gate | {"bias": own}}}
    expected, after = apply(model, shifted, *slots, mix=mix)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(routing.gates, after.gates, atol=1e-6)
    np.testing.assert_array_equal(routing.logits, before.logits)
    assert np.abs(found - plain).max() > 1e-3


def test_apply_lets_the_gate_alone_read_a_stem_of_its_own(params):
    model, every = make_image_model(), ([*range(EXPERTS)], [1] * EXPERTS, EXPERTS)
    other = jax.tree.map(lambda leaf: leaf + 0.5, params["stem"])
    plain, _ = apply(model, params, *every)
    seen = model.parts.stem(other, {"x": draw(BATCH, 8, 8, 1)}, None)
    expected = gate_logits(params["gate"]["moe"], seen)
    found, routing = apply(model, params | {"gate_stem": other}, *every)
    np.testing.assert_allclose(routing.logits[0], expected, rtol=1e-5, atol=1e-5)
    gates = route(expected, jnp.ones(EXPERTS, bool), EXPERTS)
    one = lambda e: apply(model, params, [e], [1], 1)[0]  # with the stem of experts
    mixed = sum(gates[:, [e]] * one(e) for e in range(EXPERTS))
    np.testing.assert_allclose(found, mixed, rtol=1e-4, atol=1e-4)
    assert np.abs(found - plain).max() > 1e-3
    same, _ = apply(model, params | {"gate_stem": params["stem"]}, *every)
    np.testing.assert_allclose(same, plain, rtol=1e-6, atol=1e-6)


# ---- a shared expert


def run_mlp(params, features):
    """The hidden layer of ONE `mlp` expert, in NumPy."""
    second, first = params["Dense_0"], params["Dense_1"]  # named from the outside in
    hidden = np.maximum(features @ first["kernel"] + first["bias"], 0)
    return hidden @ second["kernel"] + second["bias"]


def gate_slowly(logits, slot, active, gating):
    """Gates [K] of one image over the held experts, one sort at a time."""
    allowed = np.flatnonzero(slot)
    if gating == "sum":
        return np.where(slot, len(slot) / len(allowed), 0.0)
    best = sorted(allowed, key=lambda k: (-logits[k], k))[:active]
    over = allowed if gating == "all" else best
    gates = np.zeros(len(slot))
    gates[best] = np.exp(logits[best]) / np.exp(logits[over]).sum()
    return gates


def share_slowly(params, held, slot, active, mix, gating):
    """Predictions of 3 images, with a shared expert, in NumPy."""
    params, batch = jax.tree.map(np.asarray, params), {"x": draw(BATCH, 8, 8, 1)}
    features = np.asarray(make_image_model().parts.stem(params["stem"], batch, None))
    gate, head, found = params["gate"]["moe"], params["head"], []
    answer = lambda outputs: outputs @ head["kernel"] + head["bias"]
    for x in features:
        gates = gate_slowly(
            (gate["kernel"] @ x + gate["bias"])[held], slot, active, gating
        )
        take = lambda e: jax.tree.map(lambda leaf: leaf[e], params["experts"]["moe"])
        outputs = [run_mlp(take(e), x) for e in held]
        beside = run_mlp(params["stem"]["shared"], x)
        if mix == "outputs":
            total = sum(g * o for g, o in zip(gates, outputs, strict=True))
            found.append(answer(total + beside))
        else:
            own = [softmax(answer(o + beside)) for o in outputs]
            found.append(np.log(sum(g * p for g, p in zip(gates, own, strict=True))))
    return np.array(found)


@pytest.mark.parametrize("gating", ["chosen", "all", "sum"])
@pytest.mark.parametrize("mix", ["outputs", "probabilities"])
@pytest.mark.parametrize("slot", [[1, 1, 1, 0], [0, 1, 0, 0]])
def test_apply_adds_the_shared_expert_once(mix, gating, slot):
    model, held = make_image_model(shared_width=3), [4, 1, 0, 4]
    params = draw_params(model)
    found, _ = apply(model, params, held, slot, 2, mix=mix, gating=gating)
    expected = share_slowly(params, held, np.array(slot, bool), 2, mix, gating)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_apply_trains_the_shared_expert_beside_experts_that_are_frozen():
    model = make_image_model(shared_width=3)
    params = draw_params(model)
    first = {"priority": lambda gates: -jnp.arange(3.0), "budget": jnp.int32(1)}

    def total(params):
        return apply(model, params, [0, 1, 2], [1, 1, 1], 3, **first)[0].sum()

    grads = jax.grad(total)(params)
    moved = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    assert moved(grads["stem"]["shared"]) > 1e-3
    experts = grads["experts"]["moe"]
    rows = [jax.tree.map(lambda leaf, e=e: leaf[e], experts) for e in range(3)]
    assert moved(rows[0]) > 1e-3 and moved(rows[1:]) == 0


def test_take_gate_stem_leaves_out_the_shared_expert():
    parts = make_image_model(shared_width=3).parts
    stem = {"kernel": 1, "shared": {"kernel": 2}}
    assert take_gate_stem(parts, stem) == {"kernel": 1}
    plain = make_image_model().parts
    assert take_gate_stem(plain, stem) is take_gate_stem(None, stem) is stem


# ---- what else there is


def test_apply_of_one_expert_has_nothing_to_route():
    model = make_image_model(num_experts=1)
    params = draw_params(model)
    _, routing = apply(model, params, [0], [1], 1)
    assert routing.logits is None
    np.testing.assert_array_equal(routing.gates, np.ones((1, BATCH, 1)))


def test_freeze_others_lets_gradients_pass_the_most_valuable_only():
    outputs, slot = jnp.arange(12.0).reshape(2, 3, 2), jnp.ones(3, bool)  # [B, K, O]
    priority = lambda gates: jnp.array([1.0, 3.0, 2.0])
    two = Route(1, priority=priority, budget=jnp.int32(2))
    trained = choose_trained(None, slot, two)
    assert trained.tolist() == [False, True, True]
    assert choose_trained(None, slot, Route(1)) is None
    total = lambda outputs: freeze_others(outputs, trained).sum()
    value, grads = jax.value_and_grad(total)(outputs)
    assert value == outputs.sum()
    np.testing.assert_array_equal(grads[:, 0], 0)
    np.testing.assert_array_equal(grads[:, 1:], 1)


def test_mix_probabilities_mixes_no_logits():
    model = SimpleNamespace(head=lambda params, outputs: params * outputs)
    outputs = jnp.log(jnp.array([[[0.99, 0.01], [0.2, 0.8]]]))
    gates = jnp.array([[0.25, 0.75]])
    mixed = jax.nn.softmax(mix_probabilities(model, 1.0, outputs, gates, None))
    np.testing.assert_allclose(mixed, [[0.3975, 0.6025]], rtol=1e-5)
    other = jax.nn.softmax(mix_outputs(model, 1.0, outputs, gates, None))
    assert other[0, 0] > 0.5
