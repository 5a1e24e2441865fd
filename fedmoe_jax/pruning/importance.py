"""The importance of units: measured by clients, averaged by the server over rounds."""

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Units
from fedmoe_jax.pruning.units import of_part, sum_units, zero_units
from fedmoe_jax.types import Array, PyTree

UNKNOWN = -1.0  # importance of units on which nobody has reported


def measure_taylor(
    submodel: PyTree, grads: PyTree, units: tuple[Units, ...]
) -> dict[str, Array]:
    """`|w . dL/dw|` of every unit on ONE batch (first-order Taylor, arXiv 1906.10771).

    Args:
      submodel: of ONE client.
      grads: of the loss, likewise.
      units: of the model.

    Returns:
      See `units.sum_units`; what is pruned has 0.
    """
    products = jax.tree.map(jnp.multiply, submodel, grads)
    return jax.tree.map(jnp.abs, sum_units(products, units))


def measure_magnitude(params: PyTree, units: tuple[Units, ...]) -> dict[str, Array]:
    """The norm of every unit's weights, of all E experts: [n] and [G, E, n]."""
    squares = jax.tree.map(jnp.square, params)
    return jax.tree.map(jnp.sqrt, sum_units(squares, units))


def init_importance(params: PyTree, units: tuple[Units, ...]) -> dict[str, Array]:
    """Importance before the first round, `UNKNOWN`: [n] and [G, E, n]."""
    empty = zero_units(params, units)
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, UNKNOWN), empty)


def learn_importance(
    importance: dict[str, Array],
    reported: dict[str, Array],
    masks: dict[str, Array],
    held: Array,
    routed: Array,
    arrived: Array,
    rate: Array,
    units: tuple[Units, ...],
) -> dict[str, Array]:
    """The importance after a round: a moving average of the mean report on each unit.

    A report on an expert's unit is of a client's batches, in few of which the expert
    may answer; the mean is therefore of positions that are routed to it: the sum of the
    reports over the sum of `routed` of the clients that keep the unit. Else units that
    all keep would lose by those that hardly use the expert, to units that few keep. Of
    the stem's units all clients count alike. A unit that nobody has reported on keeps
    its own; the first report counts whole.

    Args:
      importance: [n] of the stem's units, [G, E, n] of the experts'.
      reported: of the cohort, [C, n] and [C, G, K, n].
      masks: likewise, the units that each client has trained.
      held: [C, G, K] int32.
      routed: [C, G, K] float32 in [0, 1], see `Feedback.routed`.
      arrived: [C] bool.
      rate: [] in (0, 1], weight of the round.
      units: of the model.
    """

    def sum_experts(values: Array, num_experts: int) -> Array:
        num_layers, count = values.shape[1], values.shape[3]
        layer = jnp.arange(num_layers)[None, :, None]
        empty = jnp.zeros((num_layers, num_experts, count))
        return empty.at[layer, held].add(values)

    stem = {each.name for each in of_part(units, "stem")}

    def learn(name: str) -> Array:
        old, mask = importance[name], masks[name].astype(jnp.float32)
        mask = mask * arrived.reshape((-1,) + (1,) * (mask.ndim - 1))
        # A broken update may report NaN.
        value = jnp.where(mask > 0, reported[name], 0.0)
        if name in stem:
            total, count = value.sum(0), mask.sum(0)
        else:
            mask = mask * jnp.where(mask > 0, routed[..., None], 0.0)
            value = jnp.where(mask > 0, value, 0.0)
            total, count = (sum_experts(v, old.shape[1]) for v in (value, mask))
        mean = total / jnp.where(count > 0, count, 1.0)
        weight = jnp.where(old >= 0, rate, 1.0)
        return jnp.where(count > 0, old + weight * (mean - old), old)

    return {name: learn(name) for name in importance}
