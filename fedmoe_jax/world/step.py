"""Step 1 of a round: every process of the world moves on, and the view is drawn up.

The world is a chain, in the order of `world.PROCESSES`: each process that is on has its
own state in `SimState.world`, and changes the view that the ones before it have left.
Draws come from the round's key and a number for each purpose, for all N clients at
once, so that the events of a client do not depend on the rest of the cohort.
"""

import jax.numpy as jnp
from flax import struct

from fedmoe_jax.base import Process
from fedmoe_jax.forms import check_form, check_type
from fedmoe_jax.types import (
    Array,
    Devices,
    ExpertLinks,
    Federation,
    Hyper,
    Keys,
    PyTree,
    Sizes,
    make_keys,
)

# Purposes, folded into the key of a round; `split` uses the small numbers.
PRESSURE, BACKGROUND, BANDWIDTH, REACH, FADING, DROPOUT, CSI, BIAS = range(1000, 1008)
LINKS = 1008
# Purposes, folded into the run's key, as the numbers of rounds are.
PHASE, PLACE, BEGINNING = 2**32 - 2, 2**32 - 3, 2**32 - 4

Chain = tuple[tuple[str, Process], ...]  # names and records, in order of application


class Events(struct.PyTreeNode):
    """The events that clients meet in one round (a leading N or C axis).

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


class View(struct.PyTreeNode):
    """The world in one round.

    Attributes:
      federation: with the examples that the clients own by now.
      devices: leaves [N], what is left for training, at the speed of the links.
      events: leaves [N], what clients meet if they are in the cohort.
      distortion: [N] float32 >= 0, the amount by which the images of each client are
        distorted: the same for all that drift, 0 for the others. None for no drift.
      links: between gate and experts; None where experts have none.
    """

    federation: Federation
    devices: Devices
    events: Events
    distortion: Array | None
    links: ExpertLinks | None = None


def init_world(
    key: Array, hyper: Hyper, sizes: Sizes, processes: Chain
) -> dict[str, PyTree]:
    """The state of every process before the first round, from its stationary law.

    Args:
      key: the run's key.
      hyper: numbers of the processes.
      sizes: static sizes.
      processes: those that are on.

    Returns:
      The states by the names of the processes, see their `init`.
    """
    keys = make_keys(key, BEGINNING)
    return {name: process.init(keys, hyper, sizes) for name, process in processes}


def step_world(
    state: dict[str, PyTree],
    keys: Keys,
    round: Array,
    hyper: Hyper,
    processes: Chain,
) -> dict[str, PyTree]:
    """The state of every process one round on.

    Args:
      state: before the round, see `init_world`.
      keys: of the round and the run.
      round: [] int32.
      hyper: numbers of the processes.
      processes: those that are on.
    """
    found = {
        name: process.step(state[name], keys, round, hyper)
        for name, process in processes
    }
    for name in found:
        check_form(f"the process {name!r} has a `step` that", found[name], state[name])
    return found


def start_view(federation: Federation) -> View:
    """The view of a world without processes."""
    count = federation.devices.memory.shape[0]
    never = jnp.zeros(count, bool)
    events = Events(~never, jnp.full(count, jnp.inf), never, never)
    return View(federation, federation.devices, events, distortion=None)


def observe(
    state: dict[str, PyTree],
    federation: Federation,
    hyper: Hyper,
    processes: Chain,
) -> View:
    """The view of one round.

    Args:
      state: of every process, in this round.
      federation: as it was before the first round.
      hyper: numbers of the processes.
      processes: those that are on.
    """
    view = start_view(federation)
    for name, process in processes:
        view = process.apply(state[name], view, hyper)
        check_type(f"the process {name!r} has an `apply` that", view, View)
    return view


def close_round(
    state: dict[str, PyTree],
    cohort: Array,
    outcome: PyTree,
    late: Array,
    hyper: Hyper,
    processes: Chain,
) -> dict[str, PyTree]:
    """The state of every process after a round.

    Args:
      state: of every process, in this round.
      cohort: [C] int32.
      outcome: leaves [C], see `world.outcome`.
      late: [C] bool, clients that still worked at the deadline.
      hyper: numbers of the processes.
      processes: those that are on.
    """
    after = {
        name: process.after(state[name], cohort, outcome, late, hyper)
        for name, process in processes
        if process.after
    }
    for name in after:
        check_form(
            f"the process {name!r} has an `after` that", after[name], state[name]
        )
    return state | after


def measure_processes(state: dict[str, PyTree], processes: Chain) -> dict[str, Array]:
    """The metrics of every process, by their names."""
    found = {}
    for name, process in processes:
        if process.metrics:
            found |= process.metrics(state[name])
    return found
