"""The causes of the comparison's outcome: a few factors around their defaults.

    python launch.py --config=configs/causes.py:idle --workdir=runs/idle
    python launch.py --config=configs/causes.py:gate --workdir=runs/gate
    python launch.py --config=configs/causes.py:personal --workdir=runs/personal

`idle` varies what becomes of the fitness of unheld pairs (a prior of 1 is optimistic:
what was not tried looks better than what was), `gate` crosses how gates are merged with
whether they are calibrated, `personal` keeps gates on the clients. The reference point
of all three is `compare.py` with the same seeds. `digits` and `smoke` can be added, as
in `compare.py`; `smoke` has one strategy and the last two changes.
"""

from ml_collections import ConfigDict

from configs import compare

FACTORS = {
    "idle": (
        ("greedy", "load_balanced"),
        ("fitness.idle=keep", "fitness.idle=decay", "fitness.prior=1.0"),
    ),
    "gate": (
        ("random", "greedy", "load_balanced"),
        (
            "loss.calibration=0.0",
            "gate.mode=holder_rows",
            "gate.mode=holder_rows,loss.calibration=0.0",
        ),
    ),
    "personal": (("greedy", "load_balanced"), ("gate.mode=personal",)),
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
    strategies, changes = FACTORS[factor]
    if "smoke" in rest:
        strategies, changes = strategies[-1:], changes[-2:]
    config.compare.strategies, config.compare.changes = strategies, changes
    config.evaluation.baseline = ""
    return config
