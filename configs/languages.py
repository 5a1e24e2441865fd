"""Federated language models: does an assignment find the languages?

    python launch.py --config=configs/languages.py:markov --workdir=runs/markov
    python launch.py --config=configs/languages.py --config.data.dir=FOLDER \\
      --workdir=runs/tune --tune
    python launch.py --config=configs/languages.py --config.data.dir=FOLDER \\
      --workdir=runs/languages --settings=runs/tune/settings.json

Clients write in one language each, two clients for each language, and train a byte
transformer of two blocks with a mixture in both. `markov` has one block and four
languages that are Markov sources over one alphabet, whose limit in bits is known, needs
no file and takes 58 s on two cores, with nothing compiled before; without it FOLDER
has a folder of .txt files for each of eight languages, of which the first 80 kB are for
training, 40 for each client, a tenth of them to tune on, and 20 kB of the last tenth
for the test. docs/running.md says where to find such texts; `--only=1/4` to
`--only=4/4` run the study in parts. `oracle` knows each client's language, `prototypes`
looks for it.
`fitness` compares what the paper's rules make of other feedback than accuracy: loss,
both less their means over the client's experts, and the loss of each expert before it
is trained on examples that the client keeps for that (`probe`), alone and so related.
`amounts` asks how the answer moves with the text that a client has, from 40 to 400 kB.
Both share rows with the study, and in its folder (`--workdir=runs/languages`) run only
what is new.
`smoke` is short, with the embedded languages. Two seeds on these, three on others;
without `--settings` all share one rate.
"""

from ml_collections import ConfigDict

from configs import compare, default

STRATEGIES = (
    "random",
    "fixed_random",
    "greedy",
    "load_balanced",
    "load_balanced_running",
    "oracle",
    "prototypes",
    "prototypes_bounded",
    "flex_moe",
    "hfedmoe",
    "fedmoe",
    "fedavg_smallest",
    "fedavg_active",
    "fedavg_held",
    "local_active",
)
FEEDBACK = ("loss", "relative", "relative_loss")
HELD_OUT = ("probe", "relative_probe")  # on a tenth that no client trains on
FEW = (
    *("random", "fixed_random", "greedy", "load_balanced", "oracle", "prototypes"),
    *("fedavg_active", "local_active"),
)
KILOBYTES = (200, 800)  # of a language, which two clients share, besides 80
AMOUNTS = ("oracle", "prototypes", "fedavg_active", "local_active")


def make_text(config: ConfigDict, markov: bool) -> None:
    """Sets data, model and training of text, in place."""
    config.data.name = "markov" if markov else "text"
    config.data.client, config.data.length = "folder", 32 if markov else 128
    config.data.kilobytes = 0 if markov else 80
    config.data.test_kilobytes = 0 if markov else 20
    languages = 4 if markov else 8
    config.num_clients = config.cohort_size = 2 * languages
    config.partition.kind, config.partition.classes_per_client = "classes", 1
    config.num_experts, config.num_active = languages, 2
    config.max_held = 2 if markov else 4
    config.model.kind, config.model.blocks = "transformer", 1 if markov else 2
    config.model.stem_width, config.model.expert_width = (
        (32, 32) if markov else (64, 64)
    )
    config.gate.input, config.loss.calibration = "prefix", 1.0
    config.client.optimizer, config.client.learning_rate = "adamw", 0.003
    config.client.clip = 1.0
    config.local_steps, config.batch_size = 10, 8
    config.num_rounds = 20 if markov else 100
    every = 10 if markov else 20
    config.eval_every = config.chunk_rounds = config.checkpoint.every = every
    config.devices.model_scale = 2000.0 if markov else 200.0
    config.evaluation.finetune = not markov  # which compiles as long as the rest


def get_config(argument: str = "") -> ConfigDict:
    """The comparison.

    `argument` joins any of `markov`, `fitness`, `amounts` and `smoke` with commas;
    `amounts` is of text from folders.
    """
    fitness, rest = compare.take_word(argument, "fitness")
    amounts, rest = compare.take_word(rest, "amounts")
    words = set(filter(None, rest.split(",")))
    if unknown := words - {"markov", "smoke"}:
        raise ValueError(
            f"config argument {min(unknown)!r} is unknown; allowed: markov, fitness, "
            "amounts, smoke"
        )
    if amounts and (words or fitness):
        raise ValueError(
            f"config argument 'amounts' is not allowed with {argument!r}; allowed: "
            "'amounts' alone"
        )
    smoke = "smoke" in words
    config = compare.get_config("digits,smoke" if smoke else "digits")
    make_text(config, markov=bool(words))
    config.compare.strategies = FEW if words else STRATEGIES
    config.compare.seeds = (0, 1) if words else (0, 1, 2)
    if fitness:
        config.compare.strategies = ("greedy", "load_balanced")
        probes = [
            f"fitness.feedback={kind},fitness.probe_share=0.1" for kind in HELD_OUT
        ]
        kinds = [f"fitness.feedback={kind}" for kind in FEEDBACK]
        config.compare.changes = ("", *kinds, *probes)
        config.evaluation.baseline = "greedy fitness.feedback=accuracy"
    if amounts:
        config.compare.strategies = AMOUNTS
        more = [f"data.kilobytes={size}" for size in KILOBYTES]
        config.compare.changes = ("", *more)
        config.evaluation.baseline = "fedavg_active data.kilobytes=80"
    rates = (0.0003, 0.001, 0.003, 0.01, 0.03)
    config.tune.rates = rates[:4] if words else rates[1:]
    fedadam = "server.optimizer=fedadam,server.learning_rate=0.003"
    config.tune.servers = ("", fedadam) if words else ("",)
    config.tune.measure = "validation_personal_bits"
    config.partition.validation_share = 0.1
    if smoke:
        default.shrink(config)
        if not fitness:
            config.compare.strategies = ("random", "oracle", "fedavg_active")
        config.compare.seeds = (0,)
        config.evaluation.finetune = False
    return config
