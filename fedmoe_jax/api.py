"""Runs from Python: `run` a config, `load_run` a folder, `predict` with its model.

`fedmoe_jax` itself hands on these names, without importing JAX before one is used.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fedmoe_jax.config import validate
from fedmoe_jax.configs import default
from fedmoe_jax.models.image_moe import apply_experts
from fedmoe_jax.models.routing import gate_logits
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.files import read_json
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.runtime.xla import keep_host, set_cpu_devices
from fedmoe_jax.scoring import answer_experts, route_all
from fedmoe_jax.state import init_state
from fedmoe_jax.tasks.images import normalise
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train.loop import drive, ignore_row
from fedmoe_jax.train.run import Plan, build_job, plan_one, plan_run, train
from fedmoe_jax.train.workdir import check_plugins, check_version
from fedmoe_jax.train.writers import Row, read_metrics
from fedmoe_jax.types import Array, PyTree, SimState

BATCH = 500  # inputs that `predict` takes at once


class Run(NamedTuple):
    """One run, finished or not.

    Attributes:
      config: its config.
      rows: field of the rows -> its values, [rounds, ...] float64 with NaN where a
        round has none, int64 where all are whole; the fields of `metrics.jsonl`.
      state: the simulation after its newest round or checkpoint, NumPy leaves, the key
        as its data; None where the folder has no checkpoint of its own, as in a run
        that has just begun or belongs to a comparison.
      plan: its program, data and federation; None likewise.
    """

    config: ConfigDict
    rows: dict[str, np.ndarray]
    state: SimState | None
    plan: Plan | None

    @property
    def params(self) -> PyTree:
        """The server's `{"stem", "gate", "experts", "head"}`; None without a state."""
        return self.state and self.state.params

    def __repr__(self) -> str:
        rounds = len(self.rows.get("round", ()))
        return f"Run(strategy={self.config.strategy!r}, {rounds} rounds)"


def run(
    config: ConfigDict,
    workdir: str | Path | None = None,
    on_row: Callable[[Row], None] = ignore_row,
) -> Run:
    """Runs one config, with progress on stdout.

    Args:
      config: of one run, from `fedmoe_jax.configs.default.get_config()` say.
      workdir: its folder, as of `launch.py`; a run there is resumed. None writes
        nothing to disk.
      on_row: called after each chunk with the row of each of its rounds, a dict of
        numbers and lists.

    Raises:
      UserError: a mistake in the config, the data or the folder.
    """
    config = ConfigDict(config.to_dict())
    if "compare" in config:
        raise UserError("compare is not allowed here; allowed: a config of one run")
    validate(config)
    adopt_devices(config.run.num_devices)
    if workdir is not None:
        check_plugins(Path(workdir))
        train(
            config,
            Path(workdir),
            stop=lambda: False,
            label=config.strategy,
            profile=False,
            on_row=on_row,
        )
        return load_run(workdir)
    rows = []

    def take(row: Row) -> None:
        rows.append(row)
        on_row(row)

    plan = plan_one(config)
    job = build_job(plan, None, config.strategy)._replace(on_row=take)
    state, _, _ = drive(config, job, None, stop=lambda: False, profile=None)
    return Run(config, stack_rows(rows), to_host(state), plan)


