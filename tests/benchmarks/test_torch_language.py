"""Work L: what both programs train is the same model on the same batches.

PyTorch runs in the environment that `python -m benchmarks.peers` makes for it.
"""

import importlib
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers, works
from fedmoe_jax.base import Route
from fedmoe_jax.capacity import count_workload
from fedmoe_jax.client import build_client_update, draw_batches
from fedmoe_jax.federation import make_federation
from fedmoe_jax.loss import local_loss
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.program import build_program, make_hyper
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.state import init_state
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import ClientInput
from fedmoe_jax.world.limits import true_capacity

RUNNERS = peers.HERE / "runners"
PYTHON = peers.ENVIRONMENTS / "torch/bin/python"
WORK = works.WORKS["L"]
HELD = np.array([[5, 0, 7, 2], [1, 6, 3, 4]])  # of both blocks
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def started():
    """Program, federation, hyperparameters and state of our runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RUNNERS)
        runner = importlib.import_module("fedmoe")
        config, (data, partition) = runner.describe(WORK), runner.load(WORK)
    federation = make_federation(config, data, partition)
    program = build_program(config, data, federation, build_mesh(1))
    hyper = make_hyper(config)
    state, frozen = init_state(jax.random.key(0), hyper, program)
    return program, federation.replace(frozen=frozen), hyper, state


@pytest.mark.slow
def test_sizes_are_those_of_the_config(started):
    program, federation, hyper, state = started
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    found = {part: count(tree) for part, tree in state.params.items()}
    assert found == works.language_parameters()
    sizes = program.sizes
    held = works.ACTIVE, max(works.LANGUAGE_HELD)
    assert (sizes.num_active, sizes.max_held) == held
    assert (sizes.local_steps, sizes.batch_size) == (WORK.steps, WORK.batch)
    client = program.static.client
    assert (client.optimizer, client.clip) == ("adamw", works.CLIP)
    assert hyper.client.learning_rate == np.float32(works.LANGUAGE_LEARNING_RATE)
    assert hyper.loss.calibration == works.LANGUAGE_CALIBRATION


def test_devices_hold_as_much_as_the_peer_is_told(started):
    program, federation, hyper, _ = started
    workload = count_workload(federation, program)
    held = true_capacity(
        federation.devices,
        workload.costs,
        buffer=hyper.devices.buffer,
        examples=workload.examples,
        deadline=workload.deadline,
        communication_share=workload.communication_share,
        max_capacity=workload.max_capacity,
        probed=workload.probed,
    )
    held = np.clip(held, 1, program.sizes.max_held)
    assert tuple(held.tolist()) == works.LANGUAGE_HELD


def name_as_torch(params) -> dict[str, np.ndarray]:
    """Our params, or changes of them, under the names and in the shapes of PyTorch."""
    rows = lambda leaf: np.asarray(leaf).reshape(works.WIDTH, -1).T
    stem, head = params["stem"], params["head"]
    named = {
        "embedding": stem["embedding"],
        "norm": head["norm"],
        "head": head["kernel"].T,
    }
    for number, name in enumerate(params["gate"]):
        block, experts = stem[name], params["experts"][name]
        attention, gate = block["attention"], params["gate"][name]
        hidden = np.concatenate([experts["gate"], experts["up"]], axis=2)
        own = {
            "attention.inward": np.concatenate(
                [rows(attention[part]) for part in ("query", "key", "value")]
            ),
            "attention.outward": attention["out"].reshape(-1, works.WIDTH).T,
            "norm.0": block["norm"][0],
            "norm.1": block["norm"][1],
            "gate.weight": gate["kernel"],
            "gate.bias": gate["bias"],
            "experts.hidden": hidden.swapaxes(1, 2),
            "experts.down": experts["down"].swapaxes(1, 2),
        }
        named |= {f"blocks.{number}.{part}": leaf for part, leaf in own.items()}
    return {name: np.ascontiguousarray(leaf) for name, leaf in named.items()}


def spread_rows(delta):
    """Changes of held experts [K, ...] at their places among all, [E, ...]."""
    place = lambda leaf, held: (
        jnp.zeros((works.EXPERTS, *leaf.shape[1:])).at[held].set(leaf)
    )
    experts = {
        name: jax.tree.map(lambda leaf, held=held: place(leaf, held), tree)
        for held, (name, tree) in zip(HELD, delta["experts"].items(), strict=True)
    }
    return delta | {"experts": experts}


def run_torch(folder: Path, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The client in PyTorch."""
    np.savez(folder / "in.npz", **arrays)
    script = RUNNERS / "torch_language_client.py"
    command = [PYTHON, script, folder / "in.npz", folder / "out.npz"]
    subprocess.run(command, check=True, timeout=120)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON.exists(),
    reason=f"no PyTorch at {PYTHON}; python -m benchmarks.peers --works=L installs it",
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_client_in_pytorch_is_ours(started, tmp_path, count):
    program, federation, hyper, state = started
    slot = jnp.broadcast_to(jnp.arange(4) < count, HELD.shape)
    inputs = ClientInput(
        client=jnp.int32(3),
        steps=jnp.int32(WORK.steps),
        budget=jnp.int32(count),
        scale=jnp.ones(()),
        held=jnp.asarray(HELD),
        slot=slot,
        calibration=jnp.ones(len(HELD)),
        correction={},
        personal={},
    )
    update = jax.jit(build_client_update(program))(
        state.params, inputs, federation, hyper, KEY
    )
    ids = draw_batches(
        jax.random.split(KEY)[0], federation.index[3], federation.size[3], program.sizes
    )
    found = run_torch(
        tmp_path,
        held=HELD[:, :count],
        windows=federation.train["tokens"][ids],
        **name_as_torch(state.params),
    )

    submodel = take_submodel(state.params, {}, inputs.held, 0)
    batch = take_batch(federation.train, ids[0], {}, program.task)
    loss, _ = local_loss(submodel, {}, batch, inputs, hyper, KEY, program=program)
    model, route = program.model, Route(program.sizes.num_active)
    logits, _ = model.apply(submodel, {}, batch, inputs.held, slot, route, None)
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found["logits"], logits.reshape(-1, works.VOCABULARY), **close
    )
    np.testing.assert_allclose(found["loss"][0], loss, **close)
    accuracy = update.feedback.accuracy[:, :count]
    np.testing.assert_allclose(found["accuracy"], accuracy, **close)
    for name, change in name_as_torch(spread_rows(update.delta)).items():
        error = np.linalg.norm(found[name] - change) / np.linalg.norm(change)
        assert error < 1e-4, name
