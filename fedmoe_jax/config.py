"""Every field of a config: its meaning, and its values, checked before anything runs.

    python -m fedmoe_jax.config > docs/config.md

writes the page of all fields.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fedmoe_jax.configs import default
from fedmoe_jax.data.load import DATASETS
from fedmoe_jax.data.partition import KINDS
from fedmoe_jax.models import MODELS
from fedmoe_jax.models.image_parts import EXPERTS, STEMS
from fedmoe_jax.options import (
    COUNT,
    HOST,
    INT32,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    STATIC,
    TRACED,
    Allowed,
    Option,
    Range,
    UserError,
    describe_kind,
    fits_kind,
    is_number,
    is_whole,
    show,
)
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.tables import find_tables, list_defaults, list_plugins
from fedmoe_jax.world.devices import WIDEST

# Fields that may change between the calls that run and resume one simulation. A
# comparison's lists may, as its runs are checked one by one.
FREE_FIELDS = frozenset(
    {
        "num_rounds",
        "data.dir",
        "evaluation.targets",
        "checkpoint.every",
        "checkpoint.keep",
        "run.memory_limit_gb",
        "run.tensorboard",
        "compare.strategies",
        "compare.changes",
        "compare.seeds",
    }
)

OPTIONS: tuple[Option, ...] = (
    Option(
        "seed",
        Range(0, 2**31 - 1),
        "seed of the split, the devices, the initial weights and every draw",
    ),
    Option(
        "num_rounds",
        COUNT,
        "federated rounds, a multiple of eval_every; may grow when a run is resumed",
    ),
    Option(
        "eval_every",
        COUNT,
        "rounds from one evaluation to the next, a multiple of chunk_rounds",
    ),
    Option("chunk_rounds", COUNT, "rounds in one compiled call", STATIC),
    Option("num_clients", COUNT, "clients in the population"),
    Option("cohort_size", COUNT, "clients of a round, at most num_clients"),
    Option("num_experts", COUNT, "experts of the server's model"),
    Option(
        "max_held", COUNT, "expert slots of the largest client, at most num_experts"
    ),
    Option(
        "num_active",
        COUNT,
        "experts that the gate mixes for an example, at most max_held",
    ),
    Option("local_steps", COUNT, "optimiser steps of a client in a round"),
    Option(
        "local_epochs",
        NON_NEGATIVE,
        "passes over the client's data in a round; 0: local_steps instead",
    ),
    Option("batch_size", COUNT, "examples of a local step"),
    Option(
        "strategy",
        None,
        "name of the strategy, which decides which client trains which experts; see "
        "docs/strategies.md",
    ),
    Option(
        "plugins",
        None,
        "modules whose records have joined the tables; set by --plugins",
    ),
    Option(
        "data.name",
        DATASETS,
        "data set: scikit-learn's digits, a synthetic task whose best "
        "assignment is known, or CIFAR-10 from TFDS",
    ),
    Option(
        "data.public",
        NON_NEGATIVE,
        "training examples that the server sets aside, drawn at random",
    ),
    Option(
        "data.dir",
        None,
        "TFDS folder; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets",
    ),
    Option(
        "partition.kind",
        tuple(KINDS),
        "division of the examples: Dirichlet over labels, shards of sorted "
        "labels, skewed sizes, equal shares at random, or the data set's own clients",
    ),
    Option(
        "partition.alpha",
        POSITIVE,
        "concentration of dirichlet (labels) and quantity (sizes); small is skewed",
    ),
    Option("partition.classes_per_client", COUNT, "shards of each client, of shards"),
    Option("partition.min_size", COUNT, "examples that every client gets at least"),
    Option("model.kind", MODELS, "builder of the model"),
    Option(
        "model.stem",
        tuple(STEMS),
        "stem: none, one hidden layer, two convolutions at half or at full "
        "resolution, or ResNet-8",
    ),
    Option("model.stem_width", COUNT, "hidden units or channels of the stem"),
    Option(
        "model.expert",
        tuple(EXPERTS),
        "expert: one layer, one hidden layer, or a convolution and a layer",
    ),
    Option("model.expert_width", COUNT, "hidden units or channels of an expert"),
    Option(
        "model.feature_width",
        COUNT,
        "outputs of an expert; a dense one has expert_width",
    ),
    Option(
        "model.stem_dropout",
        Range(0, 1, open_high=True),
        "share of the stem's outputs that training drops",
    ),
    Option(
        "model.expert_dropout",
        Range(0, 1, open_high=True),
        "share of each expert's outputs that training drops",
    ),
    Option(
        "gate.mode",
        ("global", "holder_rows", "personal"),
        "gate rows: averaged over all clients, over the expert's holders "
        "alone, or kept by each client",
    ),
    Option(
        "loss.calibration",
        NON_NEGATIVE,
        "weight of -log(gate mass on held experts) in the local loss",
        TRACED,
    ),
    Option(
        "loss.load", NON_NEGATIVE, "weight of the Switch load-balancing loss", TRACED
    ),
    Option("loss.z", NON_NEGATIVE, "weight of the router z-loss", TRACED),
    Option("client.optimizer", ("sgd", "adam"), "optimiser of the local steps", STATIC),
    Option("client.learning_rate", POSITIVE, "step size of the local steps", TRACED),
    Option("client.momentum", Range(0, 1, open_high=True), "momentum of sgd", STATIC),
    Option("client.prox", NON_NEGATIVE, "mu of the FedProx term; 0: none", TRACED),
    Option(
        "server.optimizer",
        ("sgd", "momentum", "adam", "yogi", "adagrad"),
        "optimiser that takes the mean update as a gradient",
        STATIC,
    ),
    Option(
        "server.learning_rate",
        POSITIVE,
        "step size of the server; 1 with sgd is plain averaging",
        TRACED,
    ),
    Option(
        "merge.weight",
        ("examples", "routed"),
        "weight of an update in an expert's mean: examples that its client "
        "owns, or those routed through the expert",
    ),
    Option(
        "fitness.feedback",
        ("accuracy", "loss", "mixed"),
        "feedback of a client about an expert: gate-weighted training "
        "accuracy, exp(-loss_scale * loss), or accuracy mixed with frequency",
        STATIC,
    ),
    Option(
        "fitness.rate",
        Range(0, 1, open_low=True),
        "weight of the newest feedback in the moving average",
        TRACED,
    ),
    Option(
        "fitness.idle",
        ("keep", "decay", "prior"),
        "score of a pair without feedback in a round: it stays, decays to 0, "
        "or decays to the prior",
        STATIC,
    ),
    Option(
        "fitness.idle_decay",
        SHARE,
        "share of its distance to 0 or the prior that such a score keeps",
        TRACED,
    ),
    Option("fitness.prior", SHARE, "score before any feedback", TRACED),
    Option(
        "fitness.noise",
        SHARE,
        "half the width of the initial scores' noise; 0: experts are drawn at first",
        TRACED,
    ),
    Option(
        "fitness.exploration",
        SHARE,
        "chance that a client's scores are random in a round",
        TRACED,
    ),
    Option(
        "fitness.loss_scale",
        NON_NEGATIVE,
        "alpha of exp(-alpha * loss), of loss",
        TRACED,
    ),
    Option(
        "fitness.frequency_share",
        SHARE,
        "share of the gate frequency in the feedback, of mixed",
        TRACED,
    ),
    Option("usage.decay", SHARE, "share of the usage that a round keeps", TRACED),
    Option(
        "weights.fitness",
        NON_NEGATIVE,
        "weight of the normalised fitness in the desirability",
        TRACED,
    ),
    Option(
        "weights.usage",
        NON_NEGATIVE,
        "weight of the normalised usage, which is subtracted",
        TRACED,
    ),
    Option(
        "devices.csv",
        None,
        "file of your own devices, instead of tiers; see docs/world.md",
    ),
    Option(
        "devices.tiers", None, "kinds of device, names of presets in world/devices.py"
    ),
    Option(
        "devices.shares", None, "share of each kind in the population; they sum to 1"
    ),
    Option(
        "devices.spread",
        Range(0, WIDEST),
        "standard deviation of the log of each capability within a kind",
    ),
    Option(
        "devices.free_memory",
        Range(0, 1, open_low=True),
        "share of the memory that training gets",
    ),
    Option(
        "devices.model_scale",
        POSITIVE,
        "bytes and FLOPs of the model that one simulated byte or FLOP stands for",
    ),
    Option(
        "devices.deadline",
        POSITIVE,
        "seconds of a round after which an update is late",
        STATIC,
    ),
    Option(
        "devices.communication_share",
        Range(0, 1, open_low=True, open_high=True),
        "share of the deadline for the links",
        STATIC,
    ),
    Option(
        "devices.buffer",
        Range(0, 1, open_high=True),
        "share of every resource that the server keeps in reserve",
        TRACED,
    ),
    Option(
        "devices.overload",
        ("ignore", "lose"),
        "update of a client that holds more than its memory: it counts all "
        "the same, or is lost",
        STATIC,
    ),
    Option(
        "profile.kind",
        ("oracle", "self_reported", "estimated"),
        "capacity that the server believes: the truth, reports with errors, "
        "or estimates from times and failures",
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
        "profile.fixed",
        SHARE,
        "share of the error that is each client's constant bias",
        TRACED,
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
        "chance that a client is given one expert more in a round, of estimated",
        TRACED,
    ),
    Option(
        "profile.caution",
        Range(1),
        "experts by which a failure lowers the estimate",
        TRACED,
    ),
    Option(
        "reaction.kind",
        ("none", "reset", "hasten"),
        "reaction when a client's feedback falls short of its fitness: its "
        "scores are reset, or learn faster",
        STATIC,
    ),
    Option(
        "reaction.slack", NON_NEGATIVE, "shortfall of fitness that is tolerated", TRACED
    ),
    Option(
        "reaction.threshold",
        POSITIVE,
        "accumulated shortfall that raises an alarm",
        TRACED,
    ),
    Option(
        "reaction.haste",
        Range(1),
        "rounds of learning in one after an alarm, of hasten",
        TRACED,
    ),
    Option("reaction.rounds", NON_NEGATIVE, "rounds of haste after an alarm", TRACED),
    Option(
        "reaction.evidence",
        COUNT,
        "scores of a pair before its shortfall counts",
        TRACED,
    ),
    Option(
        "evaluation.dense_experts",
        COUNT,
        "largest number of experts of which each one sees every test image; "
        "beyond it only those that some gate chooses",
    ),
    Option(
        "evaluation.clients",
        NON_NEGATIVE,
        "clients whose personal accuracy is evaluated, at most, where parts are "
        "personal or more sets of held experts are possible: a sample drawn from "
        "the seed, of those that have taken part; 0: all",
        STATIC,
    ),
    Option(
        "evaluation.targets",
        None,
        "global accuracies in (0, 1] to which the report counts rounds; none: 50, 80, "
        "90 and 95 % of the best control's final one",
    ),
    Option(
        "checkpoint.every",
        COUNT,
        "rounds from one checkpoint to the next, a multiple of chunk_rounds",
    ),
    Option("checkpoint.keep", COUNT, "newest checkpoints that stay on disk"),
    Option("run.client_chunk", COUNT, "clients vmapped at once on each device", STATIC),
    Option(
        "run.num_devices",
        NON_NEGATIVE,
        "devices of all processes together; 0: all, at most one per client",
    ),
    Option(
        "run.memory_limit_gb",
        POSITIVE,
        "estimated memory beyond which a run is refused, GB",
    ),
    Option("run.tensorboard", None, "whether TensorBoard events are written"),
)

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


def describe(allowed: Allowed) -> str:
    """Allowed values in words, as messages and pages have them."""
    if callable(allowed):
        return describe(allowed())
    return str(allowed) if isinstance(allowed, Range) else ", ".join(allowed)


def check(name: str, value: Any, allowed: Allowed, where: str = "") -> None:
    """Raises UserError unless `value` is allowed in the field `name`."""
    if value not in (allowed() if callable(allowed) else allowed):
        text = describe(allowed)
        raise UserError(f"{name}={show(value)} is not allowed{where}; allowed: {text}")


def describe_values(option: Option, default: Any) -> str:
    """The values that a field takes in words: its kind and its range, or its names."""
    kind = describe_kind(default)
    if option.allowed is None:
        return kind
    text = describe(option.allowed)
    if not is_number(default):
        return text
    endless = isinstance(option.allowed, Range) and option.allowed.high == math.inf
    if is_whole(default) and endless:
        text = f"{text}, at most {INT32}"
    return f"{kind} {text}"


@functools.cache
def list_values(of_plugins: str) -> dict[str, Any]:
    """The default of every field by its dotted name; anew for other plug-ins' ones."""
    del of_plugins  # which `get_config` adds
    return flatten(default.get_config().to_dict())


