"""Forms that the files of a run must have so that a report can be made of them.

Runs of older versions and of plug-ins have other fields, too; what no report reads is
not looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmoe_jax.measures import LAYERS, MEASURES, OF_STRATA, OUTCOMES
from fedmoe_jax.options import UserError, is_number, is_whole, show
from fedmoe_jax.report.rows import Row


class Form(NamedTuple):
    """What a field must hold.

    Attributes:
      fits: whether a value does.
      about: the values in words.
      needed: whether it may not be missing.
    """

    fits: Callable[[Any], bool]
    about: str
    needed: bool = True


def list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of such elements."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def is_text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


TEXT, NUMBER = Form(is_text, "text"), Form(is_number, "a number")
COUNT = Form(lambda value: is_whole(value) and value >= 0, "a whole number from 0")
SWITCH = Form(lambda value: isinstance(value, bool), "true or false")
TEXTS = Form(list_of(is_text), "a list of text")
NUMBERS = Form(list_of(is_number), "a list of numbers")
OBJECT = Form(lambda value: isinstance(value, dict), "an object")

CONFIG = {
    "strategy": TEXT._replace(about="that of a run"),
    **dict.fromkeys(("data.name", "partition.kind"), TEXT),
    **dict.fromkeys(("num_clients", "cohort_size", "num_experts"), COUNT),
    "devices.tiers": TEXTS,
    "devices.deadline": NUMBER,
    "devices.buffer": NUMBER,
    "weights.usage": NUMBER,
    "fitness.rate": NUMBER,
    "fitness.exploration": NUMBER,
    "data.public": COUNT._replace(needed=False),
    "evaluation.targets": NUMBERS._replace(needed=False),
}
PLUGINS = {"plugins": TEXTS._replace(needed=False)}
COMPARISON = {
    "compare.strategies": TEXTS,
    "compare.changes": TEXTS,
    "compare.seeds": Form(list_of(is_whole), "a list of whole numbers"),
}
SUMMARY = {
    "num_rounds": COUNT,
    **dict.fromkeys(("note", "needs"), TEXT._replace(needed=False)),
    "reference": SWITCH._replace(needed=False),
    **dict.fromkeys(("idle", "reads"), TEXTS._replace(needed=False)),
    **dict.fromkeys(
        ("made_by", "overwrites", "privacy"), OBJECT._replace(needed=False)
    ),
    **dict.fromkeys(
        ("wall_seconds", "owners_per_example", "bytes_per_token", "limit_bits"),
        NUMBER._replace(needed=False),
    ),
}
FLOAT, INTEGER, NAMES = "f", "iu", "U"  # kinds of dtypes
# Axes by the letters of `types`, with D for clients that have a device of their own; a
# model with one layer lacks G. Then the dtype, and whether a report needs the array.
ARRAYS = {
    "label_counts": ("NL", INTEGER, True),
    "label_names": ("L", NAMES, True),
    "capacity": ("D", INTEGER, True),
    "tier": ("D", INTEGER, True),
    "specialisation": ("GEL", FLOAT, True),
    "times_held": ("DGE", INTEGER, True),
    "fitness": ("DGE", FLOAT, True),
    "belief": ("D", INTEGER, False),
    "participation": ("D", INTEGER, False),
    "client_accuracy": ("N", FLOAT, False),
    "client_bits": ("N", FLOAT, False),
    "group_names": ("Q", NAMES, False),
    "last_client": ("C", INTEGER, False),
    "last_code": ("C", INTEGER, False),
    "last_phases": ("C3", FLOAT, False),
    "last_spent": ("C3", FLOAT, False),
}
EXPERTS = ("expert_load", "expert_accuracy")  # fields of rows with an E axis
LISTS = {*OF_STRATA, *LAYERS.values()}  # fields of rows with one axis
# Fields of rows that are one number.
SINGLE = {
    *(name for m in MEASURES.values() for name in (*m.fields, *m.per)),
    *(f"{name}_clients" for name in OUTCOMES),
    *("seconds", "fitness_change", "assignment_change", "late_clients"),
    *("simulated_seconds", "simulated_median_seconds"),
}
MAKE_AGAIN = (
    "restore it, or remove it and give the run's command again, which makes it again"
)


def check_fields(
    tree: Mapping[str, Any], forms: Mapping[str, Form], path: Path
) -> None:
    """Checks an object that was read from JSON.

    Args:
      tree: the object.
      forms: by the dotted names of fields.
      path: of the file, for messages.

    Raises:
      UserError: a field is missing or holds something else.
    """
    for name, form in forms.items():
        group, _, leaf = name.rpartition(".")
        holder = tree.get(group, {}) if group else tree
        if not isinstance(holder, Mapping):
            raise UserError(
                f"{path} is damaged: {group}={show(holder)}; allowed: an object"
            )
        if leaf not in holder and form.needed:
            raise UserError(f"{path} has no {name}; allowed: {form.about}")
        if leaf in holder and not form.fits(holder[leaf]):
            raise UserError(
                f"{path} is damaged: {name}={show(holder[leaf])}; allowed: {form.about}"
            )


def check_rows(rows: Sequence[Row], path: Path) -> None:
    """Checks that every field of the rows is a number or an array of one shape.

    Args:
      rows: one per round.
      path: of the file, for messages.

    Raises:
      UserError: one is not.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        for name, value in row.items():
            if value is None:
                continue
            shape = find_shape(value)
            first = shapes.setdefault(name, shape or ())
            if shape != first or not fits_rank(name, len(first)):
                raise UserError(
                    f"{path} is damaged: {name}={show(value)} of round {row['round']}; "
                    "allowed: what the run has written, restored"
                )


