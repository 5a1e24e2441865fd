"""Devices drawn from presets and read from a file."""

import jax
import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.types import Devices
from fedmoe_jax.world.devices import (
    TIERS,
    Tier,
    draw_devices,
    follow_labels,
    read_devices,
)
from fedmoe_jax.world.devices import unlimited_device as unlimited

NAMES = ("phone", "laptop", "workstation")
FIELDS = Tier._fields
HEADER = "memory,flops,upload,download,latency,power,radio"
ROW = "4e9,1e11,5e6,15e6,0.02,5,2"


def rng():
    return np.random.default_rng(7)


def draw(num_clients, tiers=NAMES, shares=(0.4, 0.4, 0.2), spread=0.3, free_memory=1.0):
    return draw_devices(rng(), num_clients, tiers, shares, spread, free_memory)


def columns(devices):
    return np.stack([getattr(devices, field) for field in FIELDS], axis=1)


# --- drawn


@pytest.mark.parametrize(
    ("num_clients", "shares", "counts"),
    [
        (10, (0.4, 0.4, 0.2), [4, 4, 2]),
        (7, (0.5, 0.25, 0.25), [3, 2, 2]),  # 3.5 1.75 1.75
        (3, (0.0, 1.0, 0.0), [0, 3, 0]),
        (100, (0.29, 0.57, 0.14), [29, 57, 14]),
    ],
)
def test_draw_devices_divides_tiers_by_largest_remainder(num_clients, shares, counts):
    devices = draw(num_clients, shares=shares, spread=0.0)
    assert np.bincount(devices.tier, minlength=3).tolist() == counts


def test_draw_devices_without_spread_gives_the_median_of_the_tier():
    devices = draw(20, spread=0.0)
    assert len(np.unique(devices.tier[:8])) > 1  # shuffled, not in blocks
    medians = np.array([TIERS[name] for name in NAMES], np.float32)
    np.testing.assert_array_equal(columns(devices), medians[devices.tier])


def test_draw_devices_keeps_the_first_four_values_of_versions_without_the_others():
    # 4 phones, 4 laptops, 2 workstations; bytes, FLOP/s, bytes/s up and down.
    medians = np.array(
        4 * [[4e9, 1e11, 5e6, 15e6]]
        + 4 * [[8e9, 1e12, 15e6, 50e6]]
        + 2 * [[24e9, 1e13, 125e6, 125e6]]
    )
    twin = rng()
    order = twin.permutation(np.repeat([0, 1, 2], [4, 4, 2]))
    rows = np.array([medians[[0, 4, 8][tier]] for tier in order])
    old = (rows * np.exp(0.3 * twin.standard_normal((10, 4)))).astype(np.float32)
    devices = draw(10)
    np.testing.assert_array_equal(devices.tier, order)
    np.testing.assert_array_equal(columns(devices)[:, :4], old)
    # Drawn by the version before: a workstation.
    first = [24436963328.0, 14949078269952.0, 107840336.0, 103769416.0]
    np.testing.assert_allclose(columns(devices)[0, :4], first, rtol=1e-6)


def test_draw_devices_draws_log_normal_values_apart_within_a_tier():
    devices = draw(4000, ("phone",), (1.0,))
    logs = np.log(columns(devices) / np.array(TIERS["phone"]))
    np.testing.assert_allclose(logs.mean(axis=0), 0.0, atol=0.02)
    np.testing.assert_allclose(logs.std(axis=0), 0.3, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(logs.T), np.eye(7), atol=0.06)
    assert all(getattr(devices, field).dtype == np.float32 for field in FIELDS)
    assert devices.tier.dtype == np.int32


