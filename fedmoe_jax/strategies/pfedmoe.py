"""pFedMoE (arXiv 2402.01350): one shared and one local expert, mixed by a local gate.

From the published description, `h = a_g(x) h_shared + a_l(x) h_local` with a two-way
gate per example. There the clients' extractors differ and only the small shared one
travels; here all share the stem as in every system, and gate, head and local expert
stay.
"""

import jax.numpy as jnp

from fedmoe_jax.rules import Rules
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes, Strategy


def resize(sizes: Sizes) -> Sizes:
    """Expert 0 is shared, expert 1 each client's own; both see every example."""
    return sizes._replace(num_experts=2, max_held=2, num_active=2)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Everyone holds both, whatever its capacity."""
    shape = (evidence.client.shape[0], 2)
    held = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), shape)
    return Assignment(held, jnp.ones(shape, bool))


def adapt(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """The last expert, the gate and the head stay with the clients."""
    return rules._replace(personal=("gate", "experts", "head"), local_experts=1)


PFEDMOE = Strategy(
    assign=assign,
    note=(
        "Mixes one expert that all share with one that each client keeps, by a gate of "
        "the client's own."
    ),
    needs="personal gates and heads, room for two experts on every client",
    resize=resize,
    adapt=adapt,
)
