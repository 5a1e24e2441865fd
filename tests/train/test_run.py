"""A run from its config to its folder: what is written, and how it goes on."""

import functools
import gc
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SMALL,
    make_data,
    never,
    restart,
    rows_of,
    run_alone,
    stop_at,
    tiny_study,
)

from configs import default
from fedmoe_jax import api
from fedmoe_jax.data.digits import load_digits
from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.data.partition import load_partition
from fedmoe_jax.measures import MEASURES, unpack_measures
from fedmoe_jax.options import UserError
from fedmoe_jax.report.page import write_report
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.report.runs import load_run
from fedmoe_jax.report.summary import SPENT
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.state import init_state
from fedmoe_jax.train import checkpoint, loop
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.plan import plan_run, plan_waves
from fedmoe_jax.train.run import (
    build_job,
    save_arrays,
    summarise_limit,
    summarise_tokens,
    tell_once,
    train,
)

# Orbax leaves reads unawaited when one of them meets a damaged file.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TINY = SMALL | {"checkpoint.every": 1, "checkpoint.keep": 3}
C, E, T, B = (
    SMALL[name] for name in ("cohort_size", "num_experts", "local_steps", "batch_size")
)
# Everything that a checkpoint has to keep is there: personal gates, two moments.
OTHER = {
    "strategy": "load_balanced_running",
    "gate.mode": "personal",
    "server.optimizer": "adam",
    "client.optimizer": "adam",
    "fitness.exploration": 0.3,
    "chunk_rounds": 2,
    "local_steps": 3,
    "batch_size": 5,
    "checkpoint.every": 4,
    "run.client_chunk": 2,
}


def tiny_config(**changes):
    config = default.get_config("smoke")
    config.update_from_flattened_dict(TINY | changes)
    return config


def run(folder, stop=never, **changes):
    return run_alone(tiny_config(**changes), folder, stop)


@functools.cache
def first_state(**changes):
    return restart(tiny_config(**changes)).state


def state_of(folder, **changes):
    """The newest state on disk, as NumPy arrays with an axis S, and its round."""
    like = first_state(**changes)
    state, done = checkpoint.read_latest(folder / "checkpoints", like)[:2]
    state = state.replace(key=jax.random.key_data(state.key))
    return jax.device_get(state), done


def assert_same_run(folder, other, **changes):
    """Bitwise the same final state, and the same rows but for the clock."""
    (state, done), (expected, expected_done) = (
        state_of(f, **changes) for f in (folder, other)
    )
    assert done == expected_done
    same = lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert jax.tree.all(jax.tree.map(same, state, expected))
    assert rows_of(folder) == rows_of(other)
    without_clock = [read_summary(f) for f in (folder, other)]
    assert without_clock[0] == without_clock[1]


def read_summary(folder):
    summary = json.loads((folder / "summary.json").read_text())
    clock = {*SPENT.values(), "wall_seconds"}
    return {
        k: v for k, v in summary.items() if k not in clock and "per_second" not in k
    }


def snapshot(folder):
    """Every file with its content and time of change."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 rounds."""
    folder = tmp_path_factory.mktemp("finished") / "new" / "run"
    assert run(folder) is True
    return folder


@pytest.fixture(scope="module")
def six_rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six") / "run"
    assert run(folder, num_rounds=6)
    return folder


def test_train_writes_the_files_that_are_promised(finished):
    recorded = json.loads((finished / "config.json").read_text())
    assert recorded == json.loads(json.dumps(tiny_config().to_dict()))
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    files = {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "lock"}
    files |= {"sha256.json", "origins.json"}
    assert names - events == files | {"partition.npz", "final.npz"}
    assert len(events) == 1
    steps = {path.name for path in (finished / "checkpoints").iterdir()}
    assert steps == {"2", "3", "4"}  # keep = 3
    partition = load_partition(finished / "partition.npz")
    assert partition.index.shape[0] == 4 and partition.size.sum() == 1437


