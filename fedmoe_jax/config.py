"""Every field of a config: its allowed values, checked before anything runs."""

from typing import Any

from ml_collections import ConfigDict

from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.data.partition import KINDS
from fedmoe_jax.models import MODELS
from fedmoe_jax.models.image_parts import EXPERTS, STEMS
from fedmoe_jax.options import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    STATIC,
    TRACED,
    Option,
    Range,
    UserError,
)
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import STRATEGIES, find_strategy
from fedmoe_jax.world import PROCESSES
from fedmoe_jax.world.devices import WIDEST

# Fields that may change between the calls that run and resume one simulation.
FREE_FIELDS = frozenset(
    {
        "num_rounds",
        "data.dir",
        "checkpoint.every",
        "checkpoint.keep",
        "run.memory_limit_gb",
        "run.tensorboard",
    }
)

OPTIONS: tuple[Option, ...] = (
    Option(
        "seed",
        Range(0, 2**31 - 1),
        "of data split, devices, initial weights and every draw",
    ),
    Option("num_rounds", COUNT, "federated rounds"),
    Option("eval_every", COUNT, "rounds; divides num_rounds"),
    Option(
        "chunk_rounds", COUNT, "rounds in one compiled call; divides eval_every", STATIC
    ),
    Option("num_clients", COUNT, "population"),
    Option("cohort_size", COUNT, "clients per round, at most num_clients"),
    Option("num_experts", COUNT, "experts in the server's model"),
    Option(
        "max_held", COUNT, "expert slots of the largest client, at most num_experts"
    ),
    Option("num_active", COUNT, "experts per example, at most max_held"),
    Option("local_steps", COUNT, "optimiser steps per client and round"),
    Option(
        "local_epochs",
        NON_NEGATIVE,
        "passes over the client's data instead; 0: local_steps",
    ),
    Option("batch_size", COUNT, "examples per local step"),
    Option("strategy", None, "see the README's table of strategies"),
    Option("data.name", None, "digits | synthetic | cifar10"),
    Option(
        "data.public", NON_NEGATIVE, "training examples of the server, drawn at random"
    ),
    Option(
        "data.dir", None, "TFDS folder; empty: TFDS_DATA_DIR or ~/tensorflow_datasets"
    ),
    Option(
        "partition.kind", tuple(KINDS), "dirichlet | shards | quantity | iid | natural"
    ),
    Option(
        "partition.alpha", POSITIVE, "> 0; of dirichlet (labels) and quantity (sizes)"
    ),
    Option("partition.classes_per_client", COUNT, "of shards"),
    Option("partition.min_size", COUNT, "examples every client gets at least"),
    Option("model.kind", None, "image_moe"),
    Option("model.stem", tuple(STEMS), "flat | mlp | cnn | simple_cnn | resnet8"),
    Option("model.stem_width", COUNT, "hidden units or channels"),
    Option("model.expert", tuple(EXPERTS), "dense | mlp | conv"),
    Option("model.expert_width", COUNT, "hidden units or channels"),
    Option(
        "model.feature_width", COUNT, "outputs of an expert; dense has expert_width"
    ),
    Option(
        "model.stem_dropout",
        Range(0, 1, open_high=True),
        "share of the stem's outputs dropped in training",
    ),
    Option(
        "model.expert_dropout",
        Range(0, 1, open_high=True),
        "share of each expert's outputs dropped",
    ),
    Option(
        "gate.mode",
        ("global", "holder_rows", "personal"),
        "global | holder_rows | personal",
    ),
    Option(
        "loss.calibration",
        NON_NEGATIVE,
        "weight of -log(gate mass on held experts)",
        TRACED,
    ),
    Option("loss.load", NON_NEGATIVE, "weight of the Switch load loss", TRACED),
    Option("loss.z", NON_NEGATIVE, "weight of the router z-loss", TRACED),
    Option("client.optimizer", ("sgd", "adam"), "sgd | adam", STATIC),
    Option("client.learning_rate", POSITIVE, "> 0", TRACED),
    Option("client.momentum", Range(0, 1, open_high=True), "of sgd", STATIC),
    Option("client.prox", NON_NEGATIVE, "FedProx coefficient", TRACED),
    Option(
        "server.optimizer",
        ("sgd", "momentum", "adam", "yogi", "adagrad"),
        "sgd | momentum | adam | yogi | adagrad",
        STATIC,
    ),
    Option(
        "server.learning_rate", POSITIVE, "> 0; 1 with sgd is plain averaging", TRACED
    ),
    Option(
        "merge.weight",
        ("examples", "routed"),
        "examples (owned) | routed (trained through it)",
    ),
    Option(
        "fitness.feedback",
        ("accuracy", "loss", "mixed"),
        "accuracy | loss | mixed",
        STATIC,
    ),
    Option(
        "fitness.rate",
        Range(0, 1, open_low=True),
        "weight of the newest feedback in the EMA",
        TRACED,
    ),
    Option("fitness.idle", ("keep", "decay", "prior"), "keep | decay | prior", STATIC),
    Option("fitness.idle_decay", SHARE, "per round, of decay and prior", TRACED),
    Option("fitness.prior", SHARE, "score before any feedback, 0 to 1", TRACED),
    Option(
        "fitness.noise", SHARE, "spread of the initial scores about the prior", TRACED
    ),
    Option(
        "fitness.exploration",
        SHARE,
        "chance per client and round of random scores",
        TRACED,
    ),
    Option(
        "fitness.loss_scale",
        NON_NEGATIVE,
        "alpha of exp(-alpha * loss), of loss",
        TRACED,
    ),
    Option("fitness.frequency_share", SHARE, "of mixed", TRACED),
    Option("usage.decay", SHARE, "share of the usage kept per round", TRACED),
    Option(
        "weights.fitness",
        NON_NEGATIVE,
        "of normalised fitness in the desirability",
        TRACED,
    ),
    Option("weights.usage", NON_NEGATIVE, "of normalised usage, subtracted", TRACED),
    Option(
        "devices.csv", None, "file of one's own devices instead of tiers; see README"
    ),
    Option("devices.tiers", None, "kinds of device"),
    Option("devices.shares", None, "of the population, sum to 1"),
    Option(
        "devices.spread",
        Range(0, WIDEST),
        "standard deviation of the log within a tier, to 5",
    ),
    Option(
        "devices.free_memory",
        Range(0, 1, open_low=True),
        "share of the memory that training gets",
    ),
    Option(
        "devices.model_scale", POSITIVE, "one simulated byte or FLOP stands for so many"
    ),
    Option("devices.deadline", POSITIVE, "seconds a round may take", STATIC),
    Option(
        "devices.communication_share",
        Range(0, 1, open_low=True, open_high=True),
        "of the deadline, for the links",
        STATIC,
    ),
    Option(
        "devices.buffer",
        Range(0, 1, open_high=True),
        "share of every resource kept in reserve",
        TRACED,
    ),
    Option(
        "devices.overload",
        ("ignore", "lose"),
        "ignore | lose (whoever holds too much)",
        STATIC,
    ),
    Option(
        "profile.kind",
        ("oracle", "self_reported", "estimated"),
        "oracle | self_reported | estimated",
        STATIC,
    ),
    Option("profile.refresh", COUNT, "rounds from one profile to the next", TRACED),
    Option(
        "profile.deviation",
        Range(0, 1, open_high=True),
        "largest relative error of a report",
        TRACED,
    ),
    Option(
        "profile.fixed", SHARE, "share of the error that is each client's bias", TRACED
    ),
    Option(
        "profile.rate",
        Range(0, 1, open_low=True),
        "weight of the newest observation in the estimates",
        TRACED,
    ),
    Option(
        "profile.exploration",
        SHARE,
        "chance per client and round of one expert more",
        TRACED,
    ),
    Option(
        "profile.caution", Range(1), "experts by which a failure lowers the aim", TRACED
    ),
    Option(
        "reaction.kind",
        ("none", "reset", "hasten"),
        "none | reset | hasten, when fitness falls short",
        STATIC,
    ),
    Option(
        "reaction.slack", NON_NEGATIVE, "shortfall of fitness that is tolerated", TRACED
    ),
    Option(
        "reaction.threshold", POSITIVE, "accumulated shortfall that is an alarm", TRACED
    ),
    Option("reaction.haste", Range(1), "rounds of learning in one, of hasten", TRACED),
    Option("reaction.rounds", NON_NEGATIVE, "of haste after an alarm", TRACED),
    Option(
        "reaction.evidence",
        COUNT,
        "scores of a pair before it raises any suspicion",
        TRACED,
    ),
    Option(
        "evaluation.dense_experts", COUNT, "up to so many, all see every test image"
    ),
    Option("checkpoint.every", COUNT, "rounds; a multiple of chunk_rounds"),
    Option("checkpoint.keep", COUNT, "newest checkpoints that stay on disk"),
    Option("run.client_chunk", COUNT, "clients vmapped at once on each device", STATIC),
    Option(
        "run.num_devices",
        NON_NEGATIVE,
        "of all processes; 0: all, one per client at most",
    ),
    Option(
        "run.memory_limit_gb",
        POSITIVE,
        "estimated memory beyond which a run is refused",
    ),
    Option("run.tensorboard", None, "write TensorBoard events"),
)

