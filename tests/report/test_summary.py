"""The numbers of a whole run, by hand from its rows."""

import pytest

from fedmoe_jax.measures import LOST, MEASURES, OUTCOMES
from fedmoe_jax.options import Measure
from fedmoe_jax.report import summary

from .fake_runs import NOTHING, ROWS, make_row

CLOCK = ("seconds", "evaluation_seconds", "save_seconds", "compile_seconds")


def test_measure_run_by_hand():
    found = summary.measure_run(ROWS, MEASURES)
    assert found["total_bytes_up"] == 8e6 and found["total_bytes_down"] == 16e6
    assert found["total_simulated_seconds"] == 120
    assert found["total_joules"] == 2000
    assert found["wasted_bytes_share"] == 0.25  # 6 of 24 MB
    assert found["mean_lost_clients"] == 1.25  # 4 without memory, 1 dropped
    assert found["mean_dropped_clients"] == 0.25
    assert found["mean_stale_clients"] == 0.5
    assert found["mean_capacity_violations"] == 1
    assert found["mean_capacity_error"] == pytest.approx(1.75 / 4)
    assert found["final_participation_jain"] == 0.8
    assert found["drift_alarms"] == 2


def test_measure_run_counts_every_outcome_as_lost_or_not():
    counted = {"merged_clients", "stale_clients"}
    assert counted | set(LOST) == {f"{name}_clients" for name in OUTCOMES}
    assert not counted & set(LOST)
    none = dict.fromkeys([*counted, *LOST], 0.0)
    for field in none:
        found = summary.measure_run([make_row(1, **none | {field: 3.0})], MEASURES)
        assert found["mean_lost_clients"] == (0 if field in counted else 3)


def test_measure_run_leaves_out_what_old_rows_lack():
    old = [{"round": 1, "bytes_up": 3.0, "bytes_down": 4.0}]
    found = summary.measure_run(old, MEASURES)
    evaluated = {key for key, m in MEASURES.items() if m.over and m.evaluated}
    assert {key: found.pop(key) for key in evaluated} == dict.fromkeys(evaluated)
    assert found == {
        "total_bytes_up": 3.0,
        "total_bytes_down": 4.0,
        "megabytes_up": 3e-6,
        "megabytes_down": 4e-6,
        "megabytes": 7e-6,
    }


def test_measure_run_wastes_no_share_where_nothing_travels():
    found = summary.measure_run([make_row(1, **NOTHING)], MEASURES)
    assert "wasted_bytes_share" not in found and found["total_wasted_bytes"] == 0


TARGETS = {"0.35": 0.35, "0.4": 0.4, "0.45": 0.45}


def test_reach_targets_by_hand():
    earlier = [*ROWS[:2], make_row(3, global_accuracy=0.36), ROWS[3]]
    sent = {"mb": Measure("bytes_up", unit=1e6, budget="mb_to"), "x": Measure("x")}
    found = summary.reach_targets(earlier, TARGETS, sent)
    assert found["rounds_to"] == {"0.35": 3, "0.4": 4, "0.45": None}
    assert found["mb_to"] == {"0.35": 6.0, "0.4": 8.0, "0.45": None}
    never = dict.fromkeys(TARGETS)
    assert summary.reach_targets([], TARGETS, sent) == {
        "rounds_to": never,
        "mb_to": never,
    }


def test_make_summary_has_the_targets_of_the_config():
    made = summary.make_summary(ROWS, {}, MEASURES, (0.35, 0.4, 0.45))
    # 0.42 in round 4 is the first above 0.35 and 0.40.
    assert made["rounds_to"] == {"0.35": 4, "0.4": 4, "0.45": None}
    assert made["simulated_seconds_to"] == {"0.35": 120.0, "0.4": 120.0, "0.45": None}
    assert made["megabytes_to"]["0.35"] == 24.0
    assert summary.make_summary(ROWS, {}, MEASURES, ())["rounds_to"] == {}


def test_make_summary_adds_seconds_that_are_in_no_row():
    rows = [make_row(1, seconds=3.0, save_seconds=None), make_row(2, seconds=1.0)]
    spent = {"compile_seconds": 5.0, "save_seconds": 1.0}
    made = summary.make_summary(rows, spent, MEASURES, ())
    assert made["num_rounds"] == 2 and made["wall_seconds"] == 10
    assert made["train_share"] == 0.4 and made["compile_share"] == 0.5
    assert made["save_share"] == 0.1 and made["evaluate_share"] == 0
    assert made["rounds_per_second"] == 0.5 and made["examples_per_second"] == 5
    assert made["rounds_to_95_percent_of_final"] is None  # it has no evaluation


def test_measure_speed_by_hand():
    spent = dict(zip(CLOCK, (4.0, 2.0, 1.0, 1.0), strict=True))
    rows = [
        make_row(1, examples=30, wasted_share=0.5),
        make_row(2, examples=50, wasted_share=0.0),
    ]
    assert summary.measure_speed(spent, rows) == {
        "rounds_per_second": 0.5,
        "examples_per_second": 20,
        "mean_wasted_share": 0.25,
        "wall_seconds": 8,
        "train_share": 0.5,
        "evaluate_share": 0.25,
        "save_share": 0.125,
        "compile_share": 0.125,
    }


def test_describe_speed_is_one_line():
    spent = dict(zip(CLOCK, (0.5, 0.25, 0.15, 0.1), strict=True))
    rows = [make_row(1, examples=12345, wasted_share=0.125)]
    speed = summary.measure_speed(spent, rows)
    line = (
        "2 rounds/s  24,690 examples/s  padding 12.5%  "
        "time: train 50%  evaluate 25%  save 15%  compile 10%"
    )
    assert summary.describe_speed(speed) == line
    lost = summary.describe_speed(speed | {"mean_lost_clients": 1.25})
    assert lost == line + "  lost 1.2 clients a round"
