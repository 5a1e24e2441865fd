"""Clients that still work for the last round while the next one begins.

State: [N] bool. Where late updates are merged a round later, a client that sends one,
or that is lost only after the deadline, cannot be reached in the next round.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import SHARE, STATIC, TRACED, Option
from fedmoe_jax.types import Array, Hyper, Keys, Sizes
from fedmoe_jax.world.outcome import Outcome
from fedmoe_jax.world.step import View


def has_stale_updates(config: ConfigDict) -> bool:
    """Whether a round ends while clients are still at work for it."""
    return config.late.kind == "stale"


def init_busy(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """No client is at work before the first round."""
    return jnp.zeros(sizes.num_clients, bool)


def step_busy(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """As the last round left it."""
    return state


def apply_busy(state: Array, view: View, hyper: Hyper) -> View:
    """Puts clients that are at work out of reach."""
    reachable = view.events.reachable & ~state
    return view.replace(events=view.events.replace(reachable=reachable))


def mark_busy(
    state: Array, cohort: Array, outcome: Outcome, late: Array, hyper: Hyper
) -> Array:
    """Late clients of the cohort are at work in the next round, and no others."""
    return jnp.zeros_like(state).at[cohort].set(late)


BUSY_PROCESS = Process(
    about="Clients past the deadline still work while the next round begins.",
    is_on=has_stale_updates,
    init=init_busy,
    step=step_busy,
    apply=apply_busy,
    after=mark_busy,
    always=("late.kind",),
    options=(
        Option(
            "late.kind",
            ("wait", "drop", "stale"),
            "updates past the deadline: the round waits, they are dropped, or merged a "
            "round later",
            STATIC,
        ),
        Option(
            "late.discount", SHARE, "share of a stale update that is applied", TRACED
        ),
    ),
)
