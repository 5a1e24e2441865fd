"""The examples of docs/ and examples/ run as they stand there."""

import json
import re
import runpy
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fedmoe_jax import plugins
from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.runtime.files import read_json
from fedmoe_jax.tables import list_plugins
from fedmoe_jax.train.run import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT, NOTEBOOK = (ROOT / "examples" / f"quickstart.{end}" for end in ("py", "ipynb"))


def find_code(path):
    """The Python blocks of a Markdown page."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The modules of docs/extending.md as files that can be imported."""
    for code in find_code(ROOT / "docs" / "extending.md"):
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


def test_the_files_of_the_guide_are_plug_ins(files, tmp_path):
    expected = ["linear_experts", "nights", "rotating", "stripes", "top_two"]
    assert files == expected
    plugins.load_plugins(*files)
    load = DATASETS["stripes"]
    scored = lambda folder: load(folder)._replace(task="top_two")
    DATASETS["stripes"] = scored
    config = make_config(
        **{"strategy": "rotating", "data.name": "stripes", "nights.speed": 0.5},
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


def test_a_task_of_the_guide_scores_the_two_likeliest(files):
    plugins.load_plugins("top_two")
    from fedmoe_jax.tasks import TASKS

    logits = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], np.float32)
    scores = TASKS["top_two"].loss(logits, {"y": np.array([1, 2])})
    assert scores.score.tolist() == [1.0, 0.0]


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
    code = "\n".join(find_code(ROOT / "docs" / "debugging.md"))
    exec(compile(code, "debugging.md", "exec"), names)
    assert not names["update"].finite and names["names"]
    printed = capfd.readouterr().out
    assert "round 0: usage" in printed and "round 1: usage" in printed
    assert "invalid value (nan)" in printed
