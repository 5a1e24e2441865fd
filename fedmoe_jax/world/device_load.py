"""Load beside training: other apps take memory and compute, other users the links."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import SHARE, TRACED, Option, Range
from fedmoe_jax.types import Array, Hyper, Keys, Sizes
from fedmoe_jax.world.processes import (
    gauss_markov_start,
    gauss_markov_step,
    markov_start,
    markov_step,
    speed_factor,
    taken_share,
)
from fedmoe_jax.world.step import BACKGROUND, BANDWIDTH, PRESSURE, View

# ---- pressure: [N] bool, whether other apps press on a device's memory


def has_pressure(config: ConfigDict) -> bool:
    """Whether other apps ever press on memory."""
    return config.pressure.share > 0


def init_pressure(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """Draws from the stationary law."""
    share = hyper.pressure.share
    return markov_start(keys.of(PRESSURE), share, sizes.num_clients)


def step_pressure(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """One step of a Markov chain of every client."""
    share, persistence = hyper.pressure.share, hyper.pressure.persistence
    return markov_step(keys.of(PRESSURE), state, share, persistence)


def apply_pressure(state: Array, view: View, hyper: Hyper) -> View:
    """Leaves devices under pressure a share of their memory."""
    left = jnp.where(state, hyper.pressure.left, 1.0)
    devices = view.devices
    return view.replace(devices=devices.replace(memory=devices.memory * left))


PRESSURE_PROCESS = Process(
    about="Other apps take a share of a device's memory, in spells.",
    is_on=has_pressure,
    init=init_pressure,
    step=step_pressure,
    apply=apply_pressure,
    options=(
        Option(
            "pressure.share",
            SHARE,
            "share of the time that other apps press on memory",
            TRACED,
        ),
        Option(
            "pressure.persistence", SHARE, "correlation from round to round", TRACED
        ),
        Option(
            "pressure.left",
            Range(0, 1, open_low=True),
            "share of the memory that is left under pressure",
            TRACED,
        ),
    ),
)


# ---- background: [N] float32, standard normal latents of the compute taken


def has_background(config: ConfigDict) -> bool:
    """Whether other work ever takes compute."""
    return config.background.most > 0


def init_background(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """Draws from the stationary law."""
    return gauss_markov_start(keys.of(BACKGROUND), (sizes.num_clients,))


def step_background(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """One step of a Gauss-Markov process of every client."""
    persistence = hyper.background.persistence
    return gauss_markov_step(keys.of(BACKGROUND), state, persistence)


def apply_background(state: Array, view: View, hyper: Hyper) -> View:
    """Leaves devices the compute that other work does not take."""
    idle = 1 - taken_share(state, hyper.background.most)
    devices = view.devices
    return view.replace(devices=devices.replace(flops=devices.flops * idle))


BACKGROUND_PROCESS = Process(
    about="Other work takes a share of a device's compute, uniform over time.",
    is_on=has_background,
    init=init_background,
    step=step_background,
    apply=apply_background,
    options=(
        Option(
            "background.most",
            Range(0, 1, open_high=True),
            "largest share of the compute that other work takes",
            TRACED,
        ),
        Option(
            "background.persistence", SHARE, "correlation from round to round", TRACED
        ),
    ),
)


# ---- bandwidth: [N] float32, standard normal latents of the links' speed


def has_bandwidth(config: ConfigDict) -> bool:
    """Whether the speed of the links varies."""
    return config.bandwidth.spread > 0


def init_bandwidth(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """Draws from the stationary law."""
    return gauss_markov_start(keys.of(BANDWIDTH), (sizes.num_clients,))


def step_bandwidth(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """One step of a Gauss-Markov process of every client."""
    persistence = hyper.bandwidth.persistence
    return gauss_markov_step(keys.of(BANDWIDTH), state, persistence)


def apply_bandwidth(state: Array, view: View, hyper: Hyper) -> View:
    """Multiplies both links of a device by a log-normal factor of mean one."""
    speed, devices = speed_factor(state, hyper.bandwidth.spread), view.devices
    devices = devices.replace(
        upload=devices.upload * speed, download=devices.download * speed
    )
    return view.replace(devices=devices)


BANDWIDTH_PROCESS = Process(
    about="Other users make a device's links faster and slower.",
    is_on=has_bandwidth,
    init=init_bandwidth,
    step=step_bandwidth,
    apply=apply_bandwidth,
    options=(
        Option(
            "bandwidth.spread",
            Range(0, 5),
            "standard deviation of the log of a link's speed",
            TRACED,
        ),
        Option(
            "bandwidth.persistence", SHARE, "correlation from round to round", TRACED
        ),
    ),
)
