"""Scores after a local round: the run's own at its own rate, and choices by hand."""

import pytest

import fedmoe_jax
from benchmarks.local_rounds import (
    choose,
    count_again,
    read_scores,
    score_run,
    tabulate,
    write_scores,
)
from fedmoe_jax.configs import default
from fedmoe_jax.options import UserError

# Of three seeds: the mean of the others is best at 0.1, 0.1 and 0.01.
ROW = {0: {0.1: 0.5, 0.01: 0.6}, 1: {0.1: 0.5, 0.01: 0.6}, 2: {0.1: 0.9, 0.01: 0.4}}


def test_choose_goes_by_the_other_seeds():
    assert choose(ROW) == {0: 0.1, 1: 0.1, 2: 0.01}
    with pytest.raises(UserError, match="allowed: two or more"):
        choose({0: ROW[0]})


def test_tabulate_by_hand():
    table = tabulate({"a b=1": ROW}, [0.1, 0.03, 0.01], {"a b=1": "tuned"})
    # (0.5 + 0.5 + 0.9) / 3, (0.6 + 0.6 + 0.4) / 3; chosen (0.5 + 0.5 + 0.4) / 3
    assert table.splitlines() == [
        "| Strategy | Rates | At 0.1 % | At 0.03 % | At 0.01 % | At the chosen % |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `a b=1` | tuned | 63.3 | – | 53.3 | 46.7 |",
    ]


def test_count_again_replaces_all_that_follows_a_local_round():
    records = [
        {
            "strategy": "a,b",
            "final_personal_finetuned_accuracy": "0.1",
            "final_worst_decile_finetuned_accuracy": "0.2",
            "seed": "0",
            "folder": "x",
        }
    ]
    text = count_again(records, {"x": {0.03: 0.7}}, {"x": 0.03})
    assert text == (
        "strategy,seed,folder,final_personal_finetuned_accuracy,local_rate\n"
        '"a,b",0,x,0.700000,0.03\n'
    )


def test_scores_are_read_as_they_were_written(tmp_path):
    scores = {"a-b=1,c=2-seed0": {0.1: 0.25, 0.003: 0.5}, "b-seed1": {0.1: 1.0}}
    assert read_scores(tmp_path / "none.csv") == {}
    write_scores(tmp_path / "scores.csv", scores)
    assert read_scores(tmp_path / "scores.csv") == scores


@pytest.mark.slow
def test_score_run_at_the_rate_of_training_is_what_the_run_has_measured(tmp_path):
    config = default.get_config("smoke")
    config.strategy, config.evaluation.finetune = "greedy", True
    config.num_clients = config.cohort_size = 5
    run = fedmoe_jax.run(config, tmp_path)
    own, less = score_run(run, [config.client.learning_rate, 1e-6])
    known = run.rows["personal_finetuned_accuracy"][-1]
    assert own == pytest.approx(float(known), abs=1e-6)
    before = run.rows["personal_accuracy"][-1]
    assert less == pytest.approx(float(before), abs=0.005)
    with pytest.raises(UserError, match="no checkpoint"):
        score_run(run._replace(state=None), [0.1])
