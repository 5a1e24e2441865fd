"""Runs apart by what their clients and data are like."""

from fedmoe_jax.report.regimes import UNCHANGED, find_given, split_regimes

from .fake_runs import make_run


def change(run, summary=None, **fields):
    config = dict(run.config)
    for name, value in fields.items():
        group, _, leaf = name.partition("__")
        config[group] = {**config[group], leaf: value} if leaf else value
    return run._replace(config=config, summary=summary or {})


def make_regimes(tmp_path):
    return [
        change(make_run(tmp_path, label), **fields)
        for label in ("greedy", "fedavg")
        for fields in (
            {},
            {"partition__kind": "iid"},
            {"partition__kind": "iid", "num_clients": 9},
        )
    ]


def test_regimes_are_named_by_what_is_unusual(tmp_path):
    regimes = split_regimes(make_regimes(tmp_path))
    assert {name: [run.label for run in runs] for name, runs in regimes.items()} == {
        "partition.kind=dirichlet": ["greedy", "fedavg"],
        UNCHANGED: ["greedy", "fedavg"],
        "num_clients=9": ["greedy", "fedavg"],
    }


def test_what_a_system_chooses_makes_no_regime(tmp_path):
    runs = [
        make_run(tmp_path),
        change(make_run(tmp_path), client__learning_rate=0.5, fitness__rate=0.9),
        change(make_run(tmp_path), model__shared_width=8, max_held=1),
        change(make_run(tmp_path, seed=1), data__dir="/elsewhere"),
    ]
    assert list(split_regimes(runs)) == [UNCHANGED] and find_given(runs) == []


def test_a_field_that_no_run_reads_makes_no_regime(tmp_path):
    idle = {"idle": ["partition.alpha"]}
    runs = [
        change(make_run(tmp_path), summary=idle, partition__alpha=alpha)
        for alpha in (0.1, 0.5)
    ]
    assert find_given(runs) == []
    runs[0] = runs[0]._replace(summary={})
    assert find_given(runs) == ["partition.alpha"]
