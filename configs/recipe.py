"""What of the recipe helps: each mechanism alone, and the recipe without it.

    python launch.py --config=configs/recipe.py:permuted,digits --workdir=runs/recipe

The recipe of `regimes.py` is a dense warm-up, a gate biased towards the experts that
suit a client, and a calibration loss of weight 1. Here each of them is added to plain
training, and left out of the recipe; a shared expert, and fitness from other feedback
than accuracy (against the client's other experts, or of received experts, on training
examples or on a fifth of them set aside), are added to both. `Global soft` of `random`
against `fixed_random` says what rotation is worth where all experts answer. Kinds of
heterogeneity, `digits` and `smoke` are those of `regimes.py`, `permuted` without any.
"""

from ml_collections import ConfigDict

from configs import regimes

STRATEGIES = ("random", "fixed_random", "load_balanced", "prototypes")
PARTS = {  # of the recipe, and what is in their place
    "upcycle.rounds": (10, 0),
    "gate.bias": (5.0, 0.0),
    "loss.calibration": (1.0, 0.2),
}
PLAIN = ",".join(f"{field}={off}" for field, (_, off) in PARTS.items())
SHARED = "model.shared_width=16"
FEEDBACK = ("relative", "probe", "relative_probe", "probe,fitness.probe_share=0.2")


def list_changes() -> tuple[str, ...]:
    """Plain training, the recipe, and both with one mechanism more or less."""
    without = [f"{field}={off}" for field, (_, off) in PARTS.items()]
    alone = [
        ",".join(f"{f}={on if f == field else off}" for f, (on, off) in PARTS.items())
        for field in PARTS
    ]
    kinds = [f"load_balanced: fitness.feedback={kind}" for kind in FEEDBACK]
    added = (SHARED, *kinds)
    return (PLAIN, *alone, *(f"{a},{PLAIN}" for a in added), "", *without, *added)


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` is that of `regimes.py`."""
    kind, _ = regimes.take_kind(argument)
    words = argument if kind else ",".join(filter(None, ("permuted", argument)))
    config = regimes.get_config(words)
    config.evaluation.baseline = ""
    if "smoke" in words.split(","):
        rounds = config.upcycle.rounds
        config.compare.strategies = ("load_balanced",)
        config.compare.changes = (PLAIN, f"upcycle.rounds={rounds},{SHARED}")
        return config
    config.compare.strategies, config.compare.changes = STRATEGIES, list_changes()
    return config
