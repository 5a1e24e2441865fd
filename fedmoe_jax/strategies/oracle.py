"""An assignment that knows each client's group: what finding it may be worth.

Not a published system, but the reference for those that look for groups of clients. It
is no bound: beside the first expert nothing is chosen.
"""

from typing import Any

import jax
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
    """`stratum` [N] int32, each client's main one or group; known from round 0 on."""
    return {"stratum": jnp.zeros(sizes.num_clients, jnp.int32)}


def look(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    sizes: Sizes,
    **static: Any,
) -> tuple[SimState, PyTree]:
    """The stage before round 0: the main stratum of every client, the first of equals.

    Where there are groups it is the client's group. Where the data drift it stays what
    it was.
    """
    mix = federation.label_mix
    if sizes.num_groups > 1:
        mix = mix_groups(mix, sizes.num_groups)
    main = mix.argmax(axis=1).astype(jnp.int32)
    own = jax.tree.map(
        lambda leaf: jnp.broadcast_to(main, leaf.shape), state.align.strategy
    )
    align = state.align.replace(strategy=own)
    return state.replace(align=align), federation.frozen


def find_own(evidence: Evidence, num_experts: int) -> Array:
    """The expert of each client's group or stratum, mod E: [C] int32."""
    return evidence.state["stratum"][evidence.client] % num_experts


def prefer_own(evidence: Evidence, hyper: Hyper) -> Array:
    """The affinity [C, E]: 1 of the expert of the client's stratum, 0 of others."""
    num_experts = evidence.fitness.shape[1]
    return jax.nn.one_hot(find_own(evidence, num_experts), num_experts)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """First the expert of the client's stratum, others at random, afresh each round."""
    own = find_own(evidence, sizes.num_experts)
    scores = uniform_scores(key, evidence.client, sizes.num_experts)
    scores = jnp.where(jnp.arange(sizes.num_experts)[None] == own[:, None], 2.0, scores)
    return top_k(scores, evidence.capacity, sizes.max_held)


ORACLE = Strategy(
    assign=assign,
    affinity=prefer_own,
    about=(
        "Gives each client the expert of its group, else of its main stratum (label, "
        "language), and others at random: the reference for strategies that look for "
        "groups."
    ),
    needs="every client's group or main stratum, which no server knows",
    init=init,
    stages=((0, look),),
)
