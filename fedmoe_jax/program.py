"""Everything static of one run: the program that is compiled."""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedmoe_jax.aggregate import EXPERT_WEIGHTS, GATE_WEIGHTS
from fedmoe_jax.align.affinity import by_fitness
from fedmoe_jax.base import (
    GATE_STEM,
    Data,
    Model,
    Routing,
    Scores,
    Strategy,
    Task,
    Units,
)
from fedmoe_jax.config import check, check_values, list_options
from fedmoe_jax.feasible import check_floor
from fedmoe_jax.forms import check_type
from fedmoe_jax.models import MODELS
from fedmoe_jax.models.flops import count_forward_flops, shape_params, trace_model
from fedmoe_jax.models.layers import ANY
from fedmoe_jax.models.links import SNR
from fedmoe_jax.models.one_layer import take_gate_stem
from fedmoe_jax.models.precision import compute_in
from fedmoe_jax.models.products import count_fixed_products
from fedmoe_jax.models.routing import calibrate_gate
from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.options import STATIC, TRACED, UserError, group
from fedmoe_jax.privacy.defences import find_flags
from fedmoe_jax.pruning.savings import Savings, count_savings
from fedmoe_jax.pruning.scores import NONE
from fedmoe_jax.pruning.units import count_entries
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.runtime.sharding import find_platform
from fedmoe_jax.strategies import does_probe, find_strategy
from fedmoe_jax.tasks import find_task
from fedmoe_jax.tasks.batches import BatchShapes, shape_batch
from fedmoe_jax.types import Array, Federation, Hyper, PyTree, Sizes, Static
from fedmoe_jax.world import PROCESSES
from fedmoe_jax.world.costs import Costs, count_costs, scale_costs
from fedmoe_jax.world.step import Chain


class Program(NamedTuple):
    """Everything static that one compiled program is built from.

    Attributes:
      task: the meaning of the data.
      batch: the shapes of its batches.
      model: the model's pure functions.
      outputs: the shapes of the model's outputs of one local batch, leaves [B, ...].
      scores: the shapes of their scores, leaves [B, ...positions].
      routing: the shapes of the routing.
      sizes: static sizes, as the strategy configures them.
      strategy: the strategy's record, without None where the config decides.
      static: the config's fields that shape the program, as the strategy configures
        them; also `prox`, whether the FedProx term is in the local objective, `ragged`,
        whether clients take different numbers of local steps, `upcycled`, whether there
        is a dense warm-up, `probes`, whether clients probe their experts before
        training, in the group `fairness` whether each of its floors and its power is
        above 0, and in the group `privacy` the defences that are on, by the names of
        their numbers.
      processes: of the world that are on, in the order of application.
      report_numbers: numbers in the report of one client, see `Strategy.report`.
      costs: of the simulated model; these bytes are reported.
      device_costs: of the model that it stands for; these are what devices feel.
      units: what pruning can leave out, with its sizes; () where it is off.
      rest_entries: numbers of ONE expert in one layer that are in no unit.
      savings: what of the FLOPs pruning can save.
      mesh: the devices that run the simulation.
      platform: their kind, `cpu`, `gpu` or `tpu`: the model's layers, runs and experts
        have the form that is fast there.
    """

    task: Task
    batch: BatchShapes
    model: Model
    outputs: PyTree
    scores: Scores
    routing: Routing
    sizes: Sizes
    strategy: Strategy
    static: Static
    processes: Chain
    report_numbers: int
    costs: Costs
    device_costs: Costs
    units: tuple[Units, ...]
    rest_entries: float
    savings: Savings
    mesh: Mesh
    platform: str


