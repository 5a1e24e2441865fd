"""FLOPs and activation bytes of a model, as XLA counts them."""

import functools

import jax
import jax.numpy as jnp

from fedmoe_jax.models.image_moe import Model, apply_experts
from fedmoe_jax.models.routing import gate_logits


@functools.cache
def count_forward_flops(
    model: Model, image_shape: tuple[int, int, int]
) -> tuple[float, float, float]:
    """FLOPs of one example forward, as XLA counts them.

    Returns:
      Of the stem; of stem, gate and head; of one expert.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    host = jax.local_devices(backend="cpu")[0]  # others cannot count before compiling

    def flops(function, *arguments) -> float:
        with jax.default_device(host):
            analysis = jax.jit(function).lower(*arguments).cost_analysis()
        return float(analysis.get("flops", 0.0))  # a flat stem has none

    features = jax.eval_shape(model.stem, params["stem"], image, None)
    expert = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
        params["experts"]["moe"],
    )
    output = jax.eval_shape(model.expert, expert, features, None)
    stem = flops(model.stem, params["stem"], image, None)
    shared = (
        stem
        + flops(gate_logits, params["gate"]["moe"], features)
        + flops(model.head, params["head"], output)
    )
    return stem, shared, flops(model.expert, expert, features, None)


@functools.cache
def count_activation_bytes(
    model: Model, image_shape: tuple[int, int, int], experts: int
) -> float:
    """Bytes of all intermediate values of one example, forward, through n experts."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = 9973  # a prime that no axis of the params has, so it marks activations
    image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    held = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((experts, *leaf.shape[1:]), leaf.dtype),
        params["experts"]["moe"],
    )

    def forward(stem, experts, x):
        return apply_experts(model, experts, model.stem(stem, x, None), None)

    jaxpr = jax.make_jaxpr(forward)(params["stem"], held, image)
    values = [var.aval for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars]
    marked = [value for value in values if batch in value.shape]
    return float(sum(value.size * value.dtype.itemsize for value in marked)) / batch