# Fields whose values are the names of a table, which may have got rows by now.
TABLES = {"data.name": DATASETS, "model.kind": MODELS}

# (field, other): field <= other
AT_MOST = (
    ("cohort_size", "num_clients"),
    ("max_held", "num_experts"),
    ("num_active", "max_held"),
)

# (field, other): field is a whole multiple of other
MULTIPLE = (
    ("num_rounds", "eval_every"),
    ("eval_every", "chunk_rounds"),
    ("checkpoint.every", "chunk_rounds"),
)


def check(
    name: str, value: Any, allowed: Range | tuple[str, ...], where: str = ""
) -> None:
    """Raises UserError unless `value` is allowed in the field `name`."""
    if value not in allowed:
        text = str(allowed) if isinstance(allowed, Range) else ", ".join(allowed)
        raise UserError(f"{name}={value!r} is not allowed{where}; allowed: {text}")


def list_options() -> dict[str, Option]:
    """Every field of a config by its name: the shared ones, and those of records."""
    records = (*STRATEGIES.values(), *PROCESSES.values())
    owned = [option for record in records for option in record.options]
    options = {option.name: option for option in (*OPTIONS, *owned)}
    for name, table in TABLES.items():
        options[name] = options[name]._replace(allowed=tuple(table))
    return options