def configure(config: ConfigDict) -> ConfigDict:
    """The config of the run's program: a copy, as its strategy needs it.

    Where no gate chooses, with one expert or a sum of all, there is no `gate.bias`, and
    no links between a gate and experts; and no `expert_floor` where the server has no
    two experts to choose from, or where they are slices of one network.

    Raises:
      UserError: the strategy's `configure` returns no config.
    """
    strategy = find_strategy(config.strategy)
    used = strategy.configure(ConfigDict(config.to_dict()))
    check_type(f"strategy={config.strategy!r} has a `configure` that", used, ConfigDict)
    if used.num_experts == 1 or strategy.gating == "sum":
        used.gate.bias = 0.0
        used.expert_links.kind, used.loss.latency = "none", 0.0
    if used.num_experts - strategy.local_experts < 2 or strategy.gating == "sum":
        used.fairness.expert_floor = 0.0
    return used


def find_overwritten(config: ConfigDict) -> dict[str, object]:
    """The fields that the strategy overwrites, with its values."""
    given, used = flatten(config.to_dict()), flatten(configure(config).to_dict())
    return {name: value for name, value in used.items() if value != given[name]}


def resolve(strategy: Strategy, config: ConfigDict) -> Strategy:
    """The record with the config's choices where it leaves them open.

    Args:
      strategy: as its file defines it.
      config: as the strategy configures it.

    Raises:
      UserError: a stage is due within a chunk of rounds or beyond the run, or a dense
        warm-up would copy experts that are none of the server's.
    """
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
    check_upcycle(config, strategy._replace(**chosen))
    affinity = strategy.affinity or by_fitness
    return strategy._replace(
        affinity=affinity if config.gate.bias > 0 else None,
        local_experts=min(strategy.local_experts, config.num_experts),
        stages=tuple(
            (number, act)
            for when, act in strategy.stages
            for number in find_rounds(when, config)
        ),
        **chosen,
    )


def check_augment(config: ConfigDict, task: Task, rows: PyTree) -> None:
    """Raises UserError unless the task's examples can be changed as the config says.

    Args:
      config: gives `client.augment`.
      task: of the data.
      rows: leaves [X, ...].
    """
    name, known = config.client.augment, dict(task.augments)
    check("client.augment", name, ("none", *known), " with these data")
    if name in known:
        row = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
        jax.eval_shape(known[name], jax.tree.map(row, rows), jax.random.key(0))


def check_upcycle(config: ConfigDict, strategy: Strategy) -> None:
    """Raises UserError for a dense warm-up without an end, or without copies.

    Args:
      config: as the strategy configures it.
      strategy: with the config's choices.
    """
    if not config.upcycle.rounds or config.num_experts == 1:
        return
    if config.upcycle.rounds >= config.num_rounds:
        raise UserError(
            f"upcycle.rounds={config.upcycle.rounds} is not allowed, as no round would "
            f"be the strategy's; allowed: 0 to num_rounds - 1 = {config.num_rounds - 1}"
        )
    if "experts" in strategy.personal or strategy.gating == "sum":
        raise UserError(
            f"upcycle.rounds={config.upcycle.rounds} is not allowed with strategy="
            f"{config.strategy!r}, whose experts are personal or parts of one network; "
            "allowed: 0"
        )


def find_rounds(when: Any, config: ConfigDict) -> list[int]:
    """The rounds of a stage, see `Strategy.stages`.

    Raises:
      UserError: see `find_round`.
    """
    if not isinstance(when, tuple):
        return [find_round(when, config)]
    first, period = (find_round(number, config) for number in when)
    return list(range(first, config.num_rounds + 1, period)) if period else [first]


def find_round(when: int | str, config: ConfigDict) -> int:
    """The round of a stage, which may be given as the name of a config field.

    Raises:
      UserError: it is no multiple of `chunk_rounds`, between which stages run, or
        beyond the run; or there is no such field.
    """
    values = flatten(config.to_dict())
    if isinstance(when, str) and when not in values:
        raise UserError(
            f"strategy={config.strategy!r} has a stage at {when!r}, which is no field; "
            "allowed: a number of rounds, or a config field that gives it"
        )
    number = values[when] if isinstance(when, str) else when
    if number % config.chunk_rounds or not 0 <= number <= config.num_rounds:
        given = f"{when}={number}" if isinstance(when, str) else f"round {number}"
        raise UserError(
            f"strategy={config.strategy!r} has a stage at {given}, which is not "
            f"allowed; allowed: multiples of chunk_rounds={config.chunk_rounds}, 0 to "
            f"num_rounds={config.num_rounds}"
        )
    return number


