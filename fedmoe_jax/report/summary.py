"""The numbers of a whole run, from its rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedmoe_jax.options import FINAL, LAST, MAX, MEAN, TOTAL, Measure
from fedmoe_jax.report.rows import (
    Row,
    final_mean,
    measured,
    rounds_to,
    rounds_to_share,
    spend_so_far,
)

ACCURACY = "global_accuracy"  # of which there are targets
# Fields of the rows that hold wall time, and the names of their shares.
SPENT = {
    "seconds": "train_share",
    "evaluation_seconds": "evaluate_share",
    "save_seconds": "save_share",
    "compile_seconds": "compile_share",
}

Points = Sequence[tuple[int, float]]  # (round, value), at least one


def _total(points: Points) -> float:
    return float(sum(value for _, value in points))


OVER: dict[str, Callable[[Points], float]] = {
    FINAL: final_mean,
    MEAN: lambda points: _total(points) / len(points),
    TOTAL: _total,
    MAX: lambda points: max(value for _, value in points),
    LAST: lambda points: points[-1][1],
}


def measure_run(
    rows: Sequence[Row], measures: Mapping[str, Measure]
) -> dict[str, float | None]:
    """The numbers of a run.

    Args:
      rows: one per round.
      measures: by the keys of the result.

    Returns:
      The numbers. One that no row has is left out; of an evaluation, which may still be
      to come, it is None.
    """
    found = {}
    for key, measure in measures.items():
        if measure.over:
            number = measure_rows(rows, measure)
            if number is not None or measure.evaluated:
                found[key] = number
    return found


def measure_rows(rows: Sequence[Row], measure: Measure) -> float | None:
    """One number of a run; None where its rows do not have it."""
    points = measured(rows, *measure.fields)
    if not points:
        return None
    number = OVER[measure.over](points) / measure.unit
    if not measure.per:
        return number
    whole = _total(measured(rows, *measure.per))
    return number / whole if whole > 0 else None


def name_target(target: float) -> str:
    """The key of a target, `0.35` say."""
    return f"{target:.10g}"


def reach_targets(
    rows: Sequence[Row], targets: Mapping[str, float], measures: Mapping[str, Measure]
) -> dict[str, dict[str, float | None]]:
    """Rounds, and costs to the end of them, until accuracies are reached.

    Args:
      rows: one per round.
      targets: global accuracies in (0, 1], by the keys of the results.
      measures: whose `budget` names a table of the result; their fields are added up,
        over the rounds too.

    Returns:
      By name, `rounds_to` and the budgets: for each target the first evaluated round
      with that accuracy, and the cost up to its end; None if none has it.
    """
    reached = {key: rounds_to(rows, ACCURACY, at) for key, at in targets.items()}
    found: dict[str, dict[str, float | None]] = {"rounds_to": dict(reached)}
    for measure in measures.values():
        if measure.budget:
            spent = spend_so_far(rows, measure.fields) / measure.unit
            so_far = dict(zip([row["round"] for row in rows], spent, strict=True))
            found[measure.budget] = {
                key: None if at is None else float(so_far[at])
                for key, at in reached.items()
            }
    return found


def measure_speed(spent: dict[str, float], rows: list[Row]) -> dict[str, float]:
    """Rates of training, and shares of the time of a run.

    Args:
      spent: seconds by the fields of `SPENT`.
      rows: one per round.
    """
    wall = sum(spent.values())
    examples = sum(row["examples"] for row in rows)
    return {
        "rounds_per_second": len(rows) / spent["seconds"],
        "examples_per_second": examples / spent["seconds"],
        "mean_wasted_share": sum(row["wasted_share"] for row in rows) / len(rows),
        "wall_seconds": wall,
        **{share: spent[field] / wall for field, share in SPENT.items()},
    }


def describe_speed(summary: dict[str, Any]) -> str:
    """Rates of training and shares of the time, on one line.

    Of runs that advance together any summary will do: each has its share of the time.
    """
    shares = "  ".join(
        f"{name.removesuffix('_share')} {summary[name]:.0%}" for name in SPENT.values()
    )
    rate = summary["examples_per_second"]
    lost = summary.get("mean_lost_clients", 0.0)
    return (
        f"{summary['rounds_per_second']:.3g} rounds/s  {rate:,.0f} examples/s  "
        f"padding {summary['mean_wasted_share']:.1%}  time: {shares}"
        + (f"  lost {lost:.1f} clients a round" if lost else "")
    )


def make_summary(
    rows: list[Row],
    spent: Row,
    measures: Mapping[str, Measure],
    targets: Sequence[float],
) -> dict[str, Any]:
    """The numbers of a whole run.

    Args:
      rows: one per round, at least one.
      spent: seconds that are in no row.
      measures: see `measure_run`.
      targets: accuracies, see `reach_targets`.
    """
    seconds = {
        name: sum(float(row.get(name) or 0.0) for row in (*rows, spent))
        for name in SPENT
    }
    named = {name_target(target): target for target in targets}
    return {
        "num_rounds": len(rows),
        **measure_run(rows, measures),
        **reach_targets(rows, named, measures),
        "rounds_to_95_percent_of_final": rounds_to_share(rows, ACCURACY, 0.95),
        **measure_speed(seconds, rows),
    }
