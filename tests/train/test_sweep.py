"""Runs that share a program: the same numbers as alone, resumable, within memory."""

import json

import chex
import numpy as np
import pytest
from factories import tiny_study

from fedmoe_jax import program
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.report.summary import SPENT
from fedmoe_jax.runtime.sharding import CLIENTS, RUNS
from fedmoe_jax.train import run as train
from fedmoe_jax.train.compare import compare, list_members
from fedmoe_jax.train.plan import estimate, plan_waves

pytestmark = pytest.mark.slow


def run(config, folder, stop=lambda: False):
    return compare(config, folder, stop=stop, profile=False)


def rows_of(folder):
    """The rows without what depends on the clock or the number of devices."""
    rows = read_metrics(folder / "metrics.jsonl")
    left_out = {*SPENT, "wasted_share"}
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def assert_rows_close(found, expected):
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in one:
            np.testing.assert_allclose(
                np.array(one[name], float),
                np.array(other[name], float),
                rtol=1e-5,
                atol=1e-5,
                err_msg=name,
            )


def arrays_of(folder):
    with np.load(folder / "final.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


# Strategies, traced hyperparameters and seeds in one program; personal gates and a
# server optimiser with moments have the most state.
MIXED = {
    "strategies": ("random", "load_balanced_running"),
    "changes": ("", "weights.usage=0.9,fitness.rate=0.7,fitness.prior=0.8"),
    "gate.mode": "personal",
    "server.optimizer": "adam",
}


def test_a_run_of_a_sweep_on_many_devices_is_the_run_alone(tmp_path):
    config = tiny_study(**MIXED, **{"run.num_devices": 4})
    folders, whole = run(config, tmp_path / "sweep")
    assert whole and len(folders) == 8
    waves = plan_waves(list_members(config))
    assert [len(wave.names) for wave in waves] == [8]
    assert dict(waves[0].program.mesh.shape) == {RUNS: 4, CLIENTS: 1}
    for member, folder in list(zip(list_members(config), folders, strict=True))[::3]:
        alone = tmp_path / "alone" / member.name
        member.config.run.num_devices = 1
        train.train(
            member.config, alone, stop=lambda: False, label="alone", profile=False
        )
        assert_rows_close(rows_of(folder), rows_of(alone))
        for name, array in arrays_of(alone).items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(
                    arrays_of(folder)[name], array, rtol=1e-5, atol=1e-5
                )
            else:
                np.testing.assert_array_equal(arrays_of(folder)[name], array)


def test_devices_that_do_not_divide_the_runs_share_clients(tmp_path):
    config = tiny_study(("greedy",), seeds=(0, 1, 2), **{"run.num_devices": 2})
    (wave,) = plan_waves(list_members(config))
    assert dict(wave.program.mesh.shape) == {RUNS: 1, CLIENTS: 2}
    folders, _ = run(config, tmp_path / "two")
    config.run.num_devices = 1
    others, _ = run(config, tmp_path / "one")
    for folder, other in zip(folders, others, strict=True):
        assert_rows_close(rows_of(folder), rows_of(other))


def test_accelerators_vmap_what_cpus_loop_over(tmp_path, monkeypatch):
    """The mapping is chosen by platform; both give the same runs."""
    folders, _ = run(tiny_study(("random", "greedy")), tmp_path / "loop")
    with monkeypatch.context() as patch:
        patch.setattr(program, "find_platform", lambda mesh: "tpu")
        others, _ = run(tiny_study(("random", "greedy")), tmp_path / "vmap")
    for folder, other in zip(folders, others, strict=True):
        assert_rows_close(rows_of(folder), rows_of(other))


def test_a_sweep_is_compiled_once(tmp_path, monkeypatch):
    """Any second trace of the round raises."""
    real = train.scan_rounds
    monkeypatch.setattr(
        train,
        "scan_rounds",
        lambda program: chex.assert_max_traces(real(program), n=1),
    )
    train.build_programs.cache_clear()
    chex.clear_trace_counter()
    config = tiny_study(("random", "greedy"), num_rounds=8, local_steps=3)
    assert run(config, tmp_path)[1]
    train.build_programs.cache_clear()


def test_a_stopped_sweep_resumes_bitwise(tmp_path):
    config = tiny_study(("random", "greedy"), num_rounds=6)
    folders, _ = run(config, tmp_path / "whole")
    parts = tmp_path / "parts"
    halfway = lambda: len(rows_of(parts / "runs" / "greedy-seed1")) >= 2
    assert run(config, parts, stop=halfway) == ([], False)
    assert len(rows_of(parts / "runs" / "random-seed0")) == 2
    others, whole = run(config, parts)
    assert whole
    for folder, other in zip(folders, others, strict=True):
        assert rows_of(folder) == rows_of(other)
        found, expected = arrays_of(folder), arrays_of(other)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in found)


def test_seeds_with_longer_index_rows_share_the_program(tmp_path):
    """M differs between these seeds: shorter rows are padded and nothing changes."""
    fields = {"partition.alpha": 0.1, "num_clients": 6, "partition.min_size": 1}
    seeds = (0, 1, 2, 3, 4, 5)
    config = tiny_study(("random",), seeds=seeds, **fields)
    (wave,) = plan_waves(list_members(config))
    widths = [plan.federation.index.shape[1] for plan in wave.plans]
    assert len(set(widths)) > 1
    folders, _ = run(config, tmp_path / "sweep")
    short = int(np.argmin(widths))
    member = list_members(config)[short]
    train.train(
        member.config, tmp_path / "a", stop=lambda: False, label="", profile=False
    )
    assert_rows_close(rows_of(folders[short]), rows_of(tmp_path / "a"))


def test_folders_hold_what_a_run_alone_leaves(tmp_path):
    folders, _ = run(tiny_study(("random",), **{"run.tensorboard": True}), tmp_path)
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        events = {name for name in names if name.startswith("events.out.tfevents")}
        assert len(events) == 1
        files = {"config.json", "metrics.jsonl", "summary.json"}
        files |= {"lock", "sha256.json", "origins.json"}
        assert names - events == files | {"partition.npz", "final.npz"}
        summary = json.loads((folder / "summary.json").read_text())
        shares = [summary[share] for share in SPENT.values()]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0


def test_another_memory_limit_cuts_no_wave_anew(tmp_path):
    """What has begun goes on as it was, what is finished stays."""
    config = tiny_study(("random", "greedy"), seeds=(0, 1), num_rounds=6)
    (wave,) = plan_waves(list_members(config))
    half = sum(estimate(wave.plans[:2], wave.program).values()) / 1e9
    config.run.memory_limit_gb = half * 1.0001
    runs = tmp_path / "runs"
    stop = lambda: len(rows_of(runs / "greedy-seed0")) >= 2
    folders, whole = run(config, tmp_path, stop)
    assert not whole and [f.name for f in folders] == ["random-seed0", "random-seed1"]
    before = [(f / "summary.json").read_bytes() for f in folders]
    config.run.memory_limit_gb = 8.0
    halfway = lambda: len(rows_of(runs / "greedy-seed0")) >= 4
    assert run(config, tmp_path, halfway) == (folders, False)
    config.run.memory_limit_gb = half / 3  # too little for what is new, not for this
    assert run(config, tmp_path)[1] and len(rows_of(runs / "greedy-seed1")) == 6
    assert [(f / "summary.json").read_bytes() for f in folders] == before
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
