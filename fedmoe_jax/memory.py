"""How much memory a run will need, estimated before anything is compiled."""

import math

from fedmoe_jax.cohort import chunk_size
from fedmoe_jax.costs import count_bytes
from fedmoe_jax.setup import Setup
from fedmoe_jax.types import Federation, SimState, UserError

# One client holds its sub-model, the received copy, gradients, momentum (two moments
# for adam) and the delta at once.
CLIENT_COPIES = 6

GIGABYTE = 1e9


def estimate_memory(
    state: SimState, federation: Federation, setup: Setup, activation_bytes: float
) -> dict[str, float]:
    """Bytes over all devices of the simulation, by what needs them.

    Args:
      state: the state, or its shapes.
      federation: the federation, or host arrays of the same shapes.
      setup: the static parts.
      activation_bytes: activations of one example, forward and backward.
    """
    sizes, devices = setup.sizes, setup.mesh.size
    submodel = (
        setup.costs.shared_bytes
        + setup.costs.gate_bytes
        + sizes.max_held * setup.costs.expert_bytes
    )
    chunk = chunk_size(sizes.cohort_size, devices, setup.rules.client_chunk)
    activations = sizes.batch_size * activation_bytes
    return {
        "data": devices * count_bytes(federation),
        # the donated state, its successor and the running sums
        "state": devices * (2 * count_bytes(state) + count_bytes(state.params)),
        "clients": devices * chunk * (CLIENT_COPIES * submodel + activations),
    }


def check_memory(parts: dict[str, float], limit_gb: float) -> None:
    """Refuses a run whose estimate is beyond the limit.

    Raises:
      UserError: with the numbers of every part.
    """
    total = sum(parts.values()) / GIGABYTE
    if total > limit_gb:
        detail = " + ".join(f"{name} {b / GIGABYTE:.2f}" for name, b in parts.items())
        raise UserError(
            f"run.memory_limit_gb={limit_gb:g} is too low: this run needs about "
            f"{total:.2f} GB ({detail}); allowed: at least {math.ceil(total)}, or make "
            "the model, the data, num_clients or run.client_chunk smaller"
        )
