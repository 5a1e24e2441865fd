"""The memory that a run will need, estimated before anything is compiled."""

import math

import jax

from fedmoe_jax.base import Model
from fedmoe_jax.evaluation.sources import choose_batch, divide_examples
from fedmoe_jax.options import UserError
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.scheduling import chunk_size
from fedmoe_jax.runtime.sharding import CLIENTS, runs_at_once
from fedmoe_jax.types import PER_RUN, Federation, SimState
from fedmoe_jax.world.costs import count_bytes

# One client holds its sub-model, the received copy, gradients, momentum (two moments
# for adam) and the delta at once.
CLIENT_COPIES = 6

GIGABYTE = 1e9


def estimate_memory(
    state: SimState,
    federation: Federation,
    program: Program,
    training_bytes: float,
    evaluation_bytes: float,
    num_runs: int,
    gathered_bytes: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """Bytes over all devices of the simulation, by what needs them.

    Args:
      state: the state of one run, or its shapes.
      federation: of one run, arrays on the host or their shapes, with what is frozen.
      program: the static parts; its mesh says how many devices a run has.
      training_bytes: activations of one example through K experts, both ways.
      evaluation_bytes: activations of one example, forward, as evaluation runs it.
      num_runs: runs that advance together, a multiple of the mesh's `runs`.
      gathered_bytes: frozen experts that a client at work and an evaluation copy.
    """
    sizes, devices = program.sizes, program.mesh.size
    per_run = program.mesh.shape[CLIENTS]
    costs = program.costs  # what is frozen is no client's own, and among the data
    submodel = costs.stem_bytes + costs.head_bytes + costs.gate_bytes
    submodel += sizes.max_held * costs.expert_bytes
    chunk = chunk_size(sizes.cohort_size, per_run, program.static.run.client_chunk)
    training = CLIENT_COPIES * submodel + sizes.batch_size * training_bytes
    training = chunk * (training + gathered_bytes[0])
    # Rows of the cohort's clients as they are sent out and as they come back.
    own = state.variate.get("own", {})
    rows = count_bytes((state.personal, own)) / sizes.num_clients
    sums = count_bytes((state.params, state.stale))
    tested, most = len(federation.test_stratum), choose_batch(program)
    evaluating = divide_examples(tested, most, per_run)[1] * evaluation_bytes
    evaluating += gathered_bytes[1]
    stage_bytes = program.strategy.stage_bytes
    staging = stage_bytes(sizes) if stage_bytes and sizes.num_experts > 1 else 0.0
    at_once = runs_at_once(num_runs, program.mesh, program.platform)
    per_run_data = count_bytes([getattr(federation, name) for name in PER_RUN])
    shared = count_bytes(federation) - per_run_data
    shared_copies, own_copies = devices, per_run
    if program.platform == "cpu":  # devices of a process share the host's copy
        shared_copies = own_copies = jax.process_count()
    return {
        "data": shared_copies * shared + own_copies * num_runs * per_run_data,
        # the donated state and its successor; the running sums of the runs at work
        "state": num_runs * per_run * 2 * count_bytes(state)
        + devices * at_once * (sums + 2 * sizes.cohort_size * rows),
        "compute": devices * at_once * max(training, evaluating, staging),
    }


def count_base_experts(model: Model) -> float:
    """Bytes of the experts of a pretrained base, of whose the model holds copies."""
    if model.base is None or not model.base.sparse:
        return 0.0
    of_expert = lambda path: any(getattr(key, "key", "") == "experts" for key in path)
    leaves = jax.tree_util.tree_leaves_with_path(model.base.shapes())
    return count_bytes([leaf for path, leaf in leaves if of_expert(path)])


def fits(parts: dict[str, float], limit_gb: float) -> bool:
    """Whether an estimate is within the limit."""
    return sum(parts.values()) / GIGABYTE <= limit_gb


def check_memory(parts: dict[str, float], limit_gb: float) -> None:
    """Refuses a run whose estimate is beyond the limit.

    Raises:
      UserError: with the numbers of every part.
    """
    if not fits(parts, limit_gb):
        total = sum(parts.values()) / GIGABYTE
        detail = " + ".join(f"{name} {b / GIGABYTE:.2f}" for name, b in parts.items())
        raise UserError(
            f"run.memory_limit_gb={limit_gb:g} is too low: this run needs about "
            f"{total:.2f} GB ({detail}); allowed: at least {math.ceil(total)}, or make "
            "the model, the data, num_clients or run.client_chunk smaller"
        )
