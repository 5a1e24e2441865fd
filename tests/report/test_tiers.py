"""Clients by the kinds of their devices, by hand."""

import numpy as np

from fedmoe_jax.report.tiers import tiers_section

from .fake_runs import ARRAYS, make_run

SCORED = ARRAYS | {"client_accuracy": np.array([0.5, 0.7, 0.9])}
EVEN = SCORED | {"participation": np.array([2, 2, 2])}


def test_tiers_section_by_hand(tmp_path):
    """Four rounds; the phone has counted in one, the desks in all."""
    unknown = SCORED | {"client_accuracy": np.array([np.nan, 0.5, np.nan])}
    runs = [
        make_run(tmp_path, arrays=SCORED),
        make_run(tmp_path, "random", arrays=EVEN),
    ]
    runs.append(make_run(tmp_path, "fedavg", arrays=unknown))
    (sheet,) = tiers_section(runs).sheets
    phone, desk = ("phone, rounds %", "desk, rounds %")
    heads = ("Strategy", phone, desk, "phone, personal %", "desk, personal %")
    assert tuple(sheet.heads) == heads
    texts = {row: [cell.text for cell in cells] for row, cells in sheet.rows.items()}
    seed = " (1 seed)"
    assert texts == {
        "greedy": [f"25.0{seed}", f"100.0{seed}", f"50.0{seed}", f"80.0{seed}"],
        "random": [f"50.0{seed}", f"50.0{seed}", f"50.0{seed}", f"80.0{seed}"],
        "fedavg": [f"25.0{seed}", f"100.0{seed}", "no data", f"50.0{seed}"],
    }


def test_tiers_section_is_the_mean_over_seeds(tmp_path):
    better = SCORED | {"client_accuracy": np.array([0.7, 0.7, 0.9])}
    runs = [
        make_run(tmp_path, arrays=each, seed=n)
        for n, each in enumerate((SCORED, better))
    ]
    (sheet,) = tiers_section(runs).sheets
    assert sheet.rows["greedy"][2].value == 60.0


def test_no_section_where_all_count_alike_or_there_is_one_kind(tmp_path):
    assert tiers_section([make_run(tmp_path, arrays=EVEN)]) is None
    assert tiers_section([make_run(tmp_path, arrays=ARRAYS)]) is None  # not scored
    one = SCORED | {"tier_names": np.array(["phone"]), "tier": np.zeros(3, int)}
    assert tiers_section([make_run(tmp_path, arrays=one)]) is None
    assert tiers_section([make_run(tmp_path)._replace(arrays={})]) is None
