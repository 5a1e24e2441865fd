"""FLOPs that units save: those of narrower models, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, V, save_checkpoint
from checkpoints import D as WIDTH
from factories import make_image_model, shape_rows

from configs import default
from fedmoe_jax.base import Units
from fedmoe_jax.models import lora, transformer
from fedmoe_jax.models.flops import count_forward_flops, shape_params
from fedmoe_jax.models.products import count_products
from fedmoe_jax.pruning.savings import Savings, count_savings, save_flops
from fedmoe_jax.pruning.units import of_part
from fedmoe_jax.world.costs import Costs


def make_costs(model, batch):
    """Costs whose FLOPs alone are read."""
    forward = dict(count_forward_flops(model, batch))
    experts = 3 * forward.pop("experts")
    flops = {"shared_flops": 3 * sum(forward.values()), "expert_flops": experts}
    return Costs(**dict.fromkeys(Costs._fields, 0.0) | flops)


def test_save_flops_by_hand():
    first = Units("a", "stem", 4, ((("x",), 1), (("between",), 0)))
    second = Units("b", "stem", 2, ((("between",), 1),))
    masks = {"a": jnp.array([1, 1, 1, 0], bool), "b": jnp.array([1, 0], bool)}
    shares = ((("between",), 0.5), (("x",), 0.2))
    saved = save_flops(masks, [first, second], shares)
    np.testing.assert_allclose(saved, 0.5 * (1 - 0.75 * 0.5) + 0.2 * 0.25, rtol=1e-6)
    assert float(save_flops(masks, [first, second], ())) == 0
    experts = {"a": jnp.array([[[1, 1, 0, 0], [0, 0, 0, 0]]], bool)}
    saved = save_flops(experts, [first], ((("x",), 0.8),))
    np.testing.assert_allclose(saved, [[0.4, 0.8]], rtol=1e-6)


def halve(units):
    """Masks that keep the first half of the units."""
    return {each.name: jnp.arange(each.count) < each.count / 2 for each in units}


def count_expert(model, batch):
    """FLOPs of all products in ONE expert."""
    params, parts = shape_params(model)[0], model.parts
    features = jax.eval_shape(parts.stem, params["stem"], batch.of(1), None)
    (experts,) = params["experts"].values()
    shrink = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    expert = jax.tree.map(shrink, experts)
    return sum(jax.tree.leaves(count_products(parts.expert, expert, features, None)))


def count_stem(model, batch):
    """FLOPs of all products in the stem."""
    params = shape_params(model)[0]["stem"]
    found = count_products(model.parts.stem, params, batch.of(1), None)
    return sum(jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["mlp", "cnn", "simple_cnn", "lenet"])
def test_half_the_units_of_a_stem_save_what_one_of_half_the_width_does(stem):
    shape = (8, 8, 1) if stem == "mlp" else (16, 16, 1)
    wide, narrow = (make_image_model(stem, "mlp", shape, stem_width=w) for w in (6, 3))
    batch = shape_rows({"x": jax.ShapeDtypeStruct((1, *shape), jnp.float32)})
    costs, units = make_costs(wide, batch), of_part(wide.units, "stem")
    found = count_savings(wide, batch, wide.units, costs)
    saved = save_flops(halve(units), units, found.stem) * costs.shared_flops
    expected = 3 * (count_stem(wide, batch) - count_stem(narrow, batch))
    np.testing.assert_allclose(saved, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("expert", ["mlp", "dense", "conv"])
def test_half_the_units_of_an_expert_save_what_one_of_half_the_width_does(expert):
    stem, shape = ("cnn", (16, 16, 1)) if expert == "conv" else ("mlp", (8, 8, 1))
    # A dense expert's hidden units are its outputs.
    widths = ({"expert_width": w, "feature_width": w} for w in (8, 4))
    if expert != "dense":
        widths = ({"expert_width": w} for w in (8, 4))
    wide, narrow = (make_image_model(stem, expert, shape, **each) for each in widths)
    batch = shape_rows({"x": jax.ShapeDtypeStruct((1, *shape), jnp.float32)})
    costs, units = make_costs(wide, batch), of_part(wide.units, "experts")
    found = count_savings(wide, batch, wide.units, costs)
    saved = save_flops(halve(units), units, found.experts) * costs.expert_flops
    expected = 3 * (count_expert(wide, batch) - count_expert(narrow, batch))
    np.testing.assert_allclose(saved, expected, rtol=1e-6)
    assert 0.8 < found.of_expert < 1 and found.alone == ()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_single_expert_saves_of_what_is_counted_with_it(layers):
    """Of a transformer with one expert; its three matrices for nine tokens."""
    sizes = dict(blocks=layers, width=8, heads=2, kv_heads=1, expert_width=6)
    rest = dict(moe_every=1, dense_width=6, shared_width=0, num_experts=1)
    switches = dict.fromkeys(("tied", "remat", "scan", "linked"), False)
    form = dict(vocabulary=11, gate_input="token", platform="cpu")
    model = transformer.build_model(
        transformer.Shape(**sizes, **rest, **switches, **form)
    )
    batch = shape_rows({"tokens": jax.ShapeDtypeStruct((1, 9), jnp.int32)})
    costs = make_costs(model, batch)
    assert costs.expert_flops == 0
    found = count_savings(model, batch, model.units, costs)
    assert found.experts == () and found.of_expert == 0
    units = of_part(model.units, "experts")
    saved = save_flops(halve(units), units, found.alone) * costs.shared_flops
    np.testing.assert_allclose(saved, 3 * layers * 3 * 2 * 9 * 8 * 6 / 2, rtol=1e-6)


def test_nothing_is_saved_where_nothing_is_pruned():
    model = make_image_model()
    batch = shape_rows({"x": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)})
    assert count_savings(model, batch, (), make_costs(model, batch)) == Savings()


def test_ranks_of_pairs_save_their_products_and_not_those_of_the_base(tmp_path):
    """Each of three matrices has a pair [D, r], [r, H] or back, for every token."""
    save_checkpoint(tmp_path, "llama")
    config, rank, length = default.get_config(), 3, 9
    fields = {"kind": "lora", "base": str(tmp_path), "lora_rank": rank}
    config.update_from_flattened_dict(
        {f"model.{name}": value for name, value in fields.items()}
        | {"num_experts": EXPERTS}
    )
    row = {"tokens": jax.ShapeDtypeStruct((1, length), jnp.int32)}
    model, batch = lora.build(config, row, V, "cpu"), shape_rows(row)
    costs = make_costs(model, batch)
    found = count_savings(model, batch, model.units, costs)
    hidden = lora.read_architecture(tmp_path).hidden_width
    layers = len(shape_params(model)[0]["gate"])
    pairs = layers * 3 * 2 * length * rank * (WIDTH + hidden)
    share = sum(value for _, value in found.experts)
    np.testing.assert_allclose(share * costs.expert_flops, 3 * pairs, rtol=1e-6)
    assert share < 0.8 and found.stem == ()
    masks = {each.name: jnp.array([True, True, False]) for each in model.units}
    saved = save_flops(masks, list(model.units), found.experts)
    np.testing.assert_allclose(saved, share / 3, rtol=1e-5)
