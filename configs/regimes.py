"""When does a federated mixture pay? Kinds of heterogeneity, strategies and controls.

    python launch.py --config=configs/regimes.py:digits --workdir=runs/regimes
    python launch.py --config=configs/regimes.py:permuted,digits --workdir=runs/tune \\
      --tune
    python launch.py --config=configs/regimes.py:permuted,digits \\
      --workdir=runs/permuted --settings=runs/tune/settings.json
    python launch.py --config=configs/regimes.py:permuted --workdir=runs/tune_cifar \\
      --tune --config.num_rounds=40
    python launch.py --config=configs/regimes.py:permuted --workdir=runs/cifar \\
      --settings=runs/tune_cifar/settings.json

Clients differ by their labels (`skew`, Dirichlet(0.1)), by the `rotation` of their
images, by their `inversion` in half of the clients, by the meaning of their labels
(`permuted`), by rotation and meaning (`both`), or by meaning and, less, by their labels
(`mixed`). Without one of these words all kinds are compared, at one rate and with fewer
rows and seeds, and the report draws a map: the best mixture beside the best control in
every kind (on the digits a minute each on two cores, mostly of compiling). A kind
alone can be tuned; its runs and those of others make a map by
`--report=runs/skew,runs/rotation`. `digits` is on the embedded digits, else it is on
CIFAR-10, for 100 rounds, with the rows that decide and fewer rates to tune. All
mixtures have the same recipe: a dense warm-up of ten rounds, a gate biased towards the
experts that suit the client, and a calibration loss of weight 1. What suits a client is
its fitness, but where a strategy knows better: `oracle` knows the groups, `prototypes`
and `update_groups` look for them, and so does `ifca`, whose clients use one expert. A
kind alone has `prototypes` with one expert a client, too, at the bytes and memory of
`fedavg_smallest`; on the digits `ifca` without the warm-up, and on CIFAR-10
`load_balanced` with probes as feedback and `prototypes` with a bias of four times as
much, as groups that are near each other differ little in it. Read personal accuracy
with the own label prior: under permuted labels no model is right for all. `smoke` is
short.
"""

from ml_collections import ConfigDict

from configs import compare

STRATEGIES = (
    *("random", "fixed_random", "greedy", "load_balanced"),
    *("oracle", "prototypes", "update_groups", "ifca"),
    *("fedavg_smallest", "fedavg_active", "fedavg", "local_active"),
)
DECISIVE = (  # a run on CIFAR-10 takes minutes
    *("load_balanced", "oracle", "prototypes", "ifca"),
    *("fedavg_smallest", "fedavg_active", "local_active"),
)
FEW = (
    *("random", "fixed_random", "greedy", "load_balanced", "oracle", "prototypes"),
    *("fedavg_smallest", "fedavg_active", "local_active"),
)
KINDS = {
    "skew": {"partition.kind": "dirichlet"},
    "rotation": {"groups.kind": "rotation"},
    "inversion": {"groups.kind": "inversion", "groups.count": 2},
    "permuted": {"groups.kind": "permuted"},
    "both": {"groups.kind": "rotation_permuted"},
    "mixed": {
        "groups.kind": "permuted",
        "partition.kind": "dirichlet",
        "partition.alpha": 0.3,
    },
}


COLD = "ifca: upcycle.rounds=0"
PROBE = "load_balanced: fitness.feedback=probe"
SHARP = "prototypes: gate.bias=20.0"
LEAN = "prototypes: max_held=1,num_active=1"


def take_kind(argument: str) -> tuple[str, str]:
    """The kind of heterogeneity, empty for all, and the rest of an argument.

    Raises:
      ValueError: there are several, or a word is unknown.
    """
    words = argument.split(",")
    allowed = *KINDS, "digits", "smoke"
    if unknown := {word for word in words if word} - set(allowed):
        raise ValueError(
            f"config argument {min(unknown)!r} is unknown; allowed: "
            f"{', '.join(allowed)}"
        )
    kinds = [word for word in words if word in KINDS]
    if len(kinds) > 1:
        raise ValueError(
            f"config argument {argument!r} has several kinds; allowed: one of "
            f"{', '.join(KINDS)}"
        )
    return (kinds or [""])[0], ",".join(w for w in words if w not in KINDS)


def compare_kinds(config: ConfigDict) -> None:
    """Makes every kind a change of the comparison, in place.

    What is tuned is one setting a strategy, and kinds need settings of their own.
    """
    changes = [",".join(f"{f}={v}" for f, v in kind.items()) for kind in KINDS.values()]
    config.compare.changes, config.compare.strategies = tuple(changes), FEW
    config.compare.seeds = config.compare.seeds[:3]
    config.evaluation.baseline = ""
    del config.tune


def get_config(argument: str = "") -> ConfigDict:
    """The comparison.

    `argument` joins a kind, and any of `digits` and `smoke`, with commas.
    """
    kind, rest = take_kind(argument)
    config = compare.get_config(rest)
    compare.support_claims(config, rest)
    config.partition.kind = "iid"
    config.upcycle.rounds = 10
    config.gate.bias, config.loss.calibration = 5.0, 1.0
    config.evaluation.finetune = True
    config.compare.strategies = STRATEGIES
    config.tune.measure = "validation_personal_prior_accuracy"
    words = rest.split(",")
    if "digits" in words:
        config.compare.changes = ("", COLD, LEAN)
    else:
        config.tune.rates, config.tune.servers = (0.01, 0.03, 0.1), ("",)
    if "digits" not in words and "smoke" not in words:
        config.num_rounds, config.local_steps = 100, 10
        config.eval_every, config.checkpoint.every = 20, 20
        config.chunk_rounds = 5
        config.compare.strategies = DECISIVE
        config.compare.changes = ("", PROBE, SHARP, LEAN)
    if kind:
        config.update_from_flattened_dict(KINDS[kind])
    else:
        compare_kinds(config)
    if "smoke" in words:
        config.upcycle.rounds = config.chunk_rounds
        two = config.compare.changes[1:4:2]  # of equal shapes
        config.compare.changes = ("",) if kind else two
        config.compare.strategies = ("prototypes", "fedavg_active")
        config.evaluation.finetune = False
    return config
