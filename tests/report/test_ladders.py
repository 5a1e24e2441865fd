"""Runs by the values of one config field, by hand."""

import numpy as np
import pytest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.report.ladders import (
    find_known,
    find_ladders,
    find_value,
    ladder_rows,
    stack_values,
)

from .fake_runs import make_row, make_run

KEY, FIELD = "final_global_accuracy", "channel.csi"
FOUND = {1.0: (0.5, 0.7, 0.6), 0.7: (0.4, 0.5, 0.3)}


def make_values(tmp_path, found=FOUND, label="greedy", refresh=1):
    """A run of each value and seed."""
    runs = []
    for value, accuracies in found.items():
        for seed, accuracy in enumerate(accuracies):
            row = make_row(1, global_accuracy=accuracy)
            run = make_run(tmp_path, label, [row], seed=seed)
            channel = {"csi": value, "refresh": refresh}
            runs.append(run._replace(config=run.config | {"channel": channel}))
    return runs


def test_find_ladders_takes_runs_apart_that_differ_in_more(tmp_path):
    runs = make_values(tmp_path)
    stale = make_values(tmp_path, {0.7: (0.2,), 0.5: (0.1,)}, refresh=5)
    alone = make_values(tmp_path, {0.5: (0.2,)}, "random")
    older = [make_run(tmp_path, "greedy")]  # its config has no channel
    found = find_ladders([*runs, *stale, *alone, *older], FIELD)
    assert list(found) == ["greedy channel.refresh=1", "greedy channel.refresh=5"]
    assert [list(ladder) for ladder in found.values()] == [[0.7, 1.0], [0.5, 0.7]]
    assert found["greedy channel.refresh=1"][1.0][1][KEY] == 0.7


def test_labels_of_ladders_are_those_of_all_runs_without_the_field(tmp_path):
    runs = make_values(tmp_path) + make_values(tmp_path, label="random")
    stale = make_values(tmp_path, {0.7: (0.2,), 0.5: (0.1,)}, refresh=5)
    # A row that is in no ladder does not lengthen the names of those that are.
    other = make_values(tmp_path, {0.6: (0.2,)}, refresh=9)
    found = find_ladders([*runs, *stale, *other], FIELD)
    assert list(found) == ["greedy", "random", "greedy channel.refresh=5"]


@pytest.mark.parametrize("value", ["0.7", None])
def test_find_value_of_no_number(tmp_path, value):
    (run,) = make_values(tmp_path, {value: (0.5,)})
    assert find_value(run, FIELD) is None
    assert find_ladders([run, *make_values(tmp_path, {0.7: (0.5,)})], FIELD) == {}


def test_stack_values_leaves_out_seeds_that_lack_a_value(tmp_path):
    (ladder,) = find_ladders(make_values(tmp_path)[:-1], FIELD).values()
    np.testing.assert_allclose(stack_values(ladder, KEY), [[0.4, 0.5], [0.5, 0.7]])


def test_find_known_has_measures_with_a_number_in_the_order_of_keys(tmp_path):
    ladders = find_ladders(make_values(tmp_path), FIELD)
    keys = "simulated_minutes", "final_linked_accuracy", KEY, "nothing"
    assert list(find_known(ladders, MEASURES, keys)) == ["simulated_minutes", KEY]


def test_ladder_rows_are_means_and_differences_to_the_lowest(tmp_path):
    runs = make_values(tmp_path)
    runs[0].rows[0]["diverged"] = 1.0
    ladders = find_ladders(runs, FIELD)
    rows = ladder_rows(ladders, {KEY: MEASURES[KEY]}, "csi")
    # 10, 20 and 30 points: their mean, and 4.303 standard errors of 5.774.
    assert {label: cell.text for label, (cell,) in rows.items()} == {
        "greedy, csi 0.7": "40.0 ± 24.8",
        "greedy, csi 1": "+20.0 ± 24.8 †",
    }
