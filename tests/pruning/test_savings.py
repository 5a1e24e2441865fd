"""FLOPs that units save: those of narrower models, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, V, save_checkpoint
from checkpoints import D as WIDTH
from factories import make_image_model

from configs import default
from fedmoe_jax.base import Units
from fedmoe_jax.models import lora
from fedmoe_jax.models.flops import count_forward_flops, shape_params
from fedmoe_jax.models.products import count_products
from fedmoe_jax.pruning.savings import Savings, count_savings, save_flops
from fedmoe_jax.pruning.units import of_part
from fedmoe_jax.tasks.batches import BatchShapes
from fedmoe_jax.world.costs import Costs


def shape_rows(row):
    leaves, tree = jax.tree.flatten(row)
    return BatchShapes(tuple(leaves), tree)


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


@pytest.mark.parametrize(
    ("stem", "expert"),
    [("mlp", "mlp"), ("cnn", "conv"), ("simple_cnn", "dense"), ("lenet", "mlp")],
)
def test_half_the_units_save_what_a_model_of_half_the_width_does(stem, expert):
    shape = (8, 8, 1) if stem == "mlp" else (16, 16, 1)
    model, narrow = (
        make_image_model(stem, expert, shape, stem_width=w) for w in (6, 3)
    )
    batch = shape_rows({"x": jax.ShapeDtypeStruct((1, *shape), jnp.float32)})
    costs = make_costs(model, batch)
    found = count_savings(model, batch, model.units, costs)

    def count_stem(model):
        params = shape_params(model)[0]["stem"]
        example = batch.of(1)
        products = count_products(model.parts.stem, params, example, None)
        return sum(jax.tree.leaves(products))

    masks = {
        each.name: jnp.arange(each.count) < each.count / 2
        for each in of_part(model.units, "stem")
    }
    saved = save_flops(masks, of_part(model.units, "stem"), found.stem)
    expected = 3 * (count_stem(model) - count_stem(narrow))
    np.testing.assert_allclose(saved * costs.shared_flops, expected, rtol=1e-6)


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
