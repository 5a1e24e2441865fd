"""The numbers of a whole run, from its rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmoe_jax.report.rows import (
    Row,
    own_final,
    rounds_to_share,
    rounds_to_targets,
)
from fedmoe_jax.train.writers import ACCURACIES, COSTS
from fedmoe_jax.world.outcome import OUTCOMES

TARGETS = (0.35, 0.40, 0.45, 0.50)
# Fields of the rows that hold wall time: what they are called as a share.
SPENT = {
    "seconds": "train_share",
    "evaluation_seconds": "evaluate_share",
    "save_seconds": "save_share",
    "compile_seconds": "compile_share",
}
# Of clients whose update does not count, whatever the reason.
LOST = tuple(f"{name}_clients" for name in OUTCOMES if name not in ("merged", "stale"))
TRAFFIC = ("bytes_up", "bytes_down")
MEANS = {  # name of a mean over rounds: the fields of a row that it adds up
    "mean_lost_clients": LOST,
    "mean_dropped_clients": ("dropped_clients",),
    "mean_stale_clients": ("stale_clients",),
    "mean_capacity_violations": ("capacity_violations",),
    "mean_capacity_error": ("capacity_error",),
}
BUDGETS = {  # name: the fields of a row that it adds up, and the unit
    "simulated_seconds_to": (("simulated_seconds",), 1.0),
    "megabytes_to": (TRAFFIC, 1e6),
}


def has(rows: Sequence[Row], *names: str) -> bool:
    """Whether any row has any of the fields."""
    return any(name in row for row in rows for name in names)


def spend_so_far(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    """[R] float64, the sum of the fields over all rounds up to each row's."""
    spent = [sum(float(row.get(name) or 0.0) for name in names) for row in rows]
    return np.cumsum(spent, dtype=np.float64)


def measure_costs(rows: Sequence[Row]) -> dict[str, float]:
    """What the rounds cost and whom they lost; left out is what the rows do not tell.

    Returns:
      `total_` and each of `COSTS`; `total_joules`; `wasted_bytes_share`, of the bytes
      that travelled; the `MEANS`, a round; `final_participation_jain`; `drift_alarms`
      in all.
    """

    def total(*names: str) -> float:
        return float(spend_so_far(rows, names)[-1])

    found = {f"total_{name}": total(name) for name in COSTS if has(rows, name)}
    if has(rows, "compute_joules"):
        found["total_joules"] = total("compute_joules", "radio_joules")
    travelled = total(*TRAFFIC)
    if has(rows, "wasted_bytes") and travelled > 0:
        found["wasted_bytes_share"] = found["total_wasted_bytes"] / travelled
    for name, fields in MEANS.items():
        if has(rows, *fields):
            found[name] = total(*fields) / len(rows)
    if has(rows[-1:], "participation_jain"):
        found["final_participation_jain"] = rows[-1]["participation_jain"]
    if has(rows, "drift_alarms"):
        found["drift_alarms"] = total("drift_alarms")
    return found


def costs_to_targets(
    rows: Sequence[Row], names: Sequence[str], unit: float
) -> dict[str, float | None]:
    """What was spent by the round that reaches each target; None if none does.

    Args:
      rows: one per round.
      names: fields of a row, which are added up.
      unit: by which the sum is divided.
    """
    reached = rounds_to_targets(rows, "global_accuracy", TARGETS)
    numbers = [row["round"] for row in rows]
    so_far = dict(zip(numbers, spend_so_far(rows, names) / unit, strict=True))
    return {
        f"{target:.2f}": None if at is None else float(so_far[at])
        for target, at in reached.items()
    }


def measure_speed(spent: dict[str, float], rows: list[Row]) -> dict[str, float]:
    """Rates of training and what took the time of a run.

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
    strategy: str, seed: int, note: str, needs: str, rows: list[Row], spent: Row
) -> dict[str, Any]:
    """The numbers of a whole run.

    Final accuracies are those of `rows.own_final`; `rounds_to` counts rounds until
    the global accuracy reaches a target for the first time, and each of `BUDGETS` tells
    what was spent by the end of that round.

    Args:
      strategy: its name.
      seed: of the run.
      note: the strategy's sentence.
      needs: what it gets beyond the shared rules.
      rows: one per round, at least one.
      spent: seconds that are in no row.
    """

    def total(name: str) -> float:
        return float(sum(row.get(name) or 0.0 for row in (*rows, spent)))

    reached = rounds_to_targets(rows, "global_accuracy", TARGETS)
    share = rounds_to_share(rows, "global_accuracy", 0.95)
    return {
        "strategy": strategy,
        "seed": seed,
        "num_rounds": len(rows),
        "note": note,
        "needs": needs,
        **{f"final_{name}": own_final(rows, name) for name in ACCURACIES},
        "rounds_to": {f"{target:.2f}": reached[target] for target in TARGETS},
        **{
            name: costs_to_targets(rows, fields, unit)
            for name, (fields, unit) in BUDGETS.items()
        },
        "rounds_to_95_percent_of_final": share,
        "mean_load_cv": total("load_cv") / len(rows),
        "mean_load_entropy": total("load_entropy") / len(rows),
        "starved_experts": total("starved_experts") / len(rows),
        "mean_late_clients": total("late_clients") / len(rows),
        "mean_simulated_seconds": total("simulated_seconds") / len(rows),
        **measure_costs(rows),
        "peak_client_parameters": max(
            row.get("peak_client_parameters") or 0.0 for row in rows
        ),
        "nonfinite_clients": int(total("nonfinite_clients")),
        **measure_speed({name: total(name) for name in SPENT}, rows),
    }