def test_train_writes_the_fields_that_are_promised(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    always = {"seconds", "train_loss", "load_cv", "bytes_up", "bytes_down"}
    for row in rows:
        assert all(row[key] > 0 for key in always)
        load = np.array(row["expert_load"])
        assert load.shape == (E,) and load.sum() <= 2 * C * T * B
        np.testing.assert_allclose(row["load_cv"], load.std() / load.mean(), rtol=1e-5)
        evaluated = row["round"] % 2 == 0
        for key in ("global_accuracy", "personal_accuracy"):
            assert (key in row) == evaluated
            assert 0 <= row.get(key, 0) <= 1
        assert len(row.get("expert_accuracy", "abc")) == E


def test_finish_summarises_the_rows(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    summary = read_summary(finished)
    assert (summary["strategy"], summary["seed"]) == ("load_balanced", 0)
    assert summary["num_rounds"] == 4
    for name in ("bytes_up", "bytes_down"):
        assert summary[f"total_{name}"] == sum(row[name] for row in rows)
    mean_cv = sum(row["load_cv"] for row in rows) / 4
    assert summary["mean_load_cv"] == pytest.approx(mean_cv)
    for name in ("global_accuracy", "personal_accuracy"):
        last = rows[3][name]  # the only evaluation in the last quarter
        assert summary[f"final_{name}"] == pytest.approx(last)
    assert summary["rounds_to"] == {}  # the report follows the data
    assert summary["simulated_seconds_to"].keys() == summary["megabytes_to"].keys()
    assert summary["reads"] == ["fitness", "usage"]
    assert summary["made_by"]["jax"] == jax.__version__
    assert unpack_measures(summary["measures"], finished) == MEASURES


def test_summarise_tokens_counts_the_bytes_of_targets():
    rows = {"bytes": np.array([[9, 4, 2], [2, 6, 0]]), "length": np.array([3, 2])}
    data = make_data()._replace(test=rows, task="text")
    assert summarise_tokens(data) == {"bytes_per_token": 4.0}
    assert summarise_tokens(data._replace(task="images")) == {}
    assert summarise_tokens(make_data()) == {}


def test_summarise_limit_is_that_of_the_data():
    assert summarise_limit(make_data()) == {}
    assert summarise_limit(make_data()._replace(limit=1.5)) == {"limit_bits": 1.5}


def test_save_arrays_agrees_with_the_state(finished):
    state, done = state_of(finished)
    assert done == state.round[0] == 4
    align = jax.tree.map(lambda leaf: leaf[0], state.align)  # the only run
    with np.load(finished / "final.npz") as arrays:
        np.testing.assert_array_equal(arrays["times_held"], align.times_held[:, 0])
        np.testing.assert_array_equal(arrays["fitness"], align.fitness[:, 0])
        assert arrays["capacity"].shape == arrays["tier"].shape == (4,)
        assert arrays["label_counts"].sum() == arrays["num_examples"].sum() == 1437
        last = read_metrics(finished / "metrics.jsonl")[-1]
        mean = arrays["client_accuracy"].mean()
        np.testing.assert_allclose(mean, last["personal_accuracy"], rtol=1e-6)
        assert last["clients_counted"] == 4
        # Every class spreads its gate mass over the experts.
        np.testing.assert_allclose(arrays["specialisation"].sum(0), 1, atol=1e-5)
        assert arrays["label_names"].tolist() == [str(i) for i in range(10)]


def test_save_arrays_needs_no_file_of_devices(tmp_path):
    file = tmp_path / "devices.csv"
    columns = "memory,flops,upload,download,latency,power,radio,tier"
    file.write_text(f"{columns}\n4e9,1e11,5e6,15e6,0.02,5,2,mine\n")
    plan = plan_run(tiny_config(**{"devices.csv": str(file)}), build_mesh(1))
    state, _ = init_state(jax.random.key(0), plan.hyper, plan.program)
    file.unlink()
    parts = state.align, state.belief, state.participation
    results = {"specialisation": np.zeros((1, 3, 10)), "client_accuracy": np.ones(4)}
    save_arrays(tmp_path / "final.npz", plan, *parts, results)
    with np.load(tmp_path / "final.npz") as arrays:
        assert arrays["tier_names"].tolist() == ["mine"]


def test_save_arrays_gives_no_accuracy_to_clients_without_examples(tmp_path):
    plan = plan_run(tiny_config(), build_mesh(1))
    counts = plan.partition.label_counts.copy()
    counts[1] = 0
    plan = plan._replace(partition=plan.partition._replace(label_counts=counts))
    state, _ = init_state(jax.random.key(0), plan.hyper, plan.program)
    parts = state.align, state.belief, state.participation
    results = {"specialisation": np.zeros((1, 3, 10)), "client_accuracy": np.ones(4)}
    save_arrays(tmp_path / "final.npz", plan, *parts, results)
    with np.load(tmp_path / "final.npz") as arrays:
        np.testing.assert_array_equal(arrays["client_accuracy"], [1, np.nan, 1, 1])


@pytest.mark.parametrize("mode", ["global", "personal"])
def test_save_arrays_gives_no_accuracy_to_clients_without_a_model(tmp_path, mode):
    plan = plan_run(tiny_config(**{"gate.mode": mode}), build_mesh(1))
    state, _ = init_state(jax.random.key(0), plan.hyper, plan.program)
    rounds = np.array([0, 1, 2, 0])
    took_part = state.participation.replace(rounds=rounds)
    results = {"specialisation": np.zeros((1, 3, 10)), "client_accuracy": np.ones(4)}
    parts = state.align, state.belief, took_part
    save_arrays(tmp_path / "final.npz", plan, *parts, results)
    with np.load(tmp_path / "final.npz") as arrays:
        known = np.isfinite(arrays["client_accuracy"])
    assert known.tolist() == (
        [True] * 4 if mode == "global" else [False, True, True, False]
    )


def test_train_leaves_a_finished_run_as_it_is(finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / "again")
    assert run(again)
    assert_same_run(again, finished)


@pytest.mark.parametrize(
    ("changes", "first"),
    [({}, 1), ({}, 3), (OTHER, 2), ({"run.num_devices": 2, "local_epochs": 0.1}, 2)],
    ids=["one", "odd", "other", "ragged on two devices"],
)
def test_train_resumes_a_stopped_run_bitwise(finished, tmp_path, changes, first):
    whole = finished
    if changes:
        whole = tmp_path / "whole"
        assert run(whole, **changes)
    parts = tmp_path / "parts"
    assert run(parts, stop=stop_at(parts, first), **changes) is False
    assert [row["round"] for row in rows_of(parts)] == list(range(1, first + 1))
    assert state_of(parts, **changes)[1] == first
    assert not (parts / "summary.json").exists()
    assert run(parts, **changes) is True
    assert_same_run(parts, whole, **changes)


def test_train_traces_a_few_chunks_for_a_profile(tmp_path):
    config = tiny_config(num_rounds=6)
    assert train(config, tmp_path, stop=never, label="tiny", profile=True)
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    text = gzip.decompress(trace.read_bytes()).decode()
    assert len(re.findall(r'"PjitFunction|jit_|ThunkExecutor', text)) > 0


def test_train_evaluates_many_experts_where_they_are_asked(tmp_path):
    fields = {"num_experts": 5, "evaluation.dense_experts": 4}
    assert run(tmp_path, **fields)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert "global_accuracy" in last and "personal_accuracy" in last
    assert "global_soft_accuracy" not in last and "expert_accuracy" not in last
    assert read_summary(tmp_path)["final_global_soft_accuracy"] is None
    page = write_report(tmp_path, [load_run(tmp_path)], "command")
    assert page.exists()


def test_build_job_needs_no_more_scratch_memory_for_a_larger_cohort():
    def scratch(cohort_size):
        widths = {f"model.{part}_width": 64 for part in ("stem", "expert", "feature")}
        changes = {"num_clients": 64, "cohort_size": cohort_size} | widths
        job = restart(tiny_config(**changes))
        rounds = [job.programs.run_rounds]
        (program,), _ = loop.compile_once(rounds, job.state, *job.inputs)
        return program.memory_analysis().temp_size_in_bytes

    assert scratch(64) < 1.1 * scratch(4)


def test_train_compiles_its_two_programs_once(tmp_path):
    changes = {"batch_size": 3, "num_rounds": 4}  # sizes of no other test
    compiled = []
    for folder, seed in (("a", 0), ("b", 1)):
        assert run(tmp_path / folder, **changes, seed=seed)
        compiled.append(dict([*loop._compiled.items()][-2:]))
    assert compiled[0] == compiled[1]


@pytest.mark.parametrize(
    ("strategy", "seeds"), [("greedy", (0,)), ("greedy", (0, 1)), ("fedjets", (0,))]
)
def test_rounds_that_compile_ahead_are_those_that_run(strategy, seeds):
    """Shapes and shardings of the first state are known before it is computed."""
    fields = {"data.public": 20, "batch_size": 5}
    config = tiny_study((strategy,), seeds=seeds, **fields)
    (wave,) = plan_waves(list_members(config))
    job = build_job(wave, [None] * len(seeds), drives=True)
    ahead = dict(loop._compiled)
    state, inputs = loop.run_stages(job, None, 0, job.state, job.inputs)
    (run_rounds, _), spent = loop.compile_programs(job, state, inputs)
    assert dict(loop._compiled) == ahead
    assert spent["compile_seconds"] >= job.compile_seconds / len(seeds) > 0
    for done in (2, 4):
        state, _ = run_rounds(state, *inputs)
        assert state.round.tolist() == [done] * len(seeds)
        loop.compile_once([job.programs.evaluate], state, *inputs)
    assert dict(loop._compiled) == ahead


def test_compile_once_keeps_few_programs():
    jitted = [jax.jit(lambda x, n=n: x + n) for n in range(4 * loop.PROGRAMS_KEPT)]
    for function in jitted:
        (program,), _ = loop.compile_once([function], jnp.ones(3))
    assert len(loop._compiled) == 3 * loop.PROGRAMS_KEPT
    assert loop.compile_once([jitted[-1]], jnp.ones(3))[0] == [program]


def test_train_continues_the_same_run_for_more_rounds(finished, six_rounds, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert run(folder, num_rounds=6)
    assert_same_run(folder, six_rounds)
    assert rows_of(folder)[:4] == rows_of(finished)
    assert json.loads((folder / "config.json").read_text())["num_rounds"] == 6


def test_train_repeats_rounds_after_a_damaged_checkpoint(
    finished, six_rounds, tmp_path
):
    folder = shutil.copytree(finished, tmp_path / "run")
    newest = folder / "checkpoints" / "4"
    for path in newest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[::-1])
    assert run(folder, num_rounds=6)
    assert_same_run(folder, six_rounds)
    assert (folder / "checkpoints" / "4.damaged").exists()
    gc.collect()  # reports Orbax's unawaited reads here and not at the end


def test_train_writes_rows_of_lost_rounds_once(finished, six_rounds, tmp_path):
    """A run killed between two saves has rows of rounds that it will do again."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "summary.json").unlink()  # as the run did when it went on
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "train_loss": 1')
    assert run(folder, num_rounds=6)
    assert_same_run(folder, six_rounds)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_train_refuses_another_config_and_changes_nothing(finished):
    before = snapshot(finished)
    with pytest.raises(UserError) as caught:
        run(finished, **{"seed": 3, "client.learning_rate": 0.5, "num_rounds": 8})
    text = str(caught.value)
    assert "client.learning_rate: 0.02 -> 0.5" in text and "seed: 0 -> 3" in text
    assert "num_rounds" not in text and "\n" not in text
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cohort_size", 5),
        ("partition.min_size", 400),
        ("data.public", 10_000),
        ("model.stem", "resnet9"),
        ("model.expert", "conv"),
        ("devices.shares", (0.5, 0.5)),
        ("devices.tiers", ("phone", "laptop", "toaster")),
        ("run.num_devices", 9),
        ("run.memory_limit_gb", 1e-5),
    ],
)
def test_train_leaves_no_trace_of_a_refused_config(tmp_path, field, value):
    with pytest.raises(UserError, match=field) as caught:
        run(tmp_path / "new" / "run", **{field: value})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"workdir={folder} cannot be used"):
            run(folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_train_refuses_a_folder_with_a_run_of_unknown_config(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="without its config.json"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_train_refuses_a_run_of_an_older_version_in_one_line(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "config.json"
    (folder / "sha256.json").unlink()
    recorded = json.loads(path.read_text())
    del recorded["plugins"], recorded["loss"]["z"]  # fields that came later
    path.write_text(json.dumps(recorded))
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        run(folder, num_rounds=6)
    told = str(caught.value)
    assert told.startswith("the run in this folder was started with an older version")
    assert "which had no field loss.z; allowed: that version" in told
    assert "\n" not in told and snapshot(folder) == before


def test_train_refuses_a_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match="config.json cannot be read"):
        run(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"seed": '


def test_train_goes_on_when_clients_diverge_and_says_so(tmp_path):
    assert run(tmp_path, num_rounds=2, **{"client.learning_rate": 1e38})
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["nonfinite_clients"] == C and row["train_loss"] is None
    assert read_summary(tmp_path)["nonfinite_clients"] == 2 * C
    state, _ = state_of(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def damage_row(text):
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:1], *lines[2:]])


def damage_digit(text):
    return text.replace('"train_loss": 2', '"train_loss": 3', 1)


@pytest.mark.parametrize(
    ("damage", "told"),
    [(damage_row, "lacks round 2"), (damage_digit, "has other rows up to round 4")],
)
def test_train_refuses_rows_that_are_not_those_it_wrote(
    finished, tmp_path, damage, told
):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(damage(whole))
    with pytest.raises(UserError, match="is not as the run has written it; allowed"):
        run(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match=f"{told}.*; allowed: the file as the run"):
        run(folder)
    path.write_text(whole)
    assert run(folder)
    assert_same_run(folder, finished)


@pytest.mark.parametrize("seals", [None, "{}", '{"final.npz": "x"}', "[]", "{"])
def test_train_counts_the_rows_of_a_run_without_seals(finished, tmp_path, seals):
    folder = shutil.copytree(finished, tmp_path / "run")
    path, sealed = folder / "metrics.jsonl", folder / "sha256.json"
    sealed.unlink() if seals is None else sealed.write_text(seals)
    whole = path.read_text()
    path.write_text(damage_row(whole))
    with pytest.raises(UserError, match=f"^{path} lacks round 2.*; allowed: "):
        run(folder)
    path.write_text(whole)
    assert run(folder)
    assert_same_run(folder, finished)


def test_train_makes_results_without_seals_again(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "sha256.json").unlink()
    np.savez(folder / "final.npz", other=np.ones(3))
    assert run(folder)
    assert load_run(folder).arrays.keys() == load_run(finished).arrays.keys()


def test_the_config_of_a_finished_run_is_sealed(finished, tmp_path, six_rounds):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"seed": 0', '"seed": 7'))
    assert path.read_text() != whole
    for read in (run, load_run):
        with pytest.raises(UserError, match=f"^{path} is not as the run has written"):
            read(folder)
    path.write_text(whole)
    assert run(folder, **{"checkpoint.every": 2})  # finished: nothing is rewritten
    assert path.read_text() == whole
    assert run(folder, num_rounds=6, **{"checkpoint.every": 2})
    assert load_run(folder).config["num_rounds"] == 6
    assert rows_of(folder) == rows_of(six_rounds)
    path.write_text(path.read_text().replace('"every": 2', '"every": 3'))
    with pytest.raises(UserError, match=f"^{path} is not as the run has written"):
        run(folder, num_rounds=6)


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("name", ["final.npz", "summary.json"])
@pytest.mark.parametrize(
    "damage", [cut, lambda path: path.write_text("{}"), lambda path: path.unlink()]
)
def test_train_makes_damaged_results_again(finished, tmp_path, name, damage):
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / name)
    assert run(folder)
    assert_same_run(folder, finished)
    keys = {"final_global_accuracy", "num_rounds", "total_bytes_up"}
    one, other = read_summary(folder), read_summary(finished)
    assert {key: one[key] for key in keys} == {key: other[key] for key in keys}


@pytest.mark.parametrize("numbered", [True, False])  # older ones do not say their step
def test_train_passes_over_a_checkpoint_under_another_number(
    finished, tmp_path, numbered
):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.copytree(folder / "checkpoints" / "2", folder / "checkpoints" / "4")
    if not numbered:
        path = folder / "checkpoints" / "4" / "meta" / "metadata"
        meta = json.loads(path.read_text())
        assert meta.pop("step") == 2
        path.write_text(json.dumps(meta))
    assert run(folder)
    assert_same_run(folder, finished)


def test_train_goes_on_under_the_settings_it_was_started_with(
    finished, tmp_path, monkeypatch
):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "summary.json").unlink()
    with jax.threefry_partitionable(False):
        told = "jax_threefry_partitionable=False is not allowed.*computed with True"
        with pytest.raises(UserError, match=told):
            run(folder)
    assert run(folder)
    assert_same_run(folder, finished)


def test_train_keeps_the_origin_of_every_process(
    finished, tmp_path, monkeypatch, capsys
):
    fast = {"xla_flags": "--xla_cpu_enable_fast_math=true"}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "find_origin", lambda: fast)
        run(tmp_path, stop=stop_at(tmp_path, 2))
    assert "origins.json" not in capsys.readouterr().out
    assert run(tmp_path)
    told = "rounds up to 2 were computed with another xla_flags, which may change"
    assert told in capsys.readouterr().out
    last = read_summary(finished)["made_by"]
    assert read_summary(finished)["origins"] == [{"first_round": 1, "made_by": last}]
    summary = read_summary(tmp_path)
    assert summary["made_by"] == last
    assert summary["origins"] == [
        {"first_round": 1, "made_by": fast},
        {"first_round": 3, "made_by": last},
    ]


def test_train_prints_the_notes_on_the_data_once(tmp_path, monkeypatch, capsys):
    """Before anything is compiled, and not where the run is refused."""

    def end(*arguments, **named):
        raise InterruptedError

    for place in ("train.run", "api"):
        monkeypatch.setattr(f"fedmoe_jax.{place}.build_job", end)
    notes = "2 of 4 clients have little text", "some letters are lost"
    load = lambda options: load_digits()._replace(notes=notes)
    monkeypatch.setitem(DATASETS, "noted", load)
    tell_once.cache_clear()
    for fields, name in (({"partition.min_size": 999}, "bad"), ({}, "a"), ({}, "b")):
        with pytest.raises(UserError if fields else InterruptedError):
            run(tmp_path / name, **{"data.name": "noted"} | fields)
        told = "".join(f"{note}\n" for note in notes) if name == "a" else ""
        assert capsys.readouterr().err == told
    tell_once.cache_clear()
    with pytest.raises(InterruptedError):
        api.run(tiny_config(**{"data.name": "noted"}))
    assert capsys.readouterr().err.splitlines() == list(notes)


MAPS = """
import sys
from pathlib import Path
from factories import SMALL
from fedmoe_jax import run
from fedmoe_jax.configs import default
config = default.get_config("smoke")
config.update_from_flattened_dict(SMALL | {"num_rounds": 1, "eval_every": 1})
for size in range(2, 7):
    config.batch_size = size
    run(config)
    print("maps", len(Path("/proc/self/maps").read_text().splitlines()))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_runs_of_many_shapes_need_no_more_memory_maps():
    tests = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    command = [sys.executable, "-c", MAPS]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    maps = [int(number) for number in re.findall(r"maps (\d+)", out.stdout)]
    first = maps[: loop.PROGRAMS_KEPT]
    assert len(maps) == 5 and maps[-1] < 1.3 * max(first)
