"""Several processes: one run, one set of outputs, one end. Real processes, one host."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest
from checkpoints import save_checkpoint
from factories import SMALL, find_importable, stop_at

from configs import compare as study
from configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.report.summary import SPENT
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.guard import LOST
from fedmoe_jax.runtime.lock import lock
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.train import run as train
from fedmoe_jax.train.compare import compare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NEVER = lambda: False
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
PATIENCE = 150  # seconds after which processes that should have ended are hanging
SIZES = SMALL | {"num_rounds": 6, "num_clients": 5, "run.num_devices": 2}
TEXT = {
    "data.name": "markov",
    "data.length": 8,
    "model.kind": "transformer",
    "model.stem_width": 8,
    "model.heads": 2,
    "model.kv_heads": 1,
    "num_active": 1,
}
STUDY = {"strategies": ("greedy", "random"), "seeds": (0, 1)}

# Starts launch.py, which sends itself SIGNAL in the round ROUND, before it compiles in
# round 0, and draws no pictures.
SCRIPT = """
import os, runpy, signal, sys, time
number, last = map(int, sys.argv[1:3])
from fedmoe_jax import launch
main = launch.main
def changed(argv, stop):  # in the child that the guard has split off
    from fedmoe_jax.train import loop as driver
    from fedmoe_jax.report import page as report
    from fedmoe_jax.runtime import multihost
    multihost.HEARTBEAT_SECONDS = 8  # a death is noticed sooner
    report.write_report = lambda workdir, *others: workdir / "report.html"
    list_rows = driver.list_rows
    def interrupted(config, done, *others):
        if done == last:
            killed = number == signal.SIGKILL
            os.kill(os.getpid() if killed else os.getppid(), number)
            while not stop():
                time.sleep(0.01)
        return list_rows(config, done, *others)
    driver.list_rows = interrupted
    compile_programs = driver.compile_programs
    def struck(*inputs):
        if last == 0:
            os.kill(os.getpid(), number)
        return compile_programs(*inputs)
    driver.compile_programs = struck
    return main(argv, stop)
