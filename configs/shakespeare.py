"""Speakers as clients: what federation gives those who say little, and newcomers.

    python launch.py --config=configs/shakespeare.py --workdir=runs/tune --tune
    python launch.py --config=configs/shakespeare.py --workdir=runs/shakespeare \\
      --settings=runs/tune/settings.json
    python launch.py --config=configs/shakespeare.py:markov --workdir=runs/speakers

Every speaker of Shakespeare's plays with enough text is a client of its own, 155 in
all: 130 of them train, 20 a round, 25 are never seen and meet the global model alone.
The last tenth of what each says is its own test. The model is that of
`languages.py`. The data set is `tiny_shakespeare` of TFDS, prepared by `python -m
fedmoe_jax.data tiny_shakespeare`; `markov` needs no file: six writers in four embedded
languages train and two are unseen. `smoke` is short, with the embedded languages. Three
seeds; without `--settings` all share one rate.
"""

from ml_collections import ConfigDict

from configs import compare, default, languages

STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "fedavg_smallest",
    "fedavg_active",
    "local_active",
)
FEW = ("random", "fixed_random", "load_balanced", "fedavg_active", "local_active")


def set_speakers(config: ConfigDict) -> None:
    """Sets the speakers' data, clients and length of the study, in place."""
    config.data.name, config.data.client = "tiny_shakespeare", "speaker"
    config.data.length = 64
    config.data.kilobytes = config.data.test_kilobytes = 0
    config.num_clients, config.cohort_size, config.partition.unseen = 130, 20, 25
    config.num_experts, config.max_held = 8, 4
    config.num_rounds, config.eval_every = 100, 20
    config.chunk_rounds = config.checkpoint.every = 20


def set_writers(config: ConfigDict) -> None:
    """Sets the embedded languages' writers, in place."""
    config.num_clients, config.cohort_size, config.partition.unseen = 6, 4, 2
    config.num_rounds = 20
    config.evaluation.finetune = False  # which compiles as long as the rest


def get_config(argument: str = "") -> ConfigDict:
    """The comparison. `argument` joins any of `markov` and `smoke` with commas."""
    words = set(filter(None, argument.split(",")))
    if unknown := words - {"markov", "smoke"}:
        raise ValueError(
            f"config argument {min(unknown)!r} is unknown; allowed: markov, smoke"
        )
    config = languages.get_config(argument)
    smoke, embedded = "smoke" in words, bool(words)
    config.partition.kind = "natural"
    if embedded:
        set_writers(config)
    else:
        set_speakers(config)
    config.compare.strategies = FEW if embedded else STRATEGIES
    config.compare.seeds = (0, 1, 2)
    if smoke:
        default.shrink(config)
        config.compare.strategies, config.compare.seeds = compare.FAMILIES, (0,)
    return config
