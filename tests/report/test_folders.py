"""Runs and studies joined: each run once, whole, or named in a line."""

import json
import shutil

import numpy as np
import pytest

from fedmoe_jax.options import UserError
from fedmoe_jax.report import folders
from fedmoe_jax.report.runs import group_runs, load_run, name_runs
from fedmoe_jax.runtime.seals import seal

from .fake_runs import change_summary, stop_run, write_run

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
