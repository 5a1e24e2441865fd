"""The paper's first check: how experts are assigned, over 100 rounds of CIFAR-10.

    python launch.py --config=configs/figure3.py --workdir=runs/figure3 \\
      --settings=results/figure3/settings.json
    python launch.py --config=configs/figure3.py:fifty --workdir=runs/figure3_fifty \\
      --settings=results/figure3/settings.json

Random, greedy and load-balanced assignment as in Figure 3 of arXiv 2507.05685, beside
dense controls, under Dirichlet(0.1) with 20 clients and, with the argument `fifty`,
with 50; ten local steps a round, five seeds. The settings are those that `systems.py`
tuned on CIFAR-10 for these strategies; `--tune` tunes for this study. The usage of
every expert over the rounds is in the report's pictures. `digits` and `smoke` as in
`compare.py`.
"""

from ml_collections import ConfigDict

from configs import compare, systems

STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "fedavg_active",
    "fedavg_smallest",
)


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `fifty`, `digits` and `smoke` with commas."""
    fifty, rest = compare.take_word(argument, "fifty")
    config = compare.get_config(rest, ["fifty"])
    systems.measure_all(config, "digits" in rest)
    config.partition.unseen = 0
    compare.support_claims(config, rest)
    if "smoke" in rest:
        config.evaluation.finetune = False
    else:
        config.compare.strategies = STRATEGIES
        config.num_rounds, config.eval_every, config.checkpoint.every = 100, 5, 20
        config.chunk_rounds = 5
        if "digits" not in rest:
            config.local_steps = 10
    if fifty:
        config.num_clients = config.cohort_size = 50
    return config
