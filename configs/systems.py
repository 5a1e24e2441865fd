"""Every system of the comparison on CIFAR-10, side by side.

    python launch.py --config=configs/systems.py --workdir=runs/systems

All get the same data, of which the server sets 2,500 examples aside (`fedjets` and
`fedjets_no_anchors` train the stem that their gates read on them, others use none), the
same split, local steps and evaluation. `digits` and `smoke` can be given as arguments,
as in `compare.py`; `smoke` has one published system.
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
    "flex_moe_examples",
    "hfedmoe",
    "fedjets",
    "fedjets_no_anchors",
    "fedmix",
    "fedmix_all",
    "fedmoe",
    "fedmoe_da",
    "pfedmoe",
    "fedavg",
    "fedavg_active",
    "fedprox_active",
    "fednova_active",
    "scaffold_active",
    "fedadam_active",
    "local_active",
    "centralised_active",
)


def get_config(argument: str = "") -> ConfigDict:
    """The comparison. `argument` joins any of `digits` and `smoke` with commas."""
    config = compare.get_config(argument)
    config.compare.strategies = STRATEGIES
    if "smoke" in argument:
        config.compare.strategies = (*compare.FAMILIES, "fedmoe")
    config.data.public = 50 if "digits" in argument else 2500
    return config
