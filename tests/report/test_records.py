"""Records of runs as CSV, by hand."""

import csv

from fedmoe_jax.report.records import write_records

from .fake_runs import make_row, make_run


def test_write_records_names_the_run_of_each_and_leaves_gaps(tmp_path):
    one = make_run(tmp_path)
    other = make_run(tmp_path, "random", rows=[make_row(1)], seed=3)
    records = {"greedy": [{"a": 1, "b": 2}, {"a": 3}], "random": [{"b": 4}]}
    path = tmp_path / "found.csv"
    write_records(path, [one, other], ["a", "b"], lambda run: records[run.label])
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["strategy", "seed", "a", "b", "folder"],
        ["greedy", "0", "1", "2", "greedy-0"],
        ["greedy", "0", "3", "", "greedy-0"],
        ["random", "3", "", "4", "random-3"],
    ]


def test_write_records_writes_nothing_of_runs_in_progress(tmp_path):
    path = tmp_path / "found.csv"
    write_records(path, [make_run(tmp_path, arrays={})], ["a"], lambda run: [{"a": 1}])
    assert not path.exists()
