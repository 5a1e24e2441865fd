"""The largest floor of participation that a schedule could meet: on the host.

It is a necessary condition, by what is known before a run: how often each client can be
reached, how often it drops out, how large cohorts are, whether its memory has room for
the network with one expert and whether its round with that one, over wires of a known
speed, or else its training alone, ends before a deadline that drops updates. Links that
fail, further experts, memory that others take and clients that are still at work for
the last round lose further updates. Where a floor is not met, its longest queue grows
in proportion to the rounds.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.options import UserError
from fedmoe_jax.pruning.scores import NONE
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.types import Array, Devices
from fedmoe_jax.world.availability import has_reach, reach_share
from fedmoe_jax.world.capacity_bias import count_stronger, has_bias
from fedmoe_jax.world.costs import Costs, Traffic, client_seconds, fits_memory

HOURS = 10_000  # of a day, over which its mean is taken
DIGITS = 3  # of a floor that is named, which is rounded down
ROUNDING = 1e-6  # of the floor that just suffices


def count_reach(config: ConfigDict, devices: Devices) -> np.ndarray:
    """The share of the rounds in which each client can be reached: [N] float64.

    The mean over a day, times what the capacity of its device leaves.

    Args:
      config: gives `availability`.
      devices: leaves [N].
    """
    numbers, share = config.availability, 1.0
    if has_reach(config):
        hour = jnp.linspace(0, 1, HOURS, endpoint=False)
        law: Any = dict(share=numbers.share, swing=numbers.swing, day=numbers.day)
        share = float(np.mean(reach_share(jnp.int32(0), hour, **law)))
    weak = np.zeros(len(devices.memory))
    if has_bias(config):
        weak = np.asarray(count_stronger(devices.memory), float)
    return share * (1 - numbers.capacity_bias * weak)


def find_largest(
    reach: np.ndarray, cohort_size: int, dropout: float, informed: bool
) -> float:
    """The largest floor that passes for feasible, in [0, 1].

    A client counts in no more rounds than it can be reached in, and all of them in no
    more than there are places. Where the server does not know who can be reached, a
    client that is there in the share a of the rounds takes 1 / a places each time that
    it is met, as draws do not follow its spells: all that they take are C.

    Args:
      reach: [N] in [0, 1], share of the rounds in which each client can be reached.
      cohort_size: C.
      dropout: chance of a client that is reached to be lost, in [0, 1].
      informed: whether cohorts are drawn among clients that can be reached.
    """
    least = float(reach.min())
    if least <= 0:
        return 0.0
    places = len(reach) if informed else float((1 / reach).sum())
    return (1 - dropout) * min(least, cohort_size / places)


def count_stuck(config: ConfigDict, devices: Devices, costs: Costs) -> int:
    """Clients that are lost in every round, as one whole expert exceeds their memory.

    0 where clients are not lost for that, or prune what they hold.
    """
    if config.devices.overload != "lose" or config.pruning.kind != NONE:
        return 0
    fits = fits_memory(costs, hold_one(devices), devices.memory)
    return int((~fits).sum())


def count_late(
    config: ConfigDict, devices: Devices, costs: Costs, examples: Array
) -> int:
    """Clients that are late in every round, with one expert, which stays with them.

    Where the speed of links varies they count by their training alone. 0 where late
    updates count, or clients prune what they hold.
    """
    if config.late.kind != "drop" or config.pruning.kind != NONE:
        return 0
    work = devices, costs, hold_one(devices), jnp.asarray(examples, jnp.float32)
    download, training, upload = client_seconds(*work).T
    varies = config.channel.kind != "wired" or config.bandwidth.spread > 0
    seconds = training if varies else download + training + upload
    return int((seconds > (1 + ROUNDING) * config.devices.deadline).sum())


def hold_one(devices: Devices) -> Traffic:
    """The least that a client may have to do: it trains one expert, and none travels.

    Args:
      devices: leaves [N].
    """
    one, none = jnp.ones(devices.memory.shape), jnp.zeros(devices.memory.shape)
    counts = dict.fromkeys(("sent", "received", "reported", "shown", "new"), none)
    return Traffic(held=one, trained=one, **counts)


def check_floor(
    config: ConfigDict, devices: Devices, costs: Costs, examples: Array
) -> None:
    """Checks that the floor of participation is not above what could be met.

    Args:
      config: as the strategy configures it.
      devices: leaves [N].
      costs: scaled, what the devices feel.
      examples: [N] that each client trains in a round, repeats included.

    Raises:
      UserError: it is, or there is nothing to choose as all clients take part anyway.
    """
    floor, numbers = config.fairness.floor, config.availability
    if not floor:
        return
    named = f"fairness.floor={floor} is not allowed"
    if config.cohort_size == config.num_clients:
        raise UserError(
            f"{named} with cohort_size=num_clients={config.num_clients}, as a floor "
            "chooses cohorts and all clients take part anyway; allowed: 0, or a "
            "smaller cohort_size"
        )
    if stuck := count_stuck(config, devices, costs):
        raise UserError(
            f"{named}: {stuck} of {config.num_clients} clients have no memory for the "
            f"network with one expert at devices.model_scale="
            f"{config.devices.model_scale:g} and are lost in every round; allowed: 0"
        )
    if behind := count_late(config, devices, costs, examples):
        raise UserError(
            f"{named}: {behind} of {config.num_clients} clients cannot train the "
            "network with one expert within devices.deadline="
            f"{config.devices.deadline:g} at devices.model_scale="
            f"{config.devices.model_scale:g}, and late.kind='drop' loses them in every "
            "round; allowed: 0"
        )
    informed, reach = numbers.sampling == "reachable", count_reach(config, devices)
    if find_strategy(config.strategy).silent and not informed:
        reach = np.ones_like(reach)  # clients need no link
    most = find_largest(reach, config.cohort_size, numbers.dropout, informed)
    if floor > most * (1 + ROUNDING):
        raise UserError(
            f"{named}: cohorts of {config.cohort_size} of {config.num_clients} "
            f"clients, of which the rarest can be reached in {reach.min():.3g} of the "
            f"rounds, with availability.dropout={numbers.dropout}, cannot meet it; "
            f"allowed: 0 to {round_down(most)}"
        )


def round_down(value: float) -> float:
    """A number >= 0 cut to `DIGITS` digits, so that it is no larger."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - DIGITS + 1)
    return float(f"{math.floor(value / unit * (1 + ROUNDING)) * unit:.{DIGITS}g}")
