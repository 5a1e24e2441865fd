"""Stored studies are read as they lie in `results/`."""

import math

import pytest

from benchmarks import studies
from fedmoe_jax.options import UserError

TABLE = """| Strategy | Seeds | Rates | Global % |
| --- | --- | --- | --- |
| `greedy` | 2 | tuned | 50.0 ± 1.0 |
| `greedy fitness.rate=0.1` | 2 | untuned | 50.0 ± 1.0 |
| `greedy fitness.rate=0.1 usage.decay=0.5` | 2 | untuned | 50.0 ± 1.0 |
| `random` | 2 | tuned | 40.0 ± 1.0 |

## Paired differences

| Strategy | Difference |
| --- | --- |
| `nobody` | +1.0 |
"""
RUNS = """strategy,seed,fitness.rate,usage.decay,final_global_accuracy,folder
greedy,0,0.3,0.9,0.50,greedy-seed0
greedy,1,0.3,0.9,0.54,greedy-seed1
greedy,0,0.1,0.9,0.60,greedy-rate-seed0
greedy,0,0.1,0.5,0.70,greedy-both-seed0
random,0,,,0.40,random-seed0
random,1,,,0.42,random-seed1
"""
EVALUATIONS = """run,round,global_accuracy
greedy-seed0,2,0.1
greedy-seed0,4,0.3
greedy-seed0,6,0.5
random-seed0,6,0.2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "table.md").write_text(TABLE)
    (tmp_path / "runs.csv").write_text(RUNS)
    (tmp_path / "evaluations.csv").write_text(EVALUATIONS)
    return tmp_path


def test_runs_lie_under_the_labels_of_the_table(folder):
    study = studies.read_study(folder)
    assert study.rates == {
        "greedy": "tuned",
        "greedy fitness.rate=0.1": "untuned",
        "greedy fitness.rate=0.1 usage.decay=0.5": "untuned",
        "random": "tuned",
    }
    found = {
        label: {seed: one["final_global_accuracy"] for seed, one in seeds.items()}
        for label, seeds in study.seeds.items()
    }
    assert found == {
        "greedy": {0: 0.5, 1: 0.54},
        "greedy fitness.rate=0.1": {0: 0.6},
        "greedy fitness.rate=0.1 usage.decay=0.5": {0: 0.7},
        "random": {0: 0.4, 1: 0.42},
    }


def test_a_table_older_than_tuning_is_untuned():
    table = "| Strategy | Seeds |\n| --- | --- |\n| `greedy` | 3 |\n"
    assert studies.read_rates(table) == {"greedy": "untuned"}


@pytest.mark.parametrize("label", ["greedy_more", "greed", "greedy fitness.rate=0.12"])
def test_a_label_of_another_row_does_not_fit(label):
    record = {"strategy": "greedy", "fitness.rate": "0.1"}
    assert studies.find_label(record, [label]) is None


def test_a_target_that_is_not_reached_is_never_and_an_empty_number_unknown():
    record = {"rounds_to.0.40": "", "mean_load_cv": "", "made_by.commit": "abc"}
    numbers = studies.read_numbers(record)
    assert numbers["rounds_to.0.40"] == math.inf
    assert math.isnan(numbers["mean_load_cv"]) and len(numbers) == 2


def test_a_window_takes_its_first_and_its_last_round(folder):
    study, key = studies.read_study(folder), "final_global_accuracy"
    found = studies.take_window(study, key, 4, 6)
    assert found == {"greedy": {0: {key: 0.4}}, "random": {0: {key: 0.2}}}
    with pytest.raises(UserError, match="no global_accuracy in rounds 7 to 9"):
        studies.take_window(study, key, 7, 9)


def test_what_attacks_find_joins_the_numbers_of_their_runs(folder):
    found = "strategy,seed,mix_majority_mean,final_global_accuracy,folder\n"
    (folder / "attacks.csv").write_text(f"{found}greedy,1,0.25,0.5,greedy-seed1\n")
    seeds = studies.read_study(folder).seeds["greedy"]
    assert seeds[1]["mix_majority_mean"] == 0.25
    assert seeds[1]["final_global_accuracy"] == 0.54  # as runs.csv has it
    assert "mix_majority_mean" not in seeds[0]
    (folder / "attacks.csv").write_text(f"{found}greedy,7,0.25,0.5,greedy-seed7\n")
    with pytest.raises(UserError, match="greedy-seed7 is no run of runs.csv; allowed"):
        studies.read_study(folder)


def test_a_run_without_a_row_is_refused(folder):
    (folder / "table.md").write_text(TABLE.replace("| `random`", "| `rand`"))
    with pytest.raises(UserError, match="random-seed0 has no row in table.md"):
        studies.read_study(folder)


@pytest.mark.parametrize("name", ["table.md", "runs.csv"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        studies.read_study(folder)


def test_stored_differences_are_those_of_the_runs(folder):
    study = studies.read_study(folder)
    # Seed by seed 10 and 12 points.
    row = {"strategy": "greedy", "baseline": "random", "difference": "11"}
    row["measure"] = "final_global_accuracy"
    unknown = row | {"measure": "final_personal_accuracy", "difference": ""}
    assert studies.find_disagreements(study, [row, unknown]) == []
    (fault,) = studies.find_disagreements(study, [row | {"difference": "11.1"}])
    assert fault.endswith("is 11.1, runs.csv gives 11")
    for other in ({"difference": ""}, {"strategy": "nobody"}):
        assert len(studies.find_disagreements(study, [row | other])) == 1


ONE = studies.Study(
    "one",
    {"greedy": {0: {"x": 1.0}}},
    {"greedy": "tuned"},
    {"g": ("greedy", 0)},
    [{"run": "g", "round": "1"}],
)
TWO = studies.Study(
    "two",
    {"random": {0: {"x": 2.0}}},
    {"random": "untuned"},
    {"g": ("random", 0)},
    [{"run": "g", "round": "2"}],
)


def test_parts_of_a_study_are_joined():
    both = studies.join_studies("both", [ONE, TWO])
    assert both.name == "both"
    assert both.seeds == {"greedy": {0: {"x": 1.0}}, "random": {0: {"x": 2.0}}}
    assert both.rates == {"greedy": "tuned", "random": "untuned"}
    assert both.places == {"one/g": ("greedy", 0), "two/g": ("random", 0)}
    runs = [{"run": "one/g", "round": "1"}, {"run": "two/g", "round": "2"}]
    assert both.evaluations == runs


def test_a_row_of_several_parts_has_the_seeds_of_all():
    more = ONE._replace(name="more", seeds={"greedy": {1: {"x": 3.0}}})
    both = studies.join_studies("both", [ONE, more])
    assert both.seeds == {"greedy": {0: {"x": 1.0}, 1: {"x": 3.0}}}
    with pytest.raises(UserError, match="seed 0 of greedy is in several parts of both"):
        studies.join_studies("both", [ONE, ONE])
    other = more._replace(rates={"greedy": "untuned"})
    with pytest.raises(UserError, match="greedy is tuned and untuned in parts of both"):
        studies.join_studies("both", [ONE, other])


def test_a_change_sets_the_rows_of_a_part_apart():
    found = studies.add_change(ONE, "model.kind=finetune")
    assert found.seeds == {"greedy model.kind=finetune": {0: {"x": 1.0}}}
    assert found.rates == {"greedy model.kind=finetune": "tuned"}
    assert found.places == {"g": ("greedy model.kind=finetune", 0)}
    both = studies.join_studies("both", [ONE, found])
    assert list(both.seeds) == ["greedy", "greedy model.kind=finetune"]
    assert studies.add_change(ONE, "") == ONE