launch.main = changed
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags_of(fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


TINY = [f"--config={CONFIGS / 'default.py'}:smoke", *flags_of(SIZES)]
PAIR = [f"--config={CONFIGS / 'compare.py'}:digits,smoke", *flags_of(SIZES)]
PAIR += flags_of({f"compare.{name}": value for name, value in STUDY.items()})


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs launch.py in two processes.

    `struck` maps a process to the signal that it sends itself and in which round;
    `extra` are further flags of the second process, `variables` the environment of
    some. Returns exit codes, stdouts, stderrs.
    """
    cache = tmp_path_factory.mktemp("cache")
    env = os.environ | {
        "PYTHONPATH": find_importable(),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(EIGHT_DEVICES, ""),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*words, struck=None, extra=(), variables=MappingProxyType({})):
        port = free_port()
        paths = [[cache / f"{name}{i}" for name in ("out", "err")] for i in (0, 1)]
        with contextlib.ExitStack() as stack:
            started = []
            for process, more in enumerate([(), extra]):
                number, last = (struck or {}).get(process, (0, -1))
                command = [sys.executable, "-c", SCRIPT, str(int(number)), str(last)]
                command += [ROOT / "launch.py", *words, *more, "--num_processes=2"]
                command += [f"--coordinator_address=localhost:{port}"]
                command += [f"--process_id={process}"]
                out, err = [stack.enter_context(p.open("w")) for p in paths[process]]
                started.append(
                    subprocess.Popen(
                        command,
                        env=env | variables.get(process, {}),
                        cwd=cache,
                        stdout=out,
                        stderr=err,
                    )
                )
            wait_for(started)
        outs, errs = zip(
            *[[path.read_text() for path in pair] for pair in paths], strict=True
        )
        return [process.returncode for process in started], outs, errs

    return run


def wait_for(started):
    """Waits until all have ended; kills those that do not."""
    ended = lambda: all(process.poll() is not None for process in started)
    deadline = time.monotonic() + PATIENCE
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    hanging = not ended()
    for process in started:
        process.kill()
        process.wait()
    assert not hanging, "a process hangs"


def rows_of(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    skip = {*SPENT, "wasted_share"}
    return [{k: v for k, v in row.items() if k not in skip} for row in rows]


def assert_same_run(found, expected):
    """Rows but for clocks, and final arrays, to 1e-5."""
    close = dict(rtol=1e-5, atol=1e-5)
    for row, other in zip(rows_of(found), rows_of(expected), strict=True):
        assert row.keys() == other.keys()
        for name in row:
            values = [np.array(r[name], float) for r in (row, other)]
            np.testing.assert_allclose(*values, **close, err_msg=name)
    with np.load(found / "final.npz") as one, np.load(expected / "final.npz") as other:
        assert set(one.files) == set(other.files)
        for name in one.files:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(one[name], other[name], **close)
            else:
                np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def interrupted(launch, tmp_path_factory):
    """One run, stopped through process 1, then without 1, then compiled without 0."""
    folder = tmp_path_factory.mktemp("run") / "here"
    words = [*TINY, f"--workdir={folder}"]
    return folder, {
        "stopped": launch(*words, struck={1: (signal.SIGTERM, 2)}),
        "1 killed": launch(*words, struck={1: (signal.SIGKILL, 3)}),
        "0 killed": launch(*words, struck={0: (signal.SIGKILL, 0)}),
        "finished": launch(*words),
    }


def test_a_signal_to_one_process_stops_all(interrupted):
    codes, outs, errs = interrupted[1]["stopped"]
    assert codes == [3, 3], errs
    assert (
        "stopped, with what is done saved; to resume: python "
        in outs[0].splitlines()[-1]
    )
    assert outs[1] == ""


@pytest.mark.parametrize("killed", [0, 1])
def test_without_one_process_the_other_ends_with_an_error(interrupted, killed):
    codes, outs, errs = interrupted[1][f"{killed} killed"]
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1 and errs[1 - killed] == f"{LOST}\n"
    assert outs[1] == ""


def test_started_again_they_finish_the_same_run(interrupted, tmp_path):
    folder, results = interrupted
    codes, outs, errs = results["finished"]
    assert codes == [0, 0], errs
    assert outs[1] == ""
    config = default.get_config("smoke")
    config.update_from_flattened_dict(SIZES)
    train.train(config, tmp_path, stop=NEVER, label="alone", profile=False)
    assert_same_run(folder, tmp_path)


def test_there_is_one_set_of_outputs(interrupted):
    folder, results = interrupted
    names = [path.name for path in folder.iterdir()]
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert len(events) == len(results)  # one a start
    files = {"config.json", "partition.npz", "metrics.jsonl", "final.npz"}
    assert set(names) - set(events) == files | {
        "summary.json",
        "sha256.json",
        "origins.json",
        "runs.csv",
        "clients.csv",
        "strata.csv",
        "table.md",
        "checkpoints",
        "lock",
    }
    assert results["finished"][1][0].count("report: ") == 1


def test_a_comparison_is_the_one_of_a_single_process(launch, tmp_path):
    folder = tmp_path / "two"
    codes, outs, errs = launch(*PAIR, f"--workdir={folder}")
    assert codes == [0, 0], errs
    assert "[1/1] 4 runs as one program on 1 x 2 devices" in outs[0]
    assert outs[1] == ""
    config = study.get_config("digits,smoke")
    config.update_from_flattened_dict(
        SIZES | {f"compare.{name}": value for name, value in STUDY.items()}
    )
    config.run.num_devices = 1
    alone, _ = compare(config, tmp_path / "one", stop=NEVER, profile=False)
    assert len(alone) == 4
    for other in alone:
        assert_same_run(folder / "runs" / other.name, other)
    assert (folder / "table.md").exists()


@pytest.mark.parametrize("kind", ["transformer", "lora"])
def test_a_text_run_begun_on_two_devices_is_finished_by_two_processes(
    launch, tmp_path, kind
):
    """Two MoE layers, and rows and arrays of the run on one device alone."""
    config, fields = default.get_config("smoke"), TEXT | {"model.kind": kind}
    if kind == "lora":
        fields["model.base"] = str(save_checkpoint(tmp_path / "base", "llama"))
    config.update_from_flattened_dict(SIZES | fields)
    folder, alone = tmp_path / "two", tmp_path / "one"
    train.train(config, folder, stop=stop_at(folder, 2), label="text", profile=False)
    begun = (folder / "metrics.jsonl").read_text()
    assert begun.count("\n") == 2
    words = [*TINY, *flags_of(fields), f"--workdir={folder}"]
    codes, outs, errs = launch(*words)
    assert codes == [0, 0], errs
    assert outs[1] == "" and (folder / "metrics.jsonl").read_text().startswith(begun)
    config.run.num_devices = 1
    train.train(config, alone, stop=NEVER, label="alone", profile=False)
    assert_same_run(folder, alone)
    with np.load(folder / "final.npz") as arrays:
        assert arrays["fitness"].shape[1:] == (2, SIZES["num_experts"])


def test_a_mistake_that_only_process_0_can_see_ends_both(launch, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    codes, outs, errs = launch(*TINY, f"--workdir={tmp_path}")
    assert codes == [2, 2] and outs[1] == "" and errs[1] == ""
    assert errs[0].startswith("error: ") and len(errs[0].splitlines()) == 1
    assert "without its config.json" in errs[0]


def test_different_requests_end_both(launch, tmp_path):
    words = [*TINY, f"--workdir={tmp_path / 'new'}"]
    codes, _, errs = launch(*words, extra=["--config.seed=1"])
    assert codes == [2, 2] and errs[1] == ""
    assert errs[0] == (
        "error: config.seed differs between the processes (0 and 1); allowed: the "
        "same on all\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_computes_otherwise_ends_both(launch, tmp_path):
    words = [*TINY, f"--workdir={tmp_path / 'new'}"]
    codes, _, errs = launch(*words, variables={1: {"JAX_ENABLE_X64": "1"}})
    assert codes == [2, 2] and errs[1] == ""
    assert errs[0] == (
        "error: settings differs between the processes ('' and 'jax_enable_x64=True'); "
        "allowed: the same on all\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_weights_of_a_base_end_both(launch, tmp_path):
    """Each process has its own home, and a base in it."""

    def change(config, tensors):
        tensors["model.norm.weight"] += 1

    homes = [tmp_path / name for name in ("first", "second")]
    save_checkpoint(homes[0] / "base", "llama")
    save_checkpoint(homes[1] / "base", "llama", change)
    fields = TEXT | {"model.kind": "lora", "model.base": "~/base"}
    words = [*TINY, *flags_of(fields), f"--workdir={tmp_path / 'new'}"]
    codes, _, errs = launch(
        *words, variables={i: {"HOME": str(home)} for i, home in enumerate(homes)}
    )
    assert codes == [2, 2] and errs[1] == ""
    assert errs[0] == (
        "error: the weights in model.base='~/base' differ between the processes; "
        "allowed: the same on all\n"
    )
    assert sorted(tmp_path.iterdir()) == homes


def test_a_folder_in_use_ends_both(launch, tmp_path):
    with lock(tmp_path):
        codes, _, errs = launch(*TINY, f"--workdir={tmp_path}")
    assert codes == [2, 2] and errs[1] == ""
    told = f"error: workdir={tmp_path} is in use by process {os.getpid()} on "
    assert errs[0].startswith(told) and errs[0].count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


ADDRESS = "localhost:1234"
BAD = {
    "no number": ((ADDRESS, None, 0, False), "--num_processes is missing"),
    "only an id": ((None, None, 1, False), "--coordinator_address is missing"),
    "no id": ((ADDRESS, 2, None, False), "--process_id is missing"),
    "both ways": ((ADDRESS, 2, 0, True), "--distributed is given too"),
    "half a way": ((ADDRESS, None, None, True), "--num_processes is missing"),
    "no port": (("localhost", 2, 0, False), "--coordinator_address=localhost"),
    "id": ((ADDRESS, 2, 2, False), "--process_id=2 .* 0 to 1"),
    "nobody": ((ADDRESS, 0, 0, False), "--num_processes=0 is not allowed; allowed"),
    "negative id": ((ADDRESS, 2, -1, False), "--process_id=-1 .* 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_flags_that_do_not_say_who_the_others_are(case):
    arguments, told = BAD[case]
    with pytest.raises(UserError, match=told) as error:
        multihost.check_flags(*arguments)
    assert "\n" not in str(error.value)


def test_a_mesh_has_equally_many_devices_of_every_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="num_devices=3 .* multiples of the 2 proc"):
        build_mesh(3)


def test_such_a_mistake_is_one_line_and_code_2(tmp_path):
    words = [ROOT / "launch.py", "--num_processes=2", f"--workdir={tmp_path / 'new'}"]
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: --coordinator_address is missing; allowed: ")
    assert len(ran.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_alone_a_process_is_the_leader_and_all_of_them():
    assert multihost.is_leader()
    assert [multihost.any_process(wish) for wish in (True, False)] == [True, False]
    assert multihost.allgather_text("größer") == [
        "größer"
    ] and multihost.allgather_text("") == [""]
    assert multihost.run_on_all(json.dumps, [1]) == "[1]"
    assert multihost.on_leader(sorted, [2, 1]) == [1, 2]
    assert multihost.exit_all(3) == 3
