"""Checkpoints come back bit for bit, or not at all."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime import files
from fedmoe_jax.train import checkpoint
from fedmoe_jax.types import AlignState, SimState

# Orbax leaves reads unawaited when one of them meets a damaged file.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "sgd": optax.sgd(0.1),  # its state has no leaves at all
}


def make_state(number: int, optimizer: str = "adam", personal: bool = False):
    """A small state (N = 3, E = 2) whose values depend on `number`."""
    keys = jax.random.split(jax.random.key(number), 4)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], (64, 64))},
        "gate": {"kernel": jax.random.normal(keys[1], (2, 5))},
        "experts": {"kernel": jax.random.normal(keys[2], (2, 5, 7))},
        "head": {"bias": jnp.zeros(10, jnp.bfloat16)},
    }
    align = AlignState(
        fitness=jax.random.uniform(keys[3], (3, 2)),
        usage=jnp.array([jnp.nan, -0.0]),
        held=jnp.array([[True, False]] * 3),
        times_held=jnp.arange(6, dtype=jnp.int32).reshape(3, 2),
    )
    own = {"gate": {"kernel": jnp.ones((3, 2, 5))}} if personal else {}
    server = OPTIMIZERS[optimizer].init(params)
    return SimState(
        jnp.int32(number), jax.random.key(number), params, server, align, own, {}
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def save_rounds(folder: Path, rounds, keep: int = 5):
    with checkpoint.open_checkpoints(folder, keep) as store:
        for number in rounds:
            checkpoint.save(store, number, make_state(number))


def restore(folder: Path):
    with checkpoint.open_checkpoints(folder, 5) as store:
        found = checkpoint.restore_latest(store, make_state(0))
        return found and found[:2]


def array_files(folder: Path) -> list[Path]:
    """The files that hold the values of the stem; the rest is in small files."""
    files = [path for path in folder.rglob("d/*") if path.stat().st_size > 8000]
    assert files
    return files


def flip(path: Path, at: int):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def flip_middle(step: Path):
    for path in array_files(step):
        flip(path, path.stat().st_size // 2)


@pytest.fixture
def warnings(monkeypatch):
    lines = []

    def record(text, *values):
        if not text.startswith("Waiting"):  # Orbax's, on a busy machine
            lines.append(text % values)

    monkeypatch.setattr(checkpoint.logging, "warning", record)
    yield lines
    gc.collect()  # reports Orbax's unawaited reads here and not in another test


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("personal", [False, True])
def test_restore_latest_is_bitwise_what_was_saved(tmp_path, optimizer, personal):
    state = make_state(7, optimizer, personal)
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        checkpoint.save(store, 7, state)
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        like = make_state(0, optimizer, personal)
        restored, step = checkpoint.restore_latest(store, like)[:2]
    assert step == 7
    assert_same_bits(restored, state)


def test_restore_latest_is_none_where_nothing_was_saved(tmp_path):
    assert restore(tmp_path / "new") is None


def test_open_checkpoints_keeps_the_newest(tmp_path):
    save_rounds(tmp_path, [2, 4, 6], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]


@pytest.mark.parametrize("step", [2, 4])
def test_save_is_never_skipped_silently(tmp_path, step):
    save_rounds(tmp_path, [4])
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        with pytest.raises(RuntimeError, match=f"step {step} was not saved.* 4"):
            checkpoint.save(store, step, make_state(step))


def test_save_lets_the_state_be_donated(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    state = make_state(1)
    big = state.replace(params={"kernel": jnp.ones((1000, 1000))})
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        checkpoint.save(store, 1, big)
        values = big.params
        for _ in range(20):
            values = step(values)
    like = state.replace(params={"kernel": jnp.zeros((1000, 1000))})
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        restored, _ = checkpoint.restore_latest(store, like)[:2]
    np.testing.assert_array_equal(restored.params["kernel"], 1.0)


def test_restore_latest_passes_over_a_flipped_bit(tmp_path, warnings):
    save_rounds(tmp_path, [2, 4])
    flip_middle(tmp_path / "4")
    with checkpoint.open_checkpoints(tmp_path, 5) as store:
        restored, step = checkpoint.restore_latest(store, make_state(0))[:2]
        assert step == 2
        assert_same_bits(restored, make_state(2))
        assert "4 is damaged: ValueError: params.stem.kernel does not" in warnings[0]
        assert "falling back to checkpoint 2" in warnings[1]
        checkpoint.save(store, 4, make_state(4))
    assert_same_bits(restore(tmp_path)[0], make_state(4))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["2", "4", "4.damaged"]


def test_restore_latest_sets_aside_every_damaged_step(tmp_path, warnings):
    save_rounds(tmp_path, [2])
    for _ in range(2):
        (tmp_path / "4").mkdir()
        assert restore(tmp_path)[1] == 2
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["2", "4.damaged", "4.damaged1"]


def test_restore_latest_notices_every_harmful_flip(tmp_path, warnings):
    save_rounds(tmp_path, [2])
    path = array_files(tmp_path / "2")[0]
    noticed = 0
    for at in np.linspace(0, path.stat().st_size - 1, 12).astype(int):
        flip(path, at)
        try:
            assert_same_bits(restore(tmp_path)[0], make_state(2))
        except UserError:
            noticed += 1
        flip(path, at)
    assert noticed > 0
    assert_same_bits(restore(tmp_path)[0], make_state(2))


def delete(step: Path):
    for path in array_files(step):
        path.unlink()


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def truncate_arrays(step: Path):
    for path in array_files(step):
        truncate(path)


def change_shape(path: Path):
    path.write_text(path.read_text().replace("float32[64,64]", "float32[64,65]"))


DAMAGE = {
    "missing data": delete,
    "truncated data": truncate_arrays,
    "flipped data": flip_middle,
    "missing index": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "flipped index": lambda step: flip(step / "state" / "manifest.ocdbt", 50),
    "missing tree": lambda step: (step / "state" / "_METADATA").unlink(),
    "missing sha256": lambda step: (step / "meta" / "metadata").unlink(),
    "truncated sha256": lambda step: truncate(step / "meta" / "metadata"),
    "changed sha256": lambda step: change_shape(step / "meta" / "metadata"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_restore_latest_falls_back_or_reports_damage(tmp_path, warnings, damage):
    save_rounds(tmp_path, [2, 4])
    DAMAGE[damage](tmp_path / "4")
    restored, step = restore(tmp_path)
    assert step == 2 and "checkpoint 4 is damaged" in warnings[0]
    assert_same_bits(restored, make_state(2))
    DAMAGE[damage](tmp_path / "2")
    with pytest.raises(UserError, match="no checkpoint in .* is intact") as error:
        restore(tmp_path)
    assert "\n" not in str(error.value) and "step 2: " in str(error.value)
    assert (tmp_path / "2").exists()


def test_restore_latest_passes_over_an_empty_step(tmp_path, warnings):
    save_rounds(tmp_path, [2])
    (tmp_path / "9").mkdir()
    assert restore(tmp_path)[1] == 2
    save_rounds(tmp_path, [4])
    assert restore(tmp_path)[1] == 4


@pytest.mark.parametrize(
    "params, message",
    [
        ({"a": jnp.zeros((2, 4))}, r"params.a: float32\[2,3\] -> float32\[2,4\]"),
        ({"a": jnp.zeros((2, 3), jnp.bfloat16)}, r"float32\[2,3\] -> bfloat16\[2,3\]"),
        ({"a": jnp.zeros((2, 3)), "b": jnp.zeros(1)}, r"params.b: absent -> float32"),
        ({}, r"params.a: float32\[2,3\] -> absent"),
        ({name: jnp.zeros(1) for name in "abcde"}, r", and 2 more leaves; allowed: "),
    ],
)
def test_restore_latest_refuses_the_state_of_another_config(tmp_path, params, message):
    state = make_state(0).replace(params={"a": jnp.zeros((2, 3))})
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        checkpoint.save(store, 3, state)
        store.wait_until_finished()
        with pytest.raises(UserError, match="does not fit the config: .*" + message):
            checkpoint.restore_latest(store, state.replace(params=params))


def sharded(state, devices, spec):
    """`state` replicated over `devices`, its params split along the leading axis."""
    mesh = Mesh(np.array(devices), ("clients",))
    whole = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    return whole.replace(params=jax.device_put(state.params, NamedSharding(mesh, spec)))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 forced devices")
@pytest.mark.parametrize("abstract", [False, True])
def test_restore_latest_puts_the_state_on_other_devices(tmp_path, abstract):
    state = make_state(3).replace(params={"x": jnp.arange(32.0).reshape(8, 4)})
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        spec = PartitionSpec("clients")
        checkpoint.save(store, 3, sharded(state, jax.devices()[:8], spec))
    like = sharded(jax.tree.map(jnp.copy, state), jax.devices()[4:6], PartitionSpec())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    with checkpoint.open_checkpoints(tmp_path, 2) as store:
        target = jax.tree.map(shape, like) if abstract else like
        restored, _ = checkpoint.restore_latest(store, target)[:2]
    assert_same_bits(restored, state)
    shardings = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
    for one, other in zip(shardings(restored), shardings(like), strict=True):
        assert one.device_set == other.device_set


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import jax.numpy as jnp
from fedmoe_jax.train import checkpoint
from test_checkpoint import make_state
import jax
with checkpoint.open_checkpoints(sys.argv[1], 5) as store:
    checkpoint.save(store, 2, make_state(2))
    store.wait_until_finished()
    noise = jax.random.normal(jax.random.key(0), (25, 1000, 1000))
    big = make_state(4).replace(params={"noise": noise})
    checkpoint.save(store, 4, big)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_save_that_is_killed_leaves_no_step(tmp_path):
    tests, product = Path(__file__).parent, Path(checkpoint.__file__).parent.parent
    command = [sys.executable, "-c", KILLED, tmp_path, product, tests]
    flags = "--xla_backend_optimization_level=0"  # as here, or other bits come out
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "2" and "4.orbax-checkpoint-tmp" in names[1]
    with checkpoint.open_checkpoints(tmp_path, 5) as store:
        restored, step = checkpoint.restore_latest(store, make_state(0))[:2]
        assert step == 2
        assert_same_bits(restored, make_state(2))
        checkpoint.save(store, 6, make_state(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6"]
    assert_same_bits(restore(tmp_path)[0], make_state(6))


CONFIG = {"seed": 0, "data": {"name": "digits"}, "devices": {"shares": (0.4, 0.6)}}


def test_check_config_passes_what_went_through_json(tmp_path):
    files.write_json(tmp_path / "config.json", CONFIG)
    saved = json.loads((tmp_path / "config.json").read_text())
    checkpoint.check_config(saved, CONFIG, frozenset())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_check_config_lists_every_differing_field():
    given = {"seed": 1, "data": {"name": "cifar10", "dir": "x"}, "devices": {}}
    with pytest.raises(UserError) as error:
        checkpoint.check_config(CONFIG, given, frozenset({"data.dir"}))
    text = str(error.value)
    assert "seed: 0 -> 1" in text and "data.name: digits -> cifar10" in text
    assert "devices.shares: [0.4, 0.6] -> absent" in text
    assert "data.dir" not in text and "\n" not in text


def test_check_config_lets_free_fields_differ():
    given = {**CONFIG, "seed": 5}
    checkpoint.check_config(CONFIG, given, frozenset({"seed"}))
