"""Low-rank experts on a frozen base: other languages than those it was trained on.

    python launch.py --config=configs/lora.py:base --config.data.dir=FIRST \\
      --workdir=runs/base
    python -m fedmoe_jax.export runs/base bases/first
    python launch.py --config=configs/lora.py --config.data.dir=OTHERS \\
      --config.model.base=bases/first --workdir=runs/tune --tune
    python launch.py --config=configs/lora.py --config.data.dir=OTHERS \\
      --config.model.base=bases/first --workdir=runs/lora \\
      --settings=runs/tune/settings.json
    python launch.py --config=configs/lora.py:full --config.data.dir=OTHERS \\
      --config.model.base=bases/first --workdir=runs/tune_full --tune
    python launch.py --config=configs/lora.py:full --config.data.dir=OTHERS \\
      --config.model.base=bases/first --workdir=runs/full \\
      --settings=runs/tune_full/settings.json

FIRST and OTHERS are folders of languages as `languages.py` reads them, four each.
`base` trains a dense byte transformer of two blocks on all text of FIRST in one place,
for some minutes. Then it is frozen, and two clients for each language of OTHERS train
pairs of rank 8 beside its hidden layers and its attention's queries and values: experts
that a strategy assigns, one pair for all (`fedavg_smallest`; as FedIT, `fedavg_active`
with the rank of two experts), or pairs without federation (`local_active`). `full` is
full fine-tuning, of all weights of the base, at rates of its own: by all clients, by
each alone, and of experts that start as copies of its hidden layers (`oracle`); its
runs join the others by `--report=runs/lora,runs/full`. `markov` trains the base, and
then the experts, on the four embedded languages, without a file; `smoke` is short.
"""

from ml_collections import ConfigDict

from configs import compare, default, languages

STRATEGIES = (
    *("random", "fixed_random", "greedy", "load_balanced", "oracle", "prototypes"),
    *("fedavg_smallest", "fedavg_active", "local_active"),
)
FULL = ("oracle", "fedavg_smallest", "local_smallest")
RANK = 8


def make_base(words: set[str]) -> ConfigDict:
    """The run that trains the base.

    Args:
      words: `markov` or `smoke`, which both have the embedded languages.
    """
    config = default.get_config()
    languages.make_text(config, markov=bool(words))
    config.strategy = "centralised_smallest"
    config.partition.kind = "natural"
    config.data.kilobytes = 0
    if not words:
        config.num_clients = config.cohort_size = 4
        config.model.expert_width, config.num_rounds = 128, 400
        config.client.cosine_rounds = 400
    if "smoke" in words:
        default.shrink(config)
    return config


def get_config(argument: str = "") -> ConfigDict:
    """The comparison, or the run that trains its base.

    `argument` joins any of `base`, `full`, `markov` and `smoke` with commas; `base`
    and `full` exclude each other.
    """
    base, rest = compare.take_word(argument, "base")
    full, rest = compare.take_word(rest, "full")
    words = set(filter(None, rest.split(",")))
    if unknown := words - {"markov", "smoke"}:
        raise ValueError(
            f"config argument {min(unknown)!r} is unknown; allowed: base, full, "
            "markov, smoke"
        )
    if base and full:
        raise ValueError(
            f"config argument {argument!r} has both; allowed: base or full"
        )
    if base:
        return make_base(words)
    config = languages.get_config(rest)
    config.model.kind = "finetune" if full else "lora"
    config.model.lora_rank = config.model.lora_attention = RANK
    config.model.lora_alpha = 2.0 * RANK
    config.num_experts, config.max_held = 4, 2
    config.num_clients = config.cohort_size = 8
    config.compare.strategies = FULL if full else STRATEGIES
    config.evaluation.baseline = "fedavg_smallest"
    if "smoke" in words:
        config.compare.strategies = ("prototypes", "fedavg_smallest")
    return config
