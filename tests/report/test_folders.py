"""Runs and studies joined: each run once, whole, or named in a line."""

import json
import shutil

import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.report import folders
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.report.runs import group_runs, load_run, name_runs
from fedmoe_jax.runtime.seals import seal

from .fake_runs import change_summary, stop_run, write_rows, write_run

SEALED = ("metrics.jsonl", "final.npz", "summary.json")


def write_study(folder, seeds, strategy="greedy"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"compare": {"seeds": seeds}}))
    return [
        write_run(folder / "runs" / f"{strategy}-seed{s}", strategy, s) for s in seeds
    ]


def test_join_has_the_finished_runs_of_all(tmp_path, capsys):
    study = write_study(tmp_path / "study", [0, 10, 2])
    stop_run(study[1], 2)
    alone = write_run(tmp_path / "alone", "greedy", 7)
    found = folders.join([tmp_path / "study", alone])
    assert found == [study[0], study[2], alone]
    assert len(group_runs(name_runs([load_run(folder) for folder in found]))) == 1
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"left out of the report: {study[1] / 'summary.json'} is missing, not finished"
    ]


def test_runs_of_a_study_are_in_its_order_with_changes_last(tmp_path):
    study = tmp_path / "study"
    lists = {"strategies": ["random", "greedy"], "seeds": [2, 10]}
    changed = "greedy-loss.l2=0.1-seed2"
    names = [
        changed,
        *(f"{name}-seed{s}" for name in ("greedy", "random") for s in (10, 2)),
    ]
    for name in (*names, "gone-seed0"):
        (study / "runs" / name).mkdir(parents=True)
    (study / "config.json").write_text(json.dumps({"compare": lists}))
    found = [path.name for path in folders.list_runs(study)]
    first = ["random-seed2", "random-seed10", "greedy-seed2", "greedy-seed10"]
    assert found == [*first, "gone-seed0", changed]
    (study / "config.json").write_text(json.dumps({"compare": 5}))
    with pytest.raises(UserError, match="config.json is damaged: compare=5; restore"):
        folders.list_runs(study)


def test_join_has_a_run_once(tmp_path, capsys):
    study = write_study(tmp_path / "study", [0, 2])
    again = shutil.copytree(study[0], tmp_path / "copy")
    found = folders.join([tmp_path / "study", tmp_path / "study", again])
    assert found == study
    told = capsys.readouterr().out
    assert told == f"left out of the report: {again} is the run of {study[0]}\n"
    other = write_run(tmp_path / "other", "greedy", 0, usage=0.9)
    assert folders.join([again, other]) == [again, other]


def test_a_field_that_no_run_reads_makes_no_label_and_no_other_run(tmp_path):
    seeds = enumerate((0, 1, 0))
    made = [write_run(tmp_path / str(at), "greedy", seed) for at, seed in seeds]
    for at, folder in enumerate(made[1:]):
        change_summary(folder, idle=["new.rate"])
        config = json.loads((folder / "config.json").read_text())
        config["new"] = {"rate": at}
        (folder / "config.json").write_text(json.dumps(config))
    assert folders.join(made) == made[:2]  # the third is the first
    labels = {run.label for run in name_runs([load_run(f) for f in made[:2]])}
    assert labels == {"greedy"}


@pytest.mark.parametrize("name", [*SEALED, "config.json"])
@pytest.mark.parametrize("fault", ["missing", "cut", "other"])
def test_a_damaged_run_is_one_line_that_names_the_file(tmp_path, capsys, name, fault):
    whole = write_run(tmp_path / "whole")
    folder = write_run(tmp_path / "run", seed=1)
    if fault == "other":
        seal(folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data)
    elif fault == "cut":
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    else:
        (folder / name).unlink()
    if name == "config.json":
        if fault != "other":
            with pytest.raises(UserError, match="config.json"):
                folders.join([whole, folder])
        return
    assert folders.join([whole, folder]) == [whole]
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and str(folder / name) in told


