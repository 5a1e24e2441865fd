"""Step 1 of a round: the world moves on, and with it what each client will meet.

The state of a process is a leaf of `SimState.world`, and a process that is off has
none. Draws come from the round's key and a number for each purpose, for all N clients
at once, so that a client's events does not depend on who else is in the cohort.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.options import replace
from fedmoe_jax.rules import World
from fedmoe_jax.types import (
    Array,
    Devices,
    Federation,
    Hyper,
    Keys,
    Sizes,
    Static,
    make_keys,
)
from fedmoe_jax.world import availability, channel, drift, processes
from fedmoe_jax.world.limits import devices_now

# Purposes, folded into the key of a round; `split` uses the small numbers.
PRESSURE, BACKGROUND, BANDWIDTH, REACH, FADING, DROPOUT, CSI = range(1000, 1007)
# Purposes, folded into the run's key, as the numbers of rounds are.
PHASE, PLACE, BEGINNING = 2**32 - 2, 2**32 - 3, 2**32 - 4


@struct.dataclass
class Events:
    """What the world has in store for clients in one round (a leading N or C axis).

    Attributes:
      reachable: bool, whether the client can be reached at all.
      dropout: float32, the share of its training after which it is lost; infinity for
        never.
      no_download: bool, whether its link fails on the way down.
      no_upload: bool, likewise on the way up.
    """

    reachable: Array
    dropout: Array
    no_download: Array
    no_upload: Array


@struct.dataclass
class View:
    """The world in one round.

    Attributes:
      federation: with the examples that the clients own by now.
      devices: leaves [N], what they have left for training, their links as slow as the
        radio channel makes them.
      events: leaves [N], what clients meet if they are in the cohort.
    """

    federation: Federation
    devices: Devices
    events: Events


def init_world(key: Array, hyper: Hyper, sizes: Sizes, world: World) -> dict:
    """The state of the processes before the first round, from their stationary laws.

    Args:
      key: the run's key.
      hyper: numbers of the processes.
      sizes: static sizes.
      world: which processes are on.

    Returns:
      `pressure`, `reach` [N] bool; `background`, `bandwidth` [N] and `fading` [N, 2]
      float32, standard normal; `busy` [N] bool, clients that still work for the last
      round; `moved`, `distorted` [] float32, how far drift has come; each only where
      its process is on.
    """
    nobody, level = jnp.zeros(sizes.num_clients, bool), jnp.zeros(sizes.num_clients)
    state = {
        "pressure": (world.pressure, nobody),
        "background": (world.background, level),
        "bandwidth": (world.bandwidth, level),
        "reach": (world.reach, nobody),
        "fading": (world.wireless, jnp.zeros((sizes.num_clients, 2))),
        "busy": (world.busy, nobody),
        "moved": (world.labels, jnp.zeros(())),
        "distorted": (bool(world.images), jnp.zeros(())),
    }
    state = {name: leaf for name, (on, leaf) in state.items() if on}
    # Nothing persists from before the first round, so this draws afresh.
    fresh = {"persistence": jnp.zeros(())}
    groups = ("pressure", "background", "bandwidth", "availability", "channel")
    first = jnp.zeros((), jnp.int32)
    hyper = replace(hyper, **dict.fromkeys(groups, fresh))
    keys = make_keys(key, BEGINNING)
    return step_world(keys, state, first, hyper)


def step_world(keys: Keys, state: dict, round: Array, hyper: Hyper) -> dict:
    """The state of the processes one round on.

    Args:
      keys: of the round and the run.
      state: before the round, see `init_world`.
      round: [] int32.
      hyper: numbers of the processes.
    """
    new = dict(state)
    if "pressure" in state:
        new["pressure"] = processes.markov_step(
            keys.of(PRESSURE),
            state["pressure"],
            hyper.pressure.share,
            hyper.pressure.persistence,
        )
    if "reach" in state:
        new["reach"] = processes.markov_step(
            keys.of(REACH),
            state["reach"],
            share_now(round, keys, state["reach"].shape[0], hyper.availability),
            hyper.availability.persistence,
        )
    for name, group, purpose in (
        ("background", "background", BACKGROUND),
        ("bandwidth", "bandwidth", BANDWIDTH),
        ("fading", "channel", FADING),
    ):
        if name in state:
            persistence = getattr(hyper, group).persistence
            new[name] = processes.gauss_markov_step(
                keys.of(purpose), state[name], persistence
            )
    for name, field in (("moved", "labels"), ("distorted", "strength")):
        if name in state:
            start, rounds = hyper.drift.start, hyper.drift.rounds
            so_far = drift.progress(round, start, rounds)
            new[name] = getattr(hyper.drift, field) * so_far
    return new


def share_now(round: Array, keys: Keys, num_clients: int, numbers: Any) -> Array:
    """[N] share of the time that each client can be reached at this hour."""
    phase = jax.random.uniform(keys.always(PHASE), (num_clients,))
    return availability.reach_share(
        round,
        phase,
        share=numbers.share,
        swing=numbers.swing,
        day=numbers.day,
    )


def drifted_federation(federation: Federation, state: dict) -> Federation:
    """The federation with the examples that the clients own by now."""
    if "moved" not in state:
        return federation
    index, size, label_mix = drift.move_examples(
        federation.index,
        federation.size,
        federation.label_mix,
        federation.drift_source,
        state["moved"],
    )
    return federation.replace(index=index, size=size, label_mix=label_mix)


def find_reachable(state: dict, num_clients: int) -> Array:
    """[N] bool, who can be reached and is not at work for an earlier round."""
    reachable = state.get("reach", jnp.ones(num_clients, bool))
    return reachable & ~state["busy"] if "busy" in state else reachable


def choose_cohort(
    key: Array, view: View, state: dict, sizes: Sizes, static: Static
) -> Array:
    """The cohort's client ids [C], ascending.

    Args:
      key: a JAX key, consumed.
      view: gives the examples of each client.
      state: of the processes.
      sizes: static sizes.
      static: gives `availability.sampling`. `uniform` and `size` do not know which
        clients can be reached, and those that cannot are missing in the round;
        `reachable` draws from those that can, if there are enough.
    """
    count, wanted = sizes.num_clients, sizes.cohort_size
    sampling = static.availability.sampling
    if sampling == "uniform" or wanted == count:
        return availability.sample_cohort(key, count, wanted)
    reachable = sampling == "reachable"
    weight = find_reachable(state, count) if reachable else view.federation.size
    return availability.sample_weighted(key, weight.astype(jnp.float32), wanted)


def mark_busy(world: dict, cohort: Array, outcome: Any, static: Static) -> dict:
    """The world's state, in which late clients still work in the next round.

    They are the clients that send a stale update or are lost only after the deadline.
    """
    if "busy" not in world:
        return world
    worked = (outcome.phases * outcome.spent).sum(1)
    late = outcome.stale | (worked > static.devices.deadline)
    return world | {"busy": jnp.zeros_like(world["busy"]).at[cohort].set(late)}


def observe(
    keys: Keys, state: dict, federation: Federation, hyper: Hyper, world: World
) -> View:
    """What there is in one round.

    Args:
      keys: of the round and the run.
      state: of the processes, in this round.
      federation: as it was before the first round.
      hyper: numbers of the processes.
      world: which of them are on.
    """
    devices = devices_now(federation.devices, state, hyper, world)
    count = devices.memory.shape[0]
    dropout, never = jnp.full(count, jnp.inf), jnp.zeros(count, bool)
    if world.dropout:
        numbers = hyper.availability
        dropout = availability.draw_dropout(
            keys.of(DROPOUT), count, rate=numbers.dropout, early=numbers.early
        )
    events = Events(find_reachable(state, count), dropout, never, never)
    if world.wireless:
        (up, no_upload), (down, no_download) = open_links(keys, state, devices, hyper)
        devices = devices.replace(upload=up, download=down)
        events = events.replace(no_download=no_download, no_upload=no_upload)
    return View(drifted_federation(federation, state), devices, events)


def open_links(
    keys: Keys, state: dict, devices: Devices, hyper: Hyper
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Rate [N] in bytes per second and outage [N] of the links up and down.

    Both directions fade alike (they share the band in turn), with powers of their own.
    """
    numbers, fading = hyper.channel, state["fading"]
    gain = channel.place(
        keys.always(PLACE), fading.shape[0], numbers.radius, numbers.shadowing
    )
    known = channel.known_fading(keys.of(CSI), fading, numbers.csi)

    def open_link(limit: Array, power: Array) -> tuple[Array, Array]:
        return channel.link(
            gain,
            fading,
            known,
            limit,
            power=power,
            bandwidth=numbers.bandwidth,
            backoff=numbers.backoff,
            min_snr=numbers.min_snr,
        )

    up = open_link(devices.upload, numbers.power_up)
    return up, open_link(devices.download, numbers.power_down)