def check_drift(values: dict[str, Any]) -> None:
    """Raises UserError for a drift that the run would not see or could not have."""
    on = values["drift.labels"] > 0 or values["drift.images"] != "none"
    last = values["num_rounds"] - values["drift.rounds"]
    if on and last < 0:
        raise UserError(
            f"drift.rounds={values['drift.rounds']} is not allowed; allowed: 1 to "
            f"num_rounds={values['num_rounds']}, so that the run sees all of the drift"
        )
    if on and values["drift.start"] > last:
        raise UserError(
            f"drift.start={values['drift.start']} is not allowed; allowed: 0 to "
            f"num_rounds - drift.rounds = {last}, so that the run sees all of the drift"
        )
    if on and round(values["drift.share"] * values["num_clients"]) < 2:
        raise UserError(
            f"drift.share={values['drift.share']} is not allowed; allowed: two of "
            f"num_clients={values['num_clients']} or more, who drift to one another"
        )
    if values["drift.labels"] > 0 and values["local_epochs"] > 0:
        raise UserError(
            f"drift.labels={values['drift.labels']} is not allowed with "
            f"local_epochs={values['local_epochs']}; allowed: 0, or local_epochs=0, as "
            "passes over data that change hands have no fixed length"
        )
    if values["drift.images"] == "contrast" and values["drift.strength"] > 1:
        raise UserError(
            f"drift.strength={values['drift.strength']} is not allowed with "
            "drift.images='contrast'; allowed: [0, 1]"
        )


def validate(config: ConfigDict) -> None:
    """Checks every field by itself and against the others.

    What depends on the data (`partition.*` against its size) is checked by `split`,
    what depends on the machine (`run.num_devices`) by `build_mesh`.

    Raises:
      UserError: one line with the field, its value and what is allowed.
    """
    values, options = flatten(config.to_dict()), list_options()
    for name in sorted(set(options) ^ set(values)):
        fault = "is missing" if name in options else "is unknown"
        raise UserError(
            f"config field {name!r} {fault}; allowed: the fields that --help lists"
        )
    for name, option in options.items():
        if option.allowed is not None:
            check(name, values[name], option.allowed)
    strategy = find_strategy(values["strategy"])
    where = f" with strategy={values['strategy']!r}"
    for name, allowed in strategy.allowed:
        check(name, values[name], allowed, where)
    for name, other in (*AT_MOST, *strategy.at_most):
        if values[name] > values[other]:
            raise UserError(
                f"{name}={values[name]} is not allowed"
                f"{where if (name, other) in strategy.at_most else ''}; "
                f"allowed: 1 to {other}={values[other]}"
            )
    check_drift(values)
    for name, other in MULTIPLE:
        if values[name] % values[other]:
            raise UserError(
                f"{name}={values[name]} is not allowed; "
                f"allowed: multiples of {other}={values[other]}"
            )
