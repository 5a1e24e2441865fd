"""What decides the comparison: one factor at a time around its default.

    python launch.py --config=configs/causes.py:idle --workdir=runs/idle
    python launch.py --config=configs/causes.py:gate --workdir=runs/gate

`idle` varies what becomes of the fitness of unheld pairs, `gate` how gates are merged
and whether they are calibrated. `digits` and `smoke` can be added, as in `compare.py`.
"""

from ml_collections import ConfigDict

from configs import compare

FACTORS = {
    "idle": (
        ("greedy", "load_balanced"),
        ("fitness.idle=keep", "fitness.idle=decay"),
    ),
    "gate": (
        ("random", "greedy", "load_balanced"),
        ("gate.mode=holder_rows", "gate.mode=personal", "loss.calibration=0.0"),
    ),
}


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` names a factor, then any of `digits` and `smoke`."""
    factor, _, rest = argument.partition(",")
    if factor == "smoke":
        factor, rest = "idle", "smoke"
    if factor not in FACTORS:
        raise ValueError(
            f"config argument {factor!r} is unknown; allowed: {', '.join(FACTORS)}, "
            "followed by digits or smoke"
        )
    config = compare.get_config(rest)
    config.compare.strategies, config.compare.changes = FACTORS[factor]
    return config
