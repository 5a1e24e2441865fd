"""Code, versions and devices that made the runs of a report, and their differences."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedmoe_jax.report.runs import Run
from fedmoe_jax.runtime.files import flatten

COMMIT_LETTERS = 9
UNKNOWN = "unknown"
VARIES = "varies"
UNTIL = " until round "  # of a field that changed within a run


def origin_of(run: Run) -> dict[str, Any]:
    """The flat `made_by` of the process that computed its last rounds, if known."""
    return list_origins(run)[-1][1]


def list_origins(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """The first round of each process that computed a run, and its flat `made_by`.

    One process without fields where none is known.
    """
    found = [(each["first_round"], flatten(each["made_by"])) for each in run.origins]
    return found or [(1, {})]


def made_by_columns(run: Run) -> dict[str, Any]:
    """The columns of a CSV file that trace a run.

    They are those of the process that computed its last rounds; `made_by.earlier` says
    what was otherwise before, and is empty where nothing was.
    """
    last = origin_of(run)
    columns = {f"made_by.{name}": value for name, value in last.items()}
    return columns | {"made_by.earlier": describe_earlier(run)} if last else {}


def join_columns(runs: Sequence[Run]) -> dict[str, Any]:
    """The columns that trace a number of several runs; `VARIES` where they differ."""
    each = [made_by_columns(run) for run in runs]
    names = dict.fromkeys(name for columns in each for name in columns)
    joined = {}
    for name in names:
        values = {str(columns.get(name)): columns.get(name) for columns in each}
        joined[name] = values.popitem()[1] if len(values) == 1 else VARIES
    return joined


def describe_earlier(run: Run) -> str:
    """Where earlier processes differ from the last of a run, on one line."""
    origins, parts = list_origins(run), []
    last = origins[-1][1]
    for (first, origin), (end, _) in itertools.pairwise(origins):
        names = dict.fromkeys([*origin, *last])
        changes = [
            f"{name}={_show(name, origin.get(name), whole=True)}"
            for name in names
            if origin.get(name) != last.get(name)
        ]
        if changes:
            parts.append(f"rounds {first} to {end - 1}: {', '.join(changes)}")
    return "; ".join(parts)


def _show_run(run: Run, name: str) -> str:
    """A field of a run's origins, with the rounds where it has changed."""
    (_, first), *later = list_origins(run)
    text = before = _show(name, first.get(name))
    for start, origin in later:
        value = _show(name, origin.get(name))
        if value != before:
            text, before = f"{text}{UNTIL}{start - 1}, then {value}", value
    return text


def _show(name: str, value: Any, whole: bool = False) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    short = name == "commit" and not whole
    return str(value)[: COMMIT_LETTERS if short else None] or "none"


def describe_origins(runs: Sequence[Run]) -> tuple[str, str]:
    """What made all begun runs alike, and in what they differ with their counts.

    Both are one line; empty where there is nothing to say. What is unknown of all runs
    is left out.
    """
    begun = [run for run in runs if run.summary or run.origins]
    alike, different = [], []
    for name in list_names(begun):
        values = Counter(_show_run(run, name) for run in begun)
        if len(values) > 1 or UNTIL in next(iter(values)):
            counts = [
                f"{value} ({count} run{'s' if count > 1 else ''})"
                for value, count in values.most_common()
            ]
            different.append(f"{name} {', '.join(counts)}")
        elif UNKNOWN not in values:
            alike.append(f"{name} {next(iter(values))}")
    return " · ".join(alike), "; ".join(different)


def list_names(runs: Sequence[Run]) -> list[str]:
    """The fields of all origins of some runs, in the order of first appearance."""
    origins = (origin for run in runs for _, origin in list_origins(run))
    return list(dict.fromkeys(name for origin in origins for name in origin))
