"""The part of the model that one client holds: its own parts, and rows of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import fill, make_image_model

from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.submodel import held_mask, is_local, take_submodel

PARAMS = fill(shape_params(make_image_model())[0])
FIRST = "Dense_0"  # layer of an expert


def with_two_layers(params):
    """The params with a second MoE layer, all values of which are 10 more."""
    more = lambda part: jax.tree.map(lambda leaf: leaf + 10, params[part]["moe"])
    double = lambda part: {"moe_0": params[part]["moe"], "moe_1": more(part)}
    return params | {part: double(part) for part in ("gate", "experts")}


def test_take_submodel_gathers_rows():
    own = {"gate": {"moe": {"kernel": jnp.ones(2)}}}
    submodel = take_submodel(PARAMS, own, jnp.array([[3, 0, 3]]), 0)
    for name, leaf in submodel["experts"]["moe"][FIRST].items():
        whole = PARAMS["experts"]["moe"][FIRST][name]
        np.testing.assert_array_equal(leaf, whole[[3, 0, 3]])
    assert submodel["gate"] is own["gate"]
    assert submodel["stem"] is PARAMS["stem"] and submodel["head"] is PARAMS["head"]


def test_take_submodel_gathers_rows_of_each_layer():
    params = with_two_layers(PARAMS)
    held = [[4, 1], [0, 2]]
    submodel = take_submodel(params, {}, jnp.array(held), 0)
    for ids, (layer, found) in zip(held, submodel["experts"].items(), strict=True):
        for name, leaf in found[FIRST].items():
            whole = params["experts"][layer][FIRST][name]
            np.testing.assert_array_equal(leaf, whole[ids])
    assert submodel["gate"] is params["gate"]


def test_take_submodel_prefers_personal_parts_and_local_experts():
    own = jax.tree.map(lambda leaf: leaf + 100, PARAMS)
    held = jnp.array([[4, 1, 2]])  # of five experts, the last two are local
    submodel = take_submodel(PARAMS, own, held, 2)
    assert submodel["stem"] is own["stem"] and submodel["head"] is own["head"]
    assert submodel["gate"] is own["gate"]
    for name, leaf in submodel["experts"]["moe"][FIRST].items():
        server = PARAMS["experts"]["moe"][FIRST][name]
        np.testing.assert_array_equal(leaf[0], server[4] + 100)
        np.testing.assert_array_equal(leaf[1:], server[[1, 2]])


def test_take_submodel_leaves_out_frozen_parts():
    trained = {part: tree for part, tree in PARAMS.items() if part != "stem"}
    assert set(take_submodel(trained, {}, jnp.array([[0]]), 0)) == set(trained)


@pytest.mark.parametrize(
    ("held", "slot", "mask"),
    [
        ([3, 0, 3], [1, 1, 0], [1, 0, 0, 1]),
        ([2, 1, 2], [0, 1, 0], [0, 1, 0, 0]),  # a repeat that does not count
        ([2, 1, 2], [1, 1, 0], [0, 1, 1, 0]),
    ],
)
def test_held_mask_counts_valid_slots_only(held, slot, mask):
    found = held_mask(jnp.array(held), jnp.array(slot, bool), 4)
    assert found.astype(int).tolist() == mask


def test_is_local_is_true_of_the_last_experts():
    held = jnp.array([0, 2, 3, 4])
    assert is_local(held, 5, 2).tolist() == [False, False, True, True]
    assert not is_local(held, 5, 0).any() and is_local(held, 5, 2**31 - 1).all()
