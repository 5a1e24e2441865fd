"""Evaluation against a loop over images, clients and experts."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    make_align,
    make_data,
    make_devices,
    make_federation,
    make_logit_model,
    make_program,
    use_model,
)
from jax.sharding import PartitionSpec as P
from scipy import stats

from fedmoe_jax.base import Routing
from fedmoe_jax.evaluation import evaluate, sources
from fedmoe_jax.evaluation.evaluate import build_evaluate, build_evaluate_share
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.runtime.sharding import RUNS, build_mesh, spread
from fedmoe_jax.tasks.images import IMAGES, score_labels
from fedmoe_jax.types import SimState
from fedmoe_jax.world.participation import init_participation

pytestmark = pytest.mark.slow

COUNT, IMAGE, CLASSES = 21, (4, 4, 1), 3  # 21: no multiple of 8 devices, nor of 4
IDLE, LOST = 5, 2  # one has held nothing, no update of the other has counted
LEFT_OUT = {"global_soft_accuracy", "expert_accuracy"}  # they need every expert
CHANGES = {
    "num_clients": 12,
    "num_experts": 4,
    "max_held": 3,
    "num_active": 2,
    "batch_size": 1,
    "model.stem_width": 6,
    "model.expert_width": 5,
    "model.feature_width": 5,
}


def build(mode="global", every_expert=True, devices=1, image=IMAGE, **changes):
    """A program whose gates are `global` or `personal`."""
    fields = CHANGES | {"gate.mode": mode} | changes
    program = make_program(make_data(CLASSES, image), **fields)
    strategy = program.strategy._replace(every_expert=every_expert)
    return program._replace(strategy=strategy, mesh=build_mesh(devices))


PROGRAM = build()
SIZES = PROGRAM.sizes


def draw_held(rng, sizes):
    held = np.zeros((sizes.num_clients, sizes.num_experts), bool)
    for client in range(sizes.num_clients):
        count = 1 + client % sizes.max_held  # some hold fewer than A experts
        held[client, rng.permutation(sizes.num_experts)[:count]] = True
    held[IDLE : IDLE + 1] = False  # of few clients none is idle
    return held


def draw_state(program, seed=0, **align):
    """Random params, gates and held experts; of some clients no update has counted."""
    rng, sizes = np.random.default_rng(seed), program.sizes
    count = sizes.num_clients
    draw = lambda leaf: np.float32(rng.normal(size=leaf.shape))
    params = jax.tree.map(draw, shape_params(program.model)[0])
    rows = lambda leaf: np.float32(0.4 * rng.normal(size=(count, *leaf.shape)))
    params["gate"] = jax.tree.map(lambda leaf: 0.4 * leaf, params["gate"])
    personal = {part: params[part] for part in program.strategy.personal}
    personal = jax.tree.map(rows, personal)
    held = draw_held(rng, sizes)[:, None]
    own = {"held": held, "fitness": jnp.full(held.shape, 0.5)}
    align = make_align(count, sizes.num_experts, **own | align)
    participation = init_participation(sizes)
    counted = jnp.ones(count, jnp.int32).at[LOST].set(0)
    state = SimState(
        round=jnp.int32(0),
        key=jax.random.key(0),
        params=params,
        server_opt={},
        align=align,
        personal=personal,
        variate={},
        participation=participation.replace(rounds=counted),
    )
    return jax.tree.map(jnp.asarray, state)


MEMORY = 1e9 * np.arange(1, SIZES.num_clients + 1)


def make_mix(seed):
    """Label mixes, [N, L]; every second client lacks a label."""
    rng = np.random.default_rng(seed)
    mix = rng.dirichlet(np.ones(CLASSES), SIZES.num_clients)
    odd = np.arange(1, SIZES.num_clients, 2)
    mix[odd, rng.integers(0, CLASSES, odd.size)] = 0.0
    return jnp.asarray(mix / mix.sum(1, keepdims=True), jnp.float32)


def draw_federation(image=IMAGE):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (COUNT, *image), np.uint8)
    y = rng.integers(0, CLASSES, COUNT, np.int32)
    pixels = {
        "mean": np.full(image, 0.5, np.float32),
        "std": np.full(image, 0.3, np.float32),
    }
    federation = make_federation(
        label_mix=make_mix(3),
        test={"x": x, "y": y},
        test_stratum=y,
        statistics=pixels,
        devices=make_devices(SIZES.num_clients, memory=MEMORY),
        frozen={},
    )
    return jax.tree.map(jnp.asarray, federation)


FEDERATION = draw_federation()


# ---- the slow twin


def slow_gates(logits, allowed, num_active):
    """Gates [E] of one image."""
    order = sorted(np.flatnonzero(allowed), key=lambda e: (-logits[e], e))
    gates = np.zeros(len(logits))
    gates[order[:num_active]] = np.exp(logits[order[:num_active]])
    return gates / gates.sum()


def share_slowly(stem, features):
    """Outputs [X', O] of a shared expert, in NumPy; 0 where there is none."""
    if "shared" not in stem:
        return 0.0
    shared = jax.tree.map(np.asarray, stem["shared"])
    second, first = shared["Dense_0"], shared["Dense_1"]
    hidden = np.maximum(np.asarray(features) @ first["kernel"] + first["bias"], 0)
    return hidden @ second["kernel"] + second["bias"]


def answer_all(state):
    """Features [X', D] and every expert's logits [X', E, L] of the test images."""
    x = np.asarray(FEDERATION.test["x"], np.float32)
    batch, parts = {"x": (x / 255 - 0.5) / np.float32(0.3)}, PROGRAM.model.parts
    features = parts.stem(state.params["stem"], batch, None)
    answers = []
    for e in range(SIZES.num_experts):
        row = jax.tree.map(lambda leaf, e=e: leaf[e], state.params["experts"]["moe"])
        outputs = parts.expert(row, features, None)
        outputs = outputs + share_slowly(state.params["stem"], features)
        answers.append(parts.head(state.params["head"], outputs))
    return np.asarray(features), np.stack(answers, axis=1)


def slow_equity(state, accuracy, counted):
    """What `equity` finds: of clients whose memory rises with their ids."""
    places = lambda ids: (np.arange(len(ids)) + 0.5) / len(ids)
    weak = accuracy[places(counted) < 1 / 3].mean()
    everyone = np.arange(SIZES.num_clients)
    weakest = everyone[places(everyone) < 1 / 3]
    # All experts are equally fit, so that the first half of them is the top.
    half = math.ceil(SIZES.num_experts / 2)
    has_top = np.asarray(state.align.held[:, 0, :half]).any(axis=1)
    took_part = np.asarray(state.participation.rounds) > 0
    return {
        "accuracy_spread": accuracy.std(),
        "weakest_accuracy": weak,
        "capacity_gap": accuracy[places(counted) > 2 / 3].mean() - weak,
        "capacity_correlation": stats.spearmanr(counted, accuracy).statistic,
        "weakest_top_share": (has_top & took_part)[weakest].mean(),
        "least_participation": took_part.min(),
    }


def slow_evaluate(state):
    """Everything `evaluate` reports, one question about one image at a time."""
    features, answers = answer_all(state)
    labels = np.asarray(FEDERATION.test["y"])
    everyone = np.ones(SIZES.num_experts, bool)
    personal = bool(state.personal)
    one = jax.tree.map(lambda leaf: leaf[None], state.params["gate"])
    gates_of = state.personal.get("gate", one)["moe"]

    def ask(client, choose, shift=0.0):
        """Whether each image is right under gates `choose(logits)`, and the gates."""
        row = client if personal else 0
        kernel = np.asarray(gates_of["kernel"][row])
        bias = np.asarray(gates_of["bias"][row])
        right, gates = np.zeros(COUNT), np.zeros((COUNT, SIZES.num_experts))
        for i in range(COUNT):
            gates[i] = choose(kernel @ features[i] + bias)
            right[i] = np.argmax(gates[i] @ answers[i] + shift) == labels[i]
        return right, gates

    clients = range(SIZES.num_clients) if personal else range(1)
    clients = [c for c in clients if not (personal and c in (IDLE, LOST))]
    active = SIZES.num_active
    top = [ask(c, lambda row: slow_gates(row, everyone, active)) for c in clients]
    soft = [ask(c, lambda row: np.exp(row) / np.exp(row).sum())[0] for c in clients]

    def ask_own(shift):
        """Accuracies [N, L] with each client's experts, logits shifted by its mix."""
        found = []
        for c in range(SIZES.num_clients):
            held = np.asarray(state.align.held[c, 0])
            held = everyone if c in (IDLE, LOST) else held
            mix = np.asarray(FEDERATION.label_mix[c])
            choose = lambda row, held=held: slow_gates(row, held, active)
            right, _ = ask(c, choose, shift(mix))
            found.append([right[labels == label].mean() for label in range(CLASSES)])
        return np.array(found)

    by_label, mix = ask_own(np.zeros_like), np.asarray(FEDERATION.label_mix)
    client_accuracy = (mix * by_label).sum(axis=1)
    prior = (mix * ask_own(lambda mix: np.log(mix + 1e-3))).sum(axis=1)
    counted, ids = client_accuracy, np.arange(SIZES.num_clients)
    if personal:
        ids = np.delete(ids, [IDLE, LOST])
        counted, prior, mix, by_label = (
            np.delete(x, [IDLE, LOST], axis=0) for x in (counted, prior, mix, by_label)
        )
    worst = lambda x: np.sort(x)[: math.ceil(len(x) / 10)].mean()
    routed = np.mean([gates for _, gates in top], axis=0)
    alone = answers.argmax(-1) == labels[:, None]
    return {
        "global_accuracy": np.mean([right for right, _ in top]),
        "global_soft_accuracy": np.mean(soft),
        "personal_accuracy": counted.mean(),
        "worst_decile_accuracy": worst(counted),
        "personal_prior_accuracy": prior.mean(),
        "worst_decile_prior_accuracy": worst(prior),
        "clients_counted": len(counted),
        "stratum_accuracy": np.mean(
            [[right[labels == k].mean() for k in range(CLASSES)] for right, _ in top],
            axis=0,
        ),
        "personal_stratum_accuracy": (mix * by_label).sum(axis=0) / mix.sum(axis=0),
        "client_accuracy": client_accuracy,
        "expert_accuracy": alone.mean(0),
        "specialisation": np.stack(
            [routed[labels == k].mean(0) for k in range(CLASSES)], axis=1
        )[None],
        **slow_equity(state, counted, ids),
    }


@pytest.fixture(scope="module", params=["global", "personal"])
def gate_mode(request):
    return request.param


@pytest.fixture(scope="module")
def expected(gate_mode):
    return slow_evaluate(draw_state(build(gate_mode)))


@pytest.mark.parametrize(
    ("devices", "batch", "every_expert"),
    [(1, 4, True), (8, 500, True), (8, 2, False)],
)
def test_evaluate_equals_the_slow_loop(
    monkeypatch, gate_mode, expected, devices, batch, every_expert
):
    monkeypatch.setattr(sources, "TEST_BATCH", batch)
    build_evaluate.cache_clear()
    program = build(gate_mode, every_expert, devices)
    result = build_evaluate(program)(draw_state(program), FEDERATION, {})
    assert result.keys() == expected.keys() - (set() if every_expert else LEFT_OUT)
    for name, value in result.items():
        assert value.shape == np.shape(expected[name])
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(result["specialisation"].sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("mode", ["global", "personal"])
@pytest.mark.parametrize("every_expert", [True, False])
def test_evaluate_with_a_shared_expert_equals_the_slow_loop(mode, every_expert):
    program = build(mode, every_expert, **{"model.shared_width": 3})
    state = draw_state(program)
    result, expected = (
        build_evaluate(program)(state, FEDERATION, {}),
        slow_evaluate(state),
    )
    assert result.keys() == expected.keys() - (set() if every_expert else LEFT_OUT)
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("experts", "held", "active", "mode", "expert", "shared"),
    [
        (16, 4, 2, "global", "mlp", 0),
        (9, 3, 1, "personal", "mlp", 0),
        (6, 6, 3, "global", "conv", 0),
        (9, 3, 2, "global", "conv", 4),
    ],
)
def test_evaluate_by_dispatch_changes_nothing(
    experts, held, active, mode, expert, shared
):
    stem, image = ("cnn", (16, 16, 1)) if expert == "conv" else ("mlp", IMAGE)
    changes = {"num_experts": experts, "max_held": held, "num_active": active}
    changes["model.shared_width"] = shared
    changes |= {"model.stem": stem, "model.expert": expert}
    programs = [build(mode, each, image=image, **changes) for each in (True, False)]
    state, federation = draw_state(programs[0]), draw_federation(image)
    dense, dispatched = (build_evaluate(p)(state, federation, {}) for p in programs)
    assert dense.keys() - dispatched.keys() == LEFT_OUT
    for name, value in dispatched.items():
        np.testing.assert_allclose(value, dense[name], atol=1e-6, err_msg=name)


# ---- models without parts


def share_sets(held):
    """Held experts [N, G, E] of which every fourth row is the same; not of the idle."""
    shared = held[np.arange(len(held)) % 4]
    shared[IDLE] = False
    return shared


@pytest.mark.parametrize("mix", ["outputs", "probabilities"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("mode", ["global", "personal"])
def test_evaluate_without_parts_is_that_with_parts(mode, devices, mix):
    """Clients share held sets; one may use more experts than a client can hold."""
    program = build(mode, devices=devices)
    strategy = program.strategy._replace(mix=mix)
    program = program._replace(strategy=strategy)
    held = share_sets(np.asarray(draw_state(program).align.held))
    assert len(np.unique(held, axis=0)) == 5 and not held[IDLE].any()
    state = draw_state(program, held=jnp.asarray(held))
    whole = program._replace(model=program.model._replace(parts=None))
    found, expected = (
        build_evaluate(each)(state, FEDERATION, {}) for each in (whole, program)
    )
    assert expected.keys() - found.keys() == LEFT_OUT
    for name, value in found.items():
        assert value.shape == expected[name].shape
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)
    scores = [float(found[f"{n}_accuracy"]) for n in ("global", "personal")]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize(
    ("mode", "mix", "gating", "every_expert"),
    [
        ("global", "outputs", "chosen", True),
        ("global", "outputs", "all", False),
        ("personal", "outputs", "sum", True),
        ("global", "probabilities", "chosen", False),
        ("personal", "probabilities", "chosen", True),
    ],
)
def test_evaluate_with_a_shared_expert_is_the_forward_pass_of_training(
    mode, mix, gating, every_expert
):
    """Without parts evaluation runs `Model.apply`, which is what clients train."""
    program = build(mode, every_expert, **{"model.shared_width": 3})
    strategy = program.strategy._replace(mix=mix, gating=gating)
    program = program._replace(strategy=strategy)
    state = draw_state(program)
    whole = program._replace(model=program.model._replace(parts=None))
    found, expected = (
        build_evaluate(each)(state, FEDERATION, {}) for each in (whole, program)
    )
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)


# ---- positions that only pad

# Labels of four test examples of two positions each, or of eight of one; 0 is padding.
LABELS = np.array([[0, 1], [1, 1], [1, 2], [0, 2]], np.int32)
STRATA = np.array([0, 0, 1, 1], np.int32)


def score_positions(logits, batch):
    """Bare logits [B, L] answer every position; labels of class 0 are padding."""
    labels = batch["y"]
    logits = jnp.broadcast_to(
        logits.reshape(-1, *[1] * (labels.ndim - 1), CLASSES), (*labels.shape, CLASSES)
    )
    scores = score_labels(logits, batch)
    return scores._replace(weight=(labels > 0).astype(jnp.float32))


@pytest.mark.parametrize("form", ["parts", "no parts", "positions"])
def test_evaluate_ignores_padding(form):
    """Expert 0 answers 1, expert 1 answers 2; the gate prefers the first."""
    sizes = dict(num_experts=2, max_held=1, num_active=1)
    program = build(num_clients=2, cohort_size=2, **sizes)
    task = IMAGES._replace(loss=score_positions, add_prior=None)
    program = program._replace(task=task)
    whole = make_logit_model(2, CLASSES)
    labels, strata = LABELS.reshape(-1), np.repeat(STRATA, 2)
    if form == "positions":
        labels, strata = LABELS, STRATA
    repeats = 1 if labels.ndim == 1 else 2

    def apply(*arguments):
        outputs, routing = whole.apply(*arguments)
        repeat = lambda leaf: jnp.repeat(leaf, repeats, axis=1)
        return outputs, Routing(repeat(routing.logits), repeat(routing.gates))

    model = whole
    if form != "parts":
        model = whole._replace(apply=apply, parts=None)
    program = use_model(program, model)
    params, _ = model.init(jax.random.key(0))
    answers = jnp.array([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    params["experts"] = {"moe": {"logits": answers}}
    params["gate"]["moe"]["bias"] = jnp.array([1.0, 0.0])
    held = jnp.eye(2, dtype=bool)[:, None]
    state = draw_state(program, held=held).replace(params=params)
    counted = state.participation.replace(rounds=jnp.ones(2, jnp.int32))
    federation = FEDERATION.replace(
        label_mix=jnp.array([[0.75, 0.25], [0.2, 0.8]]),
        test={"x": jnp.zeros((len(labels), *IMAGE)), "y": jnp.asarray(labels)},
        test_stratum=jnp.asarray(strata),
        devices=make_devices(2, memory=MEMORY[:2]),
    )
    run = build_evaluate(program)
    found = run(state.replace(participation=counted), federation, {})
    # Labels of stratum 0 are 1, 1 and 1, of stratum 1 they are 1, 2 and 2.
    expected = {
        "global_accuracy": 4 / 6,
        "client_accuracy": [0.75 + 0.25 / 3, 0.8 * 2 / 3],
        "personal_accuracy": (0.75 + 0.25 / 3 + 0.8 * 2 / 3) / 2,
        "worst_decile_accuracy": 0.8 * 2 / 3,
        "clients_counted": 2,
        "stratum_accuracy": [1, 1 / 3],
        "personal_stratum_accuracy": [0.75 / 0.95, (0.25 / 3 + 0.8 * 2 / 3) / 1.05],
        "specialisation": [[[1, 1], [0, 0]]],
        "accuracy_spread": (0.75 + 0.25 / 3 - 0.8 * 2 / 3) / 2,
        "weakest_accuracy": 0.75 + 0.25 / 3,
        "capacity_gap": 0.8 * 2 / 3 - 0.75 - 0.25 / 3,
        "capacity_correlation": -1,
        "weakest_top_share": 1,
        "least_participation": 1,
    }
    if form == "parts":
        expected |= {"global_soft_accuracy": 4 / 6, "expert_accuracy": [4 / 6, 2 / 6]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


# ---- the label prior


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("mode", ["global", "personal"])
def test_the_prior_alone_decides_where_the_model_knows_nothing(mode, parts):
    """Equal logits: every client answers its commonest label, and is right as often."""
    program = build(mode)
    if not parts:
        program = program._replace(model=program.model._replace(parts=None))
    state = draw_state(program)
    head = jax.tree.map(jnp.zeros_like, state.params["head"])
    state = state.replace(params=state.params | {"head": head})
    found = build_evaluate(program)(state, FEDERATION, {})
    best = np.asarray(FEDERATION.label_mix).max(1)
    best = np.delete(best, [IDLE, LOST]) if mode == "personal" else best
    np.testing.assert_allclose(found["personal_prior_accuracy"], best.mean(), rtol=1e-5)
    worst = np.sort(best)[: math.ceil(len(best) / 10)].mean()
    np.testing.assert_allclose(found["worst_decile_prior_accuracy"], worst, rtol=1e-5)
    shares = np.asarray(FEDERATION.label_mix)[:, 0]
    shares = np.delete(shares, [IDLE, LOST]) if mode == "personal" else shares
    np.testing.assert_allclose(found["personal_accuracy"], shares.mean(), rtol=1e-5)


# ---- a sweep


@pytest.mark.parametrize(
    ("walk", "every_expert"), [("map", True), ("map", False), ("vmap", False)]
)
def test_evaluate_many_runs_equals_one_at_a_time(walk, every_expert):
    """Runs spread over one mesh axis and walked on each device, test images over
    the other; states and label mixes differ, the test set is shared."""
    program = build("global", every_expert)
    states = [draw_state(program, seed) for seed in range(4)]
    mixes = [make_mix(seed) for seed in range(4)]
    share = build_evaluate_share(program)
    one = lambda run: share(run[0], FEDERATION.replace(label_mix=run[1]), {})
    over = {"map": lambda runs: jax.lax.map(one, runs), "vmap": jax.vmap(one)}[walk]
    sweep = jax.jit(spread(over, build_mesh(4, num_runs=2), (P(RUNS),), P(RUNS)))
    stack = lambda *leaves: jnp.stack(leaves)
    results = sweep((jax.tree.map(stack, *states), jnp.stack(mixes)))

    alone = build_evaluate(program)
    for i, (state, mix) in enumerate(zip(states, mixes, strict=True)):
        wanted = alone(state, FEDERATION.replace(label_mix=mix), {})
        for name, value in wanted.items():
            np.testing.assert_allclose(results[name][i], value, atol=1e-6, err_msg=name)


# ---- the parts


def test_slow_evaluate_answers_every_question_differently(gate_mode, expected):
    """Equal answers could hide a wrong mask from the test above."""
    names = ("global", "global_soft", "personal", "worst_decile", "personal_prior")
    assert len({round(expected[f"{name}_accuracy"], 6) for name in names}) == 5
    accuracy = expected["client_accuracy"]
    assert len(np.unique(accuracy.round(6))) == SIZES.num_clients
    mean = pytest.approx(accuracy.mean(), abs=1e-4)
    assert (expected["personal_accuracy"] == mean) == (gate_mode == "global")


def test_average_strata_leaves_out_what_a_diverged_model_says_of_others():
    values = jnp.array([[[1.0, 1.0], [jnp.nan, jnp.nan]], [[0.5, 0.5], [2.0, 2.0]]])
    mix, both = jnp.eye(2), jnp.ones(2, bool)
    found = evaluate.average_strata(values, mix, both)
    np.testing.assert_allclose(found, [[1.0, 0.5], [np.nan, 2.0]])
    found = evaluate.average_strata(values, mix, ~both.at[1].set(False))
    np.testing.assert_allclose(found, [[np.nan, 0.5], [np.nan, 2.0]])


def test_measure_groups_tells_several_layers_apart():
    """Two groups: layer 0 holds an expert each, layer 1 both experts."""
    held = jnp.array([[[1, 0], [1, 1]], [[0, 1], [1, 1]]], bool)
    federation = make_federation(label_mix=jnp.eye(2))

    def measure(held):
        state = SimpleNamespace(align=make_align(2, 2, held=held))
        return evaluate.measure_groups(state, federation, 2)

    found = measure(held)
    np.testing.assert_allclose(found["layer_group_information"], [1, 0], atol=1e-6)
    np.testing.assert_allclose(found["expert_group_information"], 0.5, rtol=1e-6)
    assert measure(held[:, :1]).keys() == {"expert_group_information"}


def test_worst_decile_by_hand():
    worst_decile = jax.jit(evaluate.worst_decile)
    accuracy = np.random.default_rng(0).random(60).astype(np.float32)
    for count in (0, 1, 9, 10, 11, 20, 30, 41, 60):
        counted = np.arange(60) < count
        worst = np.sort(accuracy[:count])[: -(-count // 10)]
        value = worst_decile(accuracy, counted)
        np.testing.assert_allclose(value, worst.mean() if count else 0, rtol=1e-6)
