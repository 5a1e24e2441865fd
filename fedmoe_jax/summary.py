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


def make_summary(
    strategy: str, seed: int, note: str, rows: list[Row]
) -> dict[str, Any]:
    """The numbers of a whole run.

    Final accuracies are means over the last ten rounds' evaluations; `rounds_to` counts
    rounds until the global accuracy reaches a target for the first time.

    Args:
      strategy: its name.
      seed: of the run.
      note: the strategy's sentence.
      rows: one per round, at least one.
    """

    def total(name: str) -> float:
        return float(sum(row.get(name) or 0.0 for row in rows))

    reached = rounds_to_targets(rows, "global_accuracy", TARGETS)
    share = rounds_to_share(rows, "global_accuracy", 0.95)
    return {
        "strategy": strategy,
        "seed": seed,
        "num_rounds": len(rows),
        "note": note,
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
        "nonfinite_clients": int(total("nonfinite_clients")),
        "wall_seconds": total("seconds") + total("evaluation_seconds"),
    }
