"""The radio link against closed forms.

Each estimate is a mean over many independent clients; it may be off by four standard
errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, choose, make_devices, make_federation, make_hyper

from fedmoe_jax.types import make_keys
from fedmoe_jax.world import channel
from fedmoe_jax.world.processes import gauss_markov_step
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

CLIENTS = 100_000
BANDWIDTH = 1e7  # Hz; the noise is -174 + 70 = -104 dBm.
POWER = 23.0  # dBm


def about(samples, expected):
    """Whether the samples' mean is within four standard errors of what it should be."""
    samples = np.asarray(samples, np.float64)
    error = samples.std() / np.sqrt(samples.size)
    assert error > 0
    assert abs(samples.mean() - expected) < 4 * error, (samples.mean(), expected, error)


def rayleigh(seed):
    return jax.random.normal(jax.random.key(seed), (CLIENTS, 2))


def gains(mean_snr_db):
    """The gain at which the mean SNR is as given."""
    return jnp.full(CLIENTS, mean_snr_db - 104.0 - POWER)


def use(gain_db, fading, known, backoff=1.0, min_snr=-100.0, limit=1e12):
    numbers = {
        "power": POWER,
        "bandwidth": BANDWIDTH,
        "backoff": backoff,
        "min_snr": min_snr,
    }
    numbers = {name: jnp.float32(value) for name, value in numbers.items()}
    limit = jnp.full(gain_db.shape, limit)
    speed, outage = jax.jit(channel.link)(gain_db, fading, known, limit, **numbers)
    assert speed.shape == gain_db.shape and outage.dtype == bool
    assert jnp.all(jnp.isfinite(speed)) and jnp.all(speed > 0)
    return speed, outage


# --- places


def test_path_loss_by_hand():
    loss = channel.path_loss(jnp.array([0.035, 0.1, 1.0, 10.0]))
    # log10(0.035) = -1.455932
    np.testing.assert_allclose(loss, [73.35696, 90.5, 128.1, 165.7], rtol=1e-6)


def test_noise_density_is_thermal_at_290_kelvin():
    milliwatts = 1.380649e-23 * 290 * 1e3
    assert abs(channel.NOISE_DENSITY - 10 * np.log10(milliwatts)) < 0.05


def distances(gain_db):
    loss = -np.asarray(gain_db, np.float64)
    return 10 ** ((loss - channel.PATH_LOSS_AT_KM) / channel.PATH_LOSS_PER_DECADE)


def test_place_spreads_clients_uniformly_over_the_disk():
    key, near, far = jax.random.key(0), channel.NEAREST, 0.25
    gain_db = channel.place(key, CLIENTS, jnp.float32(far), jnp.float32(0))
    distance = distances(gain_db)
    assert near * 0.9999 < distance.min() and distance.max() < far * 1.0001
    # Uniform in the area: within d with probability (d^2 - near^2) / (far^2 - near^2).
    for within in (0.05, 0.1, 0.2):
        about(distance < within, (within**2 - near**2) / (far**2 - near**2))
    about(distance**2, (near**2 + far**2) / 2)


def test_place_draws_shadowing_normal_in_decibels_and_independent_of_the_place():
    key, radius, spread = jax.random.key(1), jnp.float32(0.5), 8.0
    bare = channel.place(key, CLIENTS, radius, jnp.float32(0))
    shadow = channel.place(key, CLIENTS, radius, jnp.float32(spread)) - bare
    about(shadow, 0)
    about(shadow**2, spread**2)
    about(shadow**4, 3 * spread**4)
    about(shadow * (bare - bare.mean()), 0)


# --- fading


def test_fading_power_by_hand():
    power = channel.fading_power(jnp.array([[3.0, 4.0], [0.0, 0.0], [-1.0, 1.0]]))
    assert power.tolist() == [12.5, 0, 1]


def test_fading_power_is_exponential_of_mean_one():
    power = channel.fading_power(rayleigh(2))
    about(power, 1)
    about((power - 1) ** 2, 1)
    about(power > 2, np.exp(-2))


@pytest.mark.parametrize("persistence", [0.6, 0.95])
def test_fading_power_is_correlated_by_the_square(persistence):
    fading = rayleigh(3)
    later = gauss_markov_step(jax.random.key(4), fading, jnp.float32(persistence))
    about(
        (channel.fading_power(fading) - 1) * (channel.fading_power(later) - 1),
        persistence**2,
    )


@pytest.mark.parametrize("csi", [0.0, 0.7])
def test_known_fading_is_correlated_as_csi_says(csi):
    fading = rayleigh(5)
    known = channel.known_fading(jax.random.key(6), fading, jnp.float32(csi))
    about(fading * known, csi)
    about(known**2, 1)
    about(known[:, 0] * fading[:, 1], 0)


def test_known_fading_of_perfect_csi_is_the_truth_bit_by_bit():
    fading = rayleigh(5)
    known = channel.known_fading(jax.random.key(6), fading, jnp.float32(1))
    assert jnp.array_equal(known, fading)


