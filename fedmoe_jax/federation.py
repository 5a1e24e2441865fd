"""From a config to the parts of a run."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedmoe_jax.align.fitness import idle_rule
from fedmoe_jax.client import sum_gate_losses
from fedmoe_jax.costs import count_costs, scale_costs
from fedmoe_jax.merge import EXPERT_WEIGHTS, GATE_WEIGHTS
from fedmoe_jax.models import Model, apply_experts, build_model
from fedmoe_jax.partition import pool, split
from fedmoe_jax.program import Setup
from fedmoe_jax.routing import gate_logits
from fedmoe_jax.rules import CALM, Rules, World
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.types import (
    Dataset,
    Devices,
    Federation,
    Hyper,
    Partition,
    Sizes,
    UserError,
)
from fedmoe_jax.world.devices import draw_devices, read_devices, unlimited_device
from fedmoe_jax.world.drift import draw_heirs


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


def count_steps(config: ConfigDict, size: np.ndarray) -> np.ndarray:
    """Local steps of every client in a round, [N] int32 >= 1, from its examples [N].

    Passes over its own data where `local_epochs` is set, the last batch filled up
    from the start of the pass; else `local_steps` for everyone. Who owns the pooled
    data takes the steps of a whole cohort.
    """
    if not config.local_epochs:
        each = config.cohort_size if find_strategy(config.strategy).pooled else 1
        return np.full(size.shape, each * config.local_steps, np.int32)
    if find_strategy(config.strategy).pooled:
        size = size * (config.cohort_size / config.num_clients)
    batches = np.ceil(config.local_epochs * size / config.batch_size - 1e-6)
    return np.maximum(batches, 1).astype(np.int32)


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


@functools.cache
def count_forward_flops(
    model: Model, image_shape: tuple[int, int, int]
) -> tuple[float, float, float]:
    """FLOPs of one example forward, as XLA counts them.

    Returns:
      Of the stem; of stem, gate and head; of one expert.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    host = jax.local_devices(backend="cpu")[0]  # others cannot count before compiling

    def flops(function, *arguments) -> float:
        with jax.default_device(host):
            analysis = jax.jit(function).lower(*arguments).cost_analysis()
        return float(analysis.get("flops", 0.0))  # a flat stem has none

    features = jax.eval_shape(model.stem, params["stem"], image, None)
    expert = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["experts"]
    )
    output = jax.eval_shape(model.expert, expert, features, None)
    stem = flops(model.stem, params["stem"], image, None)
    shared = (
        stem
        + flops(gate_logits, params["gate"], features)
        + flops(model.head, params["head"], output)
    )
    return stem, shared, flops(model.expert, expert, features, None)


@functools.cache
def count_activation_bytes(
    model: Model, image_shape: tuple[int, int, int], experts: int
) -> float:
    """Bytes of all intermediate values of one example, forward, through n experts."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = 9973  # a prime that no axis of the params has, so it marks activations
    image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    held = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((experts, *leaf.shape[1:]), leaf.dtype),
        params["experts"],
    )

    def forward(stem, experts, x):
        return apply_experts(model, experts, model.stem(stem, x, None), None)

    jaxpr = jax.make_jaxpr(forward)(params["stem"], held, image)
    values = [var.aval for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars]
    marked = [value for value in values if batch in value.shape]
    return float(sum(value.size * value.dtype.itemsize for value in marked)) / batch


def build_setup(
    config: ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
    local_steps: int,
    mesh: Mesh,
) -> Setup:
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
    return Setup(
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


def make_partition(config: ConfigDict, data: Dataset) -> Partition:
    """Divides the training examples among the clients and the server's public slice.

    Raises:
      UserError: the data cannot be divided so.
    """
    total, public = len(data.train_y), config.data.public
    most = total - config.num_clients * config.partition.min_size
    if public > max(most, 0):
        raise UserError(
            f"data.public={public} is not allowed; allowed: 0 to {max(most, 0)}, which "
            f"leaves num_clients={config.num_clients} clients "
            f"partition.min_size={config.partition.min_size} of the {total} training "
            "examples each"
        )
    rng = np.random.default_rng([config.seed, 2])
    order = rng.permutation(total).astype(np.int32)
    aside, rest = np.sort(order[:public]), np.sort(order[public:])
    partition = split(
        config.partition.kind,
        data.train_y[rest],
        num_clients=config.num_clients,
        num_classes=len(data.label_names),
        alpha=config.partition.alpha,
        classes_per_client=config.partition.classes_per_client,
        min_size=config.partition.min_size,
        seed=config.seed,
    )
    counts = np.arange(partition.index.shape[1])[None] < partition.size[:, None]
    index = np.where(counts, rest[partition.index], 0)
    return partition._replace(index=index, public=aside)


def make_devices(config: ConfigDict) -> tuple[Devices, tuple[str, ...]]:
    """Every client's device, from presets or the user's file; names of the tiers.

    Raises:
      UserError: device tiers or shares that are not allowed, or a file that is not.
    """
    options = config.devices
    rng = np.random.default_rng([config.seed, 1])  # not the stream of the partition
    if options.csv:
        return read_devices(options.csv, config.num_clients, rng, options.free_memory)
    tiers = tuple(options.tiers)
    devices = draw_devices(
        rng,
        config.num_clients,
        tiers,
        tuple(options.shares),
        options.spread,
        options.free_memory,
    )
    return devices, tiers


def make_federation(
    config: ConfigDict, data: Dataset, partition: Partition
) -> Federation:
    """Everything a round reads, still on the host; `replicate` puts it on devices.

    Where a strategy pools the data, one client owns all of it, on a device without
    limits; `label_mix` is still of those who own it otherwise.

    Raises:
      UserError: device tiers or shares that are not allowed.
    """
    mean, std = measure_channels(data)
    counts = partition.label_counts.astype(np.float32)
    devices, _ = make_devices(config)
    heir = draw_heirs(
        np.random.default_rng([config.seed, 3]), config.num_clients, config.drift.share
    )
    if find_strategy(config.strategy).pooled:
        partition, devices = pool(partition), unlimited_device()
        heir = np.zeros(1, np.int32)
    return Federation(
        x=data.train_x,
        y=data.train_y,
        index=partition.index,
        size=partition.size,
        steps=count_steps(config, partition.size),
        label_mix=counts / counts.sum(axis=1, keepdims=True),
        public=partition.public,
        test_x=data.test_x,
        test_y=data.test_y,
        mean=np.broadcast_to(mean, data.train_x.shape[1:]),
        std=np.broadcast_to(std, data.train_x.shape[1:]),
        devices=devices,
        heir=heir,
    )


def measure_channels(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [F] float32 of the training pixels / 255."""
    levels = np.arange(256) / 255.0
    channels = np.moveaxis(data.train_x, -1, 0)
    counts = np.stack([np.bincount(x.ravel(), minlength=256) for x in channels])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt((share * (levels[None] - mean[:, None]) ** 2).sum(axis=1))
    return mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)
