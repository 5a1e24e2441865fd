"""Tuning: equal budgets, halved by a measure that the test examples have no part in."""

import json
import math

import pytest
from factories import tiny_study

from fedmoe_jax.options import UserError
from fedmoe_jax.report.tuning import Trial
from fedmoe_jax.train import tune as tuning
from fedmoe_jax.train.tune import (
    keep_half,
    list_settings,
    plan_rounds,
    plan_trials,
    rank,
    tune,
)

RATES = (0.01, 0.02)
SERVERS = ("", "server.optimizer=fedadam,server.learning_rate=0.01")


def study(strategies=("greedy", "fedavg"), **fields):
    config = tiny_study(strategies, seeds=(3, 4), **fields)
    config.tune.rates, config.tune.servers = RATES, SERVERS
    return config


def test_settings_are_rates_times_servers():
    found = list_settings(study())
    expected = [
        "client.learning_rate=0.01",
        f"client.learning_rate=0.01,{SERVERS[1]}",
        "client.learning_rate=0.02",
        f"client.learning_rate=0.02,{SERVERS[1]}",
    ]
    assert found == {"greedy": expected, "fedavg": expected}


def test_what_a_strategy_overwrites_is_tried_once_and_its_own_field_instead():
    config = study(("fedadam",))
    config.tune.servers = (*SERVERS, "fedadam: fedadam.server_learning_rate=0.1")
    assert list_settings(config) == {
        "fedadam": [
            "client.learning_rate=0.01",
            "client.learning_rate=0.01,fedadam.server_learning_rate=0.1",
            "client.learning_rate=0.02",
            "client.learning_rate=0.02,fedadam.server_learning_rate=0.1",
        ]
    }


def test_more_than_eight_settings_are_refused():
    config = study()
    config.tune.rates = (0.01, 0.02, 0.03, 0.04, 0.05)
    with pytest.raises(
        UserError, match="are 10 settings of greedy; allowed: at most 8"
    ):
        list_settings(config)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rates": ()}, r"tune.rates=\(\) is not allowed; allowed: numbers"),
        ({"rates": ("a",)}, r"tune.rates=\('a',\) is not allowed; allowed: numbers"),
        ({"servers": (1,)}, r"tune.servers=\(1,\) is not allowed; allowed: changes"),
    ],
)
def test_bad_lists_are_refused(fields, told, tmp_path):
    config = study()
    with config.ignore_type():
        config.tune.update(fields)
    with pytest.raises(UserError, match=told):
        tune(config, tmp_path, stop=lambda: False, profile=False)
    assert list(tmp_path.iterdir()) == []


def test_the_first_half_of_the_budget_is_a_third_of_the_rounds():
    config = study()
    config.num_rounds, config.eval_every = 40, 2
    assert plan_rounds(config) == (14, 40)
    config.num_rounds = 4
    assert plan_rounds(config) == (2, 4)


def test_trials_are_a_comparison_on_one_seed():
    trial = plan_trials(study(), {"greedy": ["a=1", "b=2"], "fedavg": ["c=3"]}, 2)
    assert tuple(trial.compare.changes) == ("greedy: a=1", "greedy: b=2", "fedavg: c=3")
    assert trial.compare.seeds == (3,) and trial.num_rounds == 2


def make_trial(*values):
    return Trial(*values, made_by={})


TRIALS = [
    make_trial("a", "x", 2, 0.5),
    make_trial("a", "y", 2, math.nan),
    make_trial("a", "z", 2, 0.7),
    make_trial("b", "x", 2, math.nan),
    make_trial("b", "y", 2, 0.1),
]


def test_the_better_half_goes_on_and_what_diverged_comes_last():
    found = [trial.change for trial in rank(TRIALS, "a", "global_accuracy")]
    assert found == ["z", "x", "y"]
    assert keep_half(TRIALS, ["a", "b"], "m") == {"a": ["z", "x"], "b": ["y"]}


def test_fewer_bits_are_better():
    found = [trial.change for trial in rank(TRIALS, "a", "validation_personal_bits")]
    assert found == ["x", "z", "y"]


def test_the_choice_says_where_a_better_rate_may_lie_beyond():
    config = study()
    config.tune.rates, config.tune.measure = (0.01, 0.02, 0.03), "m"
    rate = "client.learning_rate="
    trials = [
        make_trial("a", f"{rate}0.02", 4, 0.5),
        make_trial("a", f"{rate}0.01,server.clip=1.0", 4, 0.25),
        make_trial("b", f"{rate}0.03", 4, 0.75),
    ]
    assert list(tuning.describe_choice(trials, ["a", "b"], config)) == [
        f"a: {rate}0.02, m 0.500",
        f"b: {rate}0.03, m 0.750; the highest of tune.rates, a better one may lie "
        "beyond",
    ]


def test_a_validation_measure_needs_validation_examples():
    config = study()
    config.tune.measure = "validation_personal_accuracy"
    with pytest.raises(UserError, match=r"partition\.validation_share=0\.0; allowed"):
        tuning.check_tune(config)
    config.partition.validation_share = 0.2
    tuning.check_tune(config)


@pytest.mark.slow
def test_tune_writes_the_settings_of_the_best_trials(tmp_path, monkeypatch):
    """By `global_accuracy` here; a second call finds all of it done."""
    config = study(("greedy",))
    config.tune.measure = "global_accuracy"
    trials, whole = tune(config, tmp_path, stop=lambda: False, profile=False)
    assert whole and [trial.rounds for trial in trials] == [2] * 4 + [4] * 2
    best = rank(trials[4:], "greedy", "global_accuracy")[0]
    written = json.loads((tmp_path / "settings.json").read_text())
    expected = f"greedy: {best.change},tuned=global_accuracy"
    assert written == {"settings": [expected]}
    seen = []
    monkeypatch.setattr(tuning, "write_json", lambda *_: seen.append(_))
    assert tune(config, tmp_path, stop=lambda: False, profile=False) == (trials, True)

    final = tiny_study(("greedy", "random"), seeds=(0,))
    final.compare.settings = (expected,)
    members = dict(tuning_members(final))
    assert members["greedy-seed0"].tuned == "global_accuracy"
    assert members["random-seed0"].tuned == ""
    rate = float(best.change.split("=")[1].split(",")[0])
    assert members["greedy-seed0"].client.learning_rate == rate


def tuning_members(config):
    from fedmoe_jax.train.compare import list_members

    return list_members(config)


@pytest.mark.slow
def test_a_measure_that_no_row_has_is_refused(tmp_path):
    config = study(("greedy",))
    config.tune.rates, config.tune.servers = (0.01,), ("",)
    config.tune.measure = "none_such"
    with pytest.raises(UserError, match="tune.measure='none_such' is in no row of"):
        tune(config, tmp_path, stop=lambda: False, profile=False)