# --- rates


def test_snr_by_hand():
    # At 1 km: 23 - 128.1 - (-104) = -1.1 dB, times |h|^2 = 1 and 12.5.
    gain_db = jnp.array([-128.1, -128.1, -100.0])
    fading = jnp.array([[1.0, 1.0], [3.0, 4.0], [0.0, 0.0]])
    snr = channel.snr(gain_db, fading, jnp.float32(POWER), jnp.float32(BANDWIDTH))
    expected = [10**-0.11, 12.5 * 10**-0.11, 0]
    np.testing.assert_allclose(snr, expected, rtol=1e-5)


def test_rate_by_hand():
    # 1 MHz at an SNR of 3 carries 2 Mbit/s, and of 1e-9 its derivative at zero.
    rate = channel.rate(jnp.array([0.0, 1.0, 3.0, 1e-9]), jnp.float32(1e6))
    expected = [0, 125_000, 250_000, 1e-3 / 8 / np.log(2)]
    np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_link_takes_shannons_rate_of_the_known_channel():
    known = jnp.sqrt(jnp.array([[3.0, 3.0], [3.0, 3.0], [0.0, 0.0]]))
    true = jnp.sqrt(jnp.array([[4.0, 4.0], [0.9, 0.9], [3.0, 3.0]]))
    speed, outage = use(gains(0.0)[:3], true, known, backoff=0.5, min_snr=0.0)
    # SNR 3 is 2 bits per Hz and half of it 1, which SNR 0.9 does not carry; an SNR
    # below 0 dB counts as 0 dB, 1 bit per Hz.
    np.testing.assert_allclose(speed * 8 / BANDWIDTH, [1, 1, 0.5], rtol=1e-5)
    assert outage.tolist() == [False, True, False]


def test_link_of_a_slow_device_does_not_overshoot_the_channel():
    known, true = jnp.full((1, 2), jnp.sqrt(3.0)), jnp.full((1, 2), jnp.sqrt(0.9))
    # SNR 0.9 carries 0.93 bits per Hz, less than the 2 of SNR 3.
    for bits, limit, fails in ((2, 3, True), (0.95, 0.95, True), (0.9, 0.9, False)):
        speed, outage = use(gains(0.0)[:1], true, known, limit=limit * BANDWIDTH / 8)
        np.testing.assert_allclose(speed * 8 / BANDWIDTH, bits, rtol=1e-5)
        assert outage.tolist() == [fails]


def test_link_below_the_least_snr_fails_however_slow():
    fading = jnp.ones((CLIENTS, 2))
    _, outage = use(gains(-5.0), fading, fading, backoff=0.01, min_snr=-4.9)
    assert outage.all()
    _, outage = use(gains(-5.0), fading, fading, backoff=0.01, min_snr=-5.1)
    assert not outage.any()


# --- outage


@pytest.mark.parametrize(("mean", "least"), [(10.0, 0.0), (0.0, -10.0), (0.0, 5.0)])
def test_link_with_perfect_csi_has_the_outage_of_rayleigh_fading(mean, least):
    fading = rayleigh(7)
    _, outage = use(gains(mean), fading, fading, min_snr=least)
    about(outage, 1 - np.exp(-(10 ** ((least - mean) / 10))))


@pytest.mark.parametrize("mean", [-60.0, 0.0, 60.0])
def test_link_with_perfect_csi_never_overshoots(mean):
    fading = rayleigh(8)
    known = channel.known_fading(jax.random.key(9), fading, jnp.float32(1))
    speed, outage = use(gains(mean), fading, known, min_snr=mean - 10)
    below = channel.fading_power(fading) < 0.1
    # Where both compute the same number differently, they may disagree about one.
    assert below.sum() > 9_000 and jnp.sum(outage != below) <= 1
    snr = channel.snr(gains(mean), fading, jnp.float32(POWER), jnp.float32(BANDWIDTH))
    carried = channel.rate(snr, jnp.float32(BANDWIDTH))
    np.testing.assert_allclose(speed[~below], carried[~below], rtol=1e-5)


@pytest.mark.parametrize("csi", [0.0, 0.5, 0.99])
def test_link_without_backoff_fails_half_the_time_where_csi_is_not_perfect(csi):
    """The known and the true channel may be exchanged: either is the better one."""
    fading = rayleigh(10)
    known = channel.known_fading(jax.random.key(11), fading, jnp.float32(csi))
    about(use(gains(10.0), fading, known)[1], 0.5)


