"""Rows that papers print on CIFAR-10, with their settings as far as these are known.

    python launch.py --config=configs/published.py:niid --workdir=runs/niid
    python launch.py --config=configs/published.py:flex_moe --workdir=runs/flex_moe
    python launch.py --config=configs/published.py:pfedmoe --workdir=runs/pfedmoe

* `niid`: dense FedAvg of NIID-Bench (arXiv 2102.02079; settings of its scripts): ten
  clients, LeNet-5, 50 rounds of ten epochs in batches of 64, rate 0.01, momentum 0.9,
  weight decay 1e-5, random crops and mirror images; Dirichlet(0.5) or two classes each.
  Initial weights and the order of examples are drawn otherwise.
* `flex_moe`: FLEX-MoE (arXiv 2512.23070): eight experts; IID, four classes each or
  Dirichlet(0.8). Clients, rounds, steps and rates could not be read, its ResNet is a
  CNN here: 20 clients, 100 rounds of ten steps, as in the other studies.
* `pfedmoe`: pFedMoE (arXiv 2402.01350), in the settings of a public port of it: ten
  clients of two classes each, whose examples are split 80 / 20 for training and test;
  ten steps a round instead of five epochs, and a smaller network.

Each goes on where it stopped. Three seeds; `smoke` is short.
"""

from ml_collections import ConfigDict

from configs import compare, default

CLASSES = "partition.kind=classes,partition.classes_per_client"
DIRICHLET = "partition.kind=dirichlet,partition.alpha"


def set_niid(config: ConfigDict) -> None:
    """FedAvg of NIID-Bench, in place."""
    config.compare.strategies = ("fedavg_smallest",)
    config.compare.changes = (f"{DIRICHLET}=0.5", f"{CLASSES}=2")
    config.num_clients = config.cohort_size = 10
    config.num_experts = config.max_held = config.num_active = 1
    config.model.stem, config.model.stem_width = "lenet", 6
    config.model.expert, config.model.expert_width = "dense", 84
    config.local_epochs, config.batch_size, config.num_rounds = 10.0, 64, 50
    config.client.learning_rate, config.client.clip = 0.01, 0.0
    config.client.weight_decay = 1e-5


def set_flex_moe(config: ConfigDict) -> None:
    """FLEX-MoE and the controls of its size, in place."""
    config.compare.strategies = ("flex_moe", "fedavg_active", "local_active")
    config.compare.changes = ("partition.kind=iid", f"{CLASSES}=4", f"{DIRICHLET}=0.8")
    config.local_steps, config.num_rounds = 10, 100
    config.eval_every = config.checkpoint.every = 20  # of twenty clients' own models


def set_pfedmoe(config: ConfigDict) -> None:
    """pFedMoE and its controls, tested on the clients' own examples, in place."""
    config.compare.strategies = ("pfedmoe", "fedavg_active", "local_active")
    config.compare.changes = (f"{CLASSES}=2",)
    config.partition.test_share = 0.2
    config.num_clients = config.cohort_size = 10
    config.local_steps, config.batch_size, config.num_rounds = 10, 256, 100
    config.client.learning_rate = 0.01
    config.eval_every = config.checkpoint.every = 20  # of ten clients' own models


SOURCES = {"niid": set_niid, "flex_moe": set_flex_moe, "pfedmoe": set_pfedmoe}


def get_config(argument: str = "") -> ConfigDict:
    """The rows of one source.

    `argument` joins a name of `SOURCES`, `niid` without one, and `smoke` with commas.
    """
    smoke, rest = compare.take_word(argument, "smoke")
    source = rest or "niid"
    if source not in SOURCES:
        raise ValueError(
            f"config argument {source!r} is unknown; allowed: {', '.join(SOURCES)}, "
            "smoke"
        )
    config = compare.get_config()
    del config.tune  # the settings are those of the source
    config.evaluation.baseline = ""
    config.client.augment = "crop_and_flip"
    config.eval_every = config.chunk_rounds = config.checkpoint.every = 5
    SOURCES[source](config)
    if smoke:
        default.shrink(config)
        config.compare.changes = config.compare.changes[:1]
        config.compare.seeds, config.local_epochs = (0,), min(config.local_epochs, 0.1)
    return config
