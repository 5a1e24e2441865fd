"""The participation of clients so far, and the last round in detail."""

import jax.numpy as jnp
from flax import struct

from fedmoe_jax.types import Array, Sizes
from fedmoe_jax.world.outcome import Outcome


class Participation(struct.PyTreeNode):
    """The participation of clients so far, and the last round in detail.

    Attributes:
      rounds: [N] int32, rounds in which the client's update counted.
      equipped: [N] bool, clients that have been sent all that they were to be sent.
      capacity: [N] int32, experts up to E that its device could truly hold in the last
        round, without any margin.
      client: [C] int32, the last cohort.
      outcome: [C], what became of it.
    """

    rounds: Array
    equipped: Array
    capacity: Array
    client: Array
    outcome: Outcome


def init_participation(sizes: Sizes) -> Participation:
    """The participation before the first round."""
    clients, cohort = sizes.num_clients, sizes.cohort_size
    return Participation(
        rounds=jnp.zeros(clients, jnp.int32),
        equipped=jnp.zeros(clients, bool),
        capacity=jnp.zeros(clients, jnp.int32),
        client=jnp.zeros(cohort, jnp.int32),
        outcome=Outcome(
            code=jnp.zeros(cohort, jnp.int32),
            phases=jnp.zeros((cohort, 3)),
            spent=jnp.zeros((cohort, 3)),
        ),
    )


def record(
    participation: Participation, cohort: Array, capacity: Array, outcome: Outcome
) -> Participation:
    """The participation after a round; `capacity` [N] is the truth of the round."""
    took_part = outcome.arrived.astype(jnp.int32)
    return Participation(
        rounds=participation.rounds.at[cohort].add(took_part),
        equipped=participation.equipped.at[cohort].max(outcome.received),
        capacity=capacity,
        client=cohort,
        outcome=outcome,
    )


def jain(values: Array) -> Array:
    """Jain's index `(sum x)^2 / (n sum x^2)` in [1 / n, 1]; 1 for all zero."""
    values = values.astype(jnp.float32)
    squares = values.shape[0] * (values**2).sum()
    return jnp.where(squares > 0, values.sum() ** 2 / jnp.maximum(squares, 1e-9), 1.0)