@pytest.mark.parametrize("csi", [0.0, 0.9])
@pytest.mark.parametrize("backoff", [0.25, 0.8])
def test_link_outage_of_a_weak_signal_with_backoff(csi, backoff):
    """Rates are proportional to |h|^2: P(b |h^|^2 > |h|^2) of correlated Gaussians.

    It follows from the eigenvalues of diag(b, -1) times the covariance of (h^, h).
    """
    fading = rayleigh(12)
    known = channel.known_fading(jax.random.key(13), fading, jnp.float32(csi))
    root = np.sqrt((1 + backoff) ** 2 - 4 * backoff * csi**2)
    expected = (1 - (1 - backoff) / root) / 2
    about(use(gains(-40.0), fading, known, backoff)[1], expected)


def test_link_with_less_backoff_is_faster_and_fails_where_more_does():
    fading = rayleigh(14)
    known = channel.known_fading(jax.random.key(15), fading, jnp.float32(0.8))
    slow, slow_outage = use(gains(10.0), fading, known, 0.3, -10.0)
    fast, fast_outage = use(gains(10.0), fading, known, 0.6, -10.0)
    np.testing.assert_allclose(fast, 2 * slow, rtol=1e-6)
    assert jnp.all(fast_outage | ~slow_outage)
    assert fast_outage.sum() > 1.2 * slow_outage.sum() > 0


# --- the process

CELL = dict(radius=0.5, shadowing=0.0, bandwidth=1e6, csi=1.0, backoff=1.0)


def make_cell(count, hyper):
    """A cell of clients whose channels are known and as good as on average."""
    sizes = SIZES._replace(num_clients=count)
    cell = channel.init_cell(make_keys(jax.random.key(2), 0), hyper, sizes)
    fading = jnp.ones((count, 2))
    return cell.replace(fading=fading, known=fading)


def look(devices, state, hyper):
    """The view of clients without data; the processes that have a state are on."""
    return observe(state, make_federation(devices=devices), hyper, choose(*state))


def test_open_links_gives_each_direction_the_power_of_its_sender():
    hyper = make_hyper(channel=CELL | dict(min_snr=-100, power_up=0, power_down=10))
    cell, devices = make_cell(5, hyper), make_devices(5)
    (up, _), (down, _) = channel.open_links(cell, devices, hyper)
    # Shannon's rate solved for the SNR: 10 dB more power is 10 times as much.
    snr = [np.exp2(8e-6 * np.float64(rate)) - 1 for rate in (up, down)]
    np.testing.assert_allclose(snr[1] / snr[0], np.full(5, 10.0), rtol=1e-3)
    # These rates, far below what the devices could do, are the ones that count.
    view = look(devices, {"wireless": cell}, hyper)
    np.testing.assert_array_equal(view.devices.upload, up)
    np.testing.assert_array_equal(view.devices.download, down)


def walk(refresh, rounds=5):
    """The cell in each of the rounds, with perfect measurements every so many."""
    hyper = make_hyper(channel=CELL | dict(persistence=0.5, refresh=refresh))
    cell, cells = make_cell(3, hyper), []
    for round in range(rounds):
        keys = make_keys(jax.random.key(2), round)
        cell = channel.step_cell(cell, keys, jnp.int32(round), hyper)
        cells.append(cell)
    return cells


def test_step_cell_keeps_the_last_measurement_until_the_next():
    every, third = walk(1), walk(3)
    for round, (fresh, stale) in enumerate(zip(every, third, strict=True)):
        np.testing.assert_array_equal(stale.fading, fresh.fading)
        np.testing.assert_array_equal(fresh.known, fresh.fading)
        measured = every[round - round % 3].fading
        np.testing.assert_array_equal(stale.known, measured)
    assert not np.array_equal(third[1].known, third[1].fading)


@pytest.mark.parametrize("weak", ["up", "down"])
def test_apply_cell_fails_only_the_direction_without_signal(weak):
    powers = {"power_up": 100.0, "power_down": 100.0} | {f"power_{weak}": -200.0}
    hyper = make_hyper(channel=CELL | dict(min_snr=-6) | powers)
    # Where there is signal enough, the device itself is the limit.
    devices = make_devices(4, upload=[1, 2, 3, 4], download=[5, 6, 7, 8])
    view = look(devices, {"wireless": make_cell(4, hyper)}, hyper)
    assert view.events.no_upload.tolist() == [weak == "up"] * 4
    assert view.events.no_download.tolist() == [weak == "down"] * 4
    np.testing.assert_array_equal(view.devices.upload, [1, 2, 3, 4])
    np.testing.assert_array_equal(view.devices.download, [5, 6, 7, 8])


def test_apply_cell_keeps_a_link_that_others_share_slow():
    channel = CELL | dict(min_snr=-6, power_up=100, power_down=100)
    hyper = make_hyper(channel=channel, bandwidth={"spread": 2.0})
    state = {"wireless": make_cell(2, hyper), "bandwidth": jnp.array([1.0, 0.0])}
    view = look(make_devices(2, upload=3.0, download=5.0), state, hyper)
    factor = np.exp([0, -2])
    np.testing.assert_allclose(view.devices.upload, 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(view.devices.download, 5 * factor, rtol=1e-6)
