"""Is this config allowed? Every field is checked before anything runs.

    python -m fedmoe_jax.config > docs/config.md

writes the page of all fields.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fedmoe_jax.configs import default
from fedmoe_jax.data.groups import MOST, NONE
from fedmoe_jax.fields import AT_MOST, FREE_FIELDS, LISTS, MULTIPLE, OPTIONS
from fedmoe_jax.options import (
    HOST,
    INT32,
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
from fedmoe_jax.privacy.defences import check_privacy, is_private
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import STRATEGIES, find_strategy
from fedmoe_jax.tables import find_tables, list_defaults, list_plugins


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
    group, _, leaf = name.rpartition(".")
    if group == "compare" and leaf in LISTS:
        return LISTS[leaf][1]
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
    """The fields of strategies, processes, groups and privacy that a config lacks.

    Args:
      config: of a run, or of a comparison, which uses the fields of all its strategies.

    Returns:
      Fields of other strategies alone, and of processes, groups and privacy, that are
      off.
    """
    tables, compared = find_tables(), "compare" in config
    names = config.compare.strategies if compared else [config.strategy]
    strategies, processes = tables["STRATEGIES"], tables["PROCESSES"].values()
    named = lambda record: {option.name for option in record.options}
    join = lambda fields: set().union(*fields)
    used = join(named(strategies[name]) for name in names if name in strategies)
    idle = join(map(named, strategies.values())) - used
    on = (named(p) if p.is_on(config) else set(p.always) for p in processes)
    off = join(map(named, processes)) - join(on)
    of_group = lambda name: {o.name for o in OPTIONS if o.name.startswith(f"{name}.")}
    if config.groups.kind == NONE:
        off |= of_group("groups")
    if not config.privacy.observe and not is_private(config):
        off |= of_group("privacy")
    return idle, off


def fill_defaults(saved: dict[str, Any]) -> ConfigDict:
    """A recorded config with today's default in every field that it lacks.

    Raises:
      UserError: it has a name that no config can have.
    """
    defaults = default.get_config().to_dict()
    if "compare" in saved:
        del defaults["strategy"], defaults["seed"]  # its members have them
    try:
        return ConfigDict(_merge(defaults, to_tuples(saved)))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"config.json is damaged ({str(error).splitlines()[0]}); allowed: what the "
            "run has written, restored"
        ) from None


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

    Those of `FREE_FIELDS`, of strategies that one of both lacks, and of processes and
    groups that are off in both.

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


def check_baseline(label: str) -> None:
    """Raises UserError unless the label is empty or begins with a strategy's name."""
    if label and label.split(" ")[0] not in STRATEGIES:
        raise UserError(
            f"evaluation.baseline={show(label)} is not allowed; allowed: '', or the "
            f"name of a row, which begins with one of {', '.join(STRATEGIES)}"
        )


def check_overlap(values: dict[str, Any]) -> None:
    """Raises UserError where clients would be tested on what others train on."""
    if not values["partition.overlap"]:
        return
    for name in ("test_share", "validation_share", "unseen"):
        field = f"partition.{name}"
        if values[field]:
            raise UserError(
                f"{field}={show(values[field])} is not allowed with partition.overlap="
                f"{values['partition.overlap']}, as other clients may own these "
                "examples; allowed: 0"
            )


def check_base(values: dict[str, Any]) -> None:
    """Raises UserError for a pretrained base that the model would not read."""
    kind, base = values["model.kind"], values["model.base"]
    if base and kind not in ("lora", "finetune"):
        raise UserError(
            f"model.base={show(base)} is not allowed with model.kind={kind!r}; "
            "allowed: '', or model.kind='lora' or 'finetune'"
        )


def check_profile(values: dict[str, Any]) -> None:
    """Raises UserError for links of a profile that an estimating server has not."""
    if values["profile.kind"] == "estimated" and values["profile.links"] != "round":
        raise UserError(
            f"profile.links={show(values['profile.links'])} is not allowed with "
            "profile.kind='estimated', which learns of links from times; allowed: round"
        )


def check_latency(values: dict[str, Any]) -> None:
    """Raises UserError for a loss by the time of links that are not there."""
    if values["loss.latency"] > 0 and values["expert_links.kind"] == "none":
        raise UserError(
            f"loss.latency={values['loss.latency']:g} is not allowed with expert_links."
            "kind='none', where no expert is behind a link; allowed: 0"
        )


def check_groups(values: dict[str, Any]) -> None:
    """Raises UserError for groups of clients that would not differ, or be empty."""
    kind, count = values["groups.kind"], values["groups.count"]
    if kind == NONE:
        return
    most = MOST.get(kind, count)
    if count > most:
        raise UserError(
            f"groups.count={count} is not allowed with groups.kind={kind!r}; allowed: "
            + ("2" if most == 2 else f"2 to {most}")
        )
    if count > values["num_clients"]:
        raise UserError(
            f"groups.count={count} is not allowed with num_clients="
            f"{values['num_clients']}; allowed: at most one group for each client"
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


def check_schedules(values: dict[str, Any]) -> None:
    """Raises UserError for a rate whose warm-up does not end before its cosine."""
    for side in ("client", "server"):
        end, warm_up = values[f"{side}.cosine_rounds"], values[f"{side}.warm_up"]
        if 0 < end <= warm_up:
            raise UserError(
                f"{side}.cosine_rounds={end} is not allowed; allowed: 0, or more than "
                f"{side}.warm_up={warm_up}"
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
    check_overlap(values)
    check_groups(values)
    check_base(values)
    check_profile(values)
    check_latency(values)
    check_drift(values)
    check_schedules(values)
    check_privacy(values)
    check_targets(values["evaluation.targets"])
    check_baseline(values["evaluation.baseline"])
    check_multiples(values)


def check_multiples(values: dict[str, Any]) -> None:
    """Raises UserError unless rounds, evaluations, checkpoints and chunks fit together.

    Its message has values that do: divisors of those that are asked for.
    """
    every, chunk = (
        math.gcd(*(values[name] for name in names))
        for names in (
            ("num_rounds", "eval_every"),
            ("num_rounds", "eval_every", "checkpoint.every", "chunk_rounds"),
        )
    )
    fitting = {"eval_every": every, "chunk_rounds": chunk}
    changed = [f"{name}={v}" for name, v in fitting.items() if values[name] != v]
    for name, other in MULTIPLE:
        if values[name] % values[other]:
            raise UserError(
                f"{name}={values[name]} is not allowed; allowed: multiples of "
                f"{other}={values[other]}, or all with {' and '.join(changed)}"
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
