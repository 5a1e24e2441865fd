"""Greedy: every client takes the experts that fit it best."""

from fedmoe_jax.align.explore import explore
from fedmoe_jax.align.ties import top_k_by_lot
from fedmoe_jax.align.top_k import in_blocks
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Top k_c of the fitness (the paper's greedy baseline), usage ignored."""

    def decide(evidence: Evidence) -> Assignment:
        scores = explore(evidence.fitness, evidence, hyper, key)
        rest = evidence.capacity, sizes.max_held, evidence.client
        return top_k_by_lot(scores, *rest, key)

    return in_blocks(decide, evidence)


GREEDY = Strategy(
    assign=assign,
    about="Gives each client its fittest experts; needs the clients' feedback.",
    alone=True,
)
