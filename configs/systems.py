"""Every system of the comparison, side by side, with every measure.

    python launch.py --config=configs/systems.py:digits --workdir=runs/tune --tune
    python launch.py --config=configs/systems.py:digits --workdir=runs/systems_digits \\
      --settings=runs/tune/settings.json
    python launch.py --config=configs/systems.py:claims --workdir=runs/tune_cifar --tune
    python launch.py --config=configs/systems.py:claims --workdir=runs/systems \\
      --settings=runs/tune_cifar/settings.json

The first two calls tune all systems on the embedded digits and compare them over ten
seeds; the last two do so on CIFAR-10 with those that carry claims, over five. Without
`claims` CIFAR-10 has all systems, which takes many hours.

All get the same data, split, local steps and evaluation. The server sets 50 examples
aside, 2,500 of CIFAR-10 (`fedjets`, `fedjets_no_anchors` and `fedjets_frozen_stem`
train the stem that their gates read on them, others use none); each client sets some
aside for tuning and as its own test set, two further clients are never trained on.
`digits`, `claims` and `smoke` can be joined by commas; `smoke` has each
family once, and no fine-tuning.
"""

from ml_collections import ConfigDict

from configs import compare

CLAIMS = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "load_balanced_running",
    "flex_moe",
    "hfedmoe",
    "pfedmoe",
    "fedavg_active",
    "fedavg_smallest",
    "local_active",
)
STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "load_balanced_no_calibration",
    "load_balanced_running",
    "flex_moe",
    "flex_moe_shared_gate",
    "flex_moe_examples",
    "flex_moe_examples_shared_gate",
    "hfedmoe",
    "hfedmoe_shared_gate",
    "fedjets",
    "fedjets_frozen_stem",
    "fedjets_shared_gate",
    "fedjets_no_anchors",
    "fedjets_no_anchors_shared_gate",
    "fedmix",
    "fedmix_shared_gate",
    "fedmix_all",
    "fedmix_all_shared_gate",
    "fedmoe",
    "fedmoe_shared_gate",
    "fedmoe_da",
    "pfedmoe",
    "heterofl",
    "fedavg",
    "fedavg_active",
    "fedavg_smallest",
    "fedavg_dropout",
    "fedprox_active",
    "fednova_active",
    "scaffold_active",
    "fedadam_active",
    "local_active",
    "local_smallest",
    "centralised_active",
)
FEDADAM = "fedadam_active: fedadam.server_learning_rate=0.03"


def measure_all(config: ConfigDict, digits: bool) -> None:
    """Turns every measure on, in place."""
    config.partition.test_share = 0.1
    config.partition.unseen = 2
    config.evaluation.finetune = True
    config.evaluation.finetune_rate = 0.02 if digits else 0.01


def get_config(argument: str = "") -> ConfigDict:
    """The comparison. `argument` joins any of `digits`, `claims` and `smoke`."""
    claims, rest = compare.take_word(argument, "claims")
    config = compare.get_config(rest, ["claims"])
    digits = "digits" in rest
    config.compare.strategies = CLAIMS if claims else STRATEGIES
    compare.support_claims(config, rest)
    config.data.public = 50 if digits else 2500
    measure_all(config, digits)
    config.tune.servers = (*config.tune.servers, FEDADAM)
    if "smoke" in rest:
        config.compare.strategies = compare.FAMILIES
        config.evaluation.finetune = False  # which compiles as long as the rest
    return config
