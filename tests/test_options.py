"""Ranges, records by group and the fields of a measure."""

import math

import jax
import numpy as np
import pytest

from fedmoe_jax.options import (
    MEAN,
    Measure,
    Range,
    describe_kind,
    fits_kind,
    group,
    replace,
    show,
)


def test_range_spells_its_ends():
    rules = (Range(1), Range(0, open_low=True), Range(0, 1), Range(0, 1, True, True))
    assert [str(rule) for rule in rules] == [">= 1", "> 0", "[0, 1]", "(0, 1)"]
    assert str(Range(0, 2**31 - 1)) == "[0, 2147483647]"


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(1), (1, 1.5, 2**31), (0, 1 - 1e-6)),
        (Range(0, 1), (0, 0.5, 1, np.float32(1)), (-1e-30, 1.001, True, np.True_)),
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


@pytest.mark.parametrize(
    ("default", "kind", "inside", "outside"),
    [
        (True, "True, False", (True, False), (1, 0, "True", None, np.True_)),
        (
            3,
            "whole numbers",
            (0, -(2**31), 2**31 - 1, np.int64(7)),
            (2**31, 1.0, True, "1", None, (1,), [1], np.float32(1)),
        ),
        (
            0.5,
            "numbers",
            (0, 1, -2.5, np.float32(0.5), np.int32(1)),
            (math.nan, math.inf, 1e300, False, "1", None, (0.5,)),
        ),
        ("a", "text", ("", "b"), (1, None, b"a", ("a",))),
        (("a", "b"), "tuples such as ('a', 'b')", ((), ("c",)), ("ab", ["a"], (1,))),
        ((0.5,), "tuples such as (0.5,)", ((1, 0.25),), ((1, None), (True,), 0.5)),
        ((), "tuples", ((), ("a", 1)), ("a", None, [])),
    ],
)
def test_a_value_is_of_the_kind_of_the_default(default, kind, inside, outside):
    assert describe_kind(default) == kind
    assert all(fits_kind(value, default) for value in inside)
    assert not any(fits_kind(value, default) for value in outside)


def test_show_is_one_line_of_bearable_length():
    assert show("a\nb") == repr("a\nb") and show(0.5) == "0.5"
    assert show(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert len(show("x" * 9000)) < 600
    assert show(10**5000) == "a number of thousands of digits"


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
