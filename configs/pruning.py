"""Do pruned experts beat fewer experts?

    python launch.py --config=configs/pruning.py:digits --workdir=runs/pruning \\
      --settings=results/systems_digits/settings.json
    python launch.py --config=configs/pruning.py --workdir=runs/pruning_cifar \\
      --settings=results/systems_cifar/settings.json

Every client keeps to the bytes that its device has room for. It holds as many whole
experts as fit, or (`pruning.kind`) twice as many of which it keeps as many hidden units
as fit: the most important by one threshold over all layers (`lamp`, and `gap`), by the
norm of weights, or the same share of every layer, of the most important, random or
first units (the widths of HeteroFL). Further rows change one thing about `lamp`: the
experts held for one whole one, a ramp, no units that take turns; in two the stem is
pruned, too, by one threshold or by the same share of every layer; and one has whole
experts on devices with twice the room (`devices.model_scale`), so that at least twice
as many fit. `fedavg` is a dense network as wide as all experts, pruned
alike; `heterofl` is nested widths.

`Own sub-network %` is of what a client has; `Personal %` of the whole experts that it
holds a part of. Without `digits` it is on CIFAR-10, with the rows that decide. `smoke`
is short.
"""

from ml_collections import ConfigDict

from configs import compare
from fedmoe_jax.pruning.scores import SCORES

STRATEGIES = ("load_balanced", "random", "fedavg", "heterofl")
LAMP = "pruning.kind=lamp"
PARTS = ("spread=1.0", "spread=4.0", "ramp=20", "rotation=0.0")
# Stem and experts, layers of two kinds, which one threshold may cut differently.
BOTH = tuple(
    f"load_balanced: pruning.kind={kind},pruning.parts=all"
    for kind in ("lamp", "uniform")
)
PRUNED = ("load_balanced", "random", "fedavg")


def list_changes(strategy: str, kinds: tuple[str, ...]) -> list[str]:
    """The pruned forms of a strategy, one for each kind.

    Without turns where a client's units are to be the same in all rounds.
    """
    same = {"random": ",pruning.rotation=0.0", "width": ",pruning.rotation=0.0"}
    return [f"{strategy}: pruning.kind={kind}{same.get(kind, '')}" for kind in kinds]


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `digits` and `smoke` with commas."""
    config = compare.get_config(argument)
    compare.support_claims(config, argument)
    words = argument.split(",")
    config.max_held = config.num_experts
    config.evaluation.finetune = True
    config.evaluation.baseline = "load_balanced pruning.kind=none"
    config.compare.strategies = STRATEGIES
    scale = config.devices.model_scale / 2
    parts = [f"load_balanced: {LAMP},pruning.{part}" for part in PARTS]
    double = f"load_balanced: devices.model_scale={scale:g}"
    some = [change for s in PRUNED for change in list_changes(s, tuple(SCORES))]
    config.compare.changes = ("", *some, *parts, *BOTH, double)
    config.compare.seeds = config.compare.seeds[:5]
    if "digits" not in words:
        config.compare.seeds = (0, 1, 2)
        config.num_rounds, config.local_steps = 100, 10
        config.eval_every, config.checkpoint.every = 20, 20
        config.chunk_rounds = 5
        config.compare.strategies = ("load_balanced", "fedavg_active")
        some = list_changes("load_balanced", ("lamp", "uniform"))
        dense = f"fedavg_active: {LAMP}"
        config.compare.changes = ("", *some, dense, *BOTH, double)
    if "smoke" in words:
        config.compare.strategies = ("load_balanced",)
        config.compare.changes = ("", LAMP)
        config.evaluation.finetune = False
        config.num_rounds = config.eval_every = config.chunk_rounds = 2
        config.checkpoint.every, config.compare.seeds = 2, (0,)
    return config
