"""FLOPs and bytes of a model without parts are those of its parts."""

import jax
import jax.numpy as jnp
import pytest

from fedmoe_jax.models.flops import count_activation_bytes, count_forward_flops
from fedmoe_jax.models.image_moe import build_model
from fedmoe_jax.tasks.batches import BatchShapes

WIDTH, OUTPUTS, STEM = 32, 16, 64


def build(num_experts):
    return build_model(
        stem="mlp",
        stem_width=STEM,
        expert="mlp",
        expert_width=WIDTH,
        feature_width=OUTPUTS,
        stem_dropout=0.0,
        expert_dropout=0.0,
        num_experts=num_experts,
        num_classes=10,
        image_shape=(8, 8, 1),
    )


def shapes():
    batch = {
        "x": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),
        "y": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    leaves, tree = jax.tree.flatten(batch)
    return BatchShapes(tuple(leaves), tree)


def test_one_expert_is_the_difference_that_a_second_makes():
    model = build(4)
    parts = count_forward_flops(model, shapes())
    whole = count_forward_flops(model._replace(parts=None), shapes())
    # Two products of its hidden layer, and little beside.
    products = 2 * (STEM * WIDTH + WIDTH * OUTPUTS)
    assert products <= parts["experts"] < 1.1 * products
    assert whole["experts"] == pytest.approx(parts["experts"], rel=0.1)
    shared = parts["stem"] + parts["gate"] + parts["head"]
    assert whole["shared"] == pytest.approx(shared, rel=0.1)


def test_a_single_expert_without_parts_is_shared():
    model = build(1)
    parts = count_forward_flops(model, shapes())
    whole = count_forward_flops(model._replace(parts=None), shapes())
    assert whole["experts"] == 0
    total = sum(parts.values()) - parts["gate"]
    assert whole["shared"] == pytest.approx(total, rel=0.1)


def test_activations_grow_by_the_experts_outputs():
    model = build(4)
    for kind in (model, model._replace(parts=None)):
        one, three = (count_activation_bytes(kind, shapes(), n) for n in (1, 3))
        assert three - one >= 2 * 4 * (WIDTH + OUTPUTS)


def test_count_forward_flops_on_the_host(monkeypatch):
    count, host = jax.stages.Lowered.cost_analysis, jax.local_devices(backend="cpu")[0]

    def as_on_accelerators(lowered):  # which count only what they have compiled
        return count(lowered) if jax.config.jax_default_device == host else None

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", as_on_accelerators)
    found = count_forward_flops.__wrapped__(build(8), shapes())
    products = {
        "stem": 2 * 64 * STEM,
        "gate": 2 * STEM * 8,
        "experts": 2 * (STEM * WIDTH + WIDTH * OUTPUTS),
        "head": 2 * OUTPUTS * 10,
    }
    assert found.keys() == products.keys()
    for part, product in products.items():
        # Biases and activations besides.
        assert product <= found[part] < 1.2 * product