def describe_field(name: str) -> str:
    """The values of a field in words, or the fields of a group; empty for no field."""
    options, defaults = list_options(), list_values(repr(list_defaults()))
    if name in options:
        return describe_values(options[name], defaults[name])
    return ", ".join(field for field in options if field.startswith(f"{name}."))


def check_kinds(values: dict[str, Any], where: str = "") -> None:
    """Raises UserError unless every field has a value of the kind of its default."""
    defaults = list_values(repr(list_defaults()))
    for name, option in list_options().items():
        if not fits_kind(values[name], defaults[name]):
            raise UserError(
                f"{name}={show(values[name])} is not allowed{where}; allowed: "
                f"{describe_values(option, defaults[name])}"
            )


def list_options() -> dict[str, Option]:
    """Every field of a config by its name: the shared ones and those of all records."""
    records = (record for table in find_tables().values() for record in table.values())
    owned = [option for record in records for option in getattr(record, "options", ())]
    return {option.name: option for option in (*OPTIONS, *owned)}


def list_idle_fields(config: ConfigDict) -> tuple[set[str], set[str]]:
    """The fields of strategies and of processes that a config does not use.

    Args:
      config: of a run, or of a comparison, which uses the fields of all its strategies.

    Returns:
      Fields of other strategies alone, and of processes that are off.
    """
    tables, compared = find_tables(), "compare" in config
    names = config.compare.strategies if compared else [config.strategy]
    strategies, processes = tables["STRATEGIES"], tables["PROCESSES"].values()
    named = lambda record: {option.name for option in record.options}
    join = lambda fields: set().union(*fields)
    used = join(named(strategies[name]) for name in names if name in strategies)
    idle = join(map(named, strategies.values())) - used
    on = (named(p) if p.is_on(config) else set(p.always) for p in processes)
    return idle, join(map(named, processes)) - join(on)


