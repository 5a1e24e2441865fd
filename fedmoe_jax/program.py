"""Everything static of one run: the program that is compiled."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedmoe_jax.aggregate import EXPERT_WEIGHTS, GATE_WEIGHTS
from fedmoe_jax.base import Routing, Strategy
from fedmoe_jax.config import list_options
from fedmoe_jax.loss import calibrate_gate
from fedmoe_jax.models.flops import count_forward_flops
from fedmoe_jax.models.image_moe import Model, build_model
from fedmoe_jax.options import STATIC, TRACED, group
from fedmoe_jax.rules import World
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.types import Hyper, Sizes, Static
from fedmoe_jax.world.costs import Costs, count_costs, scale_costs


class Program(NamedTuple):
    """Everything static that one compiled program is built from.

    Attributes:
      model: the model's pure functions.
      sizes: static sizes, as the strategy configures them.
      strategy: the strategy's record, without None where the config decides.
      static: the config's fields that shape the program, as the strategy configures
        them; also `prox`, whether the FedProx term is in the local objective, and
        `ragged`, whether clients take different numbers of local steps.
      world: which of its processes are on.
      report_numbers: numbers in the report of one client, see `Strategy.report`.
      costs: of the simulated model; these bytes are reported.
      device_costs: of the model that it stands for; these are what devices feel.
      mesh: the devices that run the simulation.
    """

    model: Model
    sizes: Sizes
    strategy: Strategy
    static: Static
    world: World
    report_numbers: int
    costs: Costs
    device_costs: Costs
    mesh: Mesh


def configure(config: ConfigDict) -> ConfigDict:
    """The config of the run's program: a copy, as its strategy needs it."""
    return find_strategy(config.strategy).configure(ConfigDict(config.to_dict()))


def find_overwritten(config: ConfigDict) -> dict[str, object]:
    """The fields that the strategy overwrites, with its values."""
    given, used = flatten(config.to_dict()), flatten(configure(config).to_dict())
    return {name: value for name, value in used.items() if value != given[name]}


def resolve(strategy: Strategy, config: ConfigDict) -> Strategy:
    """The record with the config's choices where it leaves them open.

    Args:
      strategy: as its file defines it.
      config: as the strategy configures it.
    """
    values = flatten(config.to_dict())
    open_to_config = {
        "personal": ("gate",) if config.gate.mode == "personal" else (),
        "gate_weight": GATE_WEIGHTS[config.gate.mode],
        "expert_weight": EXPERT_WEIGHTS[config.merge.weight],
        "gate_loss": calibrate_gate,
        "every_expert": config.num_experts <= config.evaluation.dense_experts,
    }
    chosen = {
        name: value
        for name, value in open_to_config.items()
        if getattr(strategy, name) is None
    }
    return strategy._replace(
        local_experts=min(strategy.local_experts, config.num_experts),
        stages=tuple((values.get(when, when), act) for when, act in strategy.stages),
        **chosen,
    )


def make_world(config: ConfigDict) -> World:
    """Which processes of the world are on: those that would change anything.

    The one client of pooled data has no such world.
    """
    if find_strategy(config.strategy).pooled:
        return World()
    reach, images = config.availability, config.drift.images
    return World(
        pressure=config.pressure.share > 0,
        background=config.background.most > 0,
        bandwidth=config.bandwidth.spread > 0,
        reach=reach.share < 1 or reach.swing > 0,
        dropout=reach.dropout > 0,
        wireless=config.channel.kind == "wireless",
        busy=config.late.kind == "stale",
        labels=config.drift.labels > 0,
        images="" if images == "none" else images,
    )


def take_scope(config: ConfigDict, scope: str) -> dict[str, object]:
    """The config's fields of one scope, by dotted name."""
    values = flatten(config.to_dict())
    return {
        name: values[name]
        for name, option in list_options().items()
        if option.scope == scope
    }


def make_static(config: ConfigDict) -> Static:
    """The fields that shape the program, of a config as the strategy configures it."""
    extra = {"prox": config.client.prox > 0, "ragged": config.local_epochs > 0}
    return group(take_scope(config, STATIC) | extra, "static")


def make_hyper(config: ConfigDict) -> Hyper:
    """The traced numbers, of a program with one strategy, from the user's config."""
    cast = lambda value: (np.int32 if isinstance(value, int) else np.float32)(value)
    traced = take_scope(configure(config), TRACED)
    numbers = {name: cast(value) for name, value in traced.items()}
    return group(numbers | {"strategy": np.int32(0)}, "hyper")


def longest(steps: np.ndarray, ragged: bool) -> int:
    """T: the most steps of any client.

    Where they differ it is rounded up to a power of two, so that most seeds share one
    compiled program; no client takes more steps for it.
    """
    most = int(steps.max())
    return 2 ** math.ceil(math.log2(most)) if ragged else most


def make_sizes(
    config: ConfigDict, *, max_capacity: int, num_classes: int, local_steps: int
) -> Sizes:
    """The sizes of a program.

    Args:
      config: as the strategy configures it.
      max_capacity: K of the user's config.
      num_classes: L.
      local_steps: T.
    """
    return Sizes(
        num_clients=config.num_clients,
        cohort_size=config.cohort_size,
        num_layers=1,
        num_experts=config.num_experts,
        max_held=config.max_held,
        num_active=config.num_active,
        local_steps=local_steps,
        batch_size=config.batch_size,
        expert_width=config.model.expert_width,
        num_classes=num_classes,
        max_capacity=max_capacity,
    )


def count_report(strategy: Strategy, sizes: Sizes, hyper: Hyper) -> int:
    """Numbers in one client's report of all layers, 0 without any."""
    if strategy.report is None:
        return 0
    batch = (sizes.batch_size,)
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    routing = Routing(shape(*batch, sizes.num_experts), shape(*batch, sizes.max_held))
    report = jax.eval_shape(strategy.report, routing, {}, hyper)
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(report))
    return sizes.num_layers * numbers


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
    used = configure(config)
    strategy = resolve(find_strategy(config.strategy), used)
    sizes = make_sizes(
        used,
        max_capacity=config.max_held,
        num_classes=num_classes,
        local_steps=local_steps,
    )
    model = build_model(
        stem=used.model.stem,
        stem_width=used.model.stem_width,
        expert=used.model.expert,
        expert_width=sizes.expert_width,
        feature_width=used.model.feature_width,
        stem_dropout=used.model.stem_dropout,
        expert_dropout=used.model.expert_dropout,
        num_experts=sizes.num_experts,
        num_classes=num_classes,
        image_shape=image_shape,
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    sizes = sizes._replace(num_layers=len(shapes["gate"]))
    costs = count_costs(shapes, *count_forward_flops(model, image_shape))
    return Program(
        model=model,
        sizes=sizes,
        strategy=strategy,
        static=make_static(used),
        world=make_world(config),
        report_numbers=count_report(strategy, sizes, make_hyper(config)),
        costs=costs,
        device_costs=scale_costs(costs, used.devices.model_scale),
        mesh=mesh,
    )
