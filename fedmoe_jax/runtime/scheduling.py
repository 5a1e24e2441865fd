"""The device of each client: devices end together, though clients are ragged.

Clients vmapped in one chunk all run as long as the longest of them, and a round lasts
as long as the busiest device. So clients are sorted by their number of local steps,
cut into chunks of similar clients, and each chunk goes to the least busy device.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.types import Array


def chunk_size(cohort_size: int, num_devices: int, client_chunk: int) -> int:
    """Clients vmapped at once on a device, at most its share of the cohort."""
    return min(client_chunk, -(-cohort_size // num_devices))


def schedule(steps: Array | np.ndarray, num_devices: int, chunk: int) -> Array:
    """Positions in the cohort, by device and chunk.

    Clients are walked from most to fewest steps, D chunks at a time, and of each such
    hand the largest chunk goes to the device that has least to do. Every device gets
    the same number of chunks; with equal steps the cohort keeps its order.

    Args:
      steps: [C] int32, local steps of every cohort client.
      num_devices: D.
      chunk: clients vmapped at once.

    Returns:
      [D, G, chunk] int32, every position in [0, C) once; the others, from C on, pad.
    """
    count = steps.shape[0]
    padded = jnp.pad(steps, (0, -count % (num_devices * chunk)))
    order = jnp.argsort(-padded, stable=True).astype(jnp.int32)
    hands = order.reshape(-1, num_devices, chunk)  # [G, D, chunk]
    longest = padded[hands].max(-1)

    def schedule_hand(busy: Array, hand: tuple) -> tuple[Array, Array]:
        positions, work = hand
        device = jnp.argsort(busy, stable=True)  # least busy first
        return busy.at[device].add(work), positions[jnp.argsort(device)]

    busy = jnp.zeros(num_devices, steps.dtype)
    return jax.lax.scan(schedule_hand, busy, (hands, longest))[1].swapaxes(0, 1)


def wasted_share(steps: Array | np.ndarray, num_devices: int, chunk: int) -> Array:
    """Share in [0, 1) of the devices' time in which they wait or compute for nothing.

    Counted in local steps: what the clients need, against what the devices could do
    while the busiest of them works.

    Args:
      steps: [C] int32, local steps >= 1 of every cohort client.
      num_devices: D.
      chunk: clients vmapped at once.

    Returns:
      [] float32.
    """
    scheduled = schedule(steps, num_devices, chunk)
    padded = jnp.pad(steps, (0, scheduled.size - steps.shape[0]))
    busiest = padded[scheduled].max(-1).sum(-1).max()
    return 1.0 - steps.sum() / (busiest * num_devices * chunk)
