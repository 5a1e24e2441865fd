"""Evaluation against a loop over images, clients and experts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import default
from fedmoe_jax import evaluate, program
from fedmoe_jax import scoring as questions
from fedmoe_jax.federation import make_devices
from fedmoe_jax.models.image_moe import build_model
from fedmoe_jax.runtime.sharding import RUNS, build_mesh, spread
from fedmoe_jax.types import AlignState, Federation, SimState, Sizes
from fedmoe_jax.world.participation import init_participation

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
    max_capacity=3,
)
IMAGES, IMAGE = 21, (4, 4, 1)  # 21 is no multiple of 8 devices nor of batches of 4
IDLE, LOST = 5, 2  # one holds nothing, no update of the other has counted
LEFT_OUT = {"global_soft_accuracy", "expert_accuracy"}  # they need every expert


def make_model(sizes, expert="mlp", stem="mlp", image=IMAGE):
    return build_model(
        stem=stem,
        stem_width=6,
        expert=expert,
        expert_width=sizes.expert_width,
        feature_width=5,
        stem_dropout=0.0,
        expert_dropout=0.0,
        num_experts=sizes.num_experts,
        num_classes=sizes.num_classes,
        image_shape=image,
    )


MODEL = make_model(SIZES)


def make_held(rng, sizes):
    held = np.zeros((sizes.num_clients, sizes.num_experts), bool)
    for client in range(sizes.num_clients):
        count = 1 + client % sizes.max_held  # some hold fewer than A experts
        held[client, rng.permutation(sizes.num_experts)[:count]] = True
    held[IDLE] = False
    return held


def make_ledger(sizes):
    participation = init_participation(sizes)
    counted = jnp.ones(sizes.num_clients, jnp.int32).at[LOST].set(0)
    return participation.replace(rounds=counted)


def make_rules(personal, every_expert):
    rules = program.make_rules(default.get_config(), SIZES.num_experts)
    own = ("gate",) if personal else ()
    return rules._replace(personal=own, every_expert=every_expert)


def make_state(personal, model=MODEL, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    params = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))
    params["gate"] = jax.tree.map(lambda leaf: 0.4 * leaf, params["gate"])
    own = {}
    if personal:
        draw = lambda leaf: 0.4 * rng.normal(size=(sizes.num_clients, *leaf.shape))
        gate = jax.tree.map(lambda leaf: jnp.float32(draw(leaf)), params["gate"])
        own = {"gate": gate}
    shape = (sizes.num_clients, sizes.num_experts)
    align = AlignState(
        fitness=jnp.zeros(shape),
        usage=jnp.zeros(sizes.num_experts),
        held=jnp.asarray(make_held(rng, sizes)),
        times_held=jnp.zeros(shape, jnp.int32),
    )
    return SimState(
        round=jnp.int32(0),
        key=jax.random.key(0),
        params=params,
        server_opt={},
        align=align,
        personal=own,
        variate={},
        participation=make_ledger(sizes),
    )


def make_mix(seed):
    """Label mixes, [N, L]; every second client lacks a label."""
    rng = np.random.default_rng(seed)
    mix = rng.dirichlet(np.ones(SIZES.num_classes), SIZES.num_clients)
    odd = np.arange(1, SIZES.num_clients, 2)
    mix[odd, rng.integers(0, SIZES.num_classes, odd.size)] = 0.0
    return jnp.asarray(mix / mix.sum(1, keepdims=True), jnp.float32)


def make_federation(image=IMAGE):
    rng = np.random.default_rng(1)
    config = default.get_config()
    config.num_clients = SIZES.num_clients
    fields = dict.fromkeys(Federation.__dataclass_fields__)
    fields |= {
        "label_mix": make_mix(3),
        "test_x": rng.integers(0, 256, (IMAGES, *image), np.uint8),
        "test_y": rng.integers(0, SIZES.num_classes, IMAGES, np.int32),
        "mean": np.full(image, 0.5, np.float32),
        "std": np.full(image, 0.3, np.float32),
        "devices": make_devices(config)[0],
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
    features = MODEL.stem(state.params["stem"], x, None)
    answers = []
    for e in range(SIZES.num_experts):
        row = jax.tree.map(lambda leaf, e=e: leaf[e], state.params["experts"])
        outputs = MODEL.expert(row, features, None)
        answers.append(MODEL.head(state.params["head"], outputs))
    return np.asarray(features), np.stack(answers, axis=1)


def slow_evaluate(state):
    """Everything `evaluate` reports, one question about one image at a time."""
    features, answers = look(state)
    labels = np.asarray(FEDERATION.test_y)
    everyone = np.ones(SIZES.num_experts, bool)
    personal = bool(state.personal)
    gates_of = state.personal.get("gate") or jax.tree.map(
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

    clients = range(SIZES.num_clients) if personal else range(1)
    clients = [c for c in clients if not (personal and c in (IDLE, LOST))]
    active = SIZES.num_active
    top = [ask(c, lambda row: slow_gates(row, everyone, active)) for c in clients]
    soft = [ask(c, lambda row: np.exp(row) / np.exp(row).sum())[0] for c in clients]
    client_accuracy = []
    for c in range(SIZES.num_clients):
        held = np.asarray(state.align.held[c])
        held = held if held.any() else everyone
        right, _ = ask(c, lambda row, held=held: slow_gates(row, held, active))
        by_label = [right[labels == label].mean() for label in range(SIZES.num_classes)]
        client_accuracy.append(np.asarray(FEDERATION.label_mix[c]) @ by_label)
    client_accuracy = np.array(client_accuracy)
    counted = np.delete(client_accuracy, [IDLE, LOST])
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


@pytest.mark.parametrize(
    ("devices", "batch", "every_expert"),
    [(1, 4, True), (8, 500, True), (8, 2, False)],
)
def test_evaluation_equals_the_slow_loop(
    monkeypatch, gate_mode, expected, devices, batch, every_expert
):
    monkeypatch.setattr(evaluate, "TEST_BATCH", batch)
    evaluate.build_evaluate.cache_clear()
    run = evaluate.build_evaluate(
        MODEL,
        SIZES,
        make_rules(gate_mode == "personal", every_expert),
        processes=(),
        mesh=build_mesh(devices),
    )
    result = run(make_state(gate_mode == "personal"), FEDERATION, {})
    assert result.keys() == expected.keys() - (set() if every_expert else LEFT_OUT)
    for name, value in result.items():
        assert value.shape == np.shape(expected[name])
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(result["specialisation"].sum(0), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("experts", "held", "active", "mode", "expert"),
    [
        (16, 4, 2, "global", "mlp"),
        (9, 3, 1, "personal", "mlp"),
        (6, 6, 3, "global", "conv"),
    ],
)
def test_dispatch_changes_nothing(experts, held, active, mode, expert):
    sizes = SIZES._replace(num_experts=experts, max_held=held, num_active=active)
    stem, image = ("cnn", (16, 16, 1)) if expert == "conv" else ("mlp", IMAGE)
    model = make_model(sizes, expert, stem, image)
    build = lambda every_expert: evaluate.build_evaluate(
        model, sizes, make_rules(mode == "personal", every_expert), (), build_mesh(1)
    )
    state = make_state(mode == "personal", model, sizes)
    federation = make_federation(image)
    dense, dispatched = (build(each)(state, federation, {}) for each in (True, False))
    assert dense.keys() - dispatched.keys() == LEFT_OUT
    for name, value in dispatched.items():
        np.testing.assert_allclose(value, dense[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("walk", "every_expert"), [("map", True), ("map", False), ("vmap", False)]
)
def test_many_runs_equal_one_at_a_time(walk, every_expert):
    """Runs spread over one mesh axis and walked on each device, test images over
    the other; states and label mixes differ, the test set is shared."""
    asked = MODEL, SIZES, make_rules(False, every_expert), ()
    states = [make_state(False, seed=seed) for seed in range(4)]
    mixes = [make_mix(seed) for seed in range(4)]
    share = evaluate.build_evaluate_share(*asked)
    one = lambda run: share(run[0], FEDERATION.replace(label_mix=run[1]), {})
    over = {"map": lambda runs: jax.lax.map(one, runs), "vmap": jax.vmap(one)}[walk]
    sweep = jax.jit(spread(over, build_mesh(4, num_runs=2), (P(RUNS),), P(RUNS)))
    stack = lambda *leaves: jnp.stack(leaves)
    results = sweep((jax.tree.map(stack, *states), jnp.stack(mixes)))

    alone = evaluate.build_evaluate(*asked, build_mesh(1))
    for i, (state, mix) in enumerate(zip(states, mixes, strict=True)):
        wanted = alone(state, FEDERATION.replace(label_mix=mix), {})
        for name, value in wanted.items():
            np.testing.assert_allclose(results[name][i], value, atol=1e-6, err_msg=name)


def test_the_questions_have_different_answers(expected):
    """Equal answers could hide a wrong mask from the test above."""
    names = ("global", "global_soft", "personal", "worst_decile")
    assert len({round(expected[f"{name}_accuracy"], 6) for name in names}) == 4
    accuracy = expected["client_accuracy"]
    assert len(np.unique(accuracy.round(6))) == SIZES.num_clients
    assert expected["personal_accuracy"] != pytest.approx(accuracy.mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("devices", "most", "batches", "size"),
    [(1, 500, 1, 21), (2, 500, 1, 11), (8, 2, 2, 2), (1, 10, 3, 7)],
)
def test_test_images_are_dealt_once(devices, most, batches, size):
    shares = [evaluate.schedule_images(21, most, d, devices) for d in range(devices)]
    assert np.shape(shares) == (devices, batches, size)
    position = np.sort(np.ravel(shares))
    np.testing.assert_array_equal(position, np.arange(len(position)))


def test_padding_takes_no_image():
    position = jnp.array([IMAGES - 1, IMAGES])
    state = make_state(False)
    rules = make_rules(False, True)
    images = evaluate.encode_batch(
        state, FEDERATION, position, None, model=MODEL, rules=rules
    )
    assert images.y.tolist() == [FEDERATION.test_y[-1], -1]
    assert images.label.sum(1).tolist() == [1.0, 0.0]


def test_worst_decile_by_hand():
    worst_decile = jax.jit(evaluate.worst_decile)
    accuracy = np.random.default_rng(0).random(60).astype(np.float32)
    for count in (0, 1, 9, 10, 11, 20, 30, 41, 60):
        counted = np.arange(60) < count
        worst = np.sort(accuracy[:count])[: -(-count // 10)]
        value = worst_decile(accuracy, counted)
        np.testing.assert_allclose(value, worst.mean() if count else 0, rtol=1e-6)


def make_images(logits, y):
    """Images of two classes as the server's gate sees them."""
    y = jnp.array(y)
    label = jax.nn.one_hot(y, 2)
    return questions.Images(None, jnp.zeros((len(y), 1)), jnp.array(logits), y, label)


def test_count_right_by_hand():
    gates = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])
    answers = jnp.array([[[4.0, 0.0], [0.0, 3.0]]] * 3)
    images = make_images(gates, [0, 1, -1])
    # The first is right (2.0 against 1.5), the second wrong, the third is padding.
    assert questions.count_right(gates, answers, images).tolist() == [1.0, 0.0]


def test_needed_pairs_by_hand():
    logits = [[3.0, 2.0, 1.0, 0.0]] * 3
    clients = questions.ClientView(
        own={},
        held=jnp.array([[0, 0, 1, 1], [0, 1, 0, 0]], bool),
        wanted=jnp.array([[1.0, 0.0], [0.0, 1.0]]),
    )
    need = questions.find_needed(make_images(logits, [0, 1, -1]), clients, 1)
    # Expert 0 is the server's choice, 2 the first client's for its label 0, 1 the
    # second's for its label 1; expert 3 and padding are never needed.
    assert need.astype(int).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
