"""The radio link of every client to one base station.

Path loss and shadowing stay as they are over the rounds. Rayleigh fading is a latent
[N, 2] of standard normals, the real and imaginary part of h, moved by
`gauss_markov_step`: Gauss-Markov fading, in which |h|^2 is correlated by
`persistence**(2 k)` over k rounds. Within a round the channel stands still (block
fading).
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import COUNT, POSITIVE, SHARE, STATIC, TRACED, Option, Range
from fedmoe_jax.types import Array, Devices, Hyper, Keys, Sizes
from fedmoe_jax.world.processes import gauss_markov_start, gauss_markov_step
from fedmoe_jax.world.step import CSI, FADING, PLACE, View

# Macro cell at 2 GHz, distance in km: 3GPP TR 36.814, annex A.2.1.1.
PATH_LOSS_AT_KM = 128.1  # dB
PATH_LOSS_PER_DECADE = 37.6  # dB
NEAREST = 0.035  # km, least distance of a client to the station
# Thermal noise k T at 290 K.
NOISE_DENSITY = -174.0  # dBm / Hz
# Equal channels may differ in the last digits of their rates, a few times 1e-7.
ROUNDING = 1e-5


def _linear(decibel: Array) -> Array:
    return 10 ** (decibel / 10)


def path_loss(distance: Array) -> Array:
    """`128.1 + 37.6 log10(d)` dB of a macro cell at 2 GHz (3GPP TR 36.814).

    Args:
      distance: [N] float32 km, at least `NEAREST`.

    Returns:
      [N] float32 dB.
    """
    return PATH_LOSS_AT_KM + PATH_LOSS_PER_DECADE * jnp.log10(distance)


def place(key: Array, num_clients: int, radius: Array, shadowing: Array) -> Array:
    """Places clients uniformly over a disk about the station; gives their mean gains.

    The same key gives the same places: clients do not move from round to round.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      radius: [] float32 km, above `NEAREST`; no client is nearer than that.
      shadowing: [] float32 dB >= 0, standard deviation of the log-normal shadowing.

    Returns:
      [N] float32 dB, `-path loss + shadowing`.
    """
    key_where, key_shadow = jax.random.split(key)
    share = jax.random.uniform(key_where, (num_clients,))
    # Uniform over the area is uniform in the squared distance.
    distance = jnp.sqrt(NEAREST**2 + share * (radius**2 - NEAREST**2))
    shadow = shadowing * jax.random.normal(key_shadow, (num_clients,))
    return shadow - path_loss(distance)


def known_fading(key: Array, fading: Array, csi: Array) -> Array:
    """The fading as the sender knows it: `csi h + sqrt(1 - csi^2) n`.

    It is distributed like the fading itself.

    Args:
      key: a JAX key, consumed.
      fading: [N, 2] float32, real and imaginary part, each N(0, 1).
      csi: [] float32 in [0, 1], correlation with the truth; 1 is perfect channel
        state information and returns `fading` bit by bit, 0 is none.

    Returns:
      [N, 2] float32.
    """
    chex.assert_shape(fading, (None, 2))
    return gauss_markov_step(key, fading, csi)


def fading_power(fading: Array) -> Array:
    """|h|^2 of Rayleigh fading: `(a^2 + b^2) / 2`, exponential of mean one.

    Args:
      fading: [N, 2] float32, a and b.

    Returns:
      [N] float32 >= 0.
    """
    chex.assert_shape(fading, (None, 2))
    return jnp.sum(fading**2, axis=-1) / 2


def snr(gain_db: Array, fading: Array, power: Array, bandwidth: Array) -> Array:
    """Signal-to-noise ratio `P g |h|^2 / (N0 B)`, linear.

    Args:
      gain_db: [N] float32 dB, see `place`.
      fading: [N, 2] float32.
      power: [] float32 dBm, what the sender sends with.
      bandwidth: [] float32 Hz > 0, what the client has for itself.

    Returns:
      [N] float32 >= 0.
    """
    chex.assert_shape(fading, (*gain_db.shape, 2))
    noise = NOISE_DENSITY + 10 * jnp.log10(bandwidth)
    return _linear(power + gain_db - noise) * fading_power(fading)


def rate(snr: Array, bandwidth: Array) -> Array:
    """Shannon's rate `B log2(1 + SNR)`, in bytes.

    Args:
      snr: [...] float32 >= 0, linear.
      bandwidth: [] float32 Hz > 0.

    Returns:
      [...] float32 bytes per second.
    """
    # log1p keeps the digits of a weak signal.
    return bandwidth * jnp.log1p(snr) / (8 * jnp.log(2.0))


def link(
    gain_db: Array,
    fading: Array,
    known: Array,
    limit: Array,
    *,
    power: Array,
    bandwidth: Array,
    backoff: Array,
    min_snr: Array,
) -> tuple[Array, Array]:
    """The rate at which every client's link is used, and where that fails.

    The sender picks `backoff` times the Shannon rate of the channel it knows, or of
    `min_snr` where that is more, so that every time is finite, and never more than its
    `limit`. The link is in outage where the true channel carries less than that or lies
    below `min_snr`. With perfect knowledge that happens with probability
    `1 - exp(-min_snr / mean SNR)`, linear.

    Args:
      gain_db: [N] float32 dB, see `place`.
      fading: [N, 2] float32, the true channel.
      known: [N, 2] float32, what the sender knows of it, see `known_fading`.
      limit: [N] float32 bytes per second > 0, of the device itself.
      power: [] float32 dBm.
      bandwidth: [] float32 Hz > 0.
      backoff: [] float32 in (0, 1]; less is slower and fails less often.
      min_snr: [] float32 dB, from -100 on; the least that the link works with.

    Returns:
      Bytes per second, [N] float32 > 0, and outage, [N] bool. In outage the rate is
      what the sender tried.
    """
    chex.assert_equal_shape([fading, known])
    chex.assert_equal_shape([gain_db, limit])
    least = _linear(min_snr)
    true_snr = snr(gain_db, fading, power, bandwidth)
    known_snr = snr(gain_db, known, power, bandwidth)
    chosen = backoff * rate(jnp.maximum(known_snr, least), bandwidth)
    chosen = jnp.minimum(chosen, limit)
    too_fast = chosen > (1 + ROUNDING) * rate(true_snr, bandwidth)
    return chosen, too_fast | (true_snr < least)


# ---- the process


class Cell(struct.PyTreeNode):
    """The radio cell in one round.

    Attributes:
      gain_db: [N] float32 dB, the mean gain of each client's place.
      fading: [N, 2] float32, real and imaginary part of the true channel.
      known: [N, 2] float32, likewise, as the senders know it, and with them the server,
        which sees the rates that they agree on.
    """

    gain_db: Array
    fading: Array
    known: Array


def is_wireless(config: ConfigDict) -> bool:
    """Whether clients share a radio cell."""
    return config.channel.kind == "wireless"


def init_cell(keys: Keys, hyper: Hyper, sizes: Sizes) -> Cell:
    """Places the clients and draws their fading from its stationary law."""
    count, numbers = sizes.num_clients, hyper.channel
    fading = gauss_markov_start(keys.of(FADING), (count, 2))
    return Cell(
        gain_db=place(keys.always(PLACE), count, numbers.radius, numbers.shadowing),
        fading=fading,
        known=known_fading(keys.of(CSI), fading, numbers.csi),
    )


def step_cell(state: Cell, keys: Keys, round: Array, hyper: Hyper) -> Cell:
    """One step of the fading; where it is due the senders measure the channel anew.

    Between two measurements they keep the last one, which the fading leaves behind.
    """
    numbers = hyper.channel
    fading = gauss_markov_step(keys.of(FADING), state.fading, numbers.persistence)
    measured = known_fading(keys.of(CSI), fading, numbers.csi)
    due = round % numbers.refresh == 0
    return state.replace(fading=fading, known=jnp.where(due, measured, state.known))


def open_links(
    state: Cell, devices: Devices, hyper: Hyper
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Rate [N] in bytes per second and outage [N] of the links up and down.

    Both directions fade alike (they share the band in turn), with powers of their own.
    """
    numbers = hyper.channel

    def open_link(limit: Array, power: Array) -> tuple[Array, Array]:
        return link(
            state.gain_db,
            state.fading,
            state.known,
            limit,
            power=power,
            bandwidth=numbers.bandwidth,
            backoff=numbers.backoff,
            min_snr=numbers.min_snr,
        )

    up = open_link(devices.upload, numbers.power_up)
    return up, open_link(devices.download, numbers.power_down)