def rewrite(name, **changes):
    """Changes fields of a JSON file of a run; None removes one."""

    def act(folder):
        tree = json.loads((folder / name).read_text()) | changes
        kept = {field: value for field, value in tree.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return act


def rewrite_row(**changes):
    def act(folder):
        rows = read_metrics(folder / "metrics.jsonl")
        rows[3] |= changes
        write_rows(folder, rows)

    return act


def rewrite_arrays(**changes):
    def act(folder):
        arrays = dict(np.load(folder / "final.npz")) | changes
        np.savez(
            folder / "final.npz", **{k: v for k, v in arrays.items() if v is not None}
        )

    return act


DAMAGE = {
    "config without clients": (rewrite("config.json", num_clients=None), "num_clients"),
    "config without devices": (rewrite("config.json", devices={}), "devices.tiers"),
    "config with a number for a group": (
        rewrite("config.json", evaluation=3),
        "evaluation=3",
    ),
    "config with other targets": (
        rewrite("config.json", evaluation={"targets": 3}),
        "evaluation.targets=3",
    ),
    "summary without rounds": (rewrite("summary.json", num_rounds=None), "num_rounds"),
    "summary of fewer rounds": (rewrite("summary.json", num_rounds=7), "has 8 rounds"),
    "summary with other origin": (rewrite("summary.json", made_by=3), "made_by=3"),
    "row with one load": (rewrite_row(expert_load=3), "expert_load=3 of round 4"),
    "row with other loads": (rewrite_row(expert_load=[3]), "expert_load=[3]"),
    "row with text": (rewrite_row(load_cv="x"), "load_cv='x'"),
    "row with a list": (rewrite_row(bytes_up=[1]), "bytes_up=[1]"),
    "row of another round": (rewrite_row(round=9), "lacks round 4"),
    "other arrays": (lambda f: np.savez(f / "final.npz", a=np.ones(3)), "label_counts"),
    "no tiers": (rewrite_arrays(tier=None), "has no tier"),
    "tiers without a name": (rewrite_arrays(tier=np.full(6, 2)), "tier has others"),
    "fewer clients": (rewrite_arrays(capacity=np.ones(5, int)), "tier is int64[6]"),
    "no numbers of examples": (
        rewrite_arrays(label_counts=np.full((6, 5), np.nan)),
        "label_counts is float64[6, 5]",
    ),
    "text for scores": (rewrite_arrays(fitness=np.array(["a"])), "fitness is <U1"),
    "clients of another class": (
        rewrite_arrays(label_names=np.array(["a"])),
        "label_names is <U1[1]",
    ),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_run_that_cannot_be_drawn_is_left_out_with_its_reason(
    tmp_path, capsys, damage, told
):
    whole, folder = write_run(tmp_path / "whole"), write_run(tmp_path / "run", seed=1)
    damage(folder)
    assert folders.join([whole, folder]) == [whole]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("left out of the report: ")
    assert str(folder) in said and told in said


def test_a_damaged_run_that_is_not_asked_for_spoils_no_report(tmp_path, capsys):
    first, second, third = write_study(tmp_path / "study", [0, 1, 2])
    rewrite("config.json", devices={})(second)
    assert folders.add_finished([first], tmp_path / "study") == [first, third]
    assert f"left out of the report: {second}" in capsys.readouterr().out


def test_join_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json is missing; allowed: the folder"):
        folders.join([tmp_path])
    run = stop_run(write_run(tmp_path / "run"), 2)
    with pytest.raises(UserError, match="has no finished run"):
        folders.join([run])


def test_add_finished_takes_the_runs_that_the_study_has_beside(tmp_path, capsys):
    study = write_study(tmp_path / "study", [0, 1, 2, 3])
    np.savez(study[3] / "final.npz")
    (study[3] / "final.npz").write_bytes(b"PK")
    stop_run(study[1], 2)
    assert folders.add_finished([study[2]], tmp_path / "study") == [study[2], study[0]]
    assert str(study[3] / "final.npz") in capsys.readouterr().out
