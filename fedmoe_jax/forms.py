"""The returns of a user's functions, checked while they are traced."""

from typing import Any

import jax
import jax.numpy as jnp

from fedmoe_jax.options import UserError
from fedmoe_jax.types import PyTree


def describe_form(tree: PyTree) -> PyTree:
    """Dtype and shape of every leaf, as text: `float32[4]`."""
    form = lambda x: f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}"
    return jax.tree.map(form, tree)


def check_form(where: str, found: PyTree, state: PyTree) -> None:
    """Raises UserError unless a new state has the structure, dtypes and shapes of old.

    Args:
      where: the function that returned it, for the message.
      found: the new state.
      state: the old one.
    """
    forms = describe_form(found), describe_form(state)
    if forms[0] != forms[1]:
        raise UserError(
            f"{where} returns {forms[0]}; allowed: {forms[1]}, as its `init` returns"
        )


def check_type(where: str, found: Any, kind: type) -> None:
    """Raises UserError unless a record's function returns the record that is due."""
    if not isinstance(found, kind):
        name = "Array" if isinstance(found, jax.Array) else type(found).__name__
        raise UserError(
            f"{where} returns a value of type {name}; allowed: {kind.__name__}"
        )
