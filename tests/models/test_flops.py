"""FLOPs and bytes of a model without parts are those of its parts."""

import jax
import pytest
from factories import make_data, make_image_model

from fedmoe_jax.models.flops import count_activation_bytes, count_forward_flops
from fedmoe_jax.tasks.batches import shape_batch
from fedmoe_jax.tasks.images import IMAGES, measure_pixels

WIDTH, OUTPUTS, STEM, CLASSES = 32, 16, 64, 10


def build(num_experts, shared_width=0):
    widths = dict(stem_width=STEM, expert_width=WIDTH, feature_width=OUTPUTS)
    widths["shared_width"] = shared_width
    return make_image_model(num_experts=num_experts, num_classes=CLASSES, **widths)


def shapes():
    data = make_data()
    return shape_batch(data.train, measure_pixels(data), IMAGES)


def test_count_forward_flops_of_an_expert_is_what_a_second_adds():
    model = build(4)
    parts = count_forward_flops(model, shapes())
    whole = count_forward_flops(model._replace(parts=None), shapes())
    # Two products of its hidden layer, and little beside.
    products = 2 * (STEM * WIDTH + WIDTH * OUTPUTS)
    assert products <= parts["experts"] < 1.1 * products
    assert whole["experts"] == pytest.approx(parts["experts"], rel=0.1)
    shared = parts["stem"] + parts["gate"] + parts["head"]
    assert whole["shared"] == pytest.approx(shared, rel=0.1)


def test_count_forward_flops_of_a_single_expert_is_shared():
    model = build(1)
    parts = count_forward_flops(model, shapes())
    whole = count_forward_flops(model._replace(parts=None), shapes())
    assert whole["experts"] == 0
    total = sum(parts.values()) - parts["gate"]
    assert whole["shared"] == pytest.approx(total, rel=0.1)


def test_count_activation_bytes_grows_by_the_experts_outputs():
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
        "head": 2 * OUTPUTS * CLASSES,
    }
    assert found.keys() == products.keys()
    for part, product in products.items():
        # Biases and activations besides.
        assert product <= found[part] < 1.2 * product


def test_count_forward_flops_of_a_shared_expert_are_those_of_a_routed_one():
    plain, found = (count_forward_flops(build(4, n), shapes()) for n in (0, WIDTH))
    assert found == plain | {"shared_expert": plain["experts"]}
    double = count_forward_flops(build(4, 2 * WIDTH), shapes())
    # Two products of WIDTH more hidden units, and their biases and activations.
    products = 2 * (STEM * WIDTH + WIDTH * OUTPUTS)
    more = double["shared_expert"] - found["shared_expert"]
    assert products <= more < 1.1 * products
    whole = count_forward_flops(build(4, WIDTH)._replace(parts=None), shapes())
    shared = sum(found[part] for part in ("stem", "gate", "head", "shared_expert"))
    assert whole["shared"] == pytest.approx(shared, rel=0.1)


def test_count_activation_bytes_of_a_shared_expert_are_those_of_a_routed_one():
    count = lambda width, held: count_activation_bytes(build(4, width), shapes(), held)
    assert 0 < count(WIDTH, 1) - count(0, 1) <= count(0, 2) - count(0, 1)
    assert count(WIDTH, 1) - count(0, 1) >= 4 * (WIDTH + OUTPUTS)