def list_processes(config: ConfigDict) -> Chain:
    """The processes of the world that are on: those that would change anything.

    The owner of pooled data does not live in that world.
    """
    if find_strategy(config.strategy).pooled:
        return ()
    return tuple(row for row in PROCESSES.items() if row[1].is_on(config))


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
    extra = {
        "prox": config.client.prox > 0,
        "ragged": config.local_epochs > 0,
        "upcycled": config.upcycle.rounds > 0 and config.num_experts > 1,
        "probes": does_probe(config),
        "fairness.floor": config.fairness.floor > 0,
        "fairness.expert_floor": config.fairness.expert_floor > 0,
        "fairness.power": config.fairness.power > 0,
        **find_flags(config, find_strategy(config.strategy).silent),
    }
    return group(take_scope(config, STATIC) | extra, "static")


def choose_chunk(static: Static, num_clients: int, platform: str) -> Static:
    """Clients vmapped at once on each device, where the config leaves that open.

    On CPU one after the other is faster; elsewhere as many as there are, of which
    `plan.fit_chunk` takes fewer where a wave's memory is short.

    Args:
      static: may have `run.client_chunk=0`.
      num_clients: of the cohort.
      platform: `cpu`, `gpu` or `tpu`.
    """
    chunk = static.run.client_chunk or (1 if platform == "cpu" else num_clients)
    return static._replace(run=static.run._replace(client_chunk=chunk))


def make_hyper(config: ConfigDict) -> Hyper:
    """The traced numbers, of a program with one strategy, from the user's config."""
    cast = lambda value: (np.int32 if isinstance(value, int) else np.float32)(value)
    traced = take_scope(configure(config), TRACED)
    numbers = {name: cast(value) for name, value in traced.items()}
    return group(numbers | {"strategy": np.int32(0)}, "hyper")


def longest(steps: np.ndarray | Array, ragged: bool) -> int:
    """T: the most steps of any client.

    Where they differ it is rounded up to a power of two, so that most seeds share one
    compiled program; no client takes more steps for it.
    """
    most = int(steps.max())
    return 2 ** math.ceil(math.log2(most)) if ragged else most


def make_sizes(
    config: ConfigDict,
    *,
    num_layers: int,
    max_capacity: int,
    num_strata: int,
    num_groups: int,
    local_steps: int,
    gate_width: int,
) -> Sizes:
    """The sizes of a program.

    Args:
      config: as the strategy configures it.
      num_layers: G.
      max_capacity: K of the user's config.
      num_strata: L.
      num_groups: Q.
      local_steps: T.
      gate_width: D.
    """
    return Sizes(
        num_clients=config.num_clients,
        cohort_size=config.cohort_size,
        num_layers=num_layers,
        num_experts=config.num_experts,
        max_held=config.max_held,
        num_active=config.num_active,
        local_steps=local_steps,
        batch_size=config.batch_size,
        num_strata=num_strata,
        num_groups=num_groups,
        max_capacity=max_capacity,
        gate_width=gate_width,
    )


def count_groups(data: Data, task: Task) -> int:
    """Q: groups of the data; every stratum is one where examples have no classes."""
    if task.labels is None and task.add_prior is None:
        return len(data.stratum_names)
    return max(len(data.group_names), 1)


def measure_gate(gates: PyTree) -> int:
    """D of the first layer: numbers of one expert's row in the largest leaf."""
    rows = jax.tree.leaves(gates[layer_names(gates)[0]])
    return max(math.prod(leaf.shape[1:]) for leaf in rows)


