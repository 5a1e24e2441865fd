"""What the masks of a cohort cover, as metrics of a round."""

import jax.numpy as jnp

from fedmoe_jax.base import Units
from fedmoe_jax.pruning.units import of_part
from fedmoe_jax.types import Array


def count_holders(mask: Array, held: Array, counted: Array, num_experts: int) -> Array:
    """Clients that train each unit of the experts: [G, E, n] int32.

    Args:
      mask: [C, G, K, n] bool.
      held: [C, G, K] int32.
      counted: [C, G, K] bool, the slots that count.
      num_experts: E.
    """
    layer = jnp.arange(mask.shape[1])[None, :, None]
    empty = jnp.zeros((mask.shape[1], num_experts, mask.shape[3]), jnp.int32)
    return empty.at[layer, held].add((mask & counted[..., None]).astype(jnp.int32))


def measure_overlap(holders: Array, experts: Array) -> Array:
    """Jaccard's index of the masks of two clients with the same expert: [] in [0, 1].

    The units that both keep over those that either does, each summed over all pairs of
    holders and all experts: of h among m holders that keep a unit, h (h - 1) / 2 pairs
    both do, and m (m - 1) / 2 - (m - h) (m - h - 1) / 2 either. NaN without a pair.

    Args:
      holders: [..., n] int32, clients that keep each unit.
      experts: [...] int32, clients that hold each expert.
    """
    pairs = lambda count: count * (count - 1) / 2
    both = pairs(holders).sum()
    either = (pairs(experts[..., None]) - pairs(experts[..., None] - holders)).sum()
    return both / either


def measure_spread(shares: Array, slot: Array) -> Array:
    """[C] float32, standard deviation of the shares that each client keeps of experts.

    Args:
      shares: [C, G, K] float32 in [0, 1].
      slot: [C, G, K] bool, those that count; 0 without any.
    """
    mean = lambda values: (values * slot).sum((1, 2)) / jnp.maximum(slot.sum((1, 2)), 1)
    return jnp.sqrt(mean((shares - mean(shares)[:, None, None]) ** 2))


def measure_pruning(
    masks: dict[str, Array],
    held: Array,
    slot: Array,
    capacity: Array,
    arrived: Array,
    units: tuple[Units, ...],
    num_experts: int,
    max_capacity: int,
) -> dict[str, Array]:
    """The metrics of a round's masks.

    Args:
      masks: of the cohort, [C, n] of the stem's units, [C, G, K, n] of the experts'.
      held: [C, G, K] int32.
      slot: [C, G, K] bool.
      capacity: [C] int32, whole experts that each client has room for, from 0 on.
      arrived: [C] bool.
      units: of the program.
      num_experts: E.
      max_capacity: the most experts that any client has room for, K.

    Returns:
      `kept_share` [] of the units of held experts; `kept_spread` [], the standard
      deviation of these shares over a client's experts, mean over clients;
      `kept_by_capacity` [K + 1, layers], of clients with room for 0, 1, ... whole
      experts, layers being the stem's and then the MoE layers, NaN without a client;
      of the experts' units the fewest clients that an update came from,
      `least_coverage` [], among experts that any client trained, the mean,
      `mean_coverage` [], and `mask_overlap` [].
    """
    experts = [masks[each.name] for each in of_part(units, "experts")]
    joined = jnp.concatenate(experts, axis=-1)  # [C, G, K, n]
    slots = slot.sum(2)  # [C, G]
    shares = joined.mean(-1) * slot  # [C, G, K]
    of_expert = shares.sum(2) / jnp.maximum(slots, 1)
    stem = [masks[each.name].mean(-1) for each in of_part(units, "stem")]
    layers = jnp.stack([*stem, *of_expert.T], axis=-1)  # [C, layers]
    most = jnp.minimum(capacity, max_capacity)[None]
    room = jnp.arange(max_capacity + 1)[:, None] == most
    counted = slot & arrived[:, None, None]
    holders = count_holders(joined, held, counted, num_experts)
    whole = jnp.ones((*held.shape, 1), bool)
    of_experts = count_holders(whole, held, counted, num_experts)[..., 0]
    trained = of_experts > 0
    least = jnp.where(trained[..., None], holders, jnp.iinfo(jnp.int32).max)
    return {
        "kept_share": shares.sum() / jnp.maximum(slot.sum(), 1),
        "kept_spread": measure_spread(shares, slot).mean(),
        "kept_by_capacity": room @ layers / room.sum(1, keepdims=True),
        "least_coverage": jnp.where(trained.any(), least.min(), 0),
        "mean_coverage": holders.sum()
        / jnp.maximum(trained.sum() * joined.shape[-1], 1),
        "mask_overlap": measure_overlap(holders, of_experts),
    }
