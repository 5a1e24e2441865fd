"""Hidden units of image models: the leaves that have a share of them."""

import pytest
from factories import make_image_model

from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.image_parts import EXPERTS, STEMS
from fedmoe_jax.models.image_units import list_expert_units, list_stem_units


def leaves_of(stem, expert):
    """Units, path and axis, and the leaf's shape, of every leaf with units."""
    size = 8 if stem in ("flat", "mlp") else 16
    model = make_image_model(stem, expert, (size, size, 1), stem_width=6)
    params = shape_params(model)[0]
    for each in model.units:
        tree = params[each.part]
        tree = tree["moe"] if each.part == "experts" else tree
        for path, axis in each.leaves:
            leaf = tree
            for name in path:
                leaf = leaf[name]
            yield each, leaf.shape[each.part == "experts" :], axis


@pytest.mark.parametrize(
    ("stem", "expert"),
    [(stem, "mlp") for stem in STEMS] + [("cnn", expert) for expert in EXPERTS],
)
def test_units_name_leaves_whose_axes_are_multiples(stem, expert):
    for units, shape, axis in leaves_of(stem, expert):
        assert shape[axis] % units.count == 0
        assert shape[axis] == units.count or axis == 0  # flattened positions


def test_list_stem_units_by_hand():
    counts = lambda stem: [each.count for each in list_stem_units(stem, 6)]
    assert counts("flat") == []
    assert counts("mlp") == [6]
    assert counts("cnn") == counts("simple_cnn") == [6, 12]
    assert counts("lenet") == [6, 16, 120]
    assert counts("resnet8") == [6, 12, 24]


def test_list_expert_units_are_the_width_of_an_expert():
    for expert in EXPERTS:
        (units,) = list_expert_units(expert, 5)
        assert (units.part, units.count) == ("experts", 5)
