"""Can every client get its share of training? Floors of participation, and their price.

    python launch.py --config=configs/fairness.py:digits --workdir=runs/fairness \\
      --settings=results/systems_digits/settings.json
    python launch.py --config=configs/fairness.py --workdir=runs/fairness_cifar \\
      --settings=results/systems_cifar/settings.json

Five of twenty clients train in a round, drawn among those that can be reached, and weak
devices seldom can (`availability.capacity_bias`): the weakest in 24 % of the rounds, in
spells, which bounds the floor of participation. The rows are floors up to near that,
the higher ones also with queues that outweigh the draw sooner (`fairness.tradeoff`);
floors of the second kind, under which clients of every capacity train experts of high
value; and, as the alternative, updates that weigh by their client's loss (q-FFL). Some
rows ask again where weak devices have classes that others lack. The report has the
spread of the clients' accuracies at each floor, with a test of its trend, the
differences to no floor in accuracy and simulated time, and the kinds of device.

`digits` is on the embedded digits, with five seeds, seven minutes on one core, else it
is on CIFAR-10, with three seeds and the rows that decide. `smoke` is short.
"""

from ml_collections import ConfigDict

from configs import compare

STRATEGIES = ("load_balanced", "random", "fedavg_active")
MIXTURES, DENSE = STRATEGIES[:2], STRATEGIES[2]
FLOORS = tuple(f"fairness.floor={share}" for share in (0.1, 0.15, 0.2))
FIRM = tuple(f"load_balanced: {floor},fairness.tradeoff=0.01" for floor in FLOORS[1:])
POWERS = tuple(f"fairness.power={power}" for power in (0.2, 0.5, 1.0))
EXPERTS = "fairness.expert_floor=0.9"
OF_EXPERTS = tuple(
    f"{name}: {change}"
    for name in MIXTURES
    for change in (EXPERTS, f"{FLOORS[-1]},{EXPERTS}")
)
# Weak devices have more of the first classes.
LACKING = "devices.order=labels"
LACKED = (LACKING, f"{LACKING},{FLOORS[-1]}", f"{LACKING},{POWERS[1]}")
DECISIVE = (
    "",
    FLOORS[-1],
    f"load_balanced: {FLOORS[0]}",
    f"load_balanced: {POWERS[1]}",
)


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `digits` and `smoke` with commas."""
    config = compare.get_config(argument)
    compare.support_claims(config, argument)
    words = argument.split(",")
    config.cohort_size = 5
    config.availability.sampling = "reachable"
    config.availability.capacity_bias, config.availability.persistence = 0.8, 0.3
    config.evaluation.baseline = "load_balanced"
    config.compare.strategies = STRATEGIES
    config.compare.changes = ("", *FLOORS, *FIRM, *POWERS, *OF_EXPERTS, *LACKED)
    if "digits" not in words:  # a run takes minutes
        config.compare.strategies = ("load_balanced", DENSE)
        config.compare.changes = DECISIVE
        # No floor is in half of the rows, and so in their names.
        config.evaluation.baseline = "load_balanced fairness.floor=0.0"
    if "smoke" in words:
        config.compare.strategies = ("load_balanced", DENSE)
        config.compare.changes = ("", f"load_balanced: {FLOORS[-1]}")
        config.evaluation.baseline = "load_balanced"
        return config
    config.compare.seeds = (0, 1, 2, 3, 4)
    config.num_rounds, config.eval_every, config.chunk_rounds = 60, 2, 2
    if "digits" not in words:
        config.compare.seeds = (0, 1, 2)
        config.num_rounds, config.eval_every, config.chunk_rounds = 100, 5, 5
        config.local_steps = 10
    return config
