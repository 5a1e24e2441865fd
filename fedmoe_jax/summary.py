"""The numbers of a whole run, from its rows."""

from typing import Any

from fedmoe_jax.metrics import (
    ACCURACIES,
    TARGETS,
    Row,
    own_final,
    rounds_to_share,
    rounds_to_targets,
)

# Fields of the rows that hold wall time: what they are called as a share.
SPENT = {
    "seconds": "train_share",
    "evaluation_seconds": "evaluate_share",
    "save_seconds": "save_share",
    "compile_seconds": "compile_share",
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
    return (
        f"{summary['rounds_per_second']:.3g} rounds/s  {rate:,.0f} examples/s  "
        f"wasted {summary['mean_wasted_share']:.1%}  time: {shares}"
    )


def make_summary(
    strategy: str, seed: int, note: str, needs: str, rows: list[Row], spent: Row
) -> dict[str, Any]:
    """The numbers of a whole run.

    Final accuracies are means over the last ten rounds' evaluations; `rounds_to` counts
    rounds until the global accuracy reaches a target for the first time.

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
        "rounds_to_95_percent_of_final": share,
        "mean_load_cv": total("load_cv") / len(rows),
        "mean_load_entropy": total("load_entropy") / len(rows),
        "starved_experts": total("starved_experts") / len(rows),
        "mean_late_clients": total("late_clients") / len(rows),
        "mean_simulated_seconds": total("simulated_seconds") / len(rows),
        "total_bytes_up": total("bytes_up"),
        "total_bytes_down": total("bytes_down"),
        "total_client_flops": total("client_flops"),
        "peak_client_parameters": max(
            row.get("peak_client_parameters") or 0.0 for row in rows
        ),
        "nonfinite_clients": int(total("nonfinite_clients")),
        **measure_speed({name: total(name) for name in SPENT}, rows),
    }
