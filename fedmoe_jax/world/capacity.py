"""What the clients' devices can do, and how many experts each can hold."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.costs import TRAINING_COPIES, Costs
from fedmoe_jax.types import Array, Devices, UserError


class Tier(NamedTuple):
    """The medians of one kind of device.

    Attributes:
      memory: bytes free for training.
      flops: floating-point operations per second, sustained in training.
      upload: bytes per second.
      download: bytes per second.
    """

    memory: float
    flops: float
    upload: float
    download: float


# Round numbers of the order of magnitude of consumer devices, not measurements.
TIERS = {
    # 4 GB; 0.1 TFLOP/s; mobile network of 40 and 120 Mbit/s
    "phone": Tier(memory=4e9, flops=1e11, upload=5e6, download=15e6),
    # 8 GB; 1 TFLOP/s; home network of 120 and 400 Mbit/s
    "laptop": Tier(memory=8e9, flops=1e12, upload=15e6, download=50e6),
    # 24 GB; 10 TFLOP/s; wired network of 1 Gbit/s both ways
    "workstation": Tier(memory=24e9, flops=1e13, upload=125e6, download=125e6),
}


def draw_devices(
    rng: np.random.Generator,
    num_clients: int,
    tiers: tuple[str, ...],
    shares: tuple[float, ...],
    spread: float,
) -> Devices:
    """Draws every client's device: a tier, and log-normal values about its medians.

    Args:
      rng: NumPy generator, advanced.
      num_clients: N.
      tiers: names from `TIERS`.
      shares: share >= 0 of the population in each tier, summing to 1; the counts are
        exact up to rounding (largest remainder), only who is in which tier is drawn.
      spread: standard deviation >= 0 of the logarithm of each value within a tier.

    Returns:
      Devices with [N] float32 leaves; the four values of a client are independent
      given its tier.

    Raises:
      UserError: on unknown tiers, shares that do not fit or a negative spread.
    """
    _check(tiers, shares, spread)
    tier = rng.permutation(np.repeat(np.arange(len(tiers)), _deal(num_clients, shares)))
    medians = np.array([TIERS[name] for name in tiers])[tier]
    values = medians * np.exp(spread * rng.standard_normal(medians.shape))
    values = Tier(*values.astype(np.float32).T)
    return Devices(
        memory=jnp.asarray(values.memory),
        flops=jnp.asarray(values.flops),
        upload=jnp.asarray(values.upload),
        download=jnp.asarray(values.download),
        tier=jnp.asarray(tier, jnp.int32),
    )


def unlimited_device() -> Devices:
    """One device that can do everything at once, [1]."""
    endless = jnp.full(1, jnp.inf)
    return Devices(endless, endless, endless, endless, jnp.zeros(1, jnp.int32))


def _check(tiers: tuple[str, ...], shares: tuple[float, ...], spread: float) -> None:
    for name in tiers:
        if name not in TIERS:
            allowed = ", ".join(TIERS)
            raise UserError(
                f"devices.tiers has {name!r}, which is unknown; allowed: {allowed}"
            )
    if len(shares) != len(tiers):
        raise UserError(
            f"devices.shares={tuple(shares)} needs one share for each of the "
            f"{len(tiers)} devices.tiers"
        )
    numbers = all(isinstance(share, int | float) and share >= 0 for share in shares)
    if not numbers or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"devices.shares={tuple(shares)} is not allowed; shares are >= 0, sum to 1"
        )
    if not 0 <= spread < np.inf:
        raise UserError(f"devices.spread={spread} is not allowed; it is finite, >= 0")


def _deal(num_clients: int, shares: tuple[float, ...]) -> np.ndarray:
    """Whole numbers that sum to N, as near to the shares as possible."""
    exact = num_clients * np.asarray(shares) / np.sum(shares)
    # A share such as 0.29 of 100 is 28.999... in binary; it must not lose a client.
    counts = np.floor(exact + 1e-9).astype(int)
    rest = num_clients - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def true_capacity(
    devices: Devices,
    costs: Costs,
    *,
    buffer: Array,
    examples: Array,
    deadline: float,
    communication_share: float,
    max_capacity: int,
) -> Array:
    """How many experts each device can hold: the least of three limits.

    Stem, gate and head are paid for first; what is left is divided by the cost of one
    expert. Memory: `TRAINING_COPIES` of the parameters must fit. Network: down and up
    within `communication_share` of the deadline. Compute: every held expert on every
    example within the other part of it. The fixed split avoids a limit that depends
    on the other. A device too weak for one expert still gets one, and is late.

    Args:
      devices: leaves [N].
      costs: scaled, what the devices feel.
      buffer: [] float32 in [0, 1), share of every resource kept in reserve.
      examples: [] or [N] float32, examples a client trains in a round, > 0.
      deadline: seconds a round may take, > 0.
      communication_share: share in (0, 1) of the deadline for the network.
      max_capacity: the most experts that any client has room for.

    Returns:
      [N] int32 in [1, K].
    """
    chex.assert_equal_shape([devices.memory, devices.flops, devices.upload])
    usable = 1 - buffer
    shared_bytes = costs.shared_bytes + costs.gate_bytes
    copies = usable * devices.memory / TRAINING_COPIES
    by_memory = (copies - shared_bytes) / costs.expert_bytes
    seconds_per_byte = (1 / devices.download + 1 / devices.upload) / usable
    travelling = communication_share * deadline / seconds_per_byte
    by_network = (travelling - shared_bytes) / costs.expert_bytes
    work = (1 - communication_share) * deadline * usable * devices.flops / examples
    by_compute = (work - costs.shared_flops) / costs.expert_flops
    least = jnp.minimum(jnp.minimum(by_memory, by_network), by_compute)
    return jnp.clip(jnp.floor(least), 1, max_capacity).astype(jnp.int32)