def count_report(
    strategy: Strategy, routing: Routing, batch: PyTree, hyper: Hyper
) -> int:
    """Numbers in one client's report beside its update, of all layers.

    Args:
      strategy: may have a report.
      routing: shapes of the routing of one batch.
      batch: shapes of the batch.
      hyper: hyperparameters.
    """
    make_report = strategy.report
    if make_report is None or routing.logits is None:
        return 0
    layer = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), routing
    )
    report = jax.eval_shape(lambda *r: make_report(*r, hyper), layer, batch)
    each = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(report))
    return len(routing.gates) * each


def take_frozen(
    params: PyTree, frozen: PyTree, model: Model, strategy: Strategy
) -> tuple[PyTree, PyTree]:
    """Params without the parts that the strategy freezes, and all that is frozen.

    Args:
      params: of the model, with all parts.
      frozen: what the model itself keeps fixed.
      model: its parts say what of the stem a gate needs.
      strategy: names the parts that it freezes.
    """
    whole = params | {GATE_STEM: take_gate_stem(model.parts, params["stem"])}
    own = {part: whole[part] for part in strategy.frozen}
    trained = {part: tree for part, tree in params.items() if part not in own}
    return trained, frozen | own


def check_layers(
    config: ConfigDict, strategy: Strategy, model: Model, num_layers: int
) -> None:
    """Raises UserError where a strategy for one MoE layer meets another model."""
    bound = strategy.one_layer or GATE_STEM in strategy.frozen
    bound |= strategy.mix == "probabilities"
    if bound and (num_layers > 1 or model.parts is None):
        reason = f"has {num_layers} MoE layers" if num_layers > 1 else "has no parts"
        raise UserError(
            f"strategy={config.strategy!r} is not allowed with model.kind="
            f"{config.model.kind!r}, which {reason}; allowed: strategies without "
            "`one_layer`, a frozen `gate_stem` or mixed probabilities"
        )


def check_links(config: ConfigDict, gates: PyTree) -> None:
    """Raises UserError where experts are behind links that gates do not see.

    Args:
      config: as the strategy configures it.
      gates: shapes of the model's.
    """
    if config.expert_links.kind == "none":
        return
    if not all(SNR in gate for gate in gates.values()):
        raise UserError(
            f"expert_links.kind={config.expert_links.kind!r} is not allowed with "
            f"model.kind={config.model.kind!r}, whose gates see no links; allowed: "
            "none, or model.kind='image_moe' or 'transformer'"
        )


def check_base(config: ConfigDict, strategy: Strategy, model: Model) -> None:
    """Raises UserError where a pretrained base does not work as a strategy needs it."""
    if model.base is None:
        return
    where = f"model.base={config.model.base!r}"
    if strategy.gating == "sum":
        raise UserError(
            f"strategy={config.strategy!r} is not allowed with {where}, each of whose "
            "experts is a whole one; allowed: strategies that do not sum experts"
        )
    if model.base.sparse and strategy.message is not None:
        raise UserError(
            f"strategy={config.strategy!r} is not allowed with {where}, whose experts "
            "do not work alone; allowed: strategies without a message, or a dense base"
        )
    if model.base.sparse and config.upcycle.rounds:
        raise UserError(
            f"upcycle.rounds={config.upcycle.rounds} is not allowed with {where}, "
            "whose experts are no copies; allowed: 0"
        )


def choose_units(config: ConfigDict, model: Model, params: PyTree) -> tuple[Units, ...]:
    """The units that pruning can leave out; () where it is off.

    Args:
      config: as the strategy configures it.
      model: names its units.
      params: without the parts that are frozen.

    Raises:
      UserError: the model has none in a part that is to be pruned.
    """
    if config.pruning.kind == NONE:
        return ()
    fields = {"experts": ("kind", NONE)}
    if config.pruning.parts == "all":
        fields["stem"] = ("parts", "experts")
    for part, (field, off) in fields.items():
        if not any(each.part == part for each in model.units):
            value, model_fields = config.pruning[field], config.model
            raise UserError(
                f"pruning.{field}={value!r} is not allowed with model.kind="
                f"{model_fields.kind!r} and model.stem={model_fields.stem!r}, in whose "
                f"{part} there are no hidden units; allowed: {off!r}"
            )
    return tuple(u for u in model.units if u.part in fields and u.part in params)


