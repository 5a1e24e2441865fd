"""Low-rank experts on a pretrained base: against the base, merged weights, and runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, FAMILIES, V, make_tokens, save_checkpoint
from checkpoints import D as WIDTH

from configs import default
from fedmoe_jax.base import BASE, Route
from fedmoe_jax.models import lora
from fedmoe_jax.models.decoder import decode
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError

TOKENS = jnp.asarray(make_tokens()[:, :9])


def make_model(folder, family="llama", **changes):
    """The model, its params with pairs that do something, and all that is frozen."""
    if not (folder / "config.json").exists():
        save_checkpoint(folder, family)
    config = default.get_config()
    fields = {"kind": "lora", "base": str(folder), "lora_rank": 3, "lora_alpha": 2.0}
    config.update_from_flattened_dict(
        {f"model.{name}": value for name, value in fields.items()}
        | {"num_experts": EXPERTS}
        | changes
    )
    model = lora.build(config, {"tokens": TOKENS}, V, "cpu")
    params, frozen = model.init(jax.random.key(0))
    noise = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape)
    return model, jax.tree.map(noise, params), frozen | {BASE: model.base.load()}


def run(model, params, frozen, held, active):
    """Logits and routing with the same held experts in every layer."""
    layers = len(params["gate"])
    held = jnp.broadcast_to(jnp.array(held), (layers, len(held)))
    own = take_submodel(params, {}, held, 0)
    slots = held, jnp.ones(held.shape, bool), Route(active)
    return model.apply(own, frozen, {"tokens": TOKENS}, *slots, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fixed", [False, True])
def test_a_model_starts_as_its_base(family, fixed, tmp_path):
    """With b = 0 and the base's own router; E experts of a dense base are alike."""
    changes = {"model.lora_fixed": fixed, "model.lora_attention": 2}
    model, _, frozen = make_model(tmp_path, family, **changes)
    params, _ = model.init(jax.random.key(0))
    logits, routing = run(model, params, frozen, list(range(EXPERTS)), 2)
    arch = lora.read_architecture(tmp_path)
    np.testing.assert_allclose(logits, decode(frozen[BASE], TOKENS, arch), atol=1e-4)
    assert routing.gates.shape == (len(params["gate"]), TOKENS.size, EXPERTS)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), frozen[BASE])
    listed = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.base.shapes())
    assert shapes == listed


def merge(pairs, weights, scale):
    """Weights with the products of their pairs added, in NumPy."""
    product = lambda pair: np.tensordot(pair["a"], pair["b"], 1)
    add = lambda name, w: w + scale * product(pairs[name]) if name in pairs else w
    return {name: add(name, np.asarray(weight)) for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_equals_the_base_with_its_products_added(expert, tmp_path):
    model, params, frozen = make_model(tmp_path, **{"model.lora_attention": 2})
    logits, _ = run(model, params, frozen, [expert], 1)
    merged = dict(frozen[BASE])
    for name in params["gate"]:
        block, own = dict(merged[name]), params["experts"][name]
        pairs = jax.tree.map(lambda leaf: np.asarray(leaf[expert]), own)
        block["hidden"] = merge(pairs, block["hidden"], 2.0 / 3)
        attention = jax.tree.map(np.asarray, params["stem"][name])
        block["attention"] = merge(attention, block["attention"], 2.0 / 3)
        merged[name] = block
    expected = decode(merged, TOKENS, lora.read_architecture(tmp_path))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_mixture_equals_a_loop_over_tokens_and_experts(tmp_path):
    """Of one layer: the base's matrices, met once for all experts, change nothing."""
    model, params, frozen = make_model(tmp_path)
    shape = model.apply.keywords["shape"]
    name = next(iter(params["gate"]))
    pairs, weights = params["experts"][name], frozen[BASE][name]["hidden"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    gates = rng.dirichlet(np.ones(EXPERTS), 5).astype(np.float32)
    expected = np.zeros_like(x)
    for token in range(5):
        for expert in range(EXPERTS):
            own = jax.tree.map(lambda leaf, e=expert: np.asarray(leaf[e]), pairs)
            w = merge(own, weights, shape.scale)
            gate, up = x[token] @ w["gate"], x[token] @ w["up"]
            hidden = gate / (1 + np.exp(-gate)) * up
            expected[token] += gates[token, expert] * (hidden @ w["down"])
    found = lora.run_shared_base(pairs, weights, x, gates, shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    each = lora.run_experts(pairs, weights, jnp.asarray(x), shape)
    mixed = np.einsum("tk,tkd->td", gates, each)
    np.testing.assert_allclose(mixed, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "llama",
            {"model.base": ""},
            "model.base='' is not allowed .*; allowed: the f",
        ),
        ("llama", {"model.base": "/none"}, "has no config.json; allowed: a folder"),
        ("llama", {"model.tied": True}, "model.tied=True is not allowed"),
        ("llama", {"model.shared_width": 4}, "shared_width=4 is not .*; allowed: 0"),
        ("llama", {"model.expert_dropout": 0.5}, "expert_dropout=0.5 is not .*: 0.0"),
        (
            "mixtral",
            {"num_experts": 8},
            "num_experts=8, as .* not allowed .*: 4, as in",
        ),
        ("olmoe", {"num_active": 1}, "num_active=1, as strategy='load_balanced' has"),
        ("olmoe", {"gate.input": "prefix"}, "gate.input='prefix' is not allowed"),
    ],
)
def test_what_does_not_fit_a_base_is_refused(family, changes, told, tmp_path):
    with pytest.raises(UserError, match=told):
        make_model(tmp_path, family, **changes)


def test_other_weights_in_the_same_folder_are_another_model(tmp_path):
    def change(config, tensors):
        tensors["model.norm.weight"] += 1

    first, _, before = make_model(tmp_path)
    assert make_model(tmp_path)[0] == first
    save_checkpoint(tmp_path, "llama", change)
    second, _, after = make_model(tmp_path)
    assert second != first
    moved = after[BASE]["norm"] - before[BASE]["norm"]
    np.testing.assert_allclose(moved, 1, atol=1e-6)


def test_windows_of_attention_are_as_long_as_the_text(tmp_path):
    def change(config, tensors):
        config["sliding_window"] = 8

    save_checkpoint(tmp_path, "mistral", change)
    with pytest.raises(UserError, match="data.length=9 is not .*; allowed: at most 8"):
        make_model(tmp_path, "mistral")


def test_data_fit_the_embedding_and_have_tokens(tmp_path):
    save_checkpoint(tmp_path, "llama")
    config = default.get_config()
    config.model.kind, config.model.base = "lora", str(tmp_path)
    with pytest.raises(UserError, match="with 41 tokens are not .*: at most 40"):
        lora.build(config, {"tokens": TOKENS}, V + 1, "cpu")
    with pytest.raises(UserError, match="without tokens .*; allowed: image_moe"):
        lora.build(config, {"x": TOKENS}, V, "cpu")


def test_only_pairs_and_gates_are_params(tmp_path):
    model, *_ = make_model(tmp_path)
    params, frozen = shape_params(model)
    assert params["stem"] == params["head"] == {} and set(frozen) == {BASE}
    (first, *_) = params["experts"].values()
    sizes = {name: pair["a"].shape for name, pair in first.items()}
    hidden = lora.read_architecture(tmp_path).hidden_width
    assert sizes["gate"] == sizes["up"] == (EXPERTS, WIDTH, 3)
    assert sizes["down"] == (EXPERTS, hidden, 3)
