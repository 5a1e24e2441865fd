"""The command line: exit codes, one line for every mistake, stopping and resuming."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from factories import SMALL, find_importable, restart, train_tokenizer, write_tokenizer

from configs import compare as study
from configs import default
from fedmoe_jax import launch
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.runtime.stop import Stop
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train import run as train
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.tune import take_settings

from .report.fake_runs import write_run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SIZES = SMALL | {"num_rounds": 6}
TINY = [f"--config={CONFIGS / 'default.py'}:smoke"]
TINY += [f"--config.{name}={value}" for name, value in SIZES.items()]


# Starts launch.py after replacing `MODULE.NAME` so that the process sends itself SIGNAL
# right after that function has seen round ROUND.
INTERRUPT = """
import importlib, os, runpy, sys, time
module, name, number, last = sys.argv[1:5]
module = importlib.import_module(module)
real = getattr(module, name)
def interrupted(*args):
    result = real(*args)
    done = args[1]
    if done == int(last):
        os.kill(os.getpid(), int(number))
        time.sleep(0.5)  # until the thread that hears signals has had its turn
    return result
setattr(module, name, interrupted)
sys.argv = sys.argv[5:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


SMOKE = f"--config={CONFIGS / 'default.py'}:smoke"
DIGITS = f"--config={CONFIGS / 'compare.py'}:digits,smoke"
BAD = {
    "unknown field": (["--config.num_expert=3"], "num_expert; .* as num_experts"),
    "unknown nested field": (["--config.fitness.idel=keep"], "such as fitness.idle"),
    "wrong type": (
        ["--config.num_experts=many"],
        "num_experts='many' is not allowed; allowed: whole",
    ),
    "float for int": (
        ["--config.num_rounds=2.5"],
        "num_rounds='2.5' .* allowed: whole numbers >= 1",
    ),
    "float for clients": (["--config.num_clients=20.5"], "allowed: whole numbers >= 1"),
    "float for batch": (["--config.batch_size=32.0"], "batch_size='32.0' is not .*"),
    "beyond int32": (
        ["--config.seed=99999999999999999999"],
        r"seed=9+ is not allowed; allowed: whole numbers \[0, 2147483647\]",
    ),
    "thousands of digits": (
        [f"--config.seed={'9' * 6000}"],
        r"seed='9+\.\.\. is not allowed; allowed: whole numbers",
    ),
    "no number": (["--config.num_clients=None"], "num_clients='None' .* whole numbers"),
    "a list": (["--config.num_clients=[1]"], r"num_clients='\[1\]' .* whole numbers"),
    "truth for number": (["--config.client.prox=True"], "prox='True' .* numbers >= 0"),
    "number for truth": (["--config.run.tensorboard=7"], "'7' .* allowed: True, False"),
    "group": (["--config.usage=3"], "usage='3' is not allowed; allowed: usage.decay"),
    "kinds of device": (["--config.devices.tiers=(1,)"], "allowed: tuples such as"),
    "no comparison": (["--config.compare.seeds=3"], "field compare.seeds; allowed"),
    "slots": (["--config.max_held=9"], "max_held=9 .* num_experts=8"),
    "cohort": (["--config.cohort_size=21"], "cohort_size=21 .* num_clients=20"),
    "no cohort": (["--config.cohort_size=0"], "cohort_size=0 .* >= 1"),
    "before the config": (["--config.cohort_size=0", SMOKE], "cohort_size=0 .* >= 1"),
    "alpha": (["--config.partition.alpha=0"], "partition.alpha=0.0 .* > 0"),
    "not a number": (["--config.partition.alpha=nan"], "partition.alpha=nan .* > 0"),
    "strategy": (["--config.strategy=best"], "strategy='best' .* random, fixed_random"),
    "data": (["--config.data.name=mnist"], "data.name='mnist' .* digits"),
    "too little data": (["--config.partition.min_size=999"], "partition.min_size=999"),
    "memory": (["--config.run.memory_limit_gb=1e-3"], "memory_limit_gb=0.001 .* GB"),
    "no base": (
        ["--config.data.name=markov", "--config.model.kind=lora"],
        "model.base='' is not allowed",
    ),
    "rank of a base": (
        ["--config.model.kind=lora", "--config.model.lora_rank=0"],
        "model.lora_rank=0 is not allowed; allowed: >= 1",
    ),
    "devices": (["--config.run.num_devices=9"], "run.num_devices=9 .* 0 .all. to 8"),
    "no file": (
        ["--config=configs/none.py"],
        "config=configs/none.py is no file; allowed: FILE or FILE:ARGUMENT",
    ),
    "a folder": (["--config=configs"], "config=configs is no file; allowed: FILE"),
    "an empty file name": (["--config="], "config= is no file; allowed: FILE"),
    "text for processes": (
        ["--num_processes=x"],
        "--num_processes=x is not allowed; allowed: whole numbers >= 1",
    ),
    "text for a switch": (
        ["--profile=maybe"],
        "--profile=maybe is not allowed; allowed: true, false",
    ),
    "an open list": (
        [DIGITS, "--config.compare.seeds=(0,"],
        r"compare.seeds='\(0,' is not allowed; allowed: whole numbers in \[0, 214748"
        r"3647\], as \(0, 1, 2\)",
    ),
    "argument": (
        [f"{SMOKE}y"],
        "error: config argument 'smokey' is unknown; allowed: smoke",
    ),
    "no value": (["--config"], "--config"),
    "unknown flag": (["--rounds=3"], "'rounds'"),
    "file of a plug-in": (["--plugins=mine.py"], "'mine.py' is no name of a module"),
    "unknown word": (["runs/here"], "'runs/here'"),
    "no plug-in": (["--plugins=json"], "json defines no table"),
    "unknown plug-in": (["--plugins", "none_such"], "no module 'none_such'"),
    "plug-ins in the config": (["--config.plugins=('mine',)"], "has --plugins=mine"),
    "change": ([DIGITS, "--config.compare.changes=('lr=3',)"], "has 'lr=3'"),
    "seeds": ([DIGITS, "--config.compare.seeds=('a',)"], "compare.seeds"),
    "seed twice": ([DIGITS, "--config.compare.seeds=(1,1)"], "compare.seeds=.* twice"),
    "change twice": ([DIGITS, "--config.compare.changes=('','')"], "none twice"),
    "same run": (
        [DIGITS, "--config.compare.changes=('','fitness.rate=0.3')"],
        "which are the same run",
    ),
    "no seeds": ([DIGITS, "--config.compare.seeds=()"], "compare.seeds"),
    "member": ([DIGITS, "--config.partition.min_size=999"], "partition.min_size=999"),
    "part of tuning": ([DIGITS, "--only=1/2", "--tune"], "--only .* with --tune"),
    "tuning of one run": ([*TINY, "--tune"], "--tune .*; allowed: with a comparison"),
    "an unknown field": (
        [*TINY, "--config.sed=3"],
        "unknown config field sed; allowed: the fields that .*, such as seed",
    ),
    "an unknown field of a group": (
        [*TINY, "--config.pruning.keep=0.5"],
        "field pruning.keep; allowed: the fields .*, such as pruning.kind, .*floor",
    ),
    "a part of a number": (
        [*TINY, "--config.pruning.floor.x=1"],
        "unknown config field pruning.floor.x; allowed",
    ),
    "a part of a name": (
        [*TINY, "--config.strategy.kind=x"],
        "unknown config field strategy.kind; .* such as strategy",
    ),
    "a strategy of a comparison": (
        [DIGITS, "--config.strategy=greedy"],
        "unknown config field strategy; .* such as compare.strategies",
    ),
    "a field that all runs change": (
        [DIGITS, "--config.compare.changes=('fitness.rate=0.2',)"]
        + ["--config.fitness.rate=0.4"],
        "--config.fitness.rate changes no run, as compare.changes or --settings",
    ),
    "a change of no field": (
        [DIGITS, "--config.compare.changes=('fitness.rat=3',)"],
        "allowed: .* field, which fitness.rat is not, and fitness.rate is",
    ),
    "settings of one run": ([*TINY, "--settings=x"], "--settings=x .* comparison"),
    "no settings": (
        [DIGITS, "--settings=none.json"],
        "allowed: settings.json of --tune",
    ),
    "no folder": ([*TINY, "--workdir="], "workdir='' is not allowed"),
    "bucket": ([*TINY, "--workdir=gs://mine/run"], "workdir='gs://mine/run' .* copied"),
    "no home": ([*TINY, "--workdir=~nobody-here/run"], "~ has no home here"),
    "folder": (
        [*TINY, "--workdir=/dev/null/run"],
        "workdir=/dev/null/run cannot be used",
    ),
}


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("csi", ["--config.channel.csi=1", "--config.usage.csi=1"], "usage.csi"),
        ("fair", ["--config.fairness.fair=1"], "fairness.fair"),
        ("strategy", ["--config.strategy=greedy"], "strategy"),
        ("no field's name", ["--config.strategy.kind=x"], "strategy.kind"),
        ("sed", [], "sed"),
    ],
)
def test_find_unknown_is_the_field_that_no_config_has(text, words, expected):
    known = {"channel.csi", "strategy", "fairness.floor"}
    assert launch.find_unknown(text, ["launch.py", *words], known) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--x=1"], ["--x=1"]),
        (["--config=a.py", "--x=1"], ["--config=a.py", "--x=1"]),
        (["--config.x=1", "--config=a.py"], ["--config=a.py", "--config.x=1"]),
        (["--x=1", "--config"], ["--x=1", "--config"]),
        (["--x=1", "-config", "a.py", "-y"], ["-config", "a.py", "--x=1", "-y"]),
    ],
)
def test_put_config_first_lets_its_fields_stand_before_it(words, expected):
    found = launch.put_config_first(["launch.py", *words])
    assert found == ["launch.py", *expected]


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_code_2(command, tmp_path, case):
    words, told = BAD[case]
    code, out, err = command(*words)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert re.search(told, err), err
    assert list(tmp_path.iterdir()) == []


