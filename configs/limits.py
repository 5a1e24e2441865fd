"""How far the right alignment leads: groups, clients, participation, drift and widths.

    python launch.py --config=configs/limits.py:digits --workdir=runs/limits
    python launch.py --config=configs/limits.py:classes --workdir=runs/classes

Clients are in four groups in which labels mean something else (`permuted` of
`regimes.py`, with its means), and one thing changes at a time: two, eight or ten
groups, groups of unequal sizes, four of twenty clients a round, a hundred clients whose
examples have several owners, labels that drift while `prototypes` asks again, and a
narrow network, of which an expert's room is the limit. `classes` has a hundred of them,
two-digit numbers, in four groups of twenty clients and in sixteen of a hundred. No
strategy but `oracle` is given the number of groups. The report draws a map. `digits`
and `smoke` are those of `regimes.py`.
"""

from ml_collections import ConfigDict

from configs import compare, regimes

STRATEGIES = (
    *("random", "fixed_random", "load_balanced", "oracle", "prototypes", "ifca"),
    *("fedavg_smallest", "fedavg_active", "local_active"),
)
GROUPS = ("groups.count=2", "groups.count=8", "groups.count=10,num_experts=10")
UNEQUAL = ("groups.skew=1.0",)
MANY = (
    "num_clients=100,cohort_size=20,partition.overlap=72,partition.validation_share=0.0"
)
CLIENTS = ("cohort_size=4", MANY)
DRIFT = ("drift.labels=1.0,drift.start=20,drift.rounds=1,prototypes.period=10",)
WIDTHS = ("model.stem_width=16,model.expert_width=8",)
SIXTEEN = (
    "num_clients=100,cohort_size=20,partition.overlap=575,"
    "partition.validation_share=0.0,groups.count=16,num_experts=16",
)


def get_config(argument: str = "") -> ConfigDict:
    """The study.

    `argument` joins `digits` or `classes`, which has its own data, and `smoke`.
    """
    classes, rest = compare.take_word(argument, "classes")
    words = rest.split(",")
    if named := set(words) & {*regimes.KINDS, *(("digits",) if classes else ())}:
        raise ValueError(
            f"config argument {min(named)!r} is unknown; allowed: digits or "
            "classes, smoke"
        )
    words += ["digits"] if classes else []
    config = regimes.get_config(",".join(filter(None, ("permuted", *words))))
    config.evaluation.baseline = ""
    if classes:
        config.data.name = "digit_pairs"
    if "smoke" in words:
        config.compare.changes = ("", *UNEQUAL)
        return config
    config.compare.strategies = STRATEGIES
    config.compare.seeds = config.compare.seeds[:5]
    config.compare.changes = ("", *GROUPS, *UNEQUAL, *CLIENTS, *DRIFT, *WIDTHS)
    if classes:
        config.num_rounds, config.compare.changes = 100, ("", *SIXTEEN)
        config.eval_every = config.checkpoint.every = 20
        config.chunk_rounds = 10
    return config
