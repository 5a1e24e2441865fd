"""The examples of docs/ and examples/ run as they stand there."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fedmoe_jax import launch as program
from fedmoe_jax import plugins
from fedmoe_jax.data.folders import resolve_data_dir
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.data.prepare import prepare
from fedmoe_jax.data.tfds import find_source
from fedmoe_jax.export import main as export
from fedmoe_jax.federation import make_partition
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.runtime.files import read_json
from fedmoe_jax.tables import list_plugins
from fedmoe_jax.train.run import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT, NOTEBOOK = (ROOT / "examples" / f"quickstart.{end}" for end in ("py", "ipynb"))


GUIDE = (ROOT / "docs" / "extending.md").read_text()
OWN_DATA, PLUG_INS = GUIDE.split("\n## Plug-ins\n")


def find_code(text):
    """The Python blocks of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def find_commands(text):
    """The words after `python` of each command in a Markdown text."""
    blocks = re.findall(r"^```\n(python .*?)^```$", text, re.S | re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The modules of docs/extending.md as files that can be imported."""
    for code in find_code(PLUG_INS):
        (name,) = re.match(r"# (\w+)\.py\n", code).groups()
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield sorted(path.stem for path in tmp_path.glob("*.py"))
    for name in list_plugins():
        plugins.leave(name)
        sys.modules.pop(name, None)


def make_config(**changes):
    from fedmoe_jax.configs import default

    config = default.get_config("smoke")
    changes = {"run.num_devices": 1, "run.tensorboard": False} | changes
    config.update_from_flattened_dict(changes)
    return config


IMAGES = ("linear_experts", "nights", "rotating", "stripes", "two_questions")
TEXT = ("dialects", "token_mixtures", "word_starts")


def test_the_files_of_the_guide_are_plug_ins(files, tmp_path):
    assert files == sorted(IMAGES + TEXT)
    plugins.load_plugins(*IMAGES)
    config = make_config(
        **{"strategy": "rotating", "data.name": "asked_stripes", "nights.speed": 0.5},
        **{"model.kind": "linear_experts", "rotating.fitness": 0.3},
        **{"num_rounds": 8, "client.learning_rate": 0.01, "partition.min_size": 1},
    )
    run = tmp_path / "run"
    assert train(config, run, stop=lambda: False, label="run", profile=False)
    rows = read_metrics(run / "metrics.jsonl")
    nights = [row["night"] for row in rows]
    assert 0 < min(nights) < max(nights) < 1 and len(set(nights)) > 2
    found = read_json(run / "summary.json")["nights"]
    assert found == pytest.approx(sum(nights) / len(nights))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    with np.load(run / "final.npz") as arrays:
        held, capacity = arrays["times_held"], arrays["belief"]
    np.testing.assert_array_equal(held.sum(1), config.num_rounds * capacity)
    # No client holds an expert twice before it has held all of them once.
    assert (np.ptp(held, axis=1) <= 1).all()


def find_launch(name):
    """The words after `launch.py` of the guide's command with this work folder."""
    commands = find_commands(OWN_DATA)
    (words,) = (words for words in commands if f"--workdir=runs/{name}" in words)
    return words[1:]


@pytest.fixture
def train_own(command, tmp_path, monkeypatch):
    """Runs a command of the guide in an empty folder; the folder of its run."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        short = ["--config.run.num_devices=1", "--config.run.tensorboard=False"]
        code, _, err = command(*find_launch(name), *short)
        assert code == 0, err
        return Path("runs", name)

    return run


def test_arrays_of_the_guide_have_natural_clients_or_overlap(train_own):
    (code,) = find_code(OWN_DATA)
    exec(compile(code, "write_arrays.py", "exec"), {})
    with np.load("mine.npz") as arrays:
        client = arrays["train_client"]
    owned = {}
    for name in ("natural", "overlap"):
        folder = train_own(name)
        rows = read_metrics(folder / "metrics.jsonl")
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]
        with np.load(folder / "partition.npz") as arrays:
            index, size = arrays["index"], arrays["size"]
        owned[name] = [row[:n] for row, n in zip(index, size, strict=True)]
    groups = [set(client[rows]) for rows in owned["natural"]]
    assert [len(group) for group in groups] == [2] * 10
    assert set.union(*groups) == set(range(20))
    overlap = [set(rows) for rows in owned["overlap"]]
    assert all(50 < len(rows) <= 60 for rows in overlap)
    assert len(set.union(*overlap)) < sum(map(len, overlap))


def test_text_of_the_guide_trains_a_transformer(train_own):
    rng = np.random.default_rng(0)
    for name in re.findall(r"texts/\S+\.txt", OWN_DATA):
        words = rng.choice([name[6] * 2, "lo", "mi", "na"], 800)
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(" ".join(words))
    folder = train_own("texts")
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["global_bits"] < rows[1]["global_bits"] < 8
    assert np.shape(rows[-1]["expert_load"]) == (4,)  # of both mixtures, which are tied
    with np.load(folder / "partition.npz") as arrays:
        assert arrays["label_counts"].shape == (4, 2)  # groups of writers, languages
    # Embedding and head; attention with two of four heads of keys and values, and
    # norms; dense and shared layers; gates; two experts of each mixture.
    square = 64 * 64
    params = 2 * 256 * 64 + 64 + 4 * (3 * square + 2 * 64)
    params += 2 * 3 * (square + square // 2) + 2 * 4 * (64 + 1) + 2 * 2 * 3 * square
    summary = read_json(folder / "summary.json")
    assert summary["peak_client_parameters"] == params


def test_data_of_tfds_of_the_guide_are_found_by_name(command, tmp_path, monkeypatch):
    """Up to the training: the data are prepared, their speakers found and grouped."""
    prepared = os.environ.get("TFDS_DATA_DIR", "")
    if not find_source(Path(prepared), "tiny_shakespeare"):
        pytest.skip("tiny_shakespeare is not in TFDS_DATA_DIR")
    (tmp_path / "tfds").symlink_to(Path(prepared).resolve())
    monkeypatch.chdir(tmp_path)
    (words,) = (w for w in find_commands(OWN_DATA) if "fedmoe_jax.data" in w)
    folder = words[3].removeprefix("--data_dir=")
    assert prepare(words[2], resolve_data_dir(folder)).is_dir()
    found = []
    monkeypatch.setattr(program, "run", lambda config, *_: found.append(config) or True)
    assert command(*find_launch("plays"))[0] == 0
    (config,) = found
    data = load_dataset(config.data)
    partition = make_partition(config, data)
    assert data.task == "text" and len(data.stratum_names) > 150
    assert (partition.size > 0).sum() == config.num_clients == 20


def test_a_run_of_the_guide_becomes_a_base_and_its_experts_adapters(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "pretrained.md").read_text()
    _, own = guide.split("\n## Without a download\n")
    short = ["--config.run.num_devices=1", "--config.run.tensorboard=False"]
    for words in find_commands(own):
        if words[0] == "-m":
            assert words[1] == "fedmoe_jax.export" and export(words[2:]) == 0
        else:
            code, _, err = command(*words[1:], *short)
            assert code == 0, err
    last = {
        name: read_metrics(Path("runs", name, "metrics.jsonl"))[-1]
        for name in ("base", "experts")
    }
    before, after = last["base"]["global_bits"], last["experts"]["global_bits"]
    assert abs(after - before) < 0.1  # as it starts from the base
    assert last["experts"]["personal_bits"] < before
    made = sorted(path.name for path in Path("adapters").iterdir())
    assert made == [*(f"expert{e}" for e in range(4)), "gates.safetensors"]


def launch(folder, *words):
    """What `python launch.py` prints, in the folder of the plug-ins."""
    ran = subprocess.run(
        [sys.executable, ROOT / "launch.py", *words],
        env=os.environ | {"PYTHONPATH": "", "XLA_FLAGS": ""},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == ("--help" in words), ran.stderr  # absl's help ends with 1
    return ran.stdout


def test_text_of_the_guide_runs_from_the_command_line(files, tmp_path):
    """Four speakers of each dialect, two MoE layers, first letters that weigh more."""
    fields = {
        **{"data.name": "dialect_starts", "data.length": 16},
        **{"model.kind": "token_mixtures", "model.stem_width": 16},
        **{"model.expert_width": 16, "num_experts": 4, "max_held": 2},
        **{"partition.kind": "natural", "num_clients": 8, "cohort_size": 8},
        **{"client.optimizer": "adamw", "client.learning_rate": 0.01},
        **{"num_rounds": 4, "run.num_devices": 1, "run.tensorboard": False},
    }
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={ROOT / 'configs' / 'default.py'}:smoke"
    launch(tmp_path, f"--plugins={','.join(TEXT)}", config, "--workdir=run", *words)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert 0 < rows[-1]["global_bits"] < 8 and rows[-1]["own_test_bits"] > 0
    assert np.shape(rows[-1]["expert_load"]) == (2, 4)
    with np.load(tmp_path / "run" / "final.npz") as arrays:
        counts = arrays["label_counts"]
    assert ((counts > 0).sum(axis=1) == 1).all()  # each speaker has one dialect
    np.testing.assert_array_equal((counts > 0).sum(axis=0), [4, 4])


def test_help_lists_the_names_and_options_of_the_guide(files, tmp_path):
    shown = launch(tmp_path, f"--plugins={','.join(files)}", "--help")
    for line in (
        "dialects: DATASETS dialects",
        "word_starts: DATASETS dialect_starts",
        "word_starts: TASKS word_starts",
        "token_mixtures: MODELS token_mixtures",
        "rotating: STRATEGIES rotating",
    ):
        assert f"\n  {line}\n" in shown
    assert "--config.rotating.fitness=0.5" in shown
    assert "--config.nights.speed=1.0" in shown


def test_a_task_of_the_guide_counts_the_answers_that_are_known(files):
    plugins.load_plugins("stripes", "two_questions")
    from fedmoe_jax.tasks import TASKS

    task = TASKS["two_questions"]
    rows = {"x": np.full((2, 8, 8, 1), 99, np.uint8), "y": np.array([3, 3])}
    rows["x"][1] = 7  # dark: its width is not known
    statistics = {"mean": np.zeros((8, 8, 1)), "std": np.ones((8, 8, 1))}
    batch = task.prepare(rows, statistics)
    assert batch["answer"].tolist() == [[1, 1], [1, -1]]
    scores = task.loss(np.array([[0.0, -2.0], [0.0, -2.0]], np.float32), batch)
    lost = np.log(2), (np.log(2) + np.log1p(np.exp(2))) / 2
    np.testing.assert_allclose(scores.loss, lost[::-1], rtol=1e-5)
    assert scores.weight.tolist() == [2, 1]
    scores = task.loss(np.array([[1.0, -2.0], [1.0, -2.0]], np.float32), batch)
    assert scores.score.tolist() == [0.5, 1]


def test_a_task_of_the_guide_weighs_the_first_letters_of_words(files):
    plugins.load_plugins("dialects", "word_starts")
    from fedmoe_jax.tasks import TASKS

    task = TASKS["word_starts"]
    tokens = np.frombuffer(b"a bc\0", np.uint8)[None]
    batch = task.prepare({"tokens": tokens, "length": np.array([4])}, {})
    scores = task.loss(np.zeros((1, 4, 256), np.float32), batch)
    assert scores.weight.tolist() == [[1, 4, 1, 0]]
    np.testing.assert_allclose(scores.loss, np.log(256), rtol=1e-6)


def test_the_notebook_is_the_script():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    parts = re.split(r"(?m)^# %%", SCRIPT.read_text())[1:]
    script = [p.partition("\n")[2].strip("\n") for p in parts if p[0] == "\n"]
    assert code == script


def test_the_quickstart_runs(monkeypatch, capsys):
    matplotlib.use("agg")
    monkeypatch.setitem(sys.modules, "quickstart", None)
    names = runpy.run_path(str(SCRIPT), run_name="__main__")
    assert set(names["runs"]) == {"random", "greedy", "restless"}
    last = names["runs"]["restless"].rows["global_accuracy"][-1]
    assert f"global accuracy {last:.3f}" in capsys.readouterr().out
    assert len(names["axes"].lines) == 3
    plugins.leave("__main__")


def test_the_session_of_the_debugging_page_runs(capfd):
    names = {}
    code = "\n".join(find_code((ROOT / "docs" / "debugging.md").read_text()))
    exec(compile(code, "debugging.md", "exec"), names)
    assert not names["update"].finite and names["names"]
    printed = capfd.readouterr().out
    assert "round 0: usage" in printed and "round 1: usage" in printed
    assert "invalid value (nan)" in printed
