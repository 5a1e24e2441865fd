"""The outcome of a client's round: its update counts, comes late or is lost.

Everything here is written for ONE client. Whatever becomes of its update, the client
has spent what it had spent by then.
"""

import jax.numpy as jnp
from flax import struct

from fedmoe_jax.measures import OUTCOMES
from fedmoe_jax.types import Array, Devices
from fedmoe_jax.world.costs import Costs, Traffic, client_seconds, fits_memory
from fedmoe_jax.world.step import Events

MERGED, STALE, DROPPED, UNREACHABLE, DROPOUT, MEMORY, OUTAGE, BROKEN = range(
    len(OUTCOMES)
)


class Conditions(struct.PyTreeNode):
    """Under which one client works (a leading C axis in a round).

    Attributes:
      client: [] int32, its id.
      device: leaves [], of this round.
      events: what the world has in store for it.
      traffic: leaves [], what it holds, trains and is sent; `sent` is known only when
        it has trained.
      examples: [] float32, examples that it trains.
    """

    client: Array
    device: Devices
    events: Events
    traffic: Traffic
    examples: Array


class Outcome(struct.PyTreeNode):
    """The outcome of one client's round (a leading C axis in a round).

    Attributes:
      code: [] int32, index into `OUTCOMES`.
      phases: [3] float32 seconds that download, training and upload would take.
      spent: [3] float32 in [0, 1], the share of each that took place.
    """

    code: Array
    phases: Array
    spent: Array

    @property
    def arrived(self) -> Array:
        """[] bool, whether the update and its feedback count, now or a round later."""
        return (self.code == MERGED) | (self.code == STALE)

    @property
    def received(self) -> Array:
        """[] bool, whether the client has received what it was sent."""
        # A client that began to train had received all, even if its link fails later.
        no_download = (self.code == OUTAGE) & (self.spent[..., 1] == 0)
        return (self.spent[..., 0] == 1) & ~no_download


def find_end(phases: Array, events: Events, fits: Array, finite: Array) -> tuple:
    """The end of the client's work, if nothing ends it from outside.

    Args:
      phases: [3] float32 seconds.
      events: of the client.
      fits: [] bool, whether its memory has room for what it holds.
      finite: [] bool, whether its update has only finite numbers.

    Returns:
      moment [] float32 seconds and code [] int32. A broken update is found when it has
      arrived.
    """
    received, trained, sent = jnp.cumsum(phases)
    progress = jnp.minimum(events.dropout, 1.0)
    ends = (  # whatever comes first in this list happens first
        (~events.reachable, 0.0, UNREACHABLE),
        (events.no_download, received, OUTAGE),
        (~fits, received, MEMORY),
        (events.dropout < 1, received + progress * (trained - received), DROPOUT),
        (events.no_upload, sent, OUTAGE),
        (~finite, sent, BROKEN),
    )
    moment, code = sent, jnp.int32(MERGED)
    for happens, when, what in reversed(ends):
        moment = jnp.where(happens, when, moment)
        code = jnp.where(happens, what, code)
    return moment, code


def judge_client(
    conditions: Conditions,
    sent: Array,
    finite: Array,
    *,
    costs: Costs,
    overload: bool,
    deadline: float,
    late: str,
) -> Outcome:
    """The outcome of ONE client's round.

    Args:
      conditions: under which it works.
      sent: [] float32, experts that it sends.
      finite: [] bool, whether its update has only finite numbers.
      costs: scaled, what the devices feel.
      overload: whether it is lost where it holds more than its memory.
      deadline: seconds.
      late: see `judge`.
    """
    device, traffic = conditions.device, conditions.traffic.replace(sent=sent)
    phases = client_seconds(device, costs, traffic, conditions.examples)
    fits = jnp.ones((), bool)
    if overload:
        fits = fits_memory(costs, traffic, device.memory)
    return judge(phases, conditions.events, fits, finite, deadline=deadline, late=late)


def judge(
    phases: Array,
    events: Events,
    fits: Array,
    finite: Array,
    *,
    deadline: float,
    late: str,
) -> Outcome:
    """The outcome of ONE client's round.

    Args:
      phases: [3] float32 seconds that download, training and upload take.
      events: of the client.
      fits: [] bool, whether its memory has room for what it holds.
      finite: [] bool, whether its update has only finite numbers.
      deadline: seconds.
      late: `wait` for clients that need longer, `drop` those still at work then, or
        take their updates as `stale` in the next round.
    """
    moment, code = find_end(phases, events, fits, finite)
    too_late = moment > deadline
    if late == "drop":
        code = jnp.where(too_late, DROPPED, code)
        moment = jnp.where(too_late, deadline, moment)
    if late == "stale":
        code = jnp.where(too_late & (code == MERGED), STALE, code)
    return Outcome(code, phases, spend(phases, moment, code))


def is_late(outcome: Outcome, deadline: float) -> Array:
    """[] bool, whether a client still worked at the deadline, in vain or not."""
    worked = (outcome.phases * outcome.spent).sum(-1)
    return (outcome.code == STALE) | (worked > deadline)


def spend(phases: Array, moment: Array, code: Array) -> Array:
    """The share of each phase [3] that took place before a moment."""
    ends = jnp.cumsum(phases)
    share = 1 - (ends - moment) / jnp.where(phases > 0, phases, 1.0)
    # A phase without any length takes place at once, if the client was there.
    spent = jnp.where(phases > 0, jnp.clip(share, 0.0, 1.0), 1.0)
    spent = jnp.where(moment >= ends, 1.0, spent)
    return jnp.where(code == UNREACHABLE, 0.0, spent)
