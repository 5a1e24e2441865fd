"""The state of a run before its first round, and the stages between its rounds."""

import jax
import jax.numpy as jnp

from fedmoe_jax.aggregate import zero_sums
from fedmoe_jax.align.drift_detector import init_detector
from fedmoe_jax.align.fitness import init_fitness
from fedmoe_jax.align_layers import ALIGN
from fedmoe_jax.capacity import init_belief
from fedmoe_jax.floors import init_queues
from fedmoe_jax.forms import check_type
from fedmoe_jax.moe_layers import layer_keys, map_layers
from fedmoe_jax.optimizers import server_optimizer
from fedmoe_jax.program import Program, take_frozen
from fedmoe_jax.prune import init_pruning
from fedmoe_jax.types import AlignState, Array, Federation, Hyper, PyTree, SimState
from fedmoe_jax.world.participation import init_participation
from fedmoe_jax.world.step import init_world, observe

BEFORE_ROUNDS = 2**32 - 1  # folded into the run's key where rounds fold their number


def init_align(key: Array, hyper: Hyper, program: Program) -> AlignState:
    """The alignment state before the first round; `key` is consumed."""
    sizes, numbers = program.sizes, hyper.fitness
    shape = (sizes.num_clients, sizes.num_experts)
    watched = program.static.reaction.kind != "none"

    def init_layer(key: Array) -> AlignState:
        return AlignState(
            fitness=init_fitness(key, *shape, prior=numbers.prior, noise=numbers.noise),
            usage=jnp.zeros(sizes.num_experts),
            held=jnp.zeros(shape, bool),
            times_held=jnp.zeros(shape, jnp.int32),
            strategy=program.strategy.init(sizes),
            detector=init_detector(*shape) if watched else {},
        )

    keys = layer_keys(key, sizes.num_layers)
    return map_layers(init_layer, sizes.num_layers, 0, ALIGN)(keys)


def init_state(key: Array, hyper: Hyper, program: Program) -> tuple[SimState, PyTree]:
    """The state before the first round, and what is frozen.

    Args:
      key: the seed's key, consumed.
      hyper: hyperparameters.
      program: the static parts.
    """
    sizes, strategy, static = program.sizes, program.strategy, program.static
    params_key, fitness_key, run_key = jax.random.split(key, 3)
    initial = program.model.init(params_key)
    params, frozen = take_frozen(*initial, program.model, strategy)
    zeros = lambda leaf: jnp.zeros((sizes.num_clients, *leaf.shape), leaf.dtype)
    copies = lambda leaf: jnp.tile(leaf[None], (sizes.num_clients,) + (1,) * leaf.ndim)
    tx = server_optimizer(static.server, hyper.server.learning_rate)
    state = SimState(
        round=jnp.zeros((), jnp.int32),
        key=run_key,
        params=params,
        server_opt=tx.init(params),
        align=init_align(fitness_key, hyper, program),
        personal={
            part: jax.tree.map(copies, params[part]) for part in strategy.personal
        },
        variate={
            "own": jax.tree.map(zeros, params),
            "mean": jax.tree.map(jnp.zeros_like, params),
        }
        if strategy.variates
        else {},
        world=init_world(run_key, hyper, sizes, program.processes),
        belief=init_belief(
            *(sizes.num_clients, sizes.max_capacity, static.profile.kind),
            pruned=bool(program.units),
            timed=strategy.timed,
        ),
        stale=zero_sums(params, program.units) if static.late.kind == "stale" else {},
        participation=init_participation(sizes),
        pruning=init_pruning(params, program),
        queues=init_queues(program),
    )
    return state, frozen


def run_stage(
    state: SimState, federation: Federation, hyper: Hyper, program: Program, number: int
) -> tuple[SimState, PyTree]:
    """State and `frozen` after the strategy's stage of that number, see `Strategy`."""
    _, act = program.strategy.stages[number]
    if program.processes:
        view = observe(state.world, federation, hyper, program.processes)
        federation = view.federation
    key = jax.random.fold_in(state.key, BEFORE_ROUNDS)
    key = jax.random.fold_in(key, number) if number else key
    static = dict(model=program.model, task=program.task, sizes=program.sizes)
    found = act(state, federation, hyper, key, **static)
    check_type(f"the strategy has a stage {number} that", found, tuple)
    return found
