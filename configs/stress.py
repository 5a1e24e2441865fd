"""Limits of alignment: drop-out, wrong profiles and drift.

    python launch.py --config=configs/stress.py:digits --workdir=runs/stress_digits \\
      --settings=results/systems_digits/settings.json
    python launch.py --config=configs/stress.py --workdir=runs/stress \\
      --settings=runs/tune_cifar/settings.json

Ten seeds on the digits, five on CIFAR-10, with the rates that `systems.py` tunes
for 40 rounds of 5 steps, on CIFAR-10 of 30; without `--settings` all share the rate of
`compare.py`.

The paper's three stresses alone and together: 20 % of the clients drop out of every
round, devices report their capacity up to 30 % wrong, and clients' labels drift
gradually to those of others. Clients that hold too much are lost, late ones
are dropped, in all conditions. The argument `full` adds the reactions to drift and runs
for longer; `digits` and `smoke` as in `compare.py`, and `smoke` has all stresses at
once.
"""

from ml_collections import ConfigDict

from configs import compare

STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "load_balanced_running",
    "flex_moe",
    "fedavg_active",
)
DROPOUT = "availability.dropout=0.2"
ERROR = "profile.kind=self_reported,profile.fixed=0"  # another error every round
DRIFT = "drift.labels=1.0"
STRESSES = ("", DROPOUT, ERROR, DRIFT, f"{DROPOUT},{ERROR},{DRIFT}")
REACTIONS = tuple(f"{DRIFT},reaction.kind={kind}" for kind in ("reset", "hasten"))


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `full`, `digits` and `smoke` with commas."""
    full, rest = compare.take_word(argument, "full")
    config = compare.get_config(rest, ["full"])
    compare.support_claims(config, rest)
    if "smoke" not in rest:
        config.num_rounds, config.eval_every, config.chunk_rounds = 30, 5, 1
        config.checkpoint.every, config.local_steps = 10, 20
        config.drift.start, config.drift.rounds = 10, 10
        if full:
            config.num_rounds = 90
            config.drift.start, config.drift.rounds = 30, 30
    # No margin, so that clients that report too much are lost.
    config.devices.free_memory, config.devices.buffer = 0.2, 0.0
    config.devices.deadline = 240.0
    config.devices.overload, config.late.kind = "lose", "drop"
    config.compare.strategies = STRATEGIES
    config.compare.changes = (*STRESSES, *REACTIONS) if full else STRESSES
    if "smoke" in rest:
        config.compare.strategies = compare.FAMILIES
        config.compare.changes = STRESSES[-1:]
    return config