def test_draw_devices_gives_training_a_share_of_the_memory_and_repeats_with_the_seed():
    whole, part = draw(9), draw(9, free_memory=0.25)
    np.testing.assert_allclose(part.memory, 0.25 * whole.memory, rtol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal, part.replace(memory=0), whole.replace(memory=0)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tiers=("phone", "toaster")), "devices.tiers.*'toaster'.*phone"),
        (dict(shares=(1.0,)), "devices.shares.*2 devices.tiers"),
        (dict(shares=(0.5, 0.6)), "devices.shares.*sum to 1"),
        (dict(shares=(1.5, -0.5)), "devices.shares.*>= 0"),
        (dict(shares=(float("nan"), 0.5)), "devices.shares"),
        (dict(spread=-0.1), "devices.spread=-0.1"),
        (dict(spread=float("nan")), "devices.spread=nan"),
        (dict(spread=5.1), "devices.spread=5.1"),
        (dict(free_memory=0.0), r"devices.free_memory=0.0.*\(0, 1\]"),
        (dict(free_memory=1.1), "devices.free_memory=1.1"),
        (dict(free_memory=float("nan")), "devices.free_memory=nan"),
    ],
)
def test_draw_devices_refuses_bad_settings(changes, message):
    good = dict(tiers=("phone", "laptop"), shares=(0.5, 0.5))
    with pytest.raises(UserError, match=message):
        draw(4, **(good | changes))


# --- presets


@pytest.mark.parametrize("name", TIERS)
def test_tiers_are_plausible_in_their_units(name):
    tier = TIERS[name]
    assert 1e9 <= tier.memory <= 1e11  # bytes, not gigabytes
    assert 1e10 <= tier.flops <= 1e14
    assert 1e6 <= tier.upload <= tier.download <= 125e6  # bytes, not bits
    assert 0.001 <= tier.latency <= 0.1  # seconds, not milliseconds
    assert 0.1 <= tier.radio <= tier.power <= 1000  # watts, not milliwatts


def test_tiers_by_hand():
    """Peak = cores x clock x operations per cycle; training sustains 0.3 of it."""
    peaks = {
        "raspberry_pi_4": 4 * 1.8e9 * 8,
        "jetson_nano": 128 * 921.6e6 * 2,
        "jetson_orin_nano": 1024 * 625e6 * 2,
        "jetson_agx_orin": 2048 * 1.3e9 * 2,
        "t4": 2560 * 1.59e9 * 2,
        "rtx_4090": 16384 * 2.52e9 * 2,
    }
    assert set(peaks) == set(TIERS) - set(NAMES)
    for name, peak in peaks.items():
        np.testing.assert_allclose(TIERS[name].flops, 0.3 * peak, rtol=0.01)
    assert TIERS["jetson_nano"].upload == 4.365e6  # 34.92 Mbit/s
    assert TIERS["jetson_nano"].download == 9.875e6  # 79.0 Mbit/s


def test_unlimited_device_has_everything_at_no_cost():
    device = unlimited()
    assert columns(device).tolist() == [4 * [np.inf] + 3 * [0.0]]
    assert device.tier.tolist() == [0] and device.tier.dtype == np.int32


# --- read


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "mine.csv"
        path.write_text(text, encoding=encoding)
        return str(path)

    return write


def test_read_devices_with_a_row_per_client_keeps_their_order(write):
    text = "tier, radio, power,latency,download,upload,flops,memory\n"
    text += "tv,0,0,0,4,3,2,1\nphone, 7, 6, 5, 4, 3, 2, 10\n\ntv,7,6,5,4,3,2,100\n"
    devices, names = read_devices(write(text), 3, rng(), 0.5)
    assert isinstance(devices, Devices) and names == ("tv", "phone")
    assert devices.tier.tolist() == [0, 1, 0] and devices.tier.dtype == np.int32
    assert columns(devices).dtype == np.float32
    assert columns(devices).tolist() == [
        [0.5, 2, 3, 4, 0, 0, 0],
        [5.0, 2, 3, 4, 5, 6, 7],
        [50.0, 2, 3, 4, 5, 6, 7],
    ]