def load_run(folder: str | Path) -> Run:
    """Reads a finished or running run, with its newest intact checkpoint.

    It loads the run's data set, for the shapes and statistics of the model.

    Raises:
      UserError: the folder holds no run, one of an older version or with other
        plug-ins; no checkpoint is intact; or its data are not there.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"folder={folder} is not allowed; allowed: one with a run's config.json"
        )
    check_plugins(folder)
    saved = read_json(folder / "config.json")
    if "compare" in saved:
        raise UserError(
            f"folder={folder} holds a comparison; allowed: one of its runs/ folders"
        )
    check_version(saved, default.get_config())
    config = ConfigDict(to_tuples(saved))
    rows = stack_rows(read_metrics(folder / "metrics.jsonl"))
    if not (folder / "checkpoints").is_dir():
        return Run(config, rows, None, None)
    adopt_devices(config.run.num_devices)
    plan = plan_run(keep_devices(config, folder), build_mesh(1))
    found = checkpoint.read_latest(folder / "checkpoints", shape_state(plan))
    return Run(config, rows, found and to_host(found[0]), plan)


def predict(run: Run, inputs: np.ndarray, client: int | None = None) -> np.ndarray:
    """The outputs of a run's model for new inputs, routed over all experts.

    It is the model of the global accuracy: top-A of all E experts.

    Args:
      run: from `run` or `load_run`.
      inputs: [B, H, W, F] uint8, images as the data set has them.
      client: in [0, N), whose model to take where parts of it are personal.

    Returns:
      [B, L] float32: logits of the classes, or their probabilities where the strategy
      mixes probabilities.

    Raises:
      UserError: inputs of another shape or dtype, a client that is missing or not
        needed, or a run without a state.
    """
    if run.state is None or run.plan is None:
        raise UserError("run has no checkpoint; allowed: a run with a model")
    inputs, shape = np.asarray(inputs), run.plan.data.train_x.shape[1:]
    if inputs.shape[1:] != shape or inputs.dtype != np.uint8 or not len(inputs):
        raise UserError(
            f"inputs are {inputs.dtype}{list(inputs.shape)}; allowed: "
            f"uint8[B, {', '.join(map(str, shape))}]"
        )
    personal = take_client(run.state.personal, client)
    federation = run.plan.federation
    apply = lambda x: apply_model(
        run.plan.program, run.params, personal, federation.mean, federation.std, x
    )
    starts = range(0, len(inputs), BATCH)
    return np.concatenate([apply(inputs[start : start + BATCH]) for start in starts])


@functools.partial(jax.jit, static_argnums=0)
def apply_model(
    program: Program,
    params: PyTree,
    personal: PyTree,
    mean: Array,
    std: Array,
    x: Array,
) -> Array:
    """Outputs [B, L] of the whole model, with ONE client's own parts or {}."""
    model, strategy, sizes = program.model, program.strategy, program.sizes
    everything = jnp.arange(sizes.num_experts)[None]
    whole = take_submodel(params, personal, everything, strategy.local_experts)
    features = model.stem(whole["stem"], normalise(x, mean, std), None)
    logits = gate_logits(whole["gate"]["moe"], features)
    gates = route_all(logits, strategy.test_active or sizes.num_active)
    outputs = apply_experts(model, whole["experts"]["moe"], features, None)
    answers = answer_experts(whole["head"], outputs, program)
    return jnp.einsum("be,bel->bl", gates, answers)


def take_client(personal: PyTree, client: int | None) -> PyTree:
    """ONE client's own parts, {} where the server has all.

    Raises:
      UserError: see `predict`.
    """
    if not personal:
        if client is not None:
            raise UserError(
                f"client={client} is not allowed; allowed: None, as the server has all "
                "of this model"
            )
        return {}
    most = len(jax.tree.leaves(personal)[0]) - 1
    if client is None or not 0 <= client <= most:
        raise UserError(
            f"client={client} is not allowed; allowed: 0 to {most}, as parts of this "
            f"model are personal ({', '.join(personal)})"
        )
    return jax.tree.map(lambda leaf: leaf[client], personal)


@functools.cache
def adopt_devices(num_devices: int) -> None:
    """Sets the CPU's devices as `launch.py` does, or says that it is too late."""
    try:
        set_cpu_devices(num_devices)
    except RuntimeError:
        found = f"{jax.device_count()} {jax.default_backend()} device(s)"
        print(f"JAX was initialised before; its {found} are used as they are")
    else:
        keep_host()


def keep_devices(config: ConfigDict, folder: Path) -> ConfigDict:
    """The config with the copy of the user's device file that the folder keeps."""
    config = ConfigDict(config.to_dict())
    if config.devices.csv:
        config.devices.csv = str(folder / "devices.csv")
    return config


def shape_state(plan: Plan) -> SimState:
    """Shapes, dtypes and shardings of the run's state."""
    init = lambda key, hyper: init_state(key, hyper, plan.program)
    everywhere = NamedSharding(plan.program.mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(init, jax.random.key(0), plan.hyper),
    )


def to_host(state: SimState) -> SimState:
    """The state with NumPy leaves, its key as the key's data."""
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def to_tuples(tree: Any) -> Any:
    """A config as JSON gives it, with tuples for lists."""
    if isinstance(tree, dict):
        return {name: to_tuples(value) for name, value in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def stack_rows(rows: list[Row]) -> dict[str, np.ndarray]:
    """Rows of `metrics.jsonl` as arrays over rounds, see `Run.rows`."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: stack_values([row.get(name) for row in rows]) for name in names}


def stack_values(values: list[Any]) -> np.ndarray:
    """Numbers or equally long lists of numbers; None is NaN, alone or in a list."""
    if all(isinstance(value, int) for value in values):
        return np.array(values)
    arrays = [None if value is None else np.array(value, float) for value in values]
    shape = next((array.shape for array in arrays if array is not None), ())
    gap = np.full(shape, np.nan)
    return np.stack([gap if array is None else array for array in arrays])
