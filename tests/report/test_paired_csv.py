"""`paired.csv` has the numbers of the tables."""

import csv

import pytest

from fedmoe_jax.report.paired import final_measures
from fedmoe_jax.report.paired_csv import write_paired_csv

from .fake_runs import IN_PARTS, load_three, make_labels

KEY = "final_global_accuracy"


def test_write_paired_csv_has_the_numbers_of_the_tables(tmp_path):
    path, runs = tmp_path / "paired.csv", load_three(tmp_path)
    write_paired_csv(path, runs, "")
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    first = records[0]
    assert (first["strategy"], first["baseline"]) == ("greedy", "fedavg")
    assert first["measure"] == KEY and float(first["difference"]) == pytest.approx(15)
    assert float(first["half_width"]) == pytest.approx(63.531, abs=1e-3)
    counts = [first[name] for name in ("pairs", "wins", "losses", "sign_test_p")]
    assert counts == ["2", "2", "0", "0.5"]
    measures = {record["measure"] for record in records}
    assert len(measures) == len(final_measures(runs))
    assert len(records) == 2 * len(measures)


def test_write_paired_csv_traces_the_runs_of_both_labels(tmp_path):
    runs = make_labels(tmp_path, greedy={0: 0.4, 1: 0.4}, random={0: 0.5, 1: 0.5})
    origin = lambda run: {"commit": "a1b2", "device": run.label}
    traced = [
        run._replace(origins=[{"first_round": 1, "made_by": origin(run)}])
        for run in runs
    ]
    write_paired_csv(tmp_path / "paired.csv", traced, "greedy")
    with (tmp_path / "paired.csv").open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            assert record["made_by.commit"] == "a1b2"
            assert record["made_by.device"] == "varies"


def test_write_paired_csv_has_the_parts_once(tmp_path):
    write_paired_csv(tmp_path / "x.csv", make_labels(tmp_path, **IN_PARTS), "random")
    lines = (tmp_path / "x.csv").read_text().splitlines()[1:]
    pairs = [line.split(",")[:2] for line in lines if KEY in line]
    assert pairs == [
        ["flex_moe_shared_gate", "random"],
        ["flex_moe", "random"],
        ["flex_moe", "flex_moe_shared_gate"],
    ]


def test_write_paired_csv_leaves_out_what_is_unknown(tmp_path):
    runs = make_labels(tmp_path, greedy={0: 0.4}, random={0: 0.5}, local={1: 0.5})
    write_paired_csv(tmp_path / "paired.csv", runs, "greedy")
    lines = (tmp_path / "paired.csv").read_text().splitlines()
    assert lines[1].startswith("random,greedy,final_global_accuracy,10,,1,1,0,1,0")
    assert lines[2] == "local,greedy,final_global_accuracy,,,0,0,0,,0"
    write_paired_csv(tmp_path / "none.csv", runs[:1], "")
    assert not (tmp_path / "none.csv").exists()
