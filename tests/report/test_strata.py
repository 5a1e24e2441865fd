"""Strata by hand: `strata.csv` and the maps of strategies."""

import csv

import numpy as np
import pytest

from fedmoe_jax.report.strata import (
    final_strata,
    mean_strata,
    strata_pictures,
    write_strata_csv,
)

from .fake_runs import make_row, make_run

ROWS = [
    make_row(1),
    make_row(7, stratum_accuracy=[0.2, 0.4], personal_stratum_accuracy=[0.5, None]),
    make_row(8, stratum_accuracy=[0.4, 0.6], personal_stratum_accuracy=[0.7, None]),
]


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_final_strata_are_means_over_the_last_evaluations():
    np.testing.assert_allclose(final_strata(ROWS, "stratum_accuracy"), [0.3, 0.5])
    own = final_strata(ROWS, "personal_stratum_accuracy")
    np.testing.assert_allclose(own, [0.6, np.nan])
    assert final_strata(ROWS, "stratum_bits") is None


def test_final_strata_leave_out_evaluations_without_a_number():
    rows = [{"round": 95, "s": [0.5, None]}, {"round": 100, "s": [0.7, 0.6]}]
    np.testing.assert_allclose(final_strata(rows, "s"), [0.6, 0.6])


def test_write_strata_csv_by_hand(tmp_path):
    runs = [make_run(tmp_path, rows=ROWS), make_run(tmp_path, "older")]
    runs.append(make_run(tmp_path, "unfinished", rows=ROWS, arrays={}))
    write_strata_csv(tmp_path / "strata.csv", runs)
    records = read(tmp_path / "strata.csv")
    assert [(r["strategy"], r["stratum"]) for r in records] == [
        ("greedy", "a"),
        ("greedy", "b"),
        ("older", "a"),
        ("older", "b"),
    ]
    assert records[0] == {
        "strategy": "greedy",
        "seed": "0",
        "stratum": "a",
        "num_examples": "3",
        "global_accuracy": "0.3",
        "personal_accuracy": "0.6",
        "folder": "greedy-0",
    }
    assert [r["personal_accuracy"] for r in records] == ["0.6", "", "", ""]


def test_write_strata_csv_writes_nothing_of_runs_in_progress(tmp_path):
    write_strata_csv(tmp_path / "strata.csv", [make_run(tmp_path, arrays={})])
    assert not (tmp_path / "strata.csv").exists()


def test_mean_strata_is_over_seeds_that_know_the_stratum(tmp_path):
    other = [make_row(8, personal_stratum_accuracy=[0.8, 0.1])]
    group = [make_run(tmp_path, rows=rows) for rows in (ROWS, other)]
    found = mean_strata({"greedy": group}, "personal_stratum_accuracy", 2)
    np.testing.assert_allclose(found["greedy"], [0.7, 0.1])
    assert mean_strata({"greedy": group}, "personal_stratum_accuracy", 3) == {}


@pytest.mark.parametrize("unit", ["accuracy", "bits"])
def test_strata_pictures_show_numbers_in_their_unit(tmp_path, unit):
    rows = [make_row(8, **{"stratum_accuracy": [0.25, 0.5], f"stratum_{unit}": [2, 1]})]
    (picture,) = strata_pictures({"greedy": [make_run(tmp_path, rows=rows)]})
    assert picture.name == "global_strata"
    axes, bar = picture.figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == (["2.00", "1.00"] if unit == "bits" else ["200", "100"])
    assert ("Bits" in bar.get_ylabel()) == (unit == "bits")


def test_strata_pictures_of_older_runs_are_none(tmp_path):
    assert not list(strata_pictures({"greedy": [make_run(tmp_path)]}))
