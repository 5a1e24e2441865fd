"""The folder of a run keeps what the run was started with."""

import json
import random

import pytest

from fedmoe_jax.configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.lock import lock
from fedmoe_jax.train.workdir import (
    check_plugins,
    check_workdir,
    has_begun,
    keep_devices,
    own_workdir,
    read_config,
)


def claim_workdir(workdir, config):
    with own_workdir(workdir, config):
        pass


def test_keep_devices_refuses_a_file_that_has_changed_since_the_start(tmp_path):
    mine, kept = tmp_path / "mine.csv", tmp_path / "run.csv"
    mine.write_text("memory,flops\n4e9,1e11\n")
    keep_devices(kept, str(mine), False)
    keep_devices(kept, str(mine), True)
    mine.write_text("memory,flops\n4e9,2e11\n")
    with pytest.raises(UserError, match="devices.csv=.*has changed.*run.csv"):
        keep_devices(kept, str(mine), True)
    assert kept.read_text() == "memory,flops\n4e9,1e11\n"
    keep_devices(kept, str(mine), False)
    assert kept.read_text() == mine.read_text()


def test_own_workdir_takes_over_a_run_without_a_round(tmp_path):
    config = default.get_config("smoke")
    claim_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints" / "a-and-2-fe51").mkdir(parents=True)
    config.num_experts = 4
    claim_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    claim_workdir(tmp_path, config)
    config.num_experts = 5
    with pytest.raises(UserError, match="num_experts: 4 -> 5"):
        claim_workdir(tmp_path, config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds a run without its config.json"):
        claim_workdir(tmp_path, config)


def test_own_workdir_removes_what_killed_processes_were_writing(tmp_path):
    config, names = default.get_config("smoke"), ("a", "b")
    claim_workdir(tmp_path, config)
    folders = [tmp_path, tmp_path / "figures", tmp_path / "checkpoints" / "wave"]
    folders += [tmp_path / "runs" / name for name in names]
    parts = [folder / "x.json.0a1b2c3d.part" for folder in folders]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    with own_workdir(tmp_path, config, shared=True):
        assert all(part.exists() for part in parts)  # others may be writing them
    with lock(folders[-1]):  # another process has that run
        claim_workdir(tmp_path, config)
    assert [part.exists() for part in parts] == [False] * 4 + [True]
    claim_workdir(tmp_path, config)
    assert not parts[-1].exists()


def test_own_workdir_keeps_a_comparison_of_which_one_run_has_a_round(tmp_path):
    config = default.get_config("smoke")
    claim_workdir(tmp_path, config)
    (tmp_path / "runs" / "greedy-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "greedy-seed0" / "metrics.jsonl").write_text("{}\n")
    config.num_experts = 4
    with pytest.raises(UserError, match="num_experts: 8 -> 4"):
        claim_workdir(tmp_path, config)


@pytest.mark.parametrize("step", ["40", "a-and-2-fe51/4", "frozen/0"])
def test_has_begun_where_a_step_is_saved(tmp_path, step):
    (tmp_path / "checkpoints").mkdir()
    assert not has_begun(tmp_path)
    (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert has_begun(tmp_path)


def test_check_plugins_names_those_of_the_run(tmp_path):
    config = default.get_config("smoke")
    config.plugins = ("one", "two")
    claim_workdir(tmp_path, config)
    check_plugins(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    told = r"plug-ins none .* --plugins=one,two .*load_plugins\('one', 'two'\)"
    with pytest.raises(UserError, match=told):
        check_plugins(tmp_path)


OF_OTHER_KINDS = {
    "num_rounds": "x",
    "num_clients": [1],
    "plugins": 3,
    "strategy": {"a": 1},
    "seed": None,
    "devices": 3,
    "evaluation": {"targets": 3},
    "drift": {"labels": "much"},
    "compare": 3,
}


@pytest.mark.parametrize("name", OF_OTHER_KINDS)
def test_a_recorded_config_of_another_kind_is_named(tmp_path, name):
    config = default.get_config("smoke")
    claim_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    path = tmp_path / "config.json"
    recorded = json.loads(path.read_text()) | {name: OF_OTHER_KINDS[name]}
    path.write_text(json.dumps(recorded))
    for check in (check_plugins, lambda folder: check_workdir(folder, config)):
        with pytest.raises(UserError, match=f"^{path} is damaged: {name}.*; allowed"):
            check(tmp_path)


@pytest.mark.parametrize("lists", [{}, {"strategies": 3}, {"seeds": ["a"]}])
def test_a_recorded_comparison_of_another_kind_is_named(tmp_path, lists):
    whole = {"strategies": ["greedy"], "changes": [""], "seeds": [0]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"compare": whole}))
    assert read_config(path) == {"compare": whole}
    path.write_text(json.dumps({"compare": whole | lists if lists else {}}))
    with pytest.raises(UserError, match=f"^{path} .*compare.*; allowed: a list of"):
        read_config(path)


def test_kept_devices_that_are_no_text_have_changed(tmp_path):
    mine, kept = tmp_path / "mine.csv", tmp_path / "run.csv"
    mine.write_text("memory,flops\n4e9,1e11\n")
    kept.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="devices.csv=.*has changed"):
        keep_devices(kept, str(mine), True)


@pytest.mark.slow
def test_a_flipped_bit_in_a_config_is_named(tmp_path):
    """Each refusal is one line; a flip may also say the same or of a free field."""
    config, draw = default.get_config("smoke"), random.Random(0)
    claim_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    path = tmp_path / "config.json"
    whole, refused = path.read_bytes(), 0
    dots = [
        whole.replace(b'"min_size"', name) for name in (b'"mi._size"', b'"__class__"')
    ]
    for number in range(200):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes([*dots, *[data] * 200][number])
        try:
            check_workdir(tmp_path, config)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150
