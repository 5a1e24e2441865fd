"""pFedMoE (arXiv 2402.01350): one shared and one local expert, mixed by a local gate.

From the published description, `h = a_g(x) h_shared + a_l(x) h_local` with a two-way
gate per example. There the clients' extractors differ and only the small shared one
travels; here all share the stem as in every system, and gate, head and local expert
stay.
"""

from ml_collections import ConfigDict

from fedmoe_jax.align.top_k import hold_all
from fedmoe_jax.base import Strategy


def configure(config: ConfigDict) -> ConfigDict:
    """Expert 0 is shared, expert 1 each client's own; both see every example."""
    config.num_experts = config.max_held = config.num_active = 2
    return config


PFEDMOE = Strategy(
    assign=hold_all,
    about=(
        "Mixes one expert that all share with one that each client keeps, by a gate of "
        "the client's own."
    ),
    needs="personal gates and heads, room for two experts on every client",
    configure=configure,
    personal=("gate", "experts", "head"),
    local_experts=1,
)
