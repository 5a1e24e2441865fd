"""Masks in the params: leaves, gradients, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import assert_same, draw, fill, make_image_model
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.base import Units
from fedmoe_jax.models import lora, transformer
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.pruning.units import (
    count_entries,
    gather,
    keep_params,
    multiply_parts,
    share_experts,
    spread,
    sum_units,
    zero_keep,
)

G, K = 1, 2


def image_model(stem, expert):
    shape = (16, 16, 1) if stem in ("lenet", "cnn", "simple_cnn", "resnet8") else None
    return make_image_model(stem, expert, shape or (8, 8, 1), stem_width=6)


def submodel_of(model, seed=0):
    """Random params of a client that holds the first K experts."""
    params = fill(shape_params(model)[0], seed)
    experts = jax.tree.map(lambda leaf: leaf[:K], params["experts"])
    return params | {"experts": experts}


def masks_of(model, seed=0):
    """Random masks, and no layer without a unit."""
    rng, masks = np.random.default_rng(seed), {}
    for each in model.units:
        rows = (G, K) if each.part == "experts" else ()
        mask = rng.random((*rows, each.count)) < 0.5
        mask[..., 0] = True
        masks[each.name] = jnp.asarray(mask)
    return masks


@pytest.mark.slow
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1))
def test_spread_is_undone_by_gather(count, repeats, axis):
    values = draw(2, count)
    shape = [2, 3, 3]
    shape[1 + axis] = count * repeats
    factor = spread(values, tuple(shape), axis)
    leaf = jnp.broadcast_to(factor, shape)
    np.testing.assert_allclose(
        gather(leaf, count, 1, axis), 3 * repeats * values, rtol=1e-6
    )


def test_spread_gives_unit_j_the_places_j_and_j_plus_n():
    np.testing.assert_array_equal(
        spread(jnp.array([1.0, 2.0]), (5, 4), 1), [[1, 2, 1, 2]]
    )


def test_keep_params_of_an_mlp_expert_is_the_network_without_the_units():
    """NumPy's network with the units cut out gives the same outputs."""
    model = make_image_model("mlp", "mlp")
    params = submodel_of(model)
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    keep = keep_params({"expert": jnp.tile(mask, (G, K, 1))}, params, model.units[1:])
    (pruned,) = multiply_parts(params, keep)["experts"].values()
    features = np.asarray(draw(5, 8))
    for k in range(K):
        one = jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), params["experts"])
        first, second = one["moe"]["Dense_1"], one["moe"]["Dense_0"]
        hidden = features @ first["kernel"][:, mask] + first["bias"][mask]
        cut = np.maximum(hidden, 0) @ second["kernel"][mask] + second["bias"]
        own = jax.tree.map(lambda leaf, k=k: leaf[k], pruned)
        np.testing.assert_allclose(
            model.parts.expert(own, features, None), cut, rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["mlp", "cnn", "simple_cnn", "lenet"])
def test_keep_params_silences_pruned_features_of_a_stem(stem):
    model = image_model(stem, "mlp")
    size = 8 if stem == "mlp" else 16
    params, masks = submodel_of(model), masks_of(model)
    keep = keep_params(masks, params, model.units)
    images = {"x": draw(3, size, size, 1)}
    own = multiply_parts(params, keep)["stem"]
    features = model.parts.stem(own, images, None)
    last = [each for each in model.units if each.part == "stem"][-1]
    mask = masks[last.name]
    assert 0 < mask.sum() < last.count
    np.testing.assert_array_equal(features[..., ~mask], 0)
    assert bool(
        (
            jnp.abs(features[..., mask]).max(axis=(0, *range(1, features.ndim - 1))) > 0
        ).any()
    )


@pytest.mark.slow
def test_keep_params_of_a_convolutional_expert_silences_its_channels():
    model = image_model("cnn", "conv")
    params, masks = submodel_of(model), masks_of(model)
    keep = keep_params(masks, params, model.units)
    (experts,) = multiply_parts(params, keep)["experts"].values()
    features = draw(3, 2, 2, 12)
    for k in range(K):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], experts)
        dead = ~masks["expert"][0, k]  # one place is left of each channel
        kernel = one["Dense_0"]["kernel"] + dead[:, None] * 5.0
        noise = one | {"Dense_0": one["Dense_0"] | {"kernel": kernel}}
        np.testing.assert_allclose(
            model.parts.expert(noise, features, None),
            model.parts.expert(one, features, None),
            rtol=1e-5,
        )


def test_count_entries_by_hand():
    model = make_image_model("mlp", "mlp", stem_width=7, expert_width=5)
    units, rest = count_entries(shape_params(model)[0], model.units)
    stem, expert = units
    assert stem.entries == 64 + 1 + 2  # kernel, bias, scale and bias of the norm
    assert expert.entries == 7 + 1 + 6  # in, bias, out
    assert rest == 6  # the bias of the outputs


def test_count_entries_of_a_leaf_between_layers_counts_it_once():
    model = image_model("cnn", "mlp")
    params = shape_params(model)[0]
    units, _ = count_entries(params, model.units)
    stem = [each for each in units if each.part == "stem"]
    whole = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params["stem"]))
    assert sum(each.count * each.entries for each in stem) == whole


def test_share_experts_counts_what_is_in_no_unit():
    units = (Units("a", "experts", 4, (), 3.0), Units("s", "stem", 2, (), 9.0))
    masks = {"a": jnp.array([[[1, 1, 0, 0], [0, 0, 0, 0]]], bool), "s": jnp.ones(2)}
    np.testing.assert_allclose(
        share_experts(masks, units, 8.0), [[14 / 20, 8 / 20]], rtol=1e-6
    )


def test_zero_keep_has_the_shapes_of_the_servers_params():
    model = image_model("cnn", "mlp")
    params = fill(shape_params(model)[0])
    keep = zero_keep(params, model.units)
    assert set(keep) == {"stem", "experts"}
    for part, tree in keep.items():
        whole = jax.tree.map(lambda factor, leaf: factor + leaf, tree, params[part])
        assert_same(whole, params[part])
    assert zero_keep(params, ()) == {}


SHAPE = transformer.Shape(
    blocks=2,
    moe_every=1,
    width=8,
    heads=2,
    kv_heads=1,
    expert_width=6,
    dense_width=6,
    shared_width=0,
    num_experts=3,
    vocabulary=11,
    gate_input="token",
    tied=False,
    remat=False,
    scan=False,
    linked=False,
    platform="cpu",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"moe_every": 2}, {"shared_width": 4}]
)
def test_units_of_transformers_sum_over_all_their_entries(changes):
    shape = SHAPE._replace(**changes)
    model = transformer.build_model(shape)
    params = fill(shape_params(model)[0])
    ones = jax.tree.map(jnp.ones_like, params)
    units, rest = count_entries(params, model.units)
    assert rest == 0  # no biases
    for each in units:
        total = sum_units(ones, model.units)[each.name]
        assert total.shape[-1] == each.count
        np.testing.assert_array_equal(total, each.entries)


def test_units_of_pairs_are_their_ranks():
    shape = lora.Shape(*[None] * len(lora.Shape._fields))._replace(rank=3, fixed=False)
    assert [each.count for each in lora.list_units(shape)] == [3, 3, 3]
    fixed = lora.list_units(shape._replace(fixed=True))
    assert all(path[1] == "b" for each in fixed for path, _ in each.leaves)