def test_read_devices_expands_the_home(write, tmp_path, monkeypatch):
    write(f"{HEADER}\n{ROW}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    devices, _ = read_devices("~/mine.csv", 3, rng(), 1.0)
    assert devices.tier.shape == (3,)


def test_read_devices_with_a_row_per_client_draws_nothing(write):
    used = rng()
    read_devices(write(f"{HEADER}\n{ROW}\n"), 1, used, 1.0)
    assert used.random() == rng().random()


@pytest.mark.parametrize("num_clients", [2, 900])
def test_read_devices_otherwise_draws_a_row_for_each_client(write, num_clients):
    rows = "\n".join(f"{value},2,3,4,5,6,7,t{value}" for value in (1, 10, 100))
    path = write(f"{HEADER},tier\n{rows}\n")
    devices, names = read_devices(path, num_clients, rng(), 1.0)
    assert names == ("t1", "t10", "t100")
    expected = rng().integers(3, size=num_clients)
    np.testing.assert_array_equal(devices.tier, expected)
    np.testing.assert_array_equal(devices.memory, 10.0**expected)  # whole rows
    if num_clients == 900:
        np.testing.assert_allclose(np.bincount(expected), 300, atol=60)


def test_read_devices_without_a_tier_column_has_one_tier(write):
    path = write(f"{HEADER}\n{ROW}\n{ROW}\n", encoding="utf-8-sig")  # as from Excel
    devices, names = read_devices(path, 2, rng(), 1.0)
    assert names == ("device",) and devices.tier.tolist() == [0, 0]


def row(**changes):
    values = dict(zip(FIELDS, ROW.split(","), strict=True)) | changes
    return ",".join(values.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'memory'; allowed: .* memory, .*radio"),
        (HEADER.replace(",latency", "") + f"\n{ROW}", "no column 'latency'"),
        (f"{HEADER},cores\n{ROW},4", "column 'cores', which is unknown.*tier"),
        (f"{HEADER},power\n{ROW},4", "column 'power'.*there twice"),
        (f"{HEADER}\n", "has no rows"),
        (f"{HEADER}\n{ROW}\n{ROW},1\n", "line 3: has more or fewer values"),
        (f"{HEADER}\n{ROW[:-2]}\n", "line 2: has more or fewer values"),
        (f"{HEADER},tier\n{ROW},\n", "line 2: tier='' is not allowed"),
        (f"{HEADER}\n{ROW}\n{row(memory='4GB')}", "line 3: memory='4GB'.*numbers > 0"),
        (f"{HEADER}\n{row(radio='')}", "line 2: radio=''.*numbers >= 0"),
        (f"{HEADER}\n{row(power='nan')}", "power='nan'.*finite"),
        (f"{HEADER}\n{row(flops='inf')}", "flops='inf'.*finite"),
        (f"{HEADER}\n{row(flops='1e39')}", "flops='1e39'.*finite"),  # of 32 bits
        (f"{HEADER}\n{row(upload='1e-50')}", "upload='1e-50'.*> 0"),  # 0 in 32 bits
        *(
            (f"{HEADER}\n{row(**{column: '0'})}", f"line 2: {column}='0'.*> 0")
            for column in FIELDS[:4]
        ),
        *(
            (f"{HEADER}\n{row(**{column: '-1'})}", f"line 2: {column}='-1'.*>= 0")
            for column in FIELDS[4:]
        ),
    ],
)
def test_read_devices_refuses_bad_files(write, text, message):
    path = write(text)
    with pytest.raises(UserError, match=message) as caught:
        read_devices(path, 2, rng(), 1.0)
    assert str(caught.value).startswith(f"devices.csv={path}")
    assert "\n" not in str(caught.value)


def test_read_devices_refuses_missing_and_unreadable_files(tmp_path):
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    endless = tmp_path / "endless.csv"
    endless.write_text("a" * 200_000)  # more than a field may have
    for path in (tmp_path / "none.csv", tmp_path, binary, endless):
        with pytest.raises(UserError, match="devices.csv=.*cannot be read"):
            read_devices(str(path), 2, rng(), 1.0)


def test_read_devices_checks_the_share_of_the_memory(write):
    with pytest.raises(UserError, match="devices.free_memory=2"):
        read_devices(write(f"{HEADER}\n{ROW}\n"), 1, rng(), 2)


# --- dealt by labels


def test_follow_labels_gives_lower_labels_less_memory_by_hand():
    """Mean labels 2, 0, 0.5 and 1: clients 1, 2, 3, 0 from the weakest device on."""
    counts = np.array([[0, 0, 5], [3, 0, 0], [3, 0, 1], [0, 7, 0]])
    devices = draw(4)
    dealt = follow_labels(devices, counts)
    order, clients = np.argsort(np.asarray(devices.memory)), np.array([1, 2, 3, 0])
    expected = columns(devices)[order][[3, 0, 1, 2]]
    np.testing.assert_array_equal(columns(dealt), expected)
    np.testing.assert_array_equal(dealt.tier[clients], devices.tier[order])
