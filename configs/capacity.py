"""Knowledge of devices that the server needs under memory pressure.

    python launch.py --config=configs/capacity.py:digits \\
      --workdir=runs/capacity_digits \\
      --settings=results/systems_digits/settings.json
    python launch.py --config=configs/capacity.py --workdir=runs/capacity \\
      --settings=runs/tune_cifar/settings.json

Ten seeds on the digits, five on CIFAR-10, with the rates that `systems.py` tunes
for 40 rounds of 5 steps, on CIFAR-10 of 30; without `--settings` all share the rate of
`compare.py`.

Other apps press on a device's memory for 30 % of the time and halve it. A client
that then holds too much is lost, a late one is dropped. Self-reported profiles (up to
30 % wrong), estimated ones and the truth, with margins of 0 to 50 % and profiles every
1, 5 and 20 rounds, one factor at a time. The argument `full` is the whole grid, for
accelerators; `digits` and `smoke` as in `compare.py`, and `smoke` has every factor
once.
"""

import itertools

from ml_collections import ConfigDict

from configs import compare

KINDS = ("self_reported", "estimated", "oracle")
BUFFERS = (0.1, 0.0, 0.25, 0.5)
REFRESHES = (1, 5, 20)
TRUTH = "load_balanced devices.buffer=0.1 profile.kind=oracle"  # of every round
FEW = (
    "profile.kind=estimated,devices.buffer=0.1,profile.refresh=1",
    "profile.kind=estimated,devices.buffer=0.0,profile.refresh=5",
    "profile.kind=oracle,devices.buffer=0.1,profile.refresh=1",
)


def list_changes(full: bool) -> tuple[str, ...]:
    """Kinds of profile x buffers x refreshes, or one of the two at a time."""
    changes = []
    for kind, buffer, refresh in itertools.product(KINDS, BUFFERS, REFRESHES):
        if full or buffer == BUFFERS[0] or refresh == REFRESHES[0]:
            change = f"profile.kind={kind},devices.buffer={buffer}"
            changes.append(f"{change},profile.refresh={refresh}")
    return tuple(changes)


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `full`, `digits` and `smoke` with commas."""
    full, rest = compare.take_word(argument, "full")
    config = compare.get_config(rest, ["full"])
    compare.support_claims(config, rest)
    if "smoke" not in rest:
        config.num_rounds, config.eval_every, config.chunk_rounds = 30, 5, 1
        config.checkpoint.every, config.local_steps = 10, 20
    # Memory is what binds: little of it is free, and the network has time.
    config.devices.free_memory, config.devices.deadline = 0.2, 240.0
    config.devices.overload, config.late.kind = "lose", "drop"
    config.pressure.share, config.pressure.persistence = 0.3, 0.5
    config.compare.strategies = ("load_balanced",)
    config.evaluation.baseline = f"{TRUTH} profile.refresh=1" if full else TRUTH
    config.compare.changes = list_changes(full)
    if "smoke" in rest:
        config.compare.changes = FEW
        config.evaluation.baseline = "load_balanced profile.kind=oracle"
    return config
