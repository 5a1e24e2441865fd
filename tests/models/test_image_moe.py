"""The model's four functions, and routing against gates computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmoe_jax.models import routing
from fedmoe_jax.models.image_moe import apply_experts, build_model, pool
from fedmoe_jax.models.routing import gate_logits, route
from fedmoe_jax.options import UserError

BATCH, EXPERTS, LABELS, FEATURES = 3, 5, 4, 6
ROUTE = jax.jit(route, static_argnums=2)
calibration_loss = jax.jit(routing.calibration_loss)
load_loss = jax.jit(routing.load_loss)
z_loss = jax.jit(routing.z_loss)


def build(stem="mlp", expert="mlp", image_shape=(8, 8, 1), **changes):
    sizes = {
        "stem_width": 8,
        "expert_width": 8,
        "feature_width": FEATURES,
        "stem_dropout": 0.0,
        "expert_dropout": 0.0,
        "num_experts": EXPERTS,
        "num_classes": LABELS,
    }
    return build_model(
        stem=stem, expert=expert, image_shape=image_shape, **(sizes | changes)
    )


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fill(shapes, seed=0):
    """Random params without compiling `init`."""
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [0.5 * draw(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


# ---- models


ALLOWED = [
    ("mlp", "mlp", (8, 8, 1), (8,)),
    ("mlp", "mlp", (5, 7, 2), (8,)),
    ("flat", "mlp", (5, 7, 2), (70,)),
    ("flat", "dense", (5, 7, 2), (70,)),
    ("mlp", "dense", (8, 8, 1), (8,)),
    ("simple_cnn", "dense", (32, 32, 3), (14, 14, 16)),
    ("simple_cnn", "conv", (8, 8, 1), (2, 2, 16)),
    ("cnn", "dense", (8, 8, 1), (1, 1, 16)),
    ("resnet8", "dense", (8, 8, 1), (2, 2, 32)),
    ("cnn", "mlp", (8, 8, 1), (1, 1, 16)),
    ("cnn", "mlp", (32, 32, 3), (4, 4, 16)),
    ("cnn", "conv", (32, 32, 3), (4, 4, 16)),
    ("resnet8", "mlp", (16, 8, 1), (4, 2, 32)),
    ("resnet8", "conv", (8, 8, 1), (2, 2, 32)),
]


@pytest.mark.parametrize(("stem", "expert", "image_shape", "feature_shape"), ALLOWED)
def test_every_allowed_combination_has_the_promised_shapes(
    stem, expert, image_shape, feature_shape
):
    model = build(stem, expert, image_shape)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert set(params) == {"stem", "gate", "experts", "head"}
    for leaf in jax.tree.leaves((params["gate"], params["experts"])):
        assert leaf.shape[0] == EXPERTS
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((BATCH, *image_shape), jnp.float32)
    features = jax.eval_shape(model.stem, params["stem"], images, None)
    assert features.shape == (BATCH, *feature_shape)
    logits = jax.eval_shape(gate_logits, params["gate"], features)
    assert logits.shape == (BATCH, EXPERTS)
    outputs = jax.eval_shape(
        lambda experts, x: apply_experts(model, experts, x, None),
        params["experts"],
        features,
    )
    width = 8 if expert == "dense" else FEATURES
    assert outputs.shape == (BATCH, EXPERTS, width)
    predictions = jax.eval_shape(model.head, params["head"], outputs)
    assert predictions.shape == (BATCH, EXPERTS, LABELS)


@pytest.mark.parametrize("stem", ["cnn", "simple_cnn", "resnet8"])
def test_widths_that_are_no_multiple_of_a_group_are_allowed(stem):
    model = build(stem, "conv", (16, 16, 1), stem_width=28, expert_width=44)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert params["experts"]["Conv_0"]["kernel"].shape[-1] == 44


@pytest.mark.parametrize(
    ("stem", "expert", "image_shape", "field", "allowed"),
    [
        ("mlp", "conv", (8, 8, 1), "model.expert='conv'", "dense, mlp"),
        ("flat", "conv", (8, 8, 1), "model.expert='conv'", "dense, mlp"),
        ("cnn", "mlp", (12, 8, 1), "model.stem='cnn'", "flat, mlp"),
        ("simple_cnn", "mlp", (8, 12, 1), "model.stem='simple_cnn'", "flat, mlp"),
        ("resnet8", "mlp", (8, 10, 1), "model.stem='resnet8'", "flat, mlp"),
        ("cnn", "conv", (8, 8, 1), "model.expert='conv'", "dense, mlp"),
        ("cnn", "conv", (24, 32, 3), "model.expert='conv'", "dense, mlp"),
    ],
)
def test_combinations_that_do_not_fit_are_refused(
    stem, expert, image_shape, field, allowed
):
    with pytest.raises(UserError) as error:
        build(stem, expert, image_shape)
    message = str(error.value)
    assert field in message and message.endswith(f": {allowed}")
    assert "\n" not in message


def test_simple_cnn_has_the_params_of_the_benchmark():
    """Without the gate: McMahan's CIFAR-10 network of two convolutions."""
    model = build(
        "simple_cnn",
        "dense",
        (32, 32, 3),
        stem_width=32,
        expert_width=128,
        num_experts=1,
        num_classes=10,
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(params["stem"]) == 9 * 3 * 32 + 32 + 9 * 32 * 64 + 64
    assert count(params["experts"]) == 14 * 14 * 64 * 128 + 128
    assert count(params["head"]) == 128 * 10 + 10
    assert count(params["gate"]) == 64 + 1
    assert count(params) == 1_626_442 + 65


def test_flat_stem_and_dense_expert_by_hand():
    model = build("flat", "dense", (2, 3, 2), expert_width=4, num_experts=1)
    images = draw(BATCH, 2, 3, 2)
    features = model.stem({}, images, None)
    np.testing.assert_array_equal(features, images.reshape(BATCH, 12))
    params = fill(jax.eval_shape(model.init, jax.random.key(0)))
    assert params["stem"] == {}
    row = jax.tree.map(lambda leaf: leaf[0], params["experts"])
    linear = (
        np.asarray(features @ row["Dense_0"]["kernel"]) + row["Dense_0"]["bias"][None]
    )
    out = model.expert(row, features, None)
    np.testing.assert_allclose(out, np.maximum(linear, 0), rtol=1e-5, atol=1e-6)


def test_resnet_shortcuts_subsample():
    """With zero branches a block is relu(Dense(x[::2, ::2]))."""
    model = build("resnet8", "mlp", (8, 8, 1), stem_width=2)
    params = fill(jax.eval_shape(model.init, jax.random.key(0))["stem"])
    for block in range(3):
        norm = params[f"norm{block}b"]
        params[f"norm{block}b"] = jax.tree.map(jnp.zeros_like, norm)
    x = draw(BATCH, 8, 8, 1)
    out = model.stem(params, x, None)
    first = jax.lax.conv_general_dilated(
        x,
        params["Conv_0"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    flat = np.asarray(first).reshape(BATCH, -1)
    normed = (flat - flat.mean(1)[:, None]) / flat.std(1)[:, None]
    normed = normed.reshape(BATCH, 8, 8, 2)
    scale, bias = (np.asarray(params["norm"][name]) for name in ("scale", "bias"))
    y = np.maximum(normed * scale + bias, 0)
    for block in (1, 2):
        kernel = np.asarray(params[f"shortcut{block}"]["kernel"])
        y = np.maximum(y[:, ::2, ::2] @ kernel, 0)
    np.testing.assert_allclose(out, y, rtol=1e-3, atol=1e-4)


# ---- dropout


@pytest.fixture(scope="module")
def dropping():
    """A model that drops, one that does not, and params and features for both."""
    changes = {"stem_dropout": 0.25, "expert_dropout": 0.5, "expert_width": 256}
    model = build("flat", "dense", (16, 16, 1), **changes)
    whole = build("flat", "dense", (16, 16, 1), expert_width=256)
    params = fill(jax.eval_shape(model.init, jax.random.key(0)))
    return model, whole, params, jnp.abs(draw(64, 16, 16, 1)) + 0.1


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_experts_and_stem_drop_their_rates(monkeypatch, dropping, backend):
    model, whole, params, images = dropping
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    key = jax.random.key(1)
    features = model.stem(params["stem"], images, key)
    kept = np.asarray(features) != 0
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.02)
    before = whole.stem(params["stem"], images, None)
    np.testing.assert_allclose(
        np.asarray(features)[kept], np.asarray(before)[kept] / 0.75, rtol=1e-5
    )
    dropped = apply_experts(model, params["experts"], features, key)
    outputs = np.asarray(apply_experts(whole, params["experts"], features, None))
    kept = (np.asarray(dropped) != 0)[outputs != 0]
    np.testing.assert_allclose(kept.mean(), 0.5, atol=0.02)
    # Every expert draws a mask of its own.
    masks = (np.asarray(dropped) != 0) | (outputs == 0)
    both = (outputs[:, 0] != 0) & (outputs[:, 1] != 0)
    np.testing.assert_allclose(
        (masks[:, 0] == masks[:, 1])[both].mean(), 0.5, atol=0.05
    )


def test_no_key_means_no_dropout(dropping):
    model, whole, params, images = dropping
    features = model.stem(params["stem"], images, None)
    np.testing.assert_array_equal(features, whole.stem(params["stem"], images, None))
    outputs = apply_experts(model, params["experts"], features, None)
    expected = apply_experts(whole, params["experts"], features, jax.random.key(0))
    np.testing.assert_array_equal(outputs, expected)


def test_loop_and_vmap_over_experts_draw_the_same_masks(monkeypatch, dropping):
    model, _, params, images = dropping
    features, found = model.stem(params["stem"], images, None), []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda b=backend: b)
        key = jax.random.key(2)
        found.append(apply_experts(model, params["experts"], features, key))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_equal_arguments_give_the_same_functions():
    assert build() is build()
    assert build() is not build(num_experts=EXPERTS + 1)


@pytest.fixture(scope="module")
def params():
    return fill(jax.eval_shape(build().init, jax.random.key(0)))


def test_every_expert_starts_differently():
    def kernels(key):
        params = build(num_experts=3).init(key)
        return params["experts"]["Dense_0"]["kernel"], params["gate"]["kernel"]

    for kernel in jax.jit(kernels)(jax.random.key(0)):
        assert len(np.unique(np.asarray(kernel).reshape(3, -1)[:, 0])) == 3


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("expert", ["mlp", "conv"])
def test_apply_experts_equals_one_by_one(monkeypatch, expert, backend):
    model = build("resnet8", expert, stem_width=2)
    experts = fill(jax.eval_shape(model.init, jax.random.key(0))["experts"])
    features = draw(BATCH, 2, 2, 8, seed=9)
    # The loop of one backend and the vmap of the other must be the same function.
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    outputs = jax.jit(lambda e, x: apply_experts(model, e, x, None))(experts, features)
    one = jax.jit(lambda e, x: model.expert(e, x, None))
    for i in range(EXPERTS):
        alone = one(jax.tree.map(lambda leaf, i=i: leaf[i], experts), features)
        np.testing.assert_allclose(outputs[:, i], alone, rtol=1e-5, atol=1e-5)


def test_mixing_outputs_equals_mixing_logits(params):
    model = build()
    outputs = draw(BATCH, EXPERTS, FEATURES)
    gates = jnp.asarray(softmax(draw(BATCH, EXPERTS, seed=1)), jnp.float32)
    head = {"kernel": params["head"]["kernel"], "bias": draw(LABELS, seed=2)}
    mixed = model.head(head, jnp.einsum("be,beo->bo", gates, outputs))
    separate = jnp.einsum("be,bel->bl", gates, model.head(head, outputs))
    np.testing.assert_allclose(mixed, separate, rtol=1e-5, atol=1e-5)


# ---- routing


def test_gate_logits_average_positions():
    features = draw(BATCH, 2, 3, 4)
    gate = {"kernel": draw(EXPERTS, 4, seed=1), "bias": draw(EXPERTS, seed=2)}
    pooled = np.asarray(features).reshape(BATCH, 6, 4).mean(1)
    np.testing.assert_allclose(pool(features), pooled, atol=1e-6)
    expected = pooled @ np.asarray(gate["kernel"]).T + np.asarray(gate["bias"])
    np.testing.assert_allclose(gate_logits(gate, features), expected, atol=1e-5)
    flat = gate_logits(gate, jnp.asarray(pooled))
    np.testing.assert_allclose(flat, expected, atol=1e-5)


def test_gates_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0], [8.0, 1.0, 1.0, 2.0]]))
    gates = ROUTE(logits, jnp.ones(4, bool), 2)
    expected = [[0, 0, 3 / 7, 4 / 7], [0.8, 0, 0, 0.2]]
    np.testing.assert_allclose(gates, expected, atol=1e-6)
    held = ROUTE(logits, jnp.array([True, True, True, False]), 2)
    expected = [[0, 2 / 5, 3 / 5, 0], [8 / 9, 1 / 9, 0, 0]]  # a tie: the lower index
    np.testing.assert_allclose(held, expected, atol=1e-6)
    alone = ROUTE(logits, jnp.array([False, True, False, False]), 2)
    np.testing.assert_array_equal(alone, [[0, 1, 0, 0]] * 2)


