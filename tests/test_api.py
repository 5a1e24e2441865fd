"""The door: what `import fedmoe_jax` offers, and that it is the program's own run."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from factories import SMALL, find_importable

import fedmoe_jax
from fedmoe_jax import launch
from fedmoe_jax.api import predict, run, stack_rows
from fedmoe_jax.configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.report import outputs

ROOT = Path(__file__).parents[1]
CLOCK = {"seconds", "evaluation_seconds", "save_seconds", "compile_seconds"}
# Orbax leaves reads unawaited when one of them meets a damaged file.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make_config(**changes):
    config = default.get_config("smoke")
    config.update_from_flattened_dict(SMALL | changes)
    return config


def assert_same(one, other):
    """Bitwise the same states and, but for the clock, the same rows."""
    same = lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert jax.tree.all(jax.tree.map(same, one.state, other.state))
    assert one.rows.keys() | CLOCK == other.rows.keys() | CLOCK
    for name in one.rows.keys() - CLOCK:
        np.testing.assert_array_equal(one.rows[name], other.rows[name], name)


def accuracy(result, client=None):
    data = result.plan.data
    return (predict(result, data.test["x"], client).argmax(-1) == data.test["y"]).mean()


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def result(told):
    return run(make_config(), on_row=told.append)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of the same run as `launch.py` makes it."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "write_all", lambda *args, **kwargs: None)
        assert launch.run(make_config(), folder, "", lambda: False, False)
    return folder


def test_every_public_name_is_there():
    for name in dir(fedmoe_jax):
        assert getattr(fedmoe_jax, name) is not None
    names = {"run", "load_run", "predict", "Strategy", "UserError", "__version__"}
    assert names <= set(dir(fedmoe_jax))
    with pytest.raises(AttributeError, match="no attribute 'train_it'"):
        _ = fedmoe_jax.train_it


def test_run_is_the_programs_run(result, launched):
    assert_same(result, fedmoe_jax.load_run(launched))


def test_run_with_a_folder_is_load_run_of_it(result, tmp_path):
    config = make_config(num_rounds=2)
    half = run(config, tmp_path)
    assert len(half.rows["round"]) == 2 and half.config.num_rounds == 2
    told = []
    config.num_rounds = 4
    whole = run(config, str(tmp_path), told.append)
    assert [row["round"] for row in told] == [3, 4]  # those that were left
    assert_same(whole, result)
    assert (tmp_path / "summary.json").exists()


def test_on_row_may_be_none(tmp_path):
    for folder in (None, tmp_path / "run"):
        found = run(make_config(num_rounds=2), folder, on_row=None)
        assert len(found.rows["round"]) == 2


def test_on_row_gets_every_row(result, told):
    assert [row["round"] for row in told] == [1, 2, 3, 4]
    assert stack_rows(told).keys() == result.rows.keys()
    assert told[0]["total_bytes_up"] == told[0]["bytes_up"]


def test_rows_are_arrays_over_rounds(result):
    rows = result.rows
    assert rows["round"].dtype == np.int64 and rows["round"].tolist() == [1, 2, 3, 4]
    assert np.isnan(rows["global_accuracy"]).tolist() == [True, False, True, False]
    assert rows["expert_load"].shape == (4, SMALL["num_experts"])
    assert repr(result) == "Run(strategy='load_balanced', 4 rounds)"


def test_stack_rows_marks_what_is_missing():
    rows = stack_rows([{"a": 1, "b": [1.0, None]}, {"a": None, "c": 2}])
    np.testing.assert_array_equal(rows["a"], [1, np.nan])
    np.testing.assert_array_equal(rows["b"], [[1, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(rows["c"], [np.nan, 2])
    assert stack_rows([]) == {}


def test_predict_is_the_model_of_the_global_accuracy(result, launched):
    last = result.rows["global_accuracy"][-1]
    assert accuracy(result) == pytest.approx(last, abs=1e-6)
    images = result.plan.data.test["x"][:7]
    outputs = predict(fedmoe_jax.load_run(launched), images)
    assert outputs.shape == (7, 10) and outputs.dtype == np.float32
    np.testing.assert_array_equal(outputs, predict(result, images))


@pytest.mark.parametrize(
    "changes",
    [{"gate.mode": "personal"}, {"strategy": "pfedmoe"}, {"strategy": "fedmix"}],
)
def test_predict_with_a_clients_own_parts(changes):
    """The global accuracy is the mean over clients that have taken part."""
    own = run(make_config(num_rounds=2, **changes))
    took_part = np.flatnonzero(own.state.participation.rounds)
    each = [accuracy(own, int(client)) for client in took_part]
    last = own.rows["global_accuracy"][-1]
    assert np.mean(each) == pytest.approx(last, abs=1e-6)
    assert len(set(each)) > 1
    for client in (None, -1, SMALL["num_clients"]):
        with pytest.raises(UserError, match=r"client=.* allowed: 0 to 3, as parts"):
            predict(own, own.plan.data.test["x"], client)


def test_predict_refuses_in_one_line(result):
    images = result.plan.data.test["x"]
    found = predict(result, images[:3, :, :, 0])
    np.testing.assert_array_equal(found, predict(result, images[:3]))
    with pytest.raises(UserError, match="client=0 is not allowed; allowed: None"):
        predict(result, images, 0)
    for wrong in (images / 255, images[0], images[:, :4], images[:0]):
        with pytest.raises(UserError, match=r"allowed: 'x' uint8\[B, 8, 8, 1\]"):
            predict(result, wrong)
    with pytest.raises(UserError, match="no checkpoint was found"):
        predict(result._replace(state=None), images)


def test_run_takes_one_valid_run(tmp_path):
    with pytest.raises(UserError, match="num_experts=1"):
        run(make_config(num_experts=1), tmp_path / "new")
    config = make_config()
    config.compare = {"seeds": (0,)}
    with pytest.raises(UserError, match="a config of one run"):
        run(config, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_load_run_reads_a_damaged_run_and_changes_nothing(launched, tmp_path):
    """The newest step is passed over; a process that writes there is not disturbed."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", launched, folder], check=True)
    steps = folder / "checkpoints"
    for file in (steps / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    (steps / "6.orbax-checkpoint-tmp-1").mkdir()  # a save under way
    before = snapshot(folder)
    found = fedmoe_jax.load_run(folder)
    assert found.state.round == 2 and len(found.rows["round"]) == 4
    assert snapshot(folder) == before
    assert (steps / "6.orbax-checkpoint-tmp-1").exists()


def test_load_run_without_a_checkpoint_has_rows_alone(launched, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((launched / name).read_bytes())
    found = fedmoe_jax.load_run(tmp_path)
    assert found.params is None and len(found.rows["train_loss"]) == 4
    with pytest.raises(UserError, match="allowed: one with a run's config.json"):
        fedmoe_jax.load_run(tmp_path / "none")


def test_load_run_reads_a_run_of_a_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "write_all", lambda *args, **kwargs: None)
    config, strategies = make_config(), ("greedy", "random", "fedavg_active")
    config.compare = dict(strategies=strategies, changes=("",), seeds=(0, 1))
    assert launch.run(config, tmp_path, "", lambda: False, False)
    for strategy in strategies:
        found = fedmoe_jax.load_run(tmp_path / "runs" / f"{strategy}-seed1")
        assert (found.config.strategy, found.config.seed) == (strategy, 1)
        np.testing.assert_allclose(accuracy(found), found.rows["global_accuracy"][-1])
    moved = (tmp_path / "runs" / "greedy-seed1").rename(tmp_path / "alone")
    assert fedmoe_jax.load_run(moved).params is None


SCRIPT = """
import sys
import fedmoe_jax
from fedmoe_jax.configs import default
import fedmoe_jax.plugins, fedmoe_jax.launch
fedmoe_jax.Option, fedmoe_jax.UserError, fedmoe_jax.__version__
config = default.get_config("smoke")
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"jax", "flax", "optax", "orbax", "sklearn"}, loaded
config.update_from_flattened_dict(SIZES)
import jax
jax.devices()
fedmoe_jax.run(config)
"""


@pytest.mark.parametrize("config", [{"seed": 1}, None, "configs/default.py"])
def test_run_takes_a_config_alone(config):
    told = f"config is a {type(config).__name__}; allowed: a ConfigDict"
    with pytest.raises(UserError, match=told):
        run(config)


def test_run_writes_nothing_and_takes_jax_as_it_is(tmp_path):
    """Neither importing the package nor reading the defaults imports JAX."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA", "XDG"))}
    env |= {name: str(tmp_path) for name in ("HOME", "TMPDIR")}
    env |= {"PYTHONPATH": find_importable(), "PYTHONDONTWRITEBYTECODE": "1"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in less time
    code = SCRIPT.replace("SIZES", repr(SMALL | {"num_rounds": 2}))
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr
    told = ran.stdout.decode().splitlines()
    assert told[0] == (
        "JAX was initialised before; its 1 cpu device(s) are used as they are"
    )
    assert told[1].startswith("round 2/2")
    assert list(tmp_path.iterdir()) == []
