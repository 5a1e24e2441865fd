"""Ranges, records by group and the fields of a measure."""

import math

import jax
import pytest

from fedmoe_jax.options import MEAN, Measure, Range, group, replace


def test_range_spells_its_ends():
    rules = (Range(1), Range(0, open_low=True), Range(0, 1), Range(0, 1, True, True))
    assert [str(rule) for rule in rules] == [">= 1", "> 0", "[0, 1]", "(0, 1)"]


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(1), (1, 1.5, 2**31), (0, 1 - 1e-6)),
        (Range(0, 1), (0, 0.5, 1, True), (-1e-30, 1.001)),
        (Range(0, 1, open_low=True), (1e-30, 1), (0, -0.0)),
        (Range(0, 1, open_high=True), (0, 0.999), (1,)),
    ],
)
def test_range_holds_what_lies_between_its_ends(allowed, inside, outside):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_range_holds_only_what_is_allowed_as_a_float32():
    assert 0.1 in Range(0.1)  # although its float32 is another number
    assert 1e-60 not in Range(0, open_low=True)
    assert 1 - 1e-12 not in Range(0, 1, open_high=True)
    for value in (math.nan, math.inf, 1e300, 10**400, "half", "1", None, (1,)):
        assert value not in Range(0)


def test_group_nests_dotted_fields():
    found = group({"b.y": 1, "seed": 3, "b.x": 2}, "Hyper")
    assert (found.seed, found.b.x, found.b.y) == (3, 2, 1)
    assert found._fields == ("b", "seed")  # sorted, as the order of a config is not


def test_group_of_equal_fields_is_one_type():
    one, other = (group({"b.x": x, "b.y": 0}, "Hyper") for x in (1, 2))
    assert type(one) is type(other) and type(one.b) is type(other.b)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(one) == hash(group({"b.y": 0, "b.x": 1}, "Hyper"))
    assert jax.tree.structure(one) != jax.tree.structure(group({"b.x": 1}, "Hyper"))


def test_replace_changes_fields_of_groups_and_leaves_the_rest():
    record = group({"b.x": 1, "b.y": 2, "seed": 3}, "Hyper")
    found = replace(record, b={"x": 10}, seed=4)
    assert (found.b.x, found.b.y, found.seed) == (10, 2, 4)
    assert (record.b.x, record.seed) == (1, 3)
    with pytest.raises(ValueError, match="z"):
        replace(record, b={"z": 0})


def test_measure_adds_up_its_fields():
    assert Measure("x", MEAN).fields == ("x",)
    assert Measure("x", MEAN, plus=("y", "z"), per=("w",)).fields == ("x", "y", "z")
