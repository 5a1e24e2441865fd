"""What the server believes about the clients' devices (paper III-B-3)."""

from fedmoe_jax.costs import Costs
from fedmoe_jax.types import Array, Devices, Hyper
from fedmoe_jax.world.capacity import true_capacity


def profile(
    devices: Devices,
    costs: Costs,
    hyper: Hyper,
    *,
    examples: Array,
    deadline: float,
    communication_share: float,
    max_capacity: int,
) -> Array:
    """Capacity in experts of every client, from honest reports less a safety margin.

    Args:
      devices: leaves [N].
      costs: scaled, what the devices feel.
      hyper: gives `buffer`, the share of every resource kept in reserve.
      examples: [] or [N] float32, examples a client trains in a round, > 0.
      deadline: seconds a round may take, > 0.
      communication_share: share in (0, 1) of the deadline for the network.
      max_capacity: the most experts that any client has room for.

    Returns:
      [N] int32 in [1, K].
    """
    return true_capacity(
        devices,
        costs,
        buffer=hyper.buffer,
        examples=examples,
        deadline=deadline,
        communication_share=communication_share,
        max_capacity=max_capacity,
    )
