"""Full fine-tuning of a pretrained base: against the base, its weights, and pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import EXPERTS, FAMILIES, V, make_tokens, save_checkpoint

from configs import default
from fedmoe_jax.base import BASE, Route
from fedmoe_jax.models import finetune, lora
from fedmoe_jax.models.decoder import decode
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.tensors import name_block

TOKENS = jnp.asarray(make_tokens()[:, :9])
LABELS = jnp.roll(TOKENS, -1, axis=1)


def make_model(folder, family="llama", build=finetune.build, **changes):
    """The model, its params before the first round, and all that is frozen."""
    if not (folder / "config.json").exists():
        save_checkpoint(folder, family)
    config = default.get_config()
    config.model.kind, config.model.base = "finetune", str(folder)
    config.update_from_flattened_dict({"num_experts": EXPERTS} | changes)
    model = build(config, {"tokens": TOKENS}, V, "cpu")
    params, frozen = model.init(jax.random.key(0))
    return model, params, frozen | {BASE: model.base.load()}


def run(model, params, frozen, held, active):
    """Logits and routing with the same held experts in every layer."""
    held = jnp.broadcast_to(jnp.array(held), (len(params["gate"]), len(held)))
    own = take_submodel(params, {}, held, 0)
    slots = held, jnp.ones(held.shape, bool), Route(active)
    return model.apply(own, frozen, {"tokens": TOKENS}, *slots, None)


def measure(logits):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return losses.mean()


def descend(loss, params, steps=3):
    """Params after some steps of SGD."""

    @jax.jit
    def step(params):
        return jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(loss)(params))

    for _ in range(steps):
        params = step(params)
    return params


def assert_trees_close(found, known, atol=1e-5):
    for one, other in zip(*map(jax.tree.leaves, (found, known)), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_starts_as_its_base_and_trains_each_weight_once(family, tmp_path):
    model, params, frozen = make_model(tmp_path, family)
    logits, _ = run(model, params, frozen, list(range(EXPERTS)), 2)
    arch = lora.read_architecture(tmp_path)
    np.testing.assert_allclose(logits, decode(frozen[BASE], TOKENS, arch), atol=1e-4)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    trained, bias = {**params, "head": {}}, EXPERTS * len(params["gate"])
    expected = count(frozen[BASE]) + bias
    if arch.mixture is None:  # copies, and gates that the base has not
        expected += (1 - 1 / EXPERTS) * count(params["experts"])
        expected += count(params["gate"]) - bias
    assert count(trained) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_expert_takes_the_steps_of_the_weights_themselves(family, tmp_path):
    model, params, frozen = make_model(tmp_path, family, num_experts=1)
    arch, gates = lora.read_architecture(tmp_path), params["gate"]
    weights = jax.tree.map(jnp.asarray, frozen[BASE])
    trained = {name: params[name] for name in ("stem", "experts")}
    whole = lambda own: own | {"gate": gates, "head": {}}
    by_difference = descend(
        lambda own: measure(run(model, whole(own), frozen, [0], 1)[0]), trained
    )
    by_weight = descend(lambda own: measure(decode(own, TOKENS, arch)), weights)
    moved = jax.tree.map(jnp.subtract, by_weight, weights)
    for layer in range(len(arch.mixes)):
        name = name_block(layer)
        hidden = moved[name].pop("hidden")
        found = by_difference["experts"][name]
        assert_trees_close({n: leaf[0] for n, leaf in found.items()}, hidden)
    assert_trees_close(by_difference["stem"], moved)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-6


@pytest.mark.slow
def test_pairs_of_full_rank_take_the_same_steps(tmp_path):
    """Several experts behind gates: with a = 1 and s = 1, b is the difference."""
    model, params, frozen = make_model(tmp_path)
    own, pairs, _ = make_model(tmp_path, build=lora.build, **{"model.lora_fixed": True})
    one = lora.build_model(own.apply.keywords["shape"]._replace(scale=1.0))
    names = {"gate", "up", "down"}
    unit = lambda leaf: {"a": jnp.broadcast_to(jnp.eye(leaf.shape[1]), square(leaf))}
    square = lambda leaf: (len(leaf), leaf.shape[1], leaf.shape[1])
    units = {
        layer: {name: unit(leaf) for name, leaf in each.items()}
        for layer, each in params["experts"].items()
    }
    fixed = frozen | {lora.FIXED: {"stem": {}, "experts": units}}
    zeros = {
        layer: {name: {"b": leaf} for name, leaf in each.items()}
        for layer, each in params["experts"].items()
    }
    held, active = [3, 0, 1], 2
    rest = {"stem": {}, "gate": params["gate"], "head": {}}
    by_pairs = descend(
        lambda own: measure(run(one, rest | {"experts": own}, fixed, held, active)[0]),
        zeros,
    )
    by_difference = descend(
        lambda own: measure(
            run(model, params | {"experts": own}, frozen, held, active)[0]
        ),
        params["experts"],
    )
    found = {
        layer: {name: each[name]["b"] for name in names}
        for layer, each in by_pairs.items()
    }
    assert_trees_close(found, by_difference)
    for leaf in jax.tree.leaves(by_difference):
        assert not np.any(leaf[2])  # that was not held
        assert min(np.abs(leaf[e]).max() for e in held) > 1e-6
    assert jax.tree.structure(pairs["gate"]) == jax.tree.structure(params["gate"])


def test_a_base_is_needed(tmp_path):
    told = "model.base='' is not allowed with model.kind='finetune'"
    with pytest.raises(UserError, match=told):
        make_model(tmp_path, **{"model.base": ""})
