"""What the order of strategies depends on: one factor at a time, on the digits.

    python launch.py --config=configs/sensitivity.py --workdir=runs/sensitivity

Capacity (fewer slots, or up to all of them), the number of experts E and of active
ones A, what becomes of the fitness of unheld pairs, calibration, the server's
optimiser, late clients, the order of sums and the clients' rate. `smoke` has one seed,
one strategy and one factor.
"""

from ml_collections import ConfigDict

from configs import compare

STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "fedavg",
    "fedavg_active",
    "fedavg_smallest",
)
# A device counts the model so many times its size: the larger, the fewer slots.
CAPACITY = ("devices.model_scale=3000.0", "devices.model_scale=500.0,max_held=8")
EXPERTS = ("num_experts=4", "num_experts=16")
ACTIVE = ("num_active=1", "num_active=4")
IDLE = ("fitness.idle=keep", "fitness.idle=decay")
CALIBRATION = ("loss.calibration=0.0", "loss.calibration=1.0")
SERVER = (compare.ADAM,)
LATE = ("late.kind=drop",)  # by default all wait for the slowest
# The same draws, with sums in another order: what chance alone makes of a seed.
SUMS = ("run.client_chunk=4",)
RATES = ("client.learning_rate=0.05", "client.learning_rate=0.8")


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` is empty or `smoke`."""
    config = compare.get_config(",".join(filter(None, ("digits", argument))))
    config.compare.strategies = STRATEGIES
    config.compare.seeds = tuple(range(10))
    config.compare.changes = (
        *("", *CAPACITY, *EXPERTS, *ACTIVE),
        *(*IDLE, *CALIBRATION, *SERVER, *LATE, *SUMS, *RATES),
    )
    if argument:
        config.compare.strategies = ("load_balanced",)
        config.compare.seeds, config.compare.changes = (0,), ("", SERVER[0])
        config.evaluation.baseline = ""
    return config
