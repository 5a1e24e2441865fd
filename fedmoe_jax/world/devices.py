"""The clients' devices: drawn from presets or read from a CSV file."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.options import UserError
from fedmoe_jax.types import Devices


class Tier(NamedTuple):
    """The medians of one kind of device.

    Attributes:
      memory: bytes, of which training gets the share `free_memory`.
      flops: floating-point operations per second, sustained in training.
      upload: bytes per second.
      download: bytes per second.
      latency: seconds one way between the device and the server.
      power: watts drawn by training.
      radio: watts drawn while sending or receiving, beyond idling.
    """

    memory: float
    flops: float
    upload: float
    download: float
    latency: float
    power: float
    radio: float


POSITIVE = Tier._fields[:4]  # a device may lack the others
WIDEST = 5.0  # spread; half of the devices are then 29 times off the median or more
ORDERS = ("random", "labels")  # in which devices are dealt to clients
GIB = 2**30  # memory chips come in powers of two
# Share of the peak that training sustains, an assumption: LLM training gets 0.2 to 0.46
# of it (PaLM, arXiv 2204.02311, table 3), small models may get less.
SUSTAINED = 0.3
# Speedtest Global Index, world medians of fixed broadband in the first quarter of 2023:
# 34.92 Mbit/s up, 79.0 Mbit/s down, 9 ms there and back. A gigabit Ethernet
# transceiver draws 0.45 to 1 W (Texas Instruments, SSZTAM3); the upper end is taken.
HOME = dict(upload=34.92e6 / 8, download=79.0e6 / 8, latency=0.0045, radio=1.0)
# Gigabit Ethernet at its nominal speed; latency assumed as from home.
OFFICE = HOME | dict(upload=125e6, download=125e6)

# The first three are round numbers of the order of magnitude of consumer devices, not
# measurements. The others are real devices: peaks of 32-bit arithmetic without tensor
# cores times `SUSTAINED`, all memory there is, and the most that the whole board or
# module may draw, of graphics cards without their host; which network, is assumed.
TIERS = {
    # 4 GB; 0.1 TFLOP/s; mobile network of 40 and 120 Mbit/s
    "phone": Tier(4e9, 1e11, 5e6, 15e6, latency=0.015, power=5.0, radio=2.0),
    # 8 GB; 1 TFLOP/s; home network of 120 and 400 Mbit/s
    "laptop": Tier(8e9, 1e12, 15e6, 50e6, latency=0.005, power=50.0, radio=2.0),
    # 24 GB; 10 TFLOP/s; wired network of 1 Gbit/s both ways
    "workstation": Tier(24e9, 1e13, 125e6, 125e6, latency=0.005, power=400, radio=1.0),
    # Product brief: 8 GB, 4 Cortex-A72; 1.8 GHz (C0). 8 operations a cycle (one 4-wide
    # multiply-add, measured by vfpbench, wlog.flatlib.jp/2015/10/30/n1787). 7.2 W at
    # the wall in LINPACK, at 0.41 of the peak (geerlingguy/sbc-reviews, issue 4).
    "raspberry_pi_4": Tier(8 * GIB, SUSTAINED * 57.6e9, power=7.2, **HOME),
    # Module data sheet: 4 GB, 128 CUDA cores at 921.6 MHz, 2 operations a cycle; 10 W.
    "jetson_nano": Tier(4 * GIB, SUSTAINED * 0.236e12, power=10.0, **HOME),
    # Series data sheet: 8 GB, 1024 CUDA cores at 625 MHz, 2 operations a cycle; 15 W.
    "jetson_orin_nano": Tier(8 * GIB, SUSTAINED * 1.28e12, power=15.0, **HOME),
    # Series technical brief: 64 GB, 5.3 TFLOP/s, 60 W.
    "jetson_agx_orin": Tier(64 * GIB, SUSTAINED * 5.3e12, power=60.0, **HOME),
    # Data sheet: 16 GB, 8.1 TFLOP/s, 70 W.
    "t4": Tier(16 * GIB, SUSTAINED * 8.1e12, power=70.0, **OFFICE),
    # Ada architecture whitepaper: 24 GB, 82.6 TFLOP/s, 450 W.
    "rtx_4090": Tier(24 * GIB, SUSTAINED * 82.6e12, power=450.0, **HOME),
}


def draw_devices(
    rng: np.random.Generator,
    num_clients: int,
    tiers: tuple[str, ...],
    shares: tuple[float, ...],
    spread: float,
    free_memory: float,
) -> Devices:
    """Draws every client's device: a tier, and log-normal values about its medians.

    Args:
      rng: NumPy generator, advanced.
      num_clients: N.
      tiers: names from `TIERS`.
      shares: share >= 0 of the population in each tier, summing to 1; the counts are
        exact up to rounding (largest remainder), only the tier of each client is drawn.
      spread: standard deviation >= 0 of the logarithm of each value within a tier.
      free_memory: share in (0, 1] of the memory that training gets.

    Returns:
      Devices, leaves [N]; the values of a client are independent given its tier.

    Raises:
      UserError: on unknown tiers, shares that do not fit, a negative spread or a share
        of the memory outside its range.
    """
    _check(tiers, shares, spread)
    tier = rng.permutation(
        np.repeat(np.arange(len(tiers)), _count(num_clients, shares))
    )
    # Two draws, so that the first four values are those of versions without the rest.
    factors = [np.exp(spread * rng.standard_normal((num_clients, n))) for n in (4, 3)]
    medians = np.array([TIERS[name] for name in tiers])[tier]
    return _build(medians * np.concatenate(factors, axis=1), tier, free_memory)


def read_devices(
    path: str, num_clients: int, rng: np.random.Generator, free_memory: float
) -> tuple[Devices, tuple[str, ...]]:
    """Reads the clients' devices from a CSV file with a header.

    Its columns are the fields of `Tier`, in any order, and perhaps tier, a name. Only
    latency, power and radio may be 0. With exactly N rows, row c is client c; otherwise
    each client draws a row. `devices.order` may deal them anew.

    Args:
      path: of the file.
      num_clients: N.
      rng: NumPy generator, advanced where rows are drawn, uniformly with replacement.
      free_memory: share in (0, 1] of the memory that training gets.

    Returns:
      Devices with [N] float32 leaves, and the names of the tiers in the order of the
      file, `("device",)` where it has no such column.

    Raises:
      UserError: on a file, column or value that is missing or not allowed.
    """
    rows = _read_rows(path)
    values = np.array([[row[column] for column in Tier._fields] for row in rows])
    names = tuple(dict.fromkeys(row["tier"] for row in rows))
    tier = np.array([names.index(row["tier"]) for row in rows])
    own = len(rows) == num_clients
    chosen = (
        np.arange(num_clients) if own else rng.integers(len(rows), size=num_clients)
    )
    return _build(values[chosen], tier[chosen], free_memory), names


def follow_labels(devices: Devices, label_counts: np.ndarray) -> Devices:
    """The devices dealt anew: the lower a client's labels, the less memory it has.

    Under label skew weak devices then have more of the first classes. Of data with
    groups, or of text, these are strata: the first groups, or speakers.

    Args:
      devices: leaves [N].
      label_counts: [N, L] int, examples of each client by label (or stratum).
    """
    numbers = np.arange(label_counts.shape[1])
    mean = label_counts @ numbers / np.maximum(label_counts.sum(axis=1), 1)
    dealt = np.empty(len(mean), int)
    dealt[np.argsort(mean, kind="stable")] = np.argsort(devices.memory, kind="stable")
    return jax.tree.map(lambda leaf: leaf[dealt], devices)


def unlimited_device() -> Devices:
    """One device that can do everything at once and at no cost, [1]."""
    endless, nothing = jnp.full(1, jnp.inf), jnp.zeros(1)
    values = dict(zip(Tier._fields, 4 * [endless] + 3 * [nothing], strict=True))
    return Devices(tier=jnp.zeros(1, jnp.int32), **values)


def _build(values: np.ndarray, tier: np.ndarray, free_memory: float) -> Devices:
    """Devices from values [N, 7] in the order of `Tier`, and tiers [N]."""
    if not 0 < free_memory <= 1:
        raise UserError(
            f"devices.free_memory={free_memory} is not allowed; allowed: (0, 1]"
        )
    columns = jnp.asarray((values * ([free_memory] + 6 * [1.0])).T, jnp.float32)
    named = dict(zip(Tier._fields, columns, strict=True))
    return Devices(tier=jnp.asarray(tier, jnp.int32), **named)


def _check(tiers: tuple[str, ...], shares: tuple[float, ...], spread: float) -> None:
    for name in tiers:
        if name not in TIERS:
            allowed = ", ".join(TIERS)
            raise UserError(
                f"devices.tiers has {name!r}, which is unknown; allowed: {allowed}"
            )
    if len(shares) != len(tiers):
        raise UserError(
            f"devices.shares={tuple(shares)} is not allowed; allowed: one share for "
            f"each of the {len(tiers)} devices.tiers"
        )
    numbers = all(isinstance(share, int | float) and share >= 0 for share in shares)
    if not numbers or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"devices.shares={tuple(shares)} is not allowed; allowed: numbers >= 0 "
            "that sum to 1"
        )
    if not 0 <= spread <= WIDEST:
        raise UserError(
            f"devices.spread={spread} is not allowed; allowed: [0, {WIDEST}]"
        )


def _count(num_clients: int, shares: tuple[float, ...]) -> np.ndarray:
    """Whole numbers that sum to N, as near to the shares as possible."""
    exact = num_clients * np.asarray(shares) / np.sum(shares)
    # A share such as 0.29 of 100 is 28.999... in binary; it must not lose a client.
    counts = np.floor(exact + 1e-9).astype(int)
    rest = num_clients - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def _read_rows(path: str) -> list[dict]:
    """Every row as numbers by column, and its tier."""
    try:
        # Spreadsheets write a byte order mark, which is no part of the first name.
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
        lines = lines.splitlines()
    except (OSError, ValueError) as error:
        raise _fault(
            path, f"cannot be read ({type(error).__name__}); allowed: a CSV file"
        ) from None
    reader = csv.DictReader(lines, skipinitialspace=True)
    try:
        _check_header(path, reader.fieldnames or [])
        rows = [_read_row(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise _fault(path, f"cannot be read ({error}); allowed: a CSV file") from None
    if not rows:
        raise _fault(path, "has no rows; allowed: one row or more below the header")
    return rows


def _check_header(path: str, header: Sequence[str]) -> None:
    for column in Tier._fields:
        if column not in header:
            raise _fault(
                path,
                f"has no column {column!r}; allowed: a header with each of "
                f"{', '.join(Tier._fields)}",
            )
    for column in header:
        if column not in (*Tier._fields, "tier") or header.count(column) > 1:
            allowed = f"allowed: {', '.join(Tier._fields)} and tier, each once"
            fault = f"has the column {column!r}, which is unknown or there twice"
            raise _fault(path, f"{fault}; {allowed}")


def _read_row(place: str, row: dict) -> dict:
    if None in row or None in row.values():
        raise _fault(
            place,
            "has more or fewer values than the header; allowed: one for each column",
        )
    numbers = {
        column: _read_number(place, column, row[column]) for column in Tier._fields
    }
    tier = row.get("tier", "device").strip()
    if not tier:
        raise _fault(place, "tier='' is not allowed; allowed: a name")
    return numbers | {"tier": tier}


def _read_number(place: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    with np.errstate(over="ignore", under="ignore"):
        kept = np.float32(value)  # what is stored must be in the range, too
    allowed = kept > 0 if column in POSITIVE else kept >= 0
    if not (np.isfinite(kept) and allowed):
        sign = ">" if column in POSITIVE else ">="
        fault = f"{column}={text!r} is not allowed; allowed: finite numbers {sign} 0"
        raise _fault(place, fault)
    return value


def _fault(place: str, fault: str) -> UserError:
    return UserError(f"devices.csv={place}: {fault}")
