"""Everything static of one run, and the state that it starts from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmoe_jax.align.fitness import init_fitness
from fedmoe_jax.costs import Costs
from fedmoe_jax.merge import server_optimizer
from fedmoe_jax.models import Model
from fedmoe_jax.types import AlignState, Array, Hyper, SimState, Sizes, Strategy


class Rules(NamedTuple):
    """The static choices of a run beside its sizes; each names a pure function.

    Attributes:
      gate_mode: `global`, `holder_rows` or `personal`.
      merge_weight: `examples` or `routed`.
      feedback: `accuracy`, `loss` or `mixed`.
      client_optimizer: `sgd` or `adam`.
      momentum: of the local sgd, in [0, 1).
      prox: whether the FedProx term is in the local objective.
      server_optimizer: `sgd`, `momentum`, `adam`, `yogi` or `adagrad`.
      deadline: seconds a round may take on a device.
      communication_share: share of the deadline for the network.
      every_expert: whether evaluation computes all E experts for every image.
      ragged: whether clients take different numbers of local steps.
      client_chunk: clients vmapped at once on each device.
      chunk_rounds: R.
    """

    gate_mode: str
    merge_weight: str
    feedback: str
    client_optimizer: str
    momentum: float
    prox: bool
    server_optimizer: str
    deadline: float
    communication_share: float
    every_expert: bool
    ragged: bool
    client_chunk: int
    chunk_rounds: int


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
    tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
    personal_gate = {}
    if rules.gate_mode == "personal":
        personal_gate = jax.tree.map(
            lambda leaf: jnp.tile(leaf[None], (sizes.num_clients,) + (1,) * leaf.ndim),
            params["gate"],
        )
    align = AlignState(
        fitness=init_fitness(fitness_key, *shape, prior=hyper.prior, noise=hyper.noise),
        usage=jnp.zeros(sizes.num_experts),
        held=jnp.zeros(shape, bool),
        times_held=jnp.zeros(shape, jnp.int32),
    )
    return SimState(
        round=jnp.zeros((), jnp.int32),
        key=run_key,
        params=params,
        server_opt=tx.init(params),
        align=align,
        personal_gate=personal_gate,
    )
