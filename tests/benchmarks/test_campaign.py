"""The campaign's verdicts, by hand: it must see what it looks for."""

import json
import random
import shutil

import numpy as np
import pytest

from benchmarks import campaign
from fedmoe_jax.config import list_options


@pytest.fixture
def folder(tmp_path):
    row = {"round": 1, "train_loss": 2.0, "seconds": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    np.savez(tmp_path / "final.npz", fitness=np.ones(3))
    summary = {"final_global_accuracy": 0.5, "wall_seconds": 1.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_judge_tells_the_ends_of_a_run_apart(folder):
    expected = campaign.read_outcome(folder)
    judge = lambda code, err: campaign.judge(code, err, folder, expected)
    assert judge(0, "") == judge(0, "warning: x\n") == campaign.UNDISTURBED
    assert judge(2, "error: x\n") == campaign.REFUSED
    assert judge(2, "error: x\ny\n") == judge(1, "Traceback\n") == campaign.UGLY
    assert judge(3, "") == judge(-9, "") == campaign.LOST
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"seconds": 0.5', '"seconds": 0.7'))
    assert judge(0, "") == campaign.UNDISTURBED
    path.write_text(path.read_text().replace("2.0", "2.5"))
    assert judge(0, "") == campaign.SILENT


def test_damage_changes_a_file(tmp_path):
    draw, path = random.Random(0), tmp_path / "x"
    whole = bytes(range(256))
    for act in (campaign.flip, campaign.cut):
        path.write_bytes(whole)
        act(path, draw)
        assert path.read_bytes() != whole
    campaign.remove(path, draw)
    assert not path.exists()


def test_spoil_leaves_the_format(folder):
    draw = random.Random(0)
    for name in ("metrics.jsonl", "final.npz", "summary.json"):
        before = (folder / name).read_bytes()
        campaign.spoil(folder / name, draw)
        assert (folder / name).read_bytes() != before
    assert campaign.read_metrics(folder / "metrics.jsonl") == []
    assert campaign.read_arrays(folder / "final.npz").keys() == {"other"}
    assert isinstance(json.loads((folder / "summary.json").read_text()), dict)


def test_judge_reads_all_runs_of_a_comparison(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "study" / "runs" / "a")
    study = tmp_path / "study"
    expected, read = campaign.read_outcomes(study), campaign.read_outcomes
    assert campaign.judge(0, "", study, expected, read) == campaign.UNDISTURBED
    (run / "metrics.jsonl").write_text("")
    assert campaign.judge(0, "", study, expected, read) == campaign.SILENT


def test_bad_values_are_of_known_fields():
    flags, names = campaign.list_bad_values(), list_options()
    assert len(flags) > 2 * campaign.VALUES
    assert {flag.removeprefix("--config.").split("=")[0] for flag in flags} <= set(
        names
    )


def test_make_table_counts_verdicts():
    trials = [campaign.Trial("x", campaign.LOST), campaign.Trial("y", campaign.LOST)]
    line = campaign.make_table({"kills": trials}).splitlines()[-1]
    assert line.startswith("| kill -9") and line.endswith("| 2 | 0 | 0 | 2 | 0 | 0 |")
