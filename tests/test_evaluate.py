"""Evaluation against a loop over images, clients and experts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import evaluate
from fedmoe_jax.models import build_model
from fedmoe_jax.sharding import build_mesh
from fedmoe_jax.types import AlignState, Federation, SimState, Sizes

SIZES = Sizes(
    num_clients=12,
    cohort_size=4,
    num_experts=4,
    max_held=3,
    num_active=2,
    local_steps=1,
    batch_size=1,
    expert_width=5,
    num_classes=3,
)
IMAGES, IMAGE = 21, (4, 4, 1)  # 21 is no multiple of 8 devices nor of batches of 4
IDLE = 5  # this client never took part
MODEL = build_model(
    stem="mlp",
    stem_width=6,
    expert="mlp",
    expert_width=SIZES.expert_width,
    feature_width=5,
    num_experts=SIZES.num_experts,
    num_classes=SIZES.num_classes,
    image_shape=IMAGE,
)


def make_params(rng):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    return jax.tree.map(draw, shapes)


def make_held(rng):
    held = np.zeros((SIZES.num_clients, SIZES.num_experts), bool)
    for client in range(SIZES.num_clients):
        count = 1 + client % SIZES.max_held  # some hold fewer than A experts
        held[client, rng.permutation(SIZES.num_experts)[:count]] = True
    held[IDLE] = False
    return held


def make_state(personal):
    rng = np.random.default_rng(0)
    params = make_params(rng)
    params["gate"] = jax.tree.map(lambda leaf: 0.4 * leaf, params["gate"])
    gate = {}
    if personal:
        draw = lambda leaf: 0.4 * rng.normal(size=(SIZES.num_clients, *leaf.shape))
        gate = jax.tree.map(lambda leaf: jnp.float32(draw(leaf)), params["gate"])
    shape = (SIZES.num_clients, SIZES.num_experts)
    align = AlignState(
        fitness=jnp.zeros(shape),
        usage=jnp.zeros(SIZES.num_experts),
        held=jnp.asarray(make_held(rng)),
        times_held=jnp.zeros(shape, jnp.int32),
    )
    return SimState(
        round=jnp.int32(0),
        key=jax.random.key(0),
        params=params,
        server_opt={},
        align=align,
        personal_gate=gate,
    )


def make_federation():
    rng = np.random.default_rng(1)
    mix = rng.dirichlet(np.ones(SIZES.num_classes), SIZES.num_clients)
    fields = dict.fromkeys(Federation.__dataclass_fields__)
    fields |= {
        "label_mix": mix.astype(np.float32),
        "test_x": rng.integers(0, 256, (IMAGES, *IMAGE), np.uint8),
        "test_y": rng.integers(0, SIZES.num_classes, IMAGES, np.int32),
        "mean": np.array([0.5], np.float32),
        "std": np.array([0.3], np.float32),
    }
    return jax.tree.map(jnp.asarray, Federation(**fields))


FEDERATION = make_federation()


# ---- the slow twin


def slow_gates(logits, allowed, num_active):
    """Gates [E] of one image."""
    order = sorted(np.flatnonzero(allowed), key=lambda e: (-logits[e], e))
    gates = np.zeros(len(logits))
    gates[order[:num_active]] = np.exp(logits[order[:num_active]])
    return gates / gates.sum()


def look(state):
    """Features [X', D] and every expert's logits [X', E, L] of the test images."""
    x = (np.asarray(FEDERATION.test_x, np.float32) / 255 - 0.5) / np.float32(0.3)
    features = MODEL.stem(state.params["stem"], x)
    answers = []
    for e in range(SIZES.num_experts):
        row = jax.tree.map(lambda leaf, e=e: leaf[e], state.params["experts"])
        outputs = MODEL.expert(row, features)
        answers.append(MODEL.head(state.params["head"], outputs))
    return np.asarray(features), np.stack(answers, axis=1)


def slow_evaluate(state):
    """Everything `evaluate` reports, one question about one image at a time."""
    features, answers = look(state)
    labels = np.asarray(FEDERATION.test_y)
    everyone = np.ones(SIZES.num_experts, bool)
    personal = bool(state.personal_gate)
    gates_of = state.personal_gate or jax.tree.map(
        lambda leaf: leaf[None], state.params["gate"]
    )

    def ask(client, choose):
        """Whether each image is right under gates `choose(logits)`, and the gates."""
        row = client if personal else 0
        kernel = np.asarray(gates_of["kernel"][row])
        bias = np.asarray(gates_of["bias"][row])
        right, gates = np.zeros(IMAGES), np.zeros((IMAGES, SIZES.num_experts))
        for i in range(IMAGES):
            gates[i] = choose(kernel @ features[i] + bias)
            right[i] = np.argmax(gates[i] @ answers[i]) == labels[i]
        return right, gates

    askers = range(SIZES.num_clients) if personal else range(1)
    askers = [c for c in askers if not (personal and c == IDLE)]
    active = SIZES.num_active
    top = [ask(c, lambda row: slow_gates(row, everyone, active)) for c in askers]
    soft = [ask(c, lambda row: np.exp(row) / np.exp(row).sum())[0] for c in askers]
    client_accuracy = []
    for c in range(SIZES.num_clients):
        held = np.asarray(state.align.held[c])
        held = held if held.any() else everyone
        right, _ = ask(c, lambda row, held=held: slow_gates(row, held, active))
        by_label = [right[labels == label].mean() for label in range(SIZES.num_classes)]
        client_accuracy.append(np.asarray(FEDERATION.label_mix[c]) @ by_label)
    client_accuracy = np.array(client_accuracy)
    counted = np.delete(client_accuracy, IDLE)
    routed = np.mean([gates for _, gates in top], axis=0)
    alone = answers.argmax(-1) == labels[:, None]
    return {
        "global_accuracy": np.mean([right for right, _ in top]),
        "global_soft_accuracy": np.mean(soft),
        "personal_accuracy": counted.mean(),
        "worst_decile_accuracy": np.sort(counted)[
            : math.ceil(len(counted) / 10)
        ].mean(),
        "client_accuracy": client_accuracy,
        "expert_accuracy": alone.mean(0),
        "specialisation": np.stack(
            [routed[labels == k].mean(0) for k in range(SIZES.num_classes)], axis=1
        ),
    }


@pytest.fixture(scope="module", params=["global", "personal"])
def gate_mode(request):
    return request.param


@pytest.fixture(scope="module")
def expected(gate_mode):
    return slow_evaluate(make_state(gate_mode == "personal"))


@pytest.mark.parametrize(("devices", "batch"), [(1, 4), (8, 250)])
def test_evaluation_equals_the_slow_loop(
    monkeypatch, gate_mode, expected, devices, batch
):
    monkeypatch.setattr(evaluate, "TEST_BATCH", batch)
    run = evaluate.build_evaluate(
        model=MODEL, sizes=SIZES, gate_mode=gate_mode, mesh=build_mesh(devices)
    )
    result = run(make_state(gate_mode == "personal"), FEDERATION)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].shape == np.shape(value)
        np.testing.assert_allclose(result[name], value, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(result["specialisation"].sum(0), 1, atol=1e-5)


def test_the_questions_have_different_answers(expected):
    """Equal answers could hide a wrong mask from the test above."""
    names = ("global", "global_soft", "personal", "worst_decile")
    assert len({round(expected[f"{name}_accuracy"], 6) for name in names}) == 4
    accuracy = expected["client_accuracy"]
    assert len(np.unique(accuracy.round(6))) == SIZES.num_clients
    assert expected["personal_accuracy"] != pytest.approx(accuracy.mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("devices", "batches", "size"), [(1, 1, 21), (2, 2, 11), (8, 8, 3)]
)
def test_test_images_are_dealt_once(devices, batches, size):
    x, y = evaluate.deal_test_images(FEDERATION, devices)
    assert x.shape == (batches, size, *IMAGE) and y.shape == (batches, size)
    flat = np.asarray(y).ravel()
    np.testing.assert_array_equal(flat[:IMAGES], FEDERATION.test_y)
    assert np.all(flat[IMAGES:] == -1)
    images = np.asarray(x).reshape(-1, *IMAGE)[:IMAGES]
    np.testing.assert_array_equal(images, FEDERATION.test_x)


def test_worst_decile_by_hand():
    worst_decile = jax.jit(evaluate.worst_decile)
    accuracy = np.random.default_rng(0).random(60).astype(np.float32)
    for count in (0, 1, 9, 10, 11, 20, 30, 41, 60):
        counted = np.arange(60) < count
        worst = np.sort(accuracy[:count])[: -(-count // 10)]
        value = worst_decile(accuracy, counted)
        np.testing.assert_allclose(value, worst.mean() if count else 0, rtol=1e-6)


def test_count_right_by_hand():
    gates = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])
    y = jnp.array([0, 1, -1])
    answers = evaluate.Answers(
        features=jnp.zeros((3, 1)),
        expert_logits=jnp.array([[[4.0, 0.0], [0.0, 3.0]]] * 3),
        y=y,
        label=jax.nn.one_hot(y, 2),
    )
    # The first is right (2.0 against 1.5), the second wrong, the third is padding.
    assert evaluate.count_right(gates, answers).tolist() == [1.0, 0.0]
