"""The returns of a user's functions: forms, types and the lines that refuse them."""

import jax
import jax.numpy as jnp
import pytest

from fedmoe_jax.forms import check_form, check_type, describe_form
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Sizes


def test_describe_form_by_hand():
    tree = {"a": jnp.zeros((2, 3)), "b": (jnp.int32(1), 0.5)}
    assert describe_form(tree) == {"a": "float32[2, 3]", "b": ("int32[]", "float[]")}


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"seen": jnp.zeros(4, jnp.int32)}, r"'int32\[4\]'.*'float32\[4\]'"),
        ({"seen": jnp.zeros(3)}, r"'float32\[3\]'.*'float32\[4\]'"),
        ({"seen": 0.0}, r"'float\[\]'"),
        ({}, r"returns {}; allowed: {'seen'"),
    ],
)
def test_check_form_refuses_a_state_of_another_form(own, told):
    before = {"seen": jnp.zeros(4)}
    check_form("the strategy has an `update` that", before, before)
    with pytest.raises(UserError, match=told):
        check_form("the strategy has an `update` that", own, before)


def test_check_type_names_both_types():
    check_type("it", {}, dict)
    with pytest.raises(UserError, match="^it returns a value of type dict; .*: Sizes$"):
        check_type("it", {}, Sizes)


def test_check_type_calls_a_traced_array_an_array():
    with pytest.raises(UserError, match="^it returns a value of type Array; "):
        jax.eval_shape(lambda x: check_type("it", x, Sizes), jnp.zeros(3))
