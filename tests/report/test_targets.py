"""Targets follow the configs, else the best control of the comparison."""

import pytest

from fedmoe_jax.report.runs import load_run
from fedmoe_jax.report.targets import SHARES, find_targets

from .fake_runs import load_runs, make_run, write_run


def values_of(runs):
    return [target.value for target in find_targets(runs)]


def test_targets_are_shares_of_the_best_control(tmp_path):
    runs = load_runs(tmp_path)  # the dense control ends at 0.4 and 0.6
    runs.append(load_run(write_run(tmp_path / "best", "load_balanced", 0, 0.9)))
    runs.append(load_run(write_run(tmp_path / "local", "local", 0, 0.1, 1)))
    assert values_of(runs) == pytest.approx([0.5 * share for share in SHARES])
    titles = [target.title for target in find_targets(runs)]
    assert titles[0] == "25.0 % (50 % of best control)"


def test_without_a_control_the_best_strategy_takes_its_place(tmp_path):
    runs = [
        load_run(write_run(tmp_path / name, name, 0, top))
        for name, top in (("greedy", 0.3), ("random", 0.8))
    ]
    assert values_of(runs) == pytest.approx([0.4, 0.64, 0.72, 0.76])
    assert "of random, the best strategy" in find_targets(runs)[0].about


def test_the_targets_of_the_configs_come_first(tmp_path):
    runs = load_runs(tmp_path)
    given = {"evaluation": {"targets": [0.8, 0.355]}}
    runs[2] = runs[2]._replace(config=runs[2].config | given)
    assert values_of(runs) == [0.355, 0.8]
    targets = find_targets(runs)
    assert [target.key for target in targets] == ["0.355", "0.8"]
    assert [target.title for target in targets] == ["35.5 %", "80 %"]


def test_no_targets_before_the_first_evaluation(tmp_path):
    assert find_targets([make_run(tmp_path, rows=[])]) == []
