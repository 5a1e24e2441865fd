"""Code, versions and devices that made the runs of a report, and their differences."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedmoe_jax.report.runs import Run
from fedmoe_jax.runtime.files import flatten

COMMIT_LETTERS = 9
UNKNOWN = "unknown"


def origin_of(run: Run) -> dict[str, Any]:
    """The flat `made_by` of a summary; empty while a run is in progress, or older."""
    return flatten(run.summary.get("made_by", {}))


def _show(name: str, value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)[: COMMIT_LETTERS if name == "commit" else None] or "none"


def describe_origins(runs: Sequence[Run]) -> tuple[str, str]:
    """What made all finished runs alike, and in what they differ with their counts.

    Both are one line; empty where there is nothing to say. What is unknown of all runs
    is left out.
    """
    origins = [origin_of(run) for run in runs if run.summary]
    alike, different = [], []
    for name in dict.fromkeys(name for origin in origins for name in origin):
        values = Counter(_show(name, origin.get(name)) for origin in origins)
        if len(values) > 1:
            counts = [
                f"{value} ({count} run{'s' if count > 1 else ''})"
                for value, count in values.most_common()
            ]
            different.append(f"{name} {', '.join(counts)}")
        elif UNKNOWN not in values:
            alike.append(f"{name} {next(iter(values))}")
    return " · ".join(alike), "; ".join(different)