# Three texts: two of 900 and 100 bytes to train on and to test, and an empty one.
TEXTS = {"a.txt": b"abcd " * 200, "b.txt": b"dcba " * 200, "c.txt": b""}
ARRAYS = {
    "train_x": np.zeros((12, 4, 4), np.uint8),
    "train_y": np.arange(12) % 3,
    "test_x": np.zeros((6, 4, 4), np.uint8),
    "test_y": np.arange(6) % 3,
}


def write_arrays(**changes):
    """A function that writes arrays, None for one that is missing, and names them."""

    def write(folder):
        arrays = {name: x for name, x in (ARRAYS | changes).items() if x is not None}
        np.savez(folder / "mine.npz", **arrays)
        return ["--config.data.name=arrays", f"--config.data.file={folder}/mine.npz"]

    return write


def write_texts(*words, tokenizer=False, **changes):
    """A function that writes texts, changed by their names, and names them."""

    def write(folder):
        changed = {f"{name}.txt": text for name, text in changes.items()}
        for name, text in (TEXTS | changed).items():
            (folder / name).write_bytes(text)
        named = ["--config.data.name=text", f"--config.data.dir={folder}", *words]
        if tokenizer:
            path = write_tokenizer(folder, train_tokenizer("abcd"))
            named.append(f"--config.data.tokenizer={path}")
        return named

    return write