def check_state(config: ConfigDict, strategy: Strategy, sizes: Sizes) -> None:
    """Raises UserError where the strategy's own state is no dict of arrays."""
    own = jax.eval_shape(lambda: strategy.init(sizes))
    arrays = isinstance(own, dict) and all(hasattr(x, "shape") for x in own.values())
    if not arrays:
        raise UserError(
            f"strategy={config.strategy!r} has an `init` that returns {own!r}; "
            "allowed: a dict of arrays"
        )


def check_positions(
    config: ConfigDict, task: str, scores: Scores, routing: Routing
) -> None:
    """Raises UserError unless every leaf of the scores has the routed positions."""
    routed = routing.gates.shape[1]
    for name, leaf in scores._asdict().items():
        if leaf is not None and leaf.size != routed:
            raise UserError(
                f"the task {task} has Scores.{name} {list(leaf.shape)} of a batch of "
                f"which model.kind={config.model.kind!r} routes {routed} positions; "
                f"allowed: {routed} numbers, one a position"
            )


def build_program(
    config: ConfigDict, data: Data, federation: Federation, mesh: Mesh
) -> Program:
    """Everything static of one run.

    Args:
      config: a validated config.
      data: gives the task, and the width of the outputs.
      federation: gives the shapes of a batch, and T.
      mesh: the devices.

    Raises:
      UserError: model parts that do not fit each other or the data; a strategy that
        does not fit the model, or whose state is no dict of arrays; a task that does
        not score the positions that the model routes; a floor that cannot be met.
    """
    used, task = configure(config), find_task(data.task)
    where = f", as strategy={config.strategy!r} configures it"
    check_values(flatten(used.to_dict()), where)
    drifts = ("none", *dict(task.drifts))
    check("drift.images", config.drift.images, drifts, " with these data")
    check_augment(config, task, data.train)
    strategy = resolve(find_strategy(config.strategy), used)
    batch = shape_batch(data.train, federation.statistics, task)
    platform, width = find_platform(mesh), task.num_outputs(data)
    build = functools.partial(MODELS[used.model.kind], used, batch.of(1), width)
    exact, plain = build(platform), build(ANY)  # of which FLOPs are counted
    model = compute_in(exact, used.model.dtype)
    params, frozen = shape_params(model)
    sizes = make_sizes(
        used,
        num_layers=len(params["gate"]),
        max_capacity=config.max_held,
        num_strata=len(data.stratum_names),
        num_groups=count_groups(data, task),
        local_steps=longest(federation.steps, config.local_epochs > 0),
        gate_width=measure_gate(params["gate"]),
    )
    check_layers(config, strategy, model, sizes.num_layers)
    check_links(used, params["gate"])
    check_base(config, strategy, model)
    check_state(config, strategy, sizes)
    outputs, scores, routing = trace_model(model, task, batch, sizes)
    check_positions(used, data.task, scores, routing)
    trained, frozen = take_frozen(params, frozen, model, strategy)
    forward = count_forward_flops(plain, batch)
    fixed = count_fixed_products(plain, batch)
    costs = count_costs(trained, frozen, forward, strategy, fixed)
    felt = scale_costs(costs, used.devices.model_scale)
    examples = federation.steps * sizes.batch_size
    check_floor(used, federation.devices, felt, examples)
    rows = batch.of(sizes.batch_size)
    units, rest = count_entries(trained, choose_units(used, model, trained))
    return Program(
        task=task,
        batch=batch,
        model=model,
        outputs=outputs,
        scores=scores,
        routing=routing,
        sizes=sizes,
        strategy=strategy,
        static=choose_chunk(make_static(used), sizes.cohort_size, platform),
        processes=list_processes(config),
        report_numbers=count_report(strategy, routing, rows, make_hyper(config)),
        costs=costs,
        device_costs=felt,
        units=units,
        rest_entries=rest,
        savings=count_savings(plain, batch, units, costs),
        mesh=mesh,
        platform=platform,
    )