def fits_rank(name: str, rank: int) -> bool:
    """Whether a report can use a field of the rows with so many axes."""
    if name in EXPERTS:
        return rank in (1, 2)
    if name in LISTS:
        return rank == 1
    return rank == 0 or name not in SINGLE


def find_shape(value: Any) -> tuple[int, ...] | None:
    """The shape of nested lists of numbers, () of one; None where they have none."""
    if value is None or isinstance(value, int | float):
        return ()
    if not isinstance(value, list):
        return None
    inner = {find_shape(item) for item in value} or {()}
    shape = inner.pop()
    return None if shape is None or inner else (len(value), *shape)


def check_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Checks the arrays of a finished run.

    Args:
      arrays: by name.
      path: of the file, for messages.

    Raises:
      UserError: one is missing, or has another dtype or shape than fits the others.
    """
    sizes = {"3": 3}
    for name, (axes, kinds, needed) in ARRAYS.items():
        if name not in arrays and not needed:
            continue
        if name not in arrays:
            raise UserError(f"{path} has no {name}; {MAKE_AGAIN}")
        value = arrays[name]
        axes = axes.replace("G", "") if value.ndim < len(axes) else axes
        found = dict(zip(axes, value.shape, strict=False))
        known = {letter: sizes.setdefault(letter, n) for letter, n in found.items()}
        if value.dtype.kind not in kinds or value.ndim != len(axes) or known != found:
            raise UserError(
                f"{path} is damaged: {name} is {value.dtype}{list(value.shape)}; "
                f"{MAKE_AGAIN}"
            )
    groups, strata = sizes.get("Q", 1), sizes["L"]
    if groups < 1 or strata % groups:
        raise UserError(
            f"{path} is damaged: {strata} strata of {groups} groups; {MAKE_AGAIN}"
        )


def check_codes(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path
) -> None:
    """Checks that tiers and outcomes are numbers of names that there are.

    Args:
      arrays: from a checked `final.npz`.
      config: of the run, checked.
      path: of the file, for messages.

    Raises:
      UserError: one is not.
    """
    tiers = arrays.get("tier_names", np.array(config["devices"]["tiers"], "U"))
    whole = tiers.ndim == 1 and tiers.dtype.kind == "U"
    named = {"tier": tiers.size if whole else 0, "last_code": len(OUTCOMES)}
    for name, count in named.items():
        codes = arrays.get(name, np.zeros(0, int))
        if codes.dtype.kind not in "iu" or not np.isin(codes, range(count)).all():
            raise UserError(
                f"{path} is damaged: {name} has others than 0 to {count - 1}; "
                f"{MAKE_AGAIN}"
            )
