"""Config options, measures and user errors, for flags, runs and reports; no JAX."""

import collections
import functools
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np


class UserError(Exception):
    """A mistake in the config, flags, data or checkpoint that a user can mend.

    The message is one line that names the field, its value and what is allowed;
    `launch.py` prints it and exits with code 2.
    """


LONGEST = 500  # characters of a value in a message
INT32 = 2**31 - 1  # the largest whole number that a run keeps


def show(value: Any) -> str:
    """A value on one line of bearable length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is a real number, likewise; not necessarily finite."""
    return isinstance(value, Real) and not isinstance(value, bool)


def fits_kind(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a field's default.

    The kinds are bool, int32, finite float32 (whole numbers are such, too), str, and
    tuples of elements of the kind of the default's first.
    """
    if is_whole(default):
        return is_whole(value) and -INT32 - 1 <= value <= INT32
    if is_number(default):
        return value in Range(-math.inf)
    if isinstance(default, tuple) and isinstance(value, tuple) and default:
        return all(fits_kind(element, default[0]) for element in value)
    return isinstance(value, type(default))


def describe_kind(default: Any) -> str:
    """The values of the kind of a field's default in words, see `fits_kind`."""
    if isinstance(default, bool):
        return "True, False"
    if is_whole(default):
        return "whole numbers"
    if is_number(default):
        return "numbers"
    if isinstance(default, tuple):
        return f"tuples such as {default!r}" if default else "tuples"
    return "text"


class Range(NamedTuple):
    """Numbers from `low` to `high`; `open_low` and `open_high` leave an end out.

    A number must lie there as a float32, too, which is what a run reads.
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        if not is_number(value):
            return False
        try:
            with np.errstate(over="ignore", under="ignore"):
                kept, low, high = map(np.float32, (value, self.low, self.high))
        except OverflowError:  # a whole number beyond float64
            return False
        lies = self._is_between(value, self.low, self.high)
        return lies and self._is_between(kept, low, high) and bool(np.isfinite(kept))

    def _is_between(self, value: Any, low: Any, high: Any) -> bool:
        above = value > low if self.open_low else value >= low
        below = value < high if self.open_high else value <= high
        return bool(above and below)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '>='} {self.low:.10g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:.10g}, {self.high:.10g}{right}"


COUNT = Range(1)
SHARE = Range(0, 1)
NON_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)

Allowed = Range | Mapping[str, Any] | tuple[str, ...] | Callable[[], tuple[str, ...]]

HOST, STATIC, TRACED = "host", "static", "traced"  # scopes of an option


class Option(NamedTuple):
    """One field of a config.

    Attributes:
      name: dotted, as in `--config.fitness.rate`.
      allowed: a range, names, a table of names, or a function that lists names; None
        where another function checks the value.
      about: its meaning and unit, for `--help` and docs/config.md.
      scope: `HOST`, read while a run is planned; `STATIC`, shapes the compiled program;
        `TRACED`, a number that enters the program as an argument, so that runs with
        different values share one program.
      default: of records from outside the package; the package's own defaults are in
        `configs.default` alone.
    """

    name: str
    allowed: Allowed | None
    about: str
    scope: str = HOST
    default: Any = None


@functools.cache
def _record_type(name: str, fields: tuple[str, ...]) -> type:
    # Cached, as pytrees of equal fields must be of one type to have one structure.
    return collections.namedtuple(name, fields)


def group(values: Mapping[str, Any], name: str) -> Any:
    """Dotted fields as nested named tuples: `{"client.prox": 0}` to `.client.prox`.

    Equal fields always give equal types, so that the results are pytrees of one
    structure, and hashable where the values are.
    """
    tree: dict[str, Any] = {}
    for field, value in values.items():
        head, _, leaf = field.partition(".")
        if leaf:
            tree.setdefault(head, {})[leaf] = value
        else:
            tree[head] = value
    return _nest(name, tree)


def _nest(name: str, tree: dict[str, Any]) -> Any:
    fields = sorted(tree)
    values = (
        _nest(f, tree[f]) if isinstance(tree[f], dict) else tree[f] for f in fields
    )
    return _record_type(name, tuple(fields))(*values)


def replace(record: Any, **changes: Any) -> Any:
    """A nested record with some groups' fields changed: `client={"prox": 1}`."""
    groups = {
        name: getattr(record, name)._replace(**change)
        if isinstance(change, dict)
        else change
        for name, change in changes.items()
    }
    return record._replace(**groups)


class Curve(NamedTuple):
    """The curve of a measure over rounds.

    Attributes:
      label: of the axis, name and unit.
      caption: what it shows, and what to look for.
      chance: whether the accuracy of guessing is drawn with it.
      costs: whether a comparison also draws it against time and traffic.
      limit: whether the bits below which no model comes are drawn with it, if known.
    """

    label: str
    caption: str
    chance: bool = False
    costs: bool = False
    limit: bool = False


FINAL, MEAN, TOTAL, MAX, LAST = "final", "mean", "total", "max", "last"
EXPERTS, DEVICES = "experts", "devices"
LEARNING, COST = "learning", "cost"
ROUNDS, LABELS = "rounds", "labels"


class Measure(NamedTuple):
    """One number of a run, from the field of its rows to its column and its curve.

    Its key, in `measures.MEASURES`, is its name in `summary.json` and `runs.csv`. Rows
    in which the field is absent, null or no single number do not count.

    Attributes:
      field: of a row of `metrics.jsonl`.
      over: how the rows of a run become its number. `FINAL`, the mean over the
        evaluations of the last ten rounds, of the last quarter in shorter runs;
        `MEAN`, `TOTAL`, `MAX` over rounds; `LAST`, of the last row; empty: no number,
        or one that `report.runs.numbers` makes of others.
      title: of its column; empty: no column.
      about: its definition, below the table.
      better: +1 where more is better, -1 where less is, 0 where neither.
      plus: further fields, which are added to it.
      per: fields by whose total the number is divided; no number where that is 0.
      unit: by which the field is divided, 1e6 for MB of bytes.
      scale: by which column and curve multiply the number, 100 for percent.
      digits: of the column, after the point.
      of: `EXPERTS`, without meaning in a model with one expert; `DEVICES`, in a run
        that simulates no device.
      group: the table of the column, `LEARNING` or `COST`.
      trivial: a number; no column where every run has this number or none.
      varies_over: `LABELS`, no column where all labels agree; `ROUNDS`, neither column
        nor curve where no run changes from round to round.
      zero_wins: whether 0 can be the best number of a column.
      evaluated: whether an evaluation measures it, instead of every round.
      running: whether every row gets the sum so far, as `total_` and the field.
      budget: name of the table in `summary.json` that says how much of it was spent by
        the round that reaches each target; empty: none.
      printed: whether its column is shown in the terminal.
      line: its name in the picture that the accuracies of one strategy share; empty:
        it is drawn apart.
      curve: None: not drawn over rounds in a picture of its own.
    """

    field: str
    over: str = ""
    title: str = ""
    about: str = ""
    better: int = 0
    plus: tuple[str, ...] = ()
    per: tuple[str, ...] = ()
    unit: float = 1.0
    scale: float = 1.0
    digits: int = 1
    of: str = ""
    group: str = LEARNING
    trivial: float | None = None
    varies_over: str = ""
    zero_wins: bool = True
    evaluated: bool = False
    running: bool = False
    budget: str = ""
    printed: bool = False
    line: str = ""
    curve: Curve | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of a row that are added up."""
        return self.field, *self.plus
