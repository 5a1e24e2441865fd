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
    mixed = jax.nn.softmax(mix_probabilities(model, 1.0, outputs, gates))
    np.testing.assert_allclose(mixed, [[0.3975, 0.6025]], rtol=1e-5)
    other = jax.nn.softmax(mix_outputs(model, 1.0, outputs, gates))
    assert other[0, 0] > 0.5
