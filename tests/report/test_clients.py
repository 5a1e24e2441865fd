"""The clients of runs: arrays, records and `clients.csv` by hand."""

import csv

import numpy as np

from fedmoe_jax.report.clients import find_clients, list_clients, write_clients_csv
from fedmoe_jax.report.runs import chance_of
from fedmoe_jax.report.tables import write_runs_csv

from .fake_runs import ARRAYS, make_run

MORE = ARRAYS | {"client_accuracy": np.array([0.5, np.nan, 0.123456789])}
MORE |= {"label_counts": np.array([[3, 4], [0, 0], [9, 0]])}
ONE = {name: ARRAYS[name][:1] for name in ("capacity", "tier", "participation")}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_find_clients_by_hand(tmp_path):
    found = find_clients(make_run(tmp_path, arrays=MORE))
    assert found.num_examples.tolist() == [7, 0, 9]
    assert found.tier.tolist() == ["phone", "desk", "desk"]
    assert found.capacity.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(found.accuracy, MORE["client_accuracy"])
    assert find_clients(make_run(tmp_path, arrays={})) is None


def test_find_clients_of_pooled_data_have_no_devices(tmp_path):
    found = find_clients(make_run(tmp_path, arrays=MORE | ONE))
    for values in (found.capacity, found.participation, found.tier):
        assert len(values) == 0


def test_list_clients_leaves_unknown_numbers_empty(tmp_path):
    records = list(list_clients(make_run(tmp_path, arrays=MORE | ONE)))
    assert [r["accuracy"] for r in records] == ["0.5", "", "0.123457"]
    assert {r["tier"] for r in records} == {""}
    older = list(list_clients(make_run(tmp_path)))
    assert [r["accuracy"] for r in older] == ["", "", ""]
    assert [r["participation"] for r in older] == [1, 4, 4]


def test_write_clients_csv_has_the_bits_of_text(tmp_path):
    text = MORE | {"client_bits": np.array([2.5, np.nan, 1.25])}
    runs = [make_run(tmp_path, arrays=text), make_run(tmp_path, "images", arrays=MORE)]
    write_clients_csv(tmp_path / "clients.csv", runs)
    bits = [record["bits"] for record in read(tmp_path / "clients.csv")]
    assert bits == ["2.5", "", "1.25", "", "", ""]
    write_clients_csv(tmp_path / "clients.csv", runs[1:])
    assert "bits" not in read(tmp_path / "clients.csv")[0]
    assert chance_of(runs[0]) is None and chance_of(runs[1]) > 0


def test_write_clients_csv_has_a_row_per_run_and_client(tmp_path):
    runs = [
        make_run(tmp_path, arrays=MORE),
        make_run(tmp_path, "random", seed=1),
        make_run(tmp_path, "late", arrays={}),
    ]
    write_clients_csv(tmp_path / "clients.csv", runs)
    first, *_, last = records = read(tmp_path / "clients.csv")
    assert len(records) == 6
    assert first == {
        "strategy": "greedy",
        "seed": "0",
        "client": "0",
        "tier": "phone",
        "capacity": "1",
        "participation": "1",
        "num_examples": "7",
        "accuracy": "0.5",
        "folder": "greedy-0",
    }
    assert (last["strategy"], last["client"]) == ("random", "2")


def test_write_clients_csv_has_varied_fields(tmp_path):
    one, other = make_run(tmp_path, arrays=MORE), make_run(tmp_path, arrays=MORE)
    other.config["weights"] = {"fitness": 0.5, "usage": 0.9}
    write_clients_csv(tmp_path / "clients.csv", [one, other])
    records = read(tmp_path / "clients.csv")
    assert [r["weights.usage"] for r in records] == ["0.5"] * 3 + ["0.9"] * 3


def test_write_clients_csv_writes_nothing_of_runs_in_progress(tmp_path):
    write_clients_csv(tmp_path / "clients.csv", [make_run(tmp_path, arrays={})])
    assert not (tmp_path / "clients.csv").exists()


def test_write_clients_csv_traces_every_row_as_runs_csv_does(tmp_path):
    run = make_run(tmp_path, arrays=MORE)
    commit = {"commit": "a" * 40, "dirty": False, "device": "cpu"}
    origins = [{"first_round": 1, "made_by": commit}]
    run = run._replace(summary={"made_by": commit}, origins=origins)
    write_clients_csv(tmp_path / "clients.csv", [run, make_run(tmp_path, "random")])
    write_runs_csv(tmp_path / "runs.csv", [run])
    first, *_, last = read(tmp_path / "clients.csv")
    (row,) = read(tmp_path / "runs.csv")
    traced = {name: value for name, value in row.items() if "made_by" in name}
    assert traced.keys() == {f"made_by.{name}" for name in [*commit, "earlier"]}
    assert {name: first[name] for name in traced} == traced
    assert last["made_by.commit"] == ""