def slow_route(logits, mask, num_active):
    """Gates one example at a time."""
    gates = np.zeros(logits.shape)
    for row, out in zip(logits, gates, strict=True):
        allowed = [e for e in range(len(row)) if mask[e]]
        chosen = sorted(allowed, key=lambda e: (-row[e], e))[:num_active]
        out[chosen] = softmax(row[chosen])
    return gates


whole_logits = hnp.arrays(np.int64, (BATCH, EXPERTS), elements=st.integers(-4, 4))
any_mask = st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).filter(any)


@settings(max_examples=60)
@given(whole_logits, any_mask, st.sampled_from([1, 2, EXPERTS]))
def test_routing_equals_the_slow_loop(logits, mask, num_active):
    gates = ROUTE(jnp.float32(logits), jnp.array(mask), num_active)
    gates = np.asarray(gates)
    np.testing.assert_allclose(gates, slow_route(logits, mask, num_active), atol=1e-6)
    np.testing.assert_allclose(gates.sum(1), 1.0, atol=1e-6)
    assert np.all((gates > 0).sum(1) == min(num_active, sum(mask)))
    assert np.all(gates[:, ~np.array(mask)] == 0)  # never an unheld expert


def test_all_experts_active_is_the_dense_softmax_mixture(params):
    model = build()
    features = draw(BATCH, 8)
    logits = gate_logits(params["gate"], features)
    outputs = apply_experts(model, params["experts"], features, None)
    gates = ROUTE(logits, jnp.ones(EXPERTS, bool), EXPERTS)
    mixed = jnp.einsum("be,beo->bo", gates, outputs)
    dense = np.zeros((BATCH, FEATURES))
    for e in range(EXPERTS):
        row = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"])
        dense += softmax(logits)[:, [e]] * np.asarray(model.expert(row, features, None))
    np.testing.assert_allclose(mixed, dense, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_router_and_only_the_chosen_rows():
    features = jnp.abs(draw(BATCH, 8)) + 0.1
    kernel = jnp.array([3.0, 0.0, 2.0, 1.0, 0.5])[:, None] * jnp.ones((EXPERTS, 8))
    gate = {"kernel": kernel, "bias": jnp.zeros(EXPERTS)}
    values = jnp.arange(1.0, EXPERTS + 1)  # what each expert would answer

    def answer(gate, mask):
        gates = route(gate_logits(gate, features), mask, 2)
        return jnp.einsum("be,e->b", gates, values).sum()

    grad = jax.jit(jax.grad(answer))
    for held, chosen in [([1, 1, 1, 1, 1], [0, 2]), ([0, 1, 0, 1, 1], [3, 4])]:
        grads = grad(gate, jnp.array(held, bool))
        for leaf in grads.values():
            moved = np.abs(np.asarray(leaf)).reshape(EXPERTS, -1).max(1)
            assert np.all(moved[chosen] > 1e-3)
            assert np.all(np.delete(moved, chosen) == 0)


# ---- auxiliary losses


def test_calibration_loss_by_hand():
    uniform = jnp.zeros((2, 3))
    one, two = jnp.array([False, True, False]), jnp.array([True, True, False])
    np.testing.assert_allclose(calibration_loss(uniform, one), np.log(3), rtol=1e-6)
    masses = jnp.log(jnp.array([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]]))
    assert calibration_loss(masses, jnp.ones(3, bool)) == 0
    expected = -(np.log(3 / 8) + np.log(6 / 8)) / 2
    np.testing.assert_allclose(calibration_loss(masses, two), expected, rtol=1e-6)


