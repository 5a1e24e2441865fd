"""Random scores, each client's drawn from its own id, and exploration with them."""

import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, Evidence, Hyper


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
    """Scores [C, E]; each row is uniform with probability `fitness.exploration`."""
    exploration = hyper.fitness.exploration

    def draw() -> Array:
        drawn = uniform_scores(key, evidence.client, 1 + scores.shape[1])
        explorer = drawn[:, :1] < exploration
        return jnp.where(explorer, drawn[:, 1:], scores)

    # For large populations drawing costs more than deciding.
    return jax.lax.cond(exploration > 0, draw, lambda: scores)