def fill_defaults(saved: dict[str, Any]) -> ConfigDict:
    """A recorded config with today's default in every field that it lacks."""
    defaults = default.get_config().to_dict()
    if "compare" in saved:
        del defaults["strategy"], defaults["seed"]  # its members have them
    return ConfigDict(_merge(defaults, to_tuples(saved)))


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merge(value, over[name])
        for name, value in under.items()
        if isinstance(value, dict) and isinstance(over.get(name), dict)
    }
    return under | over | both


def to_tuples(tree: Any) -> Any:
    """A config as JSON gives it, with tuples for lists."""
    if isinstance(tree, dict):
        return {name: to_tuples(value) for name, value in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def list_free_fields(saved: dict[str, Any], config: ConfigDict) -> frozenset[str]:
    """The fields in which a run or comparison may differ from how it was started.

    Those of `FREE_FIELDS`, of strategies that one of both lacks, and of processes that
    are off in both.

    Args:
      saved: the nested config, as read from `config.json`.
      config: given now.
    """
    strategies, processes = zip(
        *map(list_idle_fields, (fill_defaults(saved), config)), strict=True
    )
    return FREE_FIELDS.union(*strategies).union(set.intersection(*processes))


def check_plugins(plugins: Iterable[str]) -> None:
    """Raises UserError unless the plug-ins of a config are those that have joined."""
    if tuple(plugins) != list_plugins():
        raise UserError(
            f"the run has --plugins={','.join(map(str, plugins)) or None}; here it is "
            f"--plugins={','.join(list_plugins()) or None}; allowed: the same"
        )


def check_targets(targets: tuple[Any, ...]) -> None:
    """Raises UserError unless these are distinct accuracies."""
    listed = all(target in Range(0, 1, open_low=True) for target in targets)
    if not listed or len(set(targets)) < len(targets):
        raise UserError(
            f"evaluation.targets={show(targets)} is not allowed; allowed: a tuple of "
            "numbers in (0, 1], none twice"
        )


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
            f"num_clients={values['num_clients']} or more, which drift to one another"
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


def check_at_most(
    values: dict[str, Any], pairs: Iterable[tuple[str, str]], where: str
) -> None:
    """Raises UserError unless field <= other field for every (field, other)."""
    for name, other in pairs:
        if values[name] > values[other]:
            raise UserError(
                f"{name}={values[name]} is not allowed{where}; "
                f"allowed: 1 to {other}={values[other]}"
            )


def check_values(values: dict[str, Any], where: str = "") -> None:
    """Raises UserError unless every field is allowed by its option, and by the sizes.

    Args:
      values: all fields by dotted name.
      where: for the message, with a leading space.
    """
    check_kinds(values, where)
    for name, option in list_options().items():
        if option.allowed is not None:
            check(name, values[name], option.allowed, where)
    check_at_most(values, AT_MOST, where)


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
    check_values(values)
    check_plugins(values["plugins"])
    strategy = find_strategy(values["strategy"])
    where = f" with strategy={values['strategy']!r}"
    for name, allowed in strategy.allowed:
        check(name, values[name], allowed, where)
    check_at_most(values, strategy.at_most, where)
    check_drift(values)
    check_targets(values["evaluation.targets"])
    for name, other in MULTIPLE:
        if values[name] % values[other]:
            raise UserError(
                f"{name}={values[name]} is not allowed; "
                f"allowed: multiples of {other}={values[other]}"
            )


class Field(NamedTuple):
    """One field of the default config, as pages show it.

    Attributes:
      group: the group of the config that it belongs to, "" for none.
      name: dotted.
      default: its value in `configs.default`.
      allowed: in words; empty where the meaning says it.
      scope: `host`, `static` or `traced`, see `Option.scope`.
      about: its meaning and unit.
    """

    group: str
    name: str
    default: Any
    allowed: str
    scope: str
    about: str


def make_field(option: Option, value: Any) -> Field:
    """The field of an option whose default is `value`."""
    group = option.name.rpartition(".")[0]
    allowed = "True, False" if isinstance(value, bool) else ""
    if option.allowed is not None:
        allowed = describe(option.allowed)
    return Field(group, option.name, value, allowed, option.scope, option.about)


def list_fields() -> list[Field]:
    """Every field of the default config: the groups in the order of the tables."""
    values = flatten(default.get_config().to_dict())
    fields = [make_field(o, values[name]) for name, o in list_options().items()]
    groups = list(dict.fromkeys(field.group for field in fields))
    return sorted(fields, key=lambda field: groups.index(field.group))


HEAD = f"""\
# Config fields

`python -m fedmoe_jax.config > docs/config.md` writes this page from the tables that
check the fields.

Every field is a flag, `--config.FIELD=VALUE`; the defaults are those of
`fedmoe_jax/configs/default.py`. Its scope says what another value costs:

* **{TRACED}**: a number that enters the compiled program as an argument. Runs that
  differ in such fields alone share one program, side by side in a comparison.
* **{STATIC}**: shapes the compiled program. Another value compiles another one.
* **{HOST}**: read while a run is planned, loaded or saved. Sizes and parts of the model
  compile another program; the seed, the split and the devices do not.
"""


def make_page() -> str:
    """`docs/config.md`: a table of fields for every group of the config."""
    lines, last = [HEAD], None
    for field in list_fields():
        if field.group != last:
            title = f"`{field.group}`" if field.group else "The run"
            head = "| field | default | allowed | scope | meaning |"
            lines += ["", f"## {title}", "", head, "|---|---|---|---|---|"]
        row = (f"`{field.name}`", f"`{field.default!r}`", *field[3:])
        lines.append(f"| {' | '.join(row)} |")
        last = field.group
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(make_page(), end="")
