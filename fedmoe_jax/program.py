"""Everything static of one run, and the state that it starts from."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedmoe_jax.aggregate import (
    EXPERT_WEIGHTS,
    GATE_WEIGHTS,
    server_optimizer,
    zero_sums,
)
from fedmoe_jax.align.capacity import init_belief
from fedmoe_jax.align.drift_detector import init_detector
from fedmoe_jax.align.fitness import idle_rule, init_fitness
from fedmoe_jax.client import sum_gate_losses
from fedmoe_jax.models.flops import count_forward_flops
from fedmoe_jax.models.image_moe import Model, build_model
from fedmoe_jax.rules import CALM, Rules, World
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.types import (
    AlignState,
    Array,
    Federation,
    Hyper,
    SimState,
    Sizes,
    Strategy,
)
from fedmoe_jax.world.costs import Costs, count_costs, scale_costs
from fedmoe_jax.world.participation import init_participation
from fedmoe_jax.world.step import init_world

BEFORE_ROUNDS = 2**32 - 1  # folded into the run's key where rounds fold their number


class Program(NamedTuple):
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


def init_state(key: Array, hyper: Hyper, program: Program) -> SimState:
    """The state before the first round.

    Args:
      key: the seed's key, consumed.
      hyper: hyperparameters.
      program: the static parts.
    """
    sizes, rules = program.sizes, program.rules
    shape = (sizes.num_clients, sizes.num_experts)
    params_key, fitness_key, run_key = jax.random.split(key, 3)
    params = program.model.init(params_key)
    zeros = lambda leaf: jnp.zeros((sizes.num_clients, *leaf.shape), leaf.dtype)
    tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
    copies = lambda leaf: jnp.tile(leaf[None], (sizes.num_clients,) + (1,) * leaf.ndim)
    align = AlignState(
        fitness=init_fitness(fitness_key, *shape, prior=hyper.prior, noise=hyper.noise),
        usage=jnp.zeros(sizes.num_experts),
        held=jnp.zeros(shape, bool),
        times_held=jnp.zeros(shape, jnp.int32),
        memory=program.strategy.remember(sizes),
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
        participation=init_participation(sizes),
    )


def prepare_state(
    state: SimState, federation: Federation, hyper: Hyper, program: Program
) -> SimState:
    """The state after what the strategy does before the first round, if anything."""
    if program.strategy.prepare is None:
        return state
    key = jax.random.fold_in(state.key, BEFORE_ROUNDS)
    params, memory = program.strategy.prepare(
        *(key, state.params, state.align.memory, federation, hyper),
        model=program.model,
        sizes=program.sizes,
    )
    return state.replace(params=params, align=state.align.replace(memory=memory))


def find_options(config: ConfigDict) -> dict[str, float]:
    """The group of the config that only the run's strategy reads."""
    group = find_strategy(config.strategy).options
    return config[group].to_dict() if group else {}


# Groups of the config whose numbers the world's processes read.
WORLD = (
    "late",
    "profile",
    "pressure",
    "background",
    "bandwidth",
    "availability",
    "channel",
    "drift",
    "reaction",
)


def find_numbers(config: ConfigDict) -> dict[str, dict[str, float]]:
    """The numbers of the world's processes, by group and field."""
    return {
        group: {
            name: value
            for name, value in config[group].items()
            if not isinstance(value, str)
        }
        for group in WORLD
    }


def make_world(config: ConfigDict) -> World:
    """Which processes of the world are on: those that would change anything.

    Who owns the pooled data does not live in that world.
    """
    if find_strategy(config.strategy).pooled:
        return CALM
    reach, images, reaction = config.availability, config.drift.images, config.reaction
    return World(
        pressure=config.pressure.share > 0,
        background=config.background.most > 0,
        bandwidth=config.bandwidth.spread > 0,
        reach=reach.share < 1 or reach.swing > 0,
        sampling=reach.sampling,
        dropout=reach.dropout > 0,
        wireless=config.channel.kind == "wireless",
        labels=config.drift.labels > 0,
        images="" if images == "none" else images,
        reaction="" if reaction.kind == "none" else reaction.kind,
        profile=config.profile.kind,
        overload=config.devices.overload == "lose",
        late=config.late.kind,
    )


