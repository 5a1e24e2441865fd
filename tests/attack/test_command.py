"""The command that attacks observed runs: what it takes, leaves out and refuses."""

import sys

import pytest
from absl import flags

from fedmoe_jax.attack import command
from fedmoe_jax.attack.command import attack, find_observed
from fedmoe_jax.options import UserError
from fedmoe_jax.report.runs import Run


def test_find_observed_refuses_folders_without_observed_runs(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing; allowed: "):
        find_observed([str(tmp_path)])


def test_find_observed_says_why_it_leaves_all_out(tmp_path):
    (tmp_path / "config.json").write_text('{"strategy": "greedy"}')
    with pytest.raises(UserError, match=r"is not finished\); allowed: .*observe=True"):
        find_observed([str(tmp_path)])
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"was not observed\); allowed: "):
        find_observed([str(tmp_path)])


def test_find_observed_refuses_a_comparison_without_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"compare": {}}')
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        UserError, match=r"\((there is none|.* not finished)\); allowed"
    ):
        find_observed([str(tmp_path)])


def test_attack_refuses_the_folder_of_other_runs(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds other runs; allowed: a folder of"):
        attack([str(tmp_path / "mine")], str(tmp_path))
    with pytest.raises(UserError, match="no finished run"):
        attack([str(tmp_path)], str(tmp_path))


def test_find_observed_takes_a_run_once(tmp_path, monkeypatch, capsys):
    for name in "abc":
        (tmp_path / name / "observed").mkdir(parents=True)
        (tmp_path / name / "observed" / "00000002.npz").touch()
        for file in ("config.json", "summary.json"):
            (tmp_path / name / file).write_text("{}")

    def load(folder):
        config = {"strategy": "greedy", "seed": {"a": 0, "b": 0, "c": 1}[folder.name]}
        return Run(config, [], {}, {}, folder, "greedy", {})

    monkeypatch.setattr(command, "keep_whole", lambda folders: folders)
    monkeypatch.setattr(command, "load_run", load)
    found = find_observed([str(tmp_path / name) for name in "abc"])
    assert [run.folder.name for run in found] == ["a", "c"]
    assert f"left out: {tmp_path / 'b'} is the run of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("workdir", "told"),
    [
        ("", "error: --workdir is missing; allowed: "),
        ("tables", "error: RUNS are missing; allowed: "),
    ],
)
def test_main_ends_with_one_line_and_code_2(workdir, told, monkeypatch, capsys):
    given = flags.FlagValues()
    flags.DEFINE_string("workdir", workdir, "", flag_values=given)
    given(sys.argv[:1])
    monkeypatch.setattr(command.flags, "FLAGS", given)
    with pytest.raises(SystemExit) as exit:
        command.main(["attack"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(told) and error.count("\n") == 1
