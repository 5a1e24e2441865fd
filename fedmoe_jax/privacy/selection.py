"""Private selection: one-shot Gumbel top-k of the clients' fitness.

Strategies read `clip(fitness, 0, 1) + Gumbel * RANGE / epsilon`. The top k_c of one
row of it is the peeling exponential mechanism, k_c picks without replacement of
epsilon each (Durfee and Rogers, arXiv 1905.04273; differentialprivacy.org,
one-shot-top-k), each of them epsilon-bounded-range, which is epsilon^2 / 8 zCDP.

`RANGE` is the largest change of a difference of two scores of a client,
`sup_ij |(q_i - q'_i) - (q_j - q'_j)|`: 2 for scores in [0, 1] where the whole client is
replaced, this project's inference for fitness. The guarantee is of the client's own
held sets, given the models that it was sent, and only of strategies that are
`Strategy.alone`: others read the values of the noisy scores, or couple clients, and
have none.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, Hyper, Keys

SELECTION = 1601  # purpose, folded into the key of a round
RANGE = 2.0


def hide_fitness(fitness: Array, client: Array, hyper: Hyper, keys: Keys) -> Array:
    """Fitness of the cohort as strategies read it, [C, G, E] float32.

    A client's noise does not depend on the rest of the cohort.

    Args:
      fitness: [C, G, E] float32, clipped to [0, 1].
      client: [C] int32, client ids.
      hyper: gives `privacy.selection`, the epsilon of each pick, > 0.
      keys: of the round.
    """
    own = jax.vmap(jax.random.fold_in, (None, 0))(keys.of(SELECTION), client)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, fitness.shape[1:]))(own)
    return jnp.clip(fitness, 0.0, 1.0) + RANGE / hyper.privacy.selection * noise
