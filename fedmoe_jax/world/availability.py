"""Which clients take part in a round."""

import jax
import jax.numpy as jnp

from fedmoe_jax.types import Array, UserError


def sample_cohort(key: Array, num_clients: int, cohort_size: int) -> Array:
    """Draws the clients of one round uniformly, without replacement.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      cohort_size: C; with C = N everyone takes part and nothing is drawn.

    Returns:
      [C] int32 client ids in ascending order.

    Raises:
      UserError: if `cohort_size` is not in [1, num_clients].
    """
    if not 1 <= cohort_size <= num_clients:
        raise UserError(
            f"cohort_size={cohort_size} is not allowed; it lies in "
            f"[1, num_clients={num_clients}]"
        )
    if cohort_size == num_clients:
        return jnp.arange(num_clients, dtype=jnp.int32)
    chosen = jax.random.choice(key, num_clients, (cohort_size,), replace=False)
    return jnp.sort(chosen.astype(jnp.int32))