def apply_cell(state: Cell, view: View, hyper: Hyper) -> View:
    """Slows the links to the rate of the radio channel, and fails those in outage."""
    (up, no_upload), (down, no_download) = open_links(state, view.devices, hyper)
    events = view.events
    events = events.replace(
        no_upload=events.no_upload | no_upload,
        no_download=events.no_download | no_download,
    )
    devices = view.devices.replace(upload=up, download=down)
    return view.replace(devices=devices, events=events)


WIRELESS_PROCESS = Process(
    about="Clients share a radio cell: path loss, shadowing, fading and outage.",
    is_on=is_wireless,
    init=init_cell,
    step=step_cell,
    apply=apply_cell,
    options=(
        Option("channel.kind", ("wired", "wireless"), "of all clients' links", STATIC),
        Option(
            "channel.radius",
            Range(NEAREST, 100, open_low=True),
            "km, of the cell",
            TRACED,
        ),
        Option(
            "channel.shadowing",
            Range(0, 50),
            "dB, standard deviation of the shadowing",
            TRACED,
        ),
        Option(
            "channel.persistence",
            SHARE,
            "correlation of the fading from round to round",
            TRACED,
        ),
        Option(
            "channel.csi",
            SHARE,
            "correlation of the known and the true fading",
            TRACED,
        ),
        Option(
            "channel.refresh",
            COUNT,
            "rounds from one measurement of the known fading to the next; senders and "
            "server keep the last one",
            TRACED,
        ),
        Option(
            "channel.backoff",
            Range(0, 1, open_low=True),
            "share of the known channel's rate that is used",
            TRACED,
        ),
        Option(
            "channel.min_snr",
            Range(-100, 100),
            "dB, signal-to-noise ratio below which there is no link",
            TRACED,
        ),
        Option("channel.bandwidth", POSITIVE, "Hz for each client", TRACED),
        Option("channel.power_up", Range(-100, 100), "dBm, power of a client", TRACED),
        Option(
            "channel.power_down",
            Range(-100, 100),
            "dBm, power of the station",
            TRACED,
        ),
    ),
)
