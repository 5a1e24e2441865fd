"""An assignment that knows each client's group: what finding it may be worth.

Not a published system, but the reference for those that look for groups of clients. It
is no bound: beside the experts of the client's group nothing is chosen.
"""

from typing import Any

import jax.numpy as jnp

from fedmoe_jax.align.explore import uniform_scores
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.base import Strategy
from fedmoe_jax.groups import mix_groups
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Federation,
    Hyper,
    PyTree,
    SimState,
    Sizes,
)


def init(sizes: Sizes) -> dict[str, Array]:
    """`own` [N, E] float32, 1 of the experts of the client's group, from round 0 on."""
    return {"own": jnp.zeros((sizes.num_clients, sizes.num_experts))}


def own_experts(group: Array, count: int, num_experts: int) -> Array:
    """1 of the experts of each client's group, else 0: [N, E] float32.

    Expert e is of group e mod `count`; where there are more groups than experts, group
    g has expert g mod E, with others.

    Args:
      group: [N] int32 in [0, count).
      count: of all groups.
      num_experts: E.
    """
    apart = min(count, num_experts)
    expert = jnp.arange(num_experts)[None] % apart
    return (expert == group[:, None] % apart).astype(jnp.float32)


def look(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    sizes: Sizes,
    **static: Any,
) -> tuple[SimState, PyTree]:
    """The stage before round 0: the experts of every client's group.

    Where the data have no groups a client's is its main stratum, the first of equals.
    Where the data drift it stays what it was.
    """
    mix = federation.label_mix
    if sizes.num_groups > 1:
        mix = mix_groups(mix, sizes.num_groups)
    own = own_experts(mix.argmax(axis=1), mix.shape[1], sizes.num_experts)
    before = state.align.strategy["own"]
    align = state.align.replace(strategy={"own": jnp.broadcast_to(own, before.shape)})
    return state.replace(align=align), federation.frozen


def prefer_own(evidence: Evidence, hyper: Hyper) -> Array:
    """The affinity [C, E]: 1 of the experts of the client's group, 0 of others."""
    return evidence.state["own"][evidence.client]


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """First the experts of the client's group in their order, then others at random."""
    own = evidence.state["own"][evidence.client]
    drawn = uniform_scores(key, evidence.client, sizes.num_experts)
    in_order = sizes.num_experts - jnp.arange(sizes.num_experts)
    scores = jnp.where(own > 0, 1.0 + in_order[None], drawn)
    return top_k(scores, evidence.capacity, sizes.max_held)


ORACLE = Strategy(
    assign=assign,
    affinity=prefer_own,
    about=(
        "Gives each client the experts of its group, else of its main stratum (label, "
        "language), then others at random: the reference for strategies that look for "
        "groups."
    ),
    needs="every client's group or main stratum, which no server knows",
    reference=True,
    init=init,
    stages=((0, look),),
)
