"""Random assignment, the free baseline, and the exploration that others share."""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes, Strategy


def uniform_scores(key: Array, client: Array, count: int) -> Array:
    """Uniform scores in [0, 1), each client's drawn from its own id.

    Args:
      key: a JAX key, consumed.
      client: [C] int32, client ids.
      count: how many scores each client draws.

    Returns:
      [C, count] float32; a client's row does not depend on the rest of the cohort.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, client)
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def explore(scores: Array, evidence: Evidence, hyper: Hyper, key: Array) -> Array:
    """Scores [C, E], each row replaced by uniform ones at a chance of `exploration`."""

    def draw() -> Array:
        drawn = uniform_scores(key, evidence.client, 1 + scores.shape[1])
        explorer = drawn[:, :1] < hyper.exploration
        return jnp.where(explorer, drawn[:, 1:], scores)

    # For large populations drawing costs more than deciding.
    return jax.lax.cond(hyper.exploration > 0, draw, lambda: scores)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds k_c experts drawn without replacement, afresh each round."""
    scores = uniform_scores(key, evidence.client, sizes.num_experts)
    return top_k(scores, evidence.capacity, sizes.max_held)


def assign_once(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
) -> Assignment:
    """Every client keeps the k_c experts that it drew when it first took part."""
    scores = uniform_scores(key, evidence.client, sizes.num_experts)
    return top_k(scores + evidence.held, evidence.capacity, sizes.max_held)


RANDOM = Strategy(
    assign=assign,
    note="Draws each client's experts uniformly every round and uses no feedback.",
)

FIXED_RANDOM = Strategy(
    assign=assign_once,
    note="Draws each client's experts uniformly once and keeps them; uses no feedback.",
)
