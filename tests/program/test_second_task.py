"""A data set, a task and a model of one's own: one record and one row each.

Strings in three languages, each with its own successor of every letter; the first
letter says which. The model has two MoE layers, a frozen embedding, and no parts.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from fedmoe_jax.base import Data, Model, Route, Routing, Scores, Task
from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.models import MODELS
from fedmoe_jax.models.layers import ANY
from fedmoe_jax.models.routing import route as route_top
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.state import init_state
from fedmoe_jax.tasks import TASKS
from fedmoe_jax.train import run
from fedmoe_jax.train.compare import compare
from fedmoe_jax.train.plan import plan_run

pytestmark = pytest.mark.slow

N, L, E, G, K, V, LENGTH, WIDTH = 6, 3, 4, 2, 2, 9, 7, 12
PAD = 0


def draw_strings(count, rng):
    """Strings [count, LENGTH] of a language each, padded; languages [count]."""
    after = np.stack([np.roll(np.arange(L + 1, V), 1 + lang) for lang in range(L)])
    language = np.arange(count, dtype=np.int32) % L
    text = np.zeros((count, LENGTH), np.int32)
    text[:, 0] = 1 + language
    text[:, 1] = rng.integers(L + 1, V, count)
    for place in range(2, LENGTH):
        text[:, place] = after[language, text[:, place - 1] - L - 1]
    text[::5, -2:] = PAD
    return text, language


def load_strings(options):
    rng = np.random.default_rng(0)
    (text, language), (test_text, test_language) = (
        draw_strings(count, rng) for count in (240, 61)
    )
    return Data(
        train={"text": text},
        test={"text": test_text},
        stratum=language,
        test_stratum=test_language,
        stratum_names=("first", "second", "third"),
        task="next_letter",
        owner=np.arange(len(text)) % N,  # two clients for each language
    )


def score_letters(logits, batch):
    target = batch["text"][:, 1:]
    right = (logits.argmax(-1) == target).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return Scores(loss, right, (target != PAD).astype(jnp.float32))


NEXT_LETTER = Task(
    statistics=lambda data: {},
    prepare=lambda rows, statistics: rows,
    loss=score_letters,
    num_outputs=lambda data: V,
)


@functools.cache
def make_two_layers(num_experts, width):
    def init(key):
        gates, experts, head, table = jax.random.split(key, 4)
        draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[-2])
        names = {"first": 0, "second": 1}
        gate = lambda i: {
            "kernel": draw(jax.random.fold_in(gates, i), num_experts, WIDTH),
            "bias": jnp.zeros(num_experts),
        }
        expert = lambda i: {
            "up": draw(jax.random.fold_in(experts, i), num_experts, WIDTH, width),
            "down": draw(jax.random.fold_in(experts, 2 + i), num_experts, width, WIDTH),
        }
        params = {
            "stem": {"scale": jnp.ones(WIDTH)},
            "gate": {name: gate(i) for name, i in names.items()},
            "experts": {name: expert(i) for name, i in names.items()},
            "head": {"kernel": draw(head, WIDTH, V)},
        }
        return params, {"embedding": draw(table, V, WIDTH) * np.sqrt(V)}

    def apply(params, frozen, batch, held, slot, route, key):
        text, table = batch["text"][:, :-1], frozen["embedding"]
        x = table[text] + table[text[:, :1]]
        x = x.reshape(-1, WIDTH) * params["stem"]["scale"][None]
        logits, gates = [], []
        for layer, name in enumerate(sorted(params["gate"])):
            gate, expert = params["gate"][name], params["experts"][name]
            logits.append(x @ gate["kernel"].T + gate["bias"][None])
            chosen = logits[-1][:, held[layer]], slot[layer]
            gates.append(route_top(*chosen, route.num_active))
            hidden = jax.nn.relu(jnp.einsum("pd,kdh->pkh", x, expert["up"]))
            x = x + jnp.einsum("pk,pkh,khd->pd", gates[-1], hidden, expert["down"])
        outputs = x @ params["head"]["kernel"]
        routing = Routing(jnp.stack(logits), jnp.stack(gates))
        return outputs.reshape(*text.shape, V), routing

    return Model(init, apply)


def build_two_layers(config, batch, num_outputs, platform):
    assert batch["text"].shape == (1, LENGTH)
    assert num_outputs == V and platform in ("cpu", ANY)
    return make_two_layers(config.num_experts, config.model.expert_width)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setitem(DATASETS, "strings", load_strings)
    monkeypatch.setitem(TASKS, "next_letter", NEXT_LETTER)
    monkeypatch.setitem(MODELS, "two_layers", build_two_layers)


def make_config(**changes):
    config = default.get_config("smoke")
    fields = {
        "data.name": "strings",
        "model.kind": "two_layers",
        "model.expert_width": 16,
        "partition.kind": "natural",
        "num_clients": N,
        "cohort_size": N,
        "num_experts": E,
        "max_held": K,
        "num_active": 1,
        "num_rounds": 6,
        "local_steps": 8,
        "client.learning_rate": 0.1,
        "devices.deadline": 1e6,
        "run.num_devices": 1,
        "run.tensorboard": False,
    }
    config.update_from_flattened_dict(fields | changes)
    return config


def train(config, workdir):
    stop = lambda: False
    assert run.train(config, workdir, stop=stop, label="strings", profile=False)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    with np.load(workdir / "final.npz") as arrays:
        return [json.loads(line) for line in lines], dict(arrays)


@pytest.mark.parametrize("strategy", ["greedy", "load_balanced"])
def test_strategies_of_one_layer_train_a_model_with_two(strategy, tmp_path):
    rows, arrays = train(make_config(strategy=strategy), tmp_path)
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert rows[-1]["global_accuracy"] > 2 / V
    assert np.shape(rows[-1]["expert_load"]) == (G, E)
    # 32 strings of 6 letters to predict, of which every fifth string lacks two.
    letters = np.sum(rows[-1]["expert_load"], axis=1)
    np.testing.assert_allclose(letters, N * 8 * 32 * (6 - 2 / 5), rtol=0.05)
    assert arrays["fitness"].shape == (N, G, E)
    assert arrays["specialisation"].shape == (G, E, L)
    np.testing.assert_allclose(arrays["specialisation"].sum(1), 1, rtol=1e-5)
    # The natural clients: two of each language.
    np.testing.assert_array_equal((arrays["label_counts"] > 0).sum(0), [2] * L)


def test_runs_of_a_comparison_are_those_alone(tmp_path):
    config = make_config(num_rounds=2, chunk_rounds=1)
    alone, _ = train(make_config(num_rounds=2, chunk_rounds=1), tmp_path / "alone")
    with config.unlocked():
        config.compare = {
            "strategies": ("greedy", config.strategy),
            "changes": ("",),
            "seeds": (0,),
        }
    folders, whole = compare(
        config, tmp_path / "both", stop=lambda: False, profile=False
    )
    assert whole and [folder.name for folder in folders] == [
        "greedy-seed0",
        f"{config.strategy}-seed0",
    ]
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines()
    for row, line in zip(alone, lines, strict=True):
        together = json.loads(line)
        for name in ("train_loss", "expert_load", "bytes_up", "client_flops"):
            np.testing.assert_allclose(row[name], together[name], rtol=1e-5)


def start(**changes):
    config = make_config(**changes)
    plan = plan_run(config, build_mesh(1))
    state, frozen = jax.jit(init_state, static_argnums=2)(
        jax.random.key(0), plan.hyper, plan.program
    )
    return plan, state, plan.federation.replace(frozen=frozen)


@pytest.mark.parametrize("gate", ["global", "personal"])
def test_clients_are_scored_with_the_experts_that_they_hold(gate):
    plan, state, federation = start(**{"gate.mode": gate})
    program = plan.program
    held = np.zeros((N, G, E), bool)
    held[0, :, :2] = held[1, :, :2] = True  # the same set
    held[2, 0, [1, 3]] = held[2, 1, 2] = True
    held[3, 0, 0] = held[3, 1, 3] = True  # clients 4 and 5 hold nothing yet
    counted = state.participation.replace(rounds=jnp.array(held.any((1, 2)), jnp.int32))
    align = state.align.replace(held=jnp.array(held))
    state = state.replace(align=align, participation=counted)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)
    state = state.replace(personal=jax.tree.map(noise, state.personal))
    mesh = program.mesh
    found = build_evaluate(program)(
        *(replicate(tree, mesh) for tree in (state, federation, plan.hyper))
    )
    text = jnp.array(federation.test["text"])
    weight = np.array(text[:, 1:] != PAD)
    for client in range(N):
        own = jax.tree.map(lambda leaf, c=client: leaf[c], state.personal)
        everything = jnp.tile(jnp.arange(E), (G, 1))
        submodel = take_submodel(state.params, own, everything, 0)
        slot = held[client] if held[client].any() else np.ones((G, E), bool)
        route = Route(program.sizes.num_active)
        logits, _ = program.model.apply(
            *(submodel, federation.frozen, {"text": text}),
            *(everything, jnp.array(slot), route, None),
        )
        right = (logits.argmax(-1) == text[:, 1:]) * weight
        languages = [federation.test_stratum == language for language in range(L)]
        score = [right[of].sum() / weight[of].sum() for of in languages]
        expected = np.dot(score, federation.label_mix[client])
        np.testing.assert_allclose(found["client_accuracy"][client], expected, 1e-5)


def test_the_frozen_embedding_travels_once_and_is_in_no_state():
    plan, state, federation = start()
    size = 4 * V * WIDTH
    assert set(federation.frozen) == {"embedding"}
    assert plan.program.costs.frozen_bytes == size
    assert set(state.params) == {"stem", "gate", "experts", "head"}
    experts = 4 * G * 2 * WIDTH * 16
    assert plan.program.costs.expert_bytes == experts
    # Up and down of one expert in both layers, two FLOPs a product, three passes.
    flops = 3 * 2 * G * 2 * WIDTH * 16 * (LENGTH - 1)
    assert plan.program.costs.expert_flops == pytest.approx(flops, rel=0.25)


def test_strategies_for_one_layer_are_refused():
    with pytest.raises(UserError, match="strategy='fedmoe_da' .* 2 MoE layers"):
        start(strategy="fedmoe_da", num_active=2)


def test_scores_of_other_positions_than_the_routed_ones_are_refused(monkeypatch):
    def score_strings(logits, batch):
        scores = score_letters(logits, batch)
        return scores._replace(weight=scores.weight.mean(axis=1))

    task = NEXT_LETTER._replace(loss=score_strings)
    monkeypatch.setitem(TASKS, "next_letter", task)
    told = r"Scores.weight \[32\] .*='two_layers' routes 192 positions; allowed: 192"
    with pytest.raises(UserError, match=told):
        start()


def test_data_that_cannot_drift_are_refused():
    with pytest.raises(UserError, match="drift.images='blur' .* allowed: none"):
        start(**{"drift.images": "blur"})
