"""Everything static of one run, and the state that it starts from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmoe_jax.align.detect import init_detector
from fedmoe_jax.align.fitness import init_fitness
from fedmoe_jax.costs import Costs
from fedmoe_jax.ledger import init_ledger
from fedmoe_jax.merge import server_optimizer, zero_sums
from fedmoe_jax.models import Model
from fedmoe_jax.profile import init_belief
from fedmoe_jax.rules import Rules
from fedmoe_jax.types import (
    AlignState,
    Array,
    Federation,
    Hyper,
    SimState,
    Sizes,
    Strategy,
)
from fedmoe_jax.world.advance import init_world

BEFORE_ROUNDS = 2**32 - 1  # folded into the run's key where rounds fold their number


class Setup(NamedTuple):
    """Everything static that one compiled program is built from.

    Attributes:
      model: the model's pure functions.
      sizes: static sizes, after the strategy's resize.
      strategy: the strategy's record.
      rules: the static choices.
      costs: of the simulated model; these bytes are reported.
      device_costs: of the model that it stands for; these are what devices feel.
      mesh: the devices that run the simulation.
    """

    model: Model
    sizes: Sizes
    strategy: Strategy
    rules: Rules
    costs: Costs
    device_costs: Costs
    mesh: Mesh


def init_state(key: Array, hyper: Hyper, setup: Setup) -> SimState:
    """The state before the first round.

    Args:
      key: the seed's key, consumed.
      hyper: hyperparameters.
      setup: the static parts.
    """
    sizes, rules = setup.sizes, setup.rules
    shape = (sizes.num_clients, sizes.num_experts)
    params_key, fitness_key, run_key = jax.random.split(key, 3)
    params = setup.model.init(params_key)
    zeros = lambda leaf: jnp.zeros((sizes.num_clients, *leaf.shape), leaf.dtype)
    tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
    copies = lambda leaf: jnp.tile(leaf[None], (sizes.num_clients,) + (1,) * leaf.ndim)
    align = AlignState(
        fitness=init_fitness(fitness_key, *shape, prior=hyper.prior, noise=hyper.noise),
        usage=jnp.zeros(sizes.num_experts),
        held=jnp.zeros(shape, bool),
        times_held=jnp.zeros(shape, jnp.int32),
        memory=setup.strategy.remember(sizes),
        detector=init_detector(*shape) if rules.world.reaction else {},
    )
    return SimState(
        round=jnp.zeros((), jnp.int32),
        key=run_key,
        params=params,
        server_opt=tx.init(params),
        align=align,
        personal={part: jax.tree.map(copies, params[part]) for part in rules.personal},
        variate=jax.tree.map(zeros, params) if rules.variates else {},
        world=init_world(run_key, hyper, sizes, rules.world),
        belief=init_belief(sizes.num_clients, sizes.max_capacity, rules.world.profile),
        stale=zero_sums(params) if rules.world.late == "stale" else {},
        ledger=init_ledger(sizes),
    )


def prepare_state(
    state: SimState, federation: Federation, hyper: Hyper, setup: Setup
) -> SimState:
    """The state after what the strategy does before the first round, if anything."""
    if setup.strategy.prepare is None:
        return state
    key = jax.random.fold_in(state.key, BEFORE_ROUNDS)
    params, memory = setup.strategy.prepare(
        *(key, state.params, state.align.memory, federation, hyper),
        model=setup.model,
        sizes=setup.sizes,
    )
    return state.replace(params=params, align=state.align.replace(memory=memory))
