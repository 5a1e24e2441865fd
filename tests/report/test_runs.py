"""Run folders read back, their labels and their numbers."""

import json
import math

import numpy as np
import pytest

from fedmoe_jax.measures import MEASURES, PERPLEXITY
from fedmoe_jax.options import DEVICES, EXPERTS, Measure, UserError
from fedmoe_jax.report import runs, summary
from fedmoe_jax.report.runs import load_run
from fedmoe_jax.runtime.seals import seal

from .fake_runs import NOTHING, ROWS, make_row, make_run, stop_run, write_run


def test_load_run_needs_a_config(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        runs.load_run(tmp_path)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_load_run_leaves_out_a_half_written_row(tmp_path, num_rows):
    run = runs.load_run(stop_run(write_run(tmp_path / "run"), num_rows))
    assert [row["round"] for row in run.rows] == list(range(1, num_rows + 1))
    assert run.summary == {} and run.arrays == {} and run.measures is MEASURES


def test_group_runs_keeps_the_order_of_first_appearance(tmp_path):
    labels = ("random", "greedy", "random")
    made = [make_run(tmp_path, label, seed=at) for at, label in enumerate(labels)]
    groups = runs.group_runs(made)
    assert list(groups) == ["random", "greedy"]
    assert groups["random"] == [made[0], made[2]]


def load_weights(tmp_path, weights):
    """Loads greedy runs with such (fitness, usage, seed)."""
    folders = [
        write_run(tmp_path / f"{at}", seed=seed, fitness=fitness, usage=usage)
        for at, (fitness, usage, seed) in enumerate(weights)
    ]
    return [runs.load_run(folder) for folder in folders]


def test_name_runs_splits_labels_by_varied_fields(tmp_path):
    made = load_weights(
        tmp_path, [(0.5, usage, seed) for usage in (0.3, 0.7) for seed in (0, 1)]
    )
    made.append(runs.load_run(write_run(tmp_path / "random", "random")))
    groups = runs.group_runs(runs.name_runs(made))
    low, high = "greedy weights.usage=0.3", "greedy weights.usage=0.7"
    assert {k: len(g) for k, g in groups.items()} == {low: 2, high: 2, "random": 1}


def test_sums_of_a_seed_in_another_order_are_no_second_seed(tmp_path):
    made = load_weights(tmp_path, [(0.5, 0.5, seed) for seed in (0, 1, 0, 1, 2)])
    chunks = (1, 1, 4, 4, 1)
    made = [
        run._replace(config=run.config | {"run": {"client_chunk": chunk}})
        for run, chunk in zip(made, chunks, strict=True)
    ]
    one, other = "greedy run.client_chunk=1", "greedy run.client_chunk=4"
    labels = [run.label for run in runs.name_runs(made)]
    assert labels == [one, one, other, other, one]
    # Where no seed is there twice, seeds are computed as the machine has room.
    alone = runs.name_runs([made[0], made[3], made[4]])
    assert {run.label for run in alone} == {"greedy"}


def test_name_runs_leaves_out_what_most_configs_share(tmp_path):
    cases = [(0.3, 0.5), (0.5, 0.5), (0.5, 0.7), (0.5, 0.9)]
    named = runs.name_runs(
        load_weights(
            tmp_path,
            [
                (fitness, usage, seed)
                for fitness, usage in cases
                for seed in ((0, 1) if usage == 0.9 else (0,))  # seeds do not count
            ],
        )
    )
    assert [run.label for run in named] == [
        "greedy weights.fitness=0.3 weights.usage=0.5",  # half of all is not most
        "greedy weights.usage=0.5",
        "greedy weights.usage=0.7",
        "greedy weights.usage=0.9",
        "greedy weights.usage=0.9",
    ]


def weigh(run, label, usage, fitness=0.5):
    weights = {"fitness": fitness, "usage": usage}
    return run._replace(label=label, config=run.config | {"weights": weights})


def test_name_runs_leaves_out_what_most_rows_of_all_strategies_have(tmp_path):
    run = make_run(tmp_path)
    greedy = [weigh(run, "greedy", usage) for usage in (0.5, 0.7, 0.7)]
    # Most of this strategy's own have 0.9, most rows 0.5.
    random = [weigh(run, "random", usage) for usage in (0.9, 0.5)]
    random.append(weigh(run, "random", 0.9, fitness=0.1))
    others = [weigh(run, label, 0.5) for label in ("fedavg", "oracle")]
    named = runs.name_runs([*greedy, *random, *others])
    assert [run.label for run in named] == [
        *("greedy", "greedy weights.usage=0.7", "greedy weights.usage=0.7"),
        *("random weights.usage=0.9", "random"),
        "random weights.fitness=0.1 weights.usage=0.9",
        *("fedavg", "oracle"),
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_name_runs_splits_labels_by_a_field_that_one_run_lacks(tmp_path, order):
    plain = make_run(tmp_path)
    stormy = plain._replace(config=plain.config | {"storms": {"rate": 0.5}})
    named = runs.name_runs([plain, stormy][::order])[::order]
    labels = ["greedy storms.rate=absent", "greedy storms.rate=0.5"]
    assert [run.label for run in named] == labels


def test_num_experts_are_those_of_a_layer(tmp_path):
    count = lambda rows: runs.num_experts(make_run(tmp_path, rows=rows))
    assert count([]) == 0
    assert count([make_row(1, expert_load=[1.0, 2.0, 3.0])]) == 3
    assert count([make_row(1, expert_load=[[1.0, 2.0, 3.0]] * 2)]) == 3


def test_varies_needs_two_values(tmp_path):
    varies = lambda rows: runs.varies(make_run(tmp_path, rows=rows), Measure("x"))
    rows = [{"round": n, "x": x} for n, x in enumerate((1.0, None, 1.0, 2.0), start=1)]
    assert varies(rows) and not varies(rows[:3]) and not varies([])


def test_numbers_of_a_finished_run(tmp_path):
    made = summary.make_summary(ROWS, {}, MEASURES, (0.3,))
    made = json.loads(json.dumps(made))
    run, targets = make_run(tmp_path)._replace(summary=made), {"low": 0.4, "high": 0.5}
    found = runs.numbers(run, MEASURES, targets)
    assert found["megabytes_to.low"] == 24 and found["megabytes_to.high"] == math.inf
    assert found["simulated_seconds_to.high"] == math.inf
    assert found["rounds_to.low"] == 4 and "rounds_to.0.3" not in found
    assert found["simulated_minutes"] == 2 and found["kilojoules"] == 2
    assert found["megabytes_up"] == 2 and found["gigaflops"] == 1


def test_numbers_of_devices_are_unknown_without_any(tmp_path):
    rows = [make_row(n, **NOTHING) for n in (1, 2)]
    found = runs.numbers(make_run(tmp_path, rows=rows), MEASURES, {})
    of_devices = [key for key, measure in MEASURES.items() if measure.of == DEVICES]
    assert len(of_devices) == 8 and all(math.isnan(found[key]) for key in of_devices)
    assert found["megabytes_up"] == 0


def test_numbers_of_experts_are_unknown_with_one(tmp_path):
    rows = [make_row(1, expert_load=[1.0])]
    found = runs.numbers(make_run(tmp_path, rows=rows), MEASURES, {})
    of_experts = [key for key, measure in MEASURES.items() if measure.of == EXPERTS]
    assert of_experts and all(math.isnan(found[key]) for key in of_experts)
    assert (
        runs.numbers(make_run(tmp_path), MEASURES, {})["mean_capacity_violations"] == 1
    )


@pytest.mark.parametrize(
    ("made", "perplexity"),
    [
        ({"final_global_bits": 3.0}, 8.0),  # a token is a byte
        ({"final_global_bits": 1.5, "bytes_per_token": 4.0}, 64.0),
        ({"final_global_bits": 0.0}, 1.0),
        ({"final_global_bits": 2000.0}, math.inf),
        ({"final_global_bits": None}, None),
        ({"seed": 0}, None),
    ],
)
def test_numbers_have_the_perplexity_of_a_token(made, perplexity, tmp_path):
    run = make_run(tmp_path)._replace(summary=made)
    assert runs.numbers(run, MEASURES, {}).get(PERPLEXITY) == perplexity


def test_numbers_have_no_perplexity_before_the_tokens_are_known(tmp_path):
    run = make_run(tmp_path, rows=[make_row(1, global_bits=3.0)])
    found = runs.numbers(run, MEASURES, {})
    assert found["final_global_bits"] == 3 and PERPLEXITY not in found


def test_absent_kinds_by_hand(tmp_path):
    dense, known = make_run(tmp_path, rows=[make_row(1, expert_load=[1.0])]), {}
    assert runs.absent_kinds(dense, known) == {EXPERTS}
    known = {"total_simulated_seconds": 0.0}
    assert runs.absent_kinds(dense, known) == {EXPERTS, DEVICES}
    assert runs.absent_kinds(make_run(tmp_path), known) == {DEVICES}


def test_has_learnt_by_hand(tmp_path):
    run = make_run(tmp_path)  # two classes: 0.5 + 0.15 * 0.5
    assert runs.chance_of(run) == 0.5
    assert runs.has_learnt(run, 0.58) and not runs.has_learnt(run, 0.57)
    assert runs.has_learnt(run._replace(arrays={}), 0.1)


def test_limit_is_that_of_all_finished_runs(tmp_path):
    early = make_run(tmp_path)
    made = [early._replace(summary={"limit_bits": x}) for x in (1.5, 1.5, 1.75)]
    assert runs.limit_of([early, *made[:2]]) == 1.5
    assert runs.limit_of(made) is None and runs.limit_of([early]) is None
    assert runs.limit_of([*made[:2], early._replace(summary={"seed": 0})]) is None


def test_chance_is_of_classes_where_there_are_groups(tmp_path):
    run = make_run(tmp_path)
    assert runs.count_groups(run) == 1
    names = {"label_names": np.array(list("abcdef"))}
    names |= {"group_names": np.array(["one", "two", "three"])}
    run = run._replace(arrays=run.arrays | names)
    assert runs.count_groups(run) == 3 and runs.chance_of(run) == 0.5


def test_numbers_without_an_evaluation_are_unknown(tmp_path):
    bare = [{"round": 1, "seconds": 0.1}, {"round": 2, "global_accuracy": None}]
    for rows in ([], bare):
        found = runs.numbers(make_run(tmp_path, rows=rows), MEASURES, {})
        assert math.isnan(found["final_global_accuracy"])


def test_interval_by_hand():
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.30265: 4.30265 / sqrt(3).
    mean, half = runs.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(2.48414, abs=1e-5)
    assert math.isnan(runs.interval([1.0])[1])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("summary.json", "", "summary.json cannot be read"),
        ("summary.json", "[]", "summary.json is damaged"),
        ("final.npz", "PK", "final.npz is damaged .*; restore it, or remove it"),
        ("metrics.jsonl", '{"round": 1e999}\n', "metrics.jsonl line 1 is damaged"),
        ("metrics.jsonl", '{"round": 1.5}\n', "metrics.jsonl line 1 is damaged"),
        ("config.json", "{}", "config.json has no strategy; allowed: that of a run"),
    ],
)
def test_load_run_names_a_damaged_file_in_one_line(tmp_path, name, text, told):
    folder = write_run(tmp_path / "run", "greedy")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_load_run_notices_a_changed_number(tmp_path):
    folder = write_run(tmp_path / "run", "greedy")
    seal(folder)
    assert load_run(folder).summary
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"round": 1,', '"round": 1, "x": 1,', 1))
    told = "metrics.jsonl is not as the run has written it; allowed"
    with pytest.raises(UserError, match=told):
        load_run(folder)