def write_tfrecords(folder):
    """A data set of TFDS in the form that it has by default."""
    version = folder / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    features = {"featuresDict": {"features": {"image": {"image": {}}}}}
    (version / "features.json").write_text(json.dumps(features))
    (version / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    return ["--config.data.name=mnist", f"--config.data.dir={folder}"]


NATURAL = ["--config.partition.kind=natural", "--config.num_clients=3"]
NATURAL += ["--config.cohort_size=3", "--config.partition.min_size=1"]
BAD_DATA = {
    "another file format": (
        write_tfrecords,
        "data.dir: .*/mnist/3.0.1 holds tfrecord files, allowed: array_record; run ",
    ),
    "a missing array": (
        write_arrays(test_y=None),
        "data.file='.*mine.npz' has no test_y; allowed: train_x, train_y, test_x, ",
    ),
    "a misnamed array": (
        write_arrays(train_labels=np.zeros(12, int)),
        "data.file='.*mine.npz' has train_labels; allowed: train_x, train_y, test_x, ",
    ),
    "labels that are no integers": (
        write_arrays(train_y=np.arange(12) / 4),
        r"has train_y float64\[12\]; allowed: 12 whole numbers >= 0, one for each ima",
    ),
    "huge labels": (
        write_arrays(train_y=np.arange(12) % 3 * 750_000_000),
        "has 5 different labels from 0 to 1500000000; allowed: 0 to 4, as at least hal",
    ),
    "sparse labels": (
        write_arrays(train_y=np.arange(12) % 4 * 1000),
        "has 6 different labels from 0 to 3000; allowed: 0 to 5, as at least half of",
    ),
    "clients without text": (
        write_texts(*NATURAL),
        r"num_clients=3 .* allowed: at most 2, the data's clients \(1 of 3 clients "
        r"have too little text for a window of 32 to train on and one to test, and are",
    ),
    "no client with text": (
        write_texts(a=b"", b=b""),
        "data.dir='.*' has no client with enough text, as the longest has 0 tokens to "
        "train on and 0 to test, its last tenth; allowed: more than data.length=32 of",
    ),
    "text that is not UTF-8": (
        write_texts(b=b"ab\xff" * 99, tokenizer=True),
        "b.txt is not UTF-8, as its byte 2 shows; allowed: data.tokenizer='', which",
    ),
    "windows beyond every text": (
        write_texts("--config.data.length=200"),
        "data.length=200 .* has 900 tokens to train on and 100 to test; .* 1 to 99$",
    ),
    "heads that do not divide": (
        lambda folder: ["--config.data.name=markov", "--config.model.heads=5"],
        "model.heads=5 is not allowed; allowed: divisors of model.stem_width=4",
    ),
    "fields of text of images": (
        lambda folder: ["--config.data.kilobytes=1"],
        "data.kilobytes=1 .* data.name='digits', which does not read it; allowed: 0$",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_one_line_and_code_2(command, tmp_path, case):
    write, told = BAD_DATA[case]
    (tmp_path / "data").mkdir()
    words = write(tmp_path / "data")
    kind = ["--config.model.kind=transformer"] if "'digits'" not in told else []
    code, out, err = command(*TINY, *kind, *words)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert re.search(told, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "def get_config(): return {'seed': 1}",
            "returns a dict from get_config; allowed: a ConfigDict",
        ),
        (
            "def get_config(): return None",
            "returns a NoneType from get_config; allowed: a",
        ),
        ("config = {}", "has no get_config; allowed: one that has"),
        (
            "def get_config():\n    return 'x'.nope",
            "ends in AttributeError in line 2 ('str' object has no attribute 'nope'); "
            "allowed: a file whose get_config returns a ConfigDict",
        ),
        (
            "def get_config():\n    return int('x')",
            "ends in ValueError in line 2 (invalid literal for int() with base 10: ",
        ),
        ("def get_config(", "ends in SyntaxError in line 1"),
        ("import none_such", "ends in ModuleNotFoundError in line 1"),
        (
            "from fedmoe_jax.configs import default\n"
            "def get_config():\n"
            "    config = default.get_config()\n"
            "    with config.ignore_type():\n"
            "        config.batch_size = 32.0\n"
            "    return config",
            "batch_size=32.0 is not allowed; allowed: whole numbers >= 1",
        ),
    ],
)
def test_a_config_file_returns_a_config(command, tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    code, out, err = command(f"--config={tmp_path / 'mine.py'}")
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and told in err, err
    assert not (tmp_path / "new").exists()


def test_a_config_file_may_take_no_argument(command, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(): return None")
    code, _, err = command(f"--config={tmp_path / 'mine.py'}:smoke")
    assert code == 2 and "has an argument; allowed: none, as get_config of" in err


def test_a_config_in_a_folder_with_a_colon_is_read(command, tmp_path):
    file = tmp_path / "a:b" / "c d" / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text((CONFIGS / "default.py").read_text())
    code, _, err = command(f"--config={file}:smoke", "--config.max_held=9")
    assert code == 2 and err.startswith("error: max_held=9 is not allowed")


def test_a_config_in_the_users_home_is_found(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text((CONFIGS / "default.py").read_text())
    code, _, err = command("--config=~/mine.py:smoke", "--config.max_held=9")
    assert code == 2 and err.startswith("error: max_held=9 is not allowed")


@pytest.mark.parametrize("text", ['{"settings": 3}', '{"settings": [1]}', "{}"])
def test_a_file_without_settings_is_refused(command, tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    code, _, err = command(DIGITS, f"--settings={tmp_path / 'mine.json'}")
    assert code == 2 and "mine.json holds no settings; allowed: what --tune" in err


def test_settings_are_those_of_the_strategies_that_are_compared(tmp_path):
    settings = ["greedy: client.learning_rate=0.5", "fedmix: local_steps=9"]
    (tmp_path / "mine.json").write_text(json.dumps({"settings": settings}))
    config = study.get_config("digits,smoke")
    config.compare.strategies = ("greedy", "random")
    take_settings(config.lock(), str(tmp_path / "mine.json"))
    assert config.compare.settings == ("greedy: client.learning_rate=0.5",)
    rates = {name: m.client.learning_rate for name, m in list_members(config)}
    assert rates == {"greedy-seed0": 0.5, "random-seed0": 0.2}


def start(cache, *words):
    """Runs Python with the compiled programs of earlier calls at hand."""
    env = os.environ | {
        "PYTHONPATH": find_importable(),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    ran = subprocess.run(
        [sys.executable, *words], env=env, cwd=cache, capture_output=True, text=True
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_help_lists_every_field():
    text = launch.describe_fields()
    for name, value in flatten(default.get_config().to_dict()).items():
        shown = re.search(rf"--config\.{re.escape(name)}=(.*)\n +\S", text)
        assert shown, f"{name} is missing"
        assert ast.literal_eval(shown[1]) == value


def test_help_names_every_study_by_the_first_line_of_its_file():
    shown = launch.describe_studies().splitlines()
    for path in CONFIGS.glob("*.py"):
        title = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        (line,) = (line for line in shown if f"configs/{path.name} " in line)
        assert line.split(maxsplit=1)[1] == title and len(line) < 120


def test_help_names_no_files_beside_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "STUDIES", tmp_path / "none")
    assert launch.describe_studies() == ""
    (tmp_path / "other.py").write_text('"""Of another package."""\n')
    monkeypatch.setattr(launch, "STUDIES", tmp_path)
    assert launch.describe_studies() == ""


@pytest.mark.slow
@pytest.mark.parametrize("program", [[ROOT / "launch.py"], ["-m", "fedmoe_jax"]])
def test_a_mistake_in_a_process_of_its_own(program, tmp_path):
    words = [f"--workdir={tmp_path / 'new'}", "--config.max_held=9"]
    code, out, err = start(tmp_path, *program, *words)
    told = "error: max_held=9 is not allowed; allowed: 1 to num_experts=8\n"
    assert (code, out, err) == (2, "", told)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was stopped in round 3, killed while saving round 4, and resumed."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("run")
    script = [ROOT / "launch.py", f"--workdir={folder}", *TINY]
    driver = lambda *what: ["-c", INTERRUPT, *map(str, what), *script]
    results = [
        start(cache, *driver("fedmoe_jax.train.loop", "list_rows", signal.SIGTERM, 3))
    ]
    results[0] += (read_metrics(folder / "metrics.jsonl"),)
    kill = driver("fedmoe_jax.train.checkpoint", "save", signal.SIGKILL, 4)
    results += [start(cache, *kill), start(cache, *script)]
    return folder, results


@pytest.mark.slow
def test_a_stopped_run_says_how_to_go_on(interrupted):
    folder, ((code, out, err, rows), *_) = interrupted
    assert code == 3, err
    assert [row["round"] for row in rows] == [1, 2, 3]
    last = out.splitlines()[-1]
    assert last.startswith("stopped, with what is done saved; to resume: python ")
    assert f"--workdir={folder}" in last and "--config.num_clients=4" in last


@pytest.mark.slow
def test_a_killed_run_was_killed(interrupted):
    _, (_, (code, *_), *_) = interrupted
    assert code == -signal.SIGKILL


@pytest.mark.slow
def test_the_same_call_finishes(interrupted):
    folder, (*_, (code, out, err)) = interrupted
    assert code == 0, err
    assert "going on after round 3/6\n" in out
    assert f"report: {folder / 'report.html'}" in out
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())["num_rounds"] == 6


@pytest.mark.slow
def test_interruptions_leave_no_mark_on_the_run(interrupted, tmp_path):
    """Bitwise the state and, but for the clock, the rows of an undisturbed run."""
    folder, _ = interrupted
    config = default.get_config("smoke")
    config.update_from_flattened_dict(SIZES)
    train.train(config, tmp_path, stop=lambda: False, label="whole", profile=False)
    like = restart(config).state
    states, rows = [], []
    for run in (folder, tmp_path):
        with checkpoint.open_checkpoints(run / "checkpoints", 9) as store:
            state, done = checkpoint.restore_latest(store, like)[:2]
        assert done == 6
        state = state.replace(key=jax.random.key_data(state.key))
        states.append(jax.device_get(state))
        clock = ("seconds", "evaluation_seconds", "save_seconds", "compile_seconds")
        found = read_metrics(run / "metrics.jsonl")
        rows.append([{k: v for k, v in r.items() if k not in clock} for r in found])
    same = lambda a, b: a.tobytes() == b.tobytes()
    assert jax.tree.all(jax.tree.map(same, *states))
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("program", [[ROOT / "launch.py"], ["-m", "fedmoe_jax"]])
def test_help_is_the_same_of_both_programs(program, tmp_path):
    _, out, _ = start(tmp_path, *program, "--help")
    assert "  --config.fitness.rate=0.3\n" in out
    for flag in ("--plugins", "--workdir", "--coordinator_address", "--[no]profile"):
        assert f"\n  {flag}" in out
    assert "weight of the newest feedback" in out
    assert "\n  configs/languages.py " in out and "python -m fedmoe_jax.data" in out


def test_the_command_to_resume_is_the_one_that_was_given(monkeypatch):
    script = Path(launch.__file__).with_name("__main__.py")
    monkeypatch.setattr(sys, "argv", [str(script), "--workdir=a b"])
    assert launch.name_command().endswith(" -m fedmoe_jax '--workdir=a b'")
    monkeypatch.setattr(sys, "argv", ["launch.py", "--workdir=x"])
    assert launch.name_command().endswith(" launch.py --workdir=x")


def test_a_run_of_an_older_version_is_refused_in_one_line(command, tmp_path):
    config = default.get_config("smoke").to_dict()
    del config["plugins"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = command(SMOKE, f"--workdir={tmp_path}")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "older version of fedmoe_jax" in err and "no field plugins" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_wish_to_stop_before_the_first_round_saves_nothing(command, tmp_path):
    stop = Stop()
    stop.wish()
    code, out, _ = command(*TINY, stop=stop)
    assert code == 3 and "stopped, with what is done saved; to resume: " in out
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == []
    assert not list((tmp_path / "new" / "checkpoints").glob("[0-9]*"))


STUDY = [f"--config={CONFIGS / 'compare.py'}:digits,smoke"]


@pytest.mark.parametrize("only", ["9/8", "0/8", "x", ""])
def test_only_names_a_part(command, tmp_path, only):
    code, out, err = command(*STUDY, f"--only={only}")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: --only={only} is not allowed; allowed: PART/PARTS")
    assert not (tmp_path / "new").exists()


def test_only_is_of_a_comparison(command, tmp_path):
    code, _, err = command(*TINY, "--only=1/2")
    assert code == 2 and err.count("\n") == 1
    assert "--only=1/2 is not allowed; allowed: with a comparison" in err
    assert not (tmp_path / "new").exists()


def test_a_part_without_a_run_is_a_success(command, tmp_path):
    code, out, err = command(*STUDY, "--only=8/8")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert "--only=8/8 has no run" in out and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_report_joins_folders_without_jax(tmp_path):
    """In a process of its own, in which JAX cannot be imported."""
    made = [write_run(tmp_path / f"run{seed}", seed=seed) for seed in (0, 1)]
    code = "import sys; sys.modules['jax'] = None; from fedmoe_jax.launch import start"
    sources = ",".join(map(str, made))
    words = [f"--report={sources}", f"--workdir={tmp_path / 'both'}"]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; start()", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"report.html", "runs.csv", "clients.csv", "table.md"} <= names
    rows = (tmp_path / "both" / "runs.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["greedy", "0"],
        ["greedy", "1"],
    ]


@pytest.mark.slow
def test_report_takes_the_baseline_of_the_first_folder(command, tmp_path):
    made = [write_run(tmp_path / f"made/{name}", name) for name in ("greedy", "random")]
    config = json.loads((made[0] / "config.json").read_text())
    config["evaluation"] = {"baseline": "random"}
    (made[0] / "config.json").write_text(json.dumps(config))
    words = [f"--report={made[0]},{made[1]}", f"--workdir={tmp_path / 'both'}"]
    for more, baseline in (([], "random"), (["greedy"], "greedy")):
        given = [f"--config.evaluation.baseline={name}" for name in more]
        assert command(*words, *given)[0] == 0
        rows = (tmp_path / "both" / "paired.csv").read_text().splitlines()
        assert {row.split(",")[1] for row in rows[1:]} == {baseline}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--report={run}", "--workdir={run}"], "as it holds config.json; allowed: a "),
        (["--report={run}/x", "--workdir={new}"], "config.json is missing; allowed: "),
        (["--report=", "--workdir={new}"], "--report= has no finished run; allowed: "),
        *(
            (["--report={run}", "--workdir={new}", flag], f"{name} is not allowed with")
            for name, flag in [
                ("--only", "--only=1/2"),
                ("--tune", "--tune"),
                ("--settings", "--settings=settings.json"),
                ("--profile", "--profile"),
            ]
        ),
        (
            ["--report={run}", "--workdir={new}", "--config.evaluation.baseline=x"],
            "evaluation.baseline='x' is not allowed; allowed: a row of the report",
        ),
    ],
)
def test_report_refuses_in_one_line(command, tmp_path, words, told):
    places = {"run": write_run(tmp_path / "run"), "new": tmp_path / "new"}
    words = [word.format(**places) for word in words]
    code, out, err = command(*words)
    assert code == 2 and told in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_report_needs_a_folder_of_its_own(tmp_path):
    words = [sys.executable, "launch.py", f"--report={write_run(tmp_path / 'run')}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    told = "error: --workdir is missing; allowed: with --report, the folder for the "
    assert done.returncode == 2 and done.stderr == f"{told}report\n"
