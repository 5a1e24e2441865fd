"""The memory of scores: fitness, usage and idle pairs.

    python launch.py --config=configs/scores.py:digits --workdir=runs/scores_digits \\
      --settings=results/systems_digits/settings.json
    python launch.py --config=configs/scores.py --workdir=runs/scores \\
      --settings=runs/tune_cifar/settings.json

Ten seeds on the digits, five on CIFAR-10, with the rates that `systems.py` tunes;
without `--settings` all share the rate of `compare.py`.

One factor at a time around the default (fitness keeps 0.7 of itself a round, usage 0.9,
idle pairs forget towards the prior). The argument `full` is the whole grid, for
accelerators; `digits` and `smoke` as in `compare.py`, and `smoke` has every factor
once.
"""

import itertools

from ml_collections import ConfigDict

from configs import compare

# A fitness that keeps 0.7, 0.8, 0.9 or 0.99 of itself gives the newest the rest.
FITNESS = tuple(f"fitness.rate={rate}" for rate in (0.3, 0.2, 0.1, 0.01))
USAGE = tuple(f"usage.decay={decay}" for decay in (0.9, 0.5, 0.99))
IDLE = tuple(f"fitness.idle={rule}" for rule in ("prior", "keep", "decay"))


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `full`, `digits` and `smoke` with commas."""
    full, rest = compare.take_word(argument, "full")
    config = compare.get_config(rest, ["full"])
    compare.support_claims(config, rest)
    config.compare.strategies = ("load_balanced",)
    usual = "load_balanced fitness.idle=prior fitness.rate=0.3 usage.decay=0.9"
    config.evaluation.baseline = usual if full else "load_balanced"
    one_at_a_time = ("", *FITNESS[1:], *USAGE[1:], *IDLE[1:])
    grid = tuple(map(",".join, itertools.product(FITNESS, USAGE, IDLE)))
    config.compare.changes = grid if full else one_at_a_time
    if "smoke" in rest:
        config.compare.changes = ("", f"{FITNESS[1]},{USAGE[1]}", IDLE[1])
        config.evaluation.baseline = "load_balanced"
    return config
