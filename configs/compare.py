"""Strategies x seeds on CIFAR-10, reported together with mean and 95 % interval.

    python launch.py --config=configs/compare.py --workdir=runs/compare
    python launch.py --config=configs/compare.py:digits --workdir=runs/digits

The arguments are `digits` (the embedded data, about 41 seconds on 2 cores) and
`smoke` (the same study in under a minute: one seed, and each family of strategies
once); `digits,smoke` is both.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import cifar10, default

STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "load_balanced_running",
    "fedavg",
    "fedavg_active",
)
ADAM = "server.optimizer=fedadam,server.learning_rate=0.01"
# Compiling is most of a short study, so its strategies make two programs.
FAMILIES = ("random", "load_balanced", "fedavg_active")


def take_word(argument: str, word: str) -> tuple[bool, str]:
    """Whether the comma-separated argument has the word, and the argument without."""
    words = argument.split(",")
    return word in words, ",".join(each for each in words if each != word)


def support_claims(config: ConfigDict, argument: str) -> None:
    """The seeds that a claim needs, but for `smoke`, and examples to tune on, in place.

    Ten seeds on the digits, five on CIFAR-10. Tuned settings are used on the examples
    that are left beside those which they were tuned on.
    """
    words = argument.split(",")
    digits = "digits" in words
    config.partition.validation_share = 0.2 if digits else 0.1
    if "smoke" not in words:
        config.compare.seeds = tuple(range(10 if digits else 5))


def get_config(argument: str = "", own: Sequence[str] = ()) -> ConfigDict:
    """The comparison. `argument` joins any of `digits` and `smoke` with commas.

    A study of `own` words takes them off the argument; a refusal names them, too.
    """
    words = set(filter(None, argument.split(",")))
    unknown = words - {"digits", "smoke"}
    if unknown:
        allowed = ", ".join((*own, "digits", "smoke"))
        raise ValueError(
            f"config argument {min(unknown)!r} is unknown; allowed: {allowed}"
        )
    digits = "digits" in words
    config = default.get_config() if digits else cifar10.get_config()
    del config.strategy, config.seed  # every run has its own
    config.client.clip = 1.0  # so that a row survives rates that others need
    if digits:
        config.client.learning_rate = 0.2
    config.compare = ConfigDict()
    config.compare.strategies = STRATEGIES
    config.compare.changes = ("",)  # one-factor changes, such as "fitness.idle=keep"
    config.compare.seeds = (0, 1, 2)
    config.compare.settings = ()  # of one strategy, such as "greedy: local_steps=9"
    config.tune = ConfigDict()  # what --tune tries, rates x servers, at most eight
    config.tune.rates = (0.05, 0.2, 0.8, 3.2) if digits else (0.01, 0.03, 0.1, 0.3)
    config.tune.servers = ("", ADAM)
    config.tune.measure = "validation_personal_accuracy"
    config.evaluation.baseline = "fedavg_active"
    if "smoke" in words:
        default.shrink(config)
        config.compare.strategies, config.compare.seeds = FAMILIES, (0,)
    return config