def test_calibration_gradient_moves_mass_to_held_experts():
    logits, held = draw(BATCH, EXPERTS), np.array([1, 0, 1, 0, 0], bool)
    grad = jax.jit(jax.grad(calibration_loss))(logits, jnp.array(held))
    among_held = softmax(np.where(held, logits, -np.inf))
    expected = (softmax(logits) - among_held) / BATCH
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    assert np.all(np.asarray(grad)[:, held] < 0)


def test_load_loss_by_hand():
    everyone, some = jnp.ones(4, bool), jnp.array([True, True, True, False])
    np.testing.assert_allclose(load_loss(jnp.zeros((4, 4)), everyone), 1.0, rtol=1e-6)
    np.testing.assert_allclose(load_loss(jnp.zeros((4, 4)), some), 1.0, rtol=1e-6)
    confident = 100 * jnp.eye(4)  # every expert is chosen once: balanced
    np.testing.assert_allclose(load_loss(confident, everyone), 1.0, rtol=1e-6)
    collapsed = confident[np.zeros(4, int)]
    np.testing.assert_allclose(load_loss(collapsed, everyone), 4.0, rtol=1e-6)
    rows = np.array([[6.0, 3.0, 1.0, 90.0], [2.0, 7.0, 1.0, 90.0]])
    # f = (1/2, 1/2, 0) and P = (0.4, 0.5, 0.1) among the three allowed
    loss = load_loss(jnp.log(jnp.float32(rows[[0, 1, 0, 1]])), some)
    np.testing.assert_allclose(loss, 3 * 0.45, rtol=1e-5)


def test_z_loss_by_hand():
    some = jnp.array([True, True, True, False])
    np.testing.assert_allclose(
        z_loss(jnp.zeros((2, 4)), some), np.log(3) ** 2, rtol=1e-6
    )
    masses = jnp.log(jnp.array([[1.0, 2.0, 5.0, 90.0], [3.0, 3.0, 4.0, 90.0]]))
    expected = (np.log(8) ** 2 + np.log(10) ** 2) / 2
    np.testing.assert_allclose(z_loss(masses, some), expected, rtol=1e-5)
