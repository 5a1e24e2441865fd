"""Random assignment, the free baseline."""

from fedmoe_jax.align.explore import uniform_scores
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.base import Strategy
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds k_c experts drawn without replacement, afresh each round."""
    scores = uniform_scores(key, evidence.client, sizes.num_experts)
    return top_k(scores, evidence.capacity, sizes.max_held)


def assign_once(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
) -> Assignment:
    """Every client keeps the k_c experts that it drew when it first took part.

    Those held most often come first. So a client that can hold fewer for a while keeps
    some of its own, and has all of them again afterwards.
    """
    scores = uniform_scores(key, evidence.client, sizes.num_experts)
    return top_k(scores + evidence.times_held, evidence.capacity, sizes.max_held)


RANDOM = Strategy(
    assign=assign,
    about="Draws each client's experts uniformly every round and uses no feedback.",
)

FIXED_RANDOM = Strategy(
    assign=assign_once,
    about=(
        "Draws each client's experts uniformly once and keeps them; uses no feedback."
    ),
)
