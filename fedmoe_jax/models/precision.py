"""Models that compute in bfloat16, with parameters and all that is summed in float32.

What clients train, their optimisers, deltas, the server's sums and every score stay
float32: a step is smaller than the gap between two numbers of bfloat16, which has eight
bits. Inside the model, norms, softmax, gates and what is averaged over positions are
float32, too (selective precision, arXiv 2101.03961, section 2.4).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Model, Parts, Routing
from fedmoe_jax.types import Array, PyTree

DTYPES = ("float32", "bfloat16")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(axes: str, left: Array, right: Array) -> Array:
    """`jnp.einsum` whose sums and result are float32, whatever it multiplies.

    Its gradients are products in the operands' own dtype. Those of JAX would be float32
    ones, which take an accelerator many times as long as bfloat16.

    Args:
      axes: of both operands and the result.
      left: any float.
      right: of the same dtype.
    """
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _einsum_forward(
    axes: str, left: Array, right: Array
) -> tuple[Array, tuple[Array, Array]]:
    return einsum_float32(axes, left, right), (left, right)


def _einsum_backward(
    axes: str, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    _, pull = jax.vjp(functools.partial(jnp.einsum, axes), *saved)
    return pull(grad.astype(saved[0].dtype))


einsum_float32.defvjp(_einsum_forward, _einsum_backward)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """A tree whose floats have `dtype`; other leaves stay."""

    def cast_leaf(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast_leaf, tree)


def apply_in(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    held: Array,
    slot: Array,
    route: Any,
    key: Array | None,
    *,
    model: Model,
    dtype: str,
) -> tuple[PyTree, Routing]:
    """`Model.apply` in `dtype`, but for the gates; outputs and routing are float32."""
    lower = functools.partial(cast, dtype=dtype)
    inputs = lower(params) | {"gate": params["gate"]}, lower(frozen), lower(batch)
    returned = model.apply(*inputs, held, slot, route, key)
    return cast(returned, jnp.float32)


def lower_parts(parts: Parts, dtype: str) -> Parts:
    """The parts in `dtype`, each of which casts what it gets; answers are float32."""

    def lower(part: Any) -> Any:
        return lambda *inputs: part(*cast(inputs[:2], dtype), *inputs[2:])

    return parts._replace(
        stem=lower(parts.stem),
        expert=lower(parts.expert),
        head=lambda *inputs: cast(lower(parts.head)(*inputs), jnp.float32),
        shared=parts.shared and lower(parts.shared),
    )


@functools.cache
def compute_in(model: Model, dtype: str) -> Model:
    """The model in one of `DTYPES`; equal arguments give the same functions."""
    if dtype == "float32":
        return model
    return model._replace(
        apply=functools.partial(apply_in, model=model, dtype=dtype),
        parts=model.parts and lower_parts(model.parts, dtype),
    )


def find_float32(model: Model) -> Model:
    """The model that `compute_in` has made this one of, or the model itself."""
    apply = model.apply
    made_here = isinstance(apply, functools.partial) and apply.func is apply_in
    return apply.keywords["model"] if made_here else model
