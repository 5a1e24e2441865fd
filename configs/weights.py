"""Fitness against usage: which trade-off is best.

    python launch.py --config=configs/weights.py:digits --workdir=runs/weights_digits \\
      --settings=results/systems_digits/settings.json
    python launch.py --config=configs/weights.py --workdir=runs/weights \\
      --settings=runs/tune_cifar/settings.json

Ten seeds on the digits, five on CIFAR-10, with the rates that `systems.py` tunes;
without `--settings` all share the rate of `compare.py`.

The paper's rule with the weights of fitness and usage at 0.3/0.7, 0.5/0.5, 0.7/0.3 and
at both extremes. The argument `full` adds the ratios between and the form in which each
pick is seen by the next; `digits` and `smoke` as in `compare.py`, and `smoke` has the
extremes and the middle.
"""

from ml_collections import ConfigDict

from configs import compare

RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
ALL_RATIOS = tuple(tenth / 10 for tenth in range(11))


def weigh(fitness: float) -> str:
    """The change that gives fitness this weight and usage the rest of 1."""
    return f"weights.fitness={fitness:g},weights.usage={1 - fitness:.1f}"


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `full`, `digits` and `smoke` with commas."""
    full, rest = compare.take_word(argument, "full")
    config = compare.get_config(rest, ["full"])
    compare.support_claims(config, rest)
    config.compare.strategies = ("load_balanced",)
    if full:
        config.compare.strategies = ("load_balanced", "load_balanced_running")
    ratios = RATIOS[::2] if "smoke" in rest else ALL_RATIOS if full else RATIOS
    config.compare.changes = tuple(map(weigh, ratios))
    config.evaluation.baseline = f"load_balanced {weigh(0.5).replace(',', ' ')}"
    return config