def make_hyper(config: ConfigDict) -> Hyper:
    """The traced hyperparameters, of a program with one strategy."""
    idle_decay, idle_target = idle_rule(
        config.fitness.idle, config.fitness.idle_decay, config.fitness.prior
    )
    strategy = find_strategy(config.strategy)
    values = Hyper(
        strategy=0,
        client_learning_rate=config.client.learning_rate,
        server_learning_rate=config.server.learning_rate,
        prox=config.client.prox,
        calibration=config.loss.calibration,
        load_loss=config.loss.load,
        z_loss=config.loss.z,
        prior=config.fitness.prior,
        noise=config.fitness.noise,
        fitness_rate=config.fitness.rate,
        idle_decay=idle_decay,
        idle_target=idle_target,
        loss_scale=config.fitness.loss_scale,
        frequency_share=config.fitness.frequency_share,
        usage_decay=config.usage.decay,
        fitness_weight=config.weights.fitness,
        usage_weight=config.weights.usage,
        exploration=config.fitness.exploration,
        buffer=config.devices.buffer,
        own=find_options(config),
        world=find_numbers(config),
    )
    values = jax.tree.map(np.float32, strategy.tune(values))
    return values.replace(strategy=np.int32(0))


def longest(steps: np.ndarray, ragged: bool) -> int:
    """T: the most steps of any client.

    Where they differ it is rounded up to a power of two, so that most seeds share one
    compiled program; no client takes more steps for it.
    """
    most = int(steps.max())
    return 2 ** math.ceil(math.log2(most)) if ragged else most


def make_sizes(config: ConfigDict, num_classes: int, local_steps: int) -> Sizes:
    """The sizes of the configured mixture, before a strategy resizes them.

    Args:
      config: a validated config.
      num_classes: L.
      local_steps: T.
    """
    return Sizes(
        num_clients=config.num_clients,
        cohort_size=config.cohort_size,
        num_experts=config.num_experts,
        max_held=config.max_held,
        num_active=config.num_active,
        local_steps=local_steps,
        batch_size=config.batch_size,
        expert_width=config.model.expert_width,
        num_classes=num_classes,
        max_capacity=config.max_held,
    )


def make_rules(config: ConfigDict, num_experts: int) -> Rules:
    """The static choices of a run whose model has E experts."""
    return Rules(
        personal=("gate",) if config.gate.mode == "personal" else (),
        local_experts=0,
        frozen=(),
        gate_period=0,
        silent=False,
        gate_weight=GATE_WEIGHTS[config.gate.mode],
        expert_weight=EXPERT_WEIGHTS[config.merge.weight],
        feedback=config.fitness.feedback,
        client_optimizer=config.client.optimizer,
        momentum=config.client.momentum,
        prox=config.client.prox > 0,
        focus=None,
        gate_loss=sum_gate_losses,
        probabilities=False,
        report_mass=False,
        variates=False,
        step_scale=None,
        server_optimizer=config.server.optimizer,
        deadline=config.devices.deadline,
        communication_share=config.devices.communication_share,
        test_active=0,
        every_expert=num_experts <= config.evaluation.dense_experts,
        ragged=config.local_epochs > 0,
        world=make_world(config),
        client_chunk=config.run.client_chunk,
        chunk_rounds=config.chunk_rounds,
    )


def build_program(
    config: ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
    local_steps: int,
    mesh: Mesh,
) -> Program:
    """Everything static of one run.

    Args:
      config: a validated config.
      num_classes: L.
      image_shape: H, W, F.
      local_steps: T.
      mesh: the devices.

    Raises:
      UserError: model parts that do not fit each other or the images.
    """
    strategy = find_strategy(config.strategy)
    sizes = strategy.resize(make_sizes(config, num_classes, local_steps))
    model = build_model(
        stem=config.model.stem,
        stem_width=config.model.stem_width,
        expert=config.model.expert,
        expert_width=sizes.expert_width,
        feature_width=config.model.feature_width,
        stem_dropout=config.model.stem_dropout,
        expert_dropout=config.model.expert_dropout,
        num_experts=sizes.num_experts,
        num_classes=num_classes,
        image_shape=image_shape,
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    costs = count_costs(shapes, *count_forward_flops(model, image_shape))
    return Program(
        model=model,
        sizes=sizes,
        strategy=strategy,
        rules=strategy.adapt(
            make_rules(config, sizes.num_experts), sizes, find_options(config)
        ),
        costs=costs,
        device_costs=scale_costs(costs, config.devices.model_scale),
        mesh=mesh,
    )
