"""What a config may say: every field's allowed values, checked before anything runs."""

from typing import Any

from ml_collections import ConfigDict

from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.data.partition import KINDS
from fedmoe_jax.models.image_moe import EXPERTS, STEMS
from fedmoe_jax.options import COUNT, NON_NEGATIVE, POSITIVE, SHARE, Range, UserError
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import STRATEGIES, find_strategy
from fedmoe_jax.world.channel import NEAREST
from fedmoe_jax.world.devices import WIDEST
from fedmoe_jax.world.drift import DISTORTIONS

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

ALLOWED: dict[str, Range | tuple[str, ...]] = {
    "seed": Range(0, 2**31 - 1),
    "num_rounds": COUNT,
    "eval_every": COUNT,
    "chunk_rounds": COUNT,
    "num_clients": COUNT,
    "cohort_size": COUNT,
    "num_experts": COUNT,
    "max_held": COUNT,
    "num_active": COUNT,
    "local_steps": COUNT,
    "local_epochs": NON_NEGATIVE,
    "batch_size": COUNT,
    "data.public": NON_NEGATIVE,
    "data.name": tuple(DATASETS),
    "partition.kind": tuple(KINDS),
    "partition.alpha": POSITIVE,
    "partition.classes_per_client": COUNT,
    "partition.min_size": COUNT,
    "model.stem": tuple(STEMS),
    "model.stem_width": COUNT,
    "model.expert": tuple(EXPERTS),
    "model.expert_width": COUNT,
    "model.feature_width": COUNT,
    "model.stem_dropout": Range(0, 1, open_high=True),
    "model.expert_dropout": Range(0, 1, open_high=True),
    "gate.mode": ("global", "holder_rows", "personal"),
    "loss.calibration": NON_NEGATIVE,
    "loss.load": NON_NEGATIVE,
    "loss.z": NON_NEGATIVE,
    "client.optimizer": ("sgd", "adam"),
    "client.learning_rate": POSITIVE,
    "client.momentum": Range(0, 1, open_high=True),
    "client.prox": NON_NEGATIVE,
    "server.optimizer": ("sgd", "momentum", "adam", "yogi", "adagrad"),
    "server.learning_rate": POSITIVE,
    "merge.weight": ("examples", "routed"),
    "fitness.feedback": ("accuracy", "loss", "mixed"),
    "fitness.rate": Range(0, 1, open_low=True),
    "fitness.idle": ("keep", "decay", "prior"),
    "fitness.idle_decay": SHARE,
    "fitness.prior": SHARE,
    "fitness.noise": SHARE,
    "fitness.exploration": SHARE,
    "fitness.loss_scale": NON_NEGATIVE,
    "fitness.frequency_share": SHARE,
    "usage.decay": SHARE,
    "weights.fitness": NON_NEGATIVE,
    "weights.usage": NON_NEGATIVE,
    "devices.spread": Range(0, WIDEST),
    "devices.free_memory": Range(0, 1, open_low=True),
    "devices.overload": ("ignore", "lose"),
    "late.kind": ("wait", "drop", "stale"),
    "late.discount": SHARE,
    "profile.kind": ("oracle", "self_reported", "estimated"),
    "profile.refresh": COUNT,
    "profile.deviation": Range(0, 1, open_high=True),
    "profile.fixed": SHARE,
    "profile.rate": Range(0, 1, open_low=True),
    "profile.exploration": SHARE,
    "profile.caution": Range(1),
    "pressure.share": SHARE,
    "pressure.persistence": SHARE,
    "pressure.left": Range(0, 1, open_low=True),
    "background.most": Range(0, 1, open_high=True),
    "background.persistence": SHARE,
    "bandwidth.spread": Range(0, 5),
    "bandwidth.persistence": SHARE,
    "availability.share": SHARE,
    "availability.persistence": SHARE,
    "availability.swing": SHARE,
    "availability.day": COUNT,
    "availability.sampling": ("uniform", "size", "reachable"),
    "availability.dropout": SHARE,
    "availability.early": SHARE,
    "channel.kind": ("wired", "wireless"),
    "channel.radius": Range(NEAREST, 100, open_low=True),
    "channel.shadowing": Range(0, 50),
    "channel.persistence": SHARE,
    "channel.csi": SHARE,
    "channel.backoff": Range(0, 1, open_low=True),
    "channel.min_snr": Range(-100, 100),
    "channel.bandwidth": POSITIVE,
    "channel.power_up": Range(-100, 100),
    "channel.power_down": Range(-100, 100),
    "drift.labels": SHARE,
    "drift.images": ("none", *DISTORTIONS),
    "drift.strength": NON_NEGATIVE,
    "drift.share": SHARE,
    "drift.start": NON_NEGATIVE,
    "drift.rounds": COUNT,
    "reaction.kind": ("none", "reset", "hasten"),
    "reaction.slack": NON_NEGATIVE,
    "reaction.threshold": POSITIVE,
    "reaction.haste": Range(1),
    "reaction.rounds": NON_NEGATIVE,
    "reaction.evidence": COUNT,
    "devices.model_scale": POSITIVE,
    "devices.deadline": POSITIVE,
    "devices.communication_share": Range(0, 1, open_low=True, open_high=True),
    "devices.buffer": Range(0, 1, open_high=True),
    "evaluation.dense_experts": COUNT,
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "run.client_chunk": COUNT,
    "run.num_devices": NON_NEGATIVE,
    "run.memory_limit_gb": POSITIVE,
}

# Checked where they are used: by `find_strategy`, TFDS, `read_devices`,
# `draw_devices`, and nowhere (true or false).
UNCHECKED = {
    "strategy",
    "data.dir",
    "devices.csv",
    "devices.tiers",
    "devices.shares",
    "run.tensorboard",
}

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


def list_allowed() -> dict[str, Range | tuple[str, ...]]:
    """Every checked field: the shared ones and the options of all strategies."""
    options = [field for strategy in STRATEGIES.values() for field in strategy.allowed]
    return dict(options) | ALLOWED


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
    values = flatten(config.to_dict())
    allowed_in = list_allowed()
    known = UNCHECKED | set(allowed_in)
    for name in sorted(known ^ set(values)):
        what = "is missing" if name in known else "is unknown"
        raise UserError(
            f"config field {name!r} {what}; allowed: those of default.py of which "
            "config.ALLOWED or a Strategy.allowed says what is allowed in them"
        )
    for name, allowed in allowed_in.items():
        check(name, values[name], allowed)
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
