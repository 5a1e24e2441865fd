"""Every field of a config: its values, its scope and its meaning, in tables.

Strategies, processes and models bring fields of their own, in their records.
"""

from collections.abc import Callable
from typing import Any

from fedmoe_jax.align.fitness import SCORES
from fedmoe_jax.data.groups import KINDS as GROUPS
from fedmoe_jax.data.partition import KINDS
from fedmoe_jax.data.text import CLIENTS
from fedmoe_jax.models import MODELS
from fedmoe_jax.models.image_parts import EXPERTS, STEMS
from fedmoe_jax.models.precision import DTYPES
from fedmoe_jax.models.transformer import GATE_INPUTS
from fedmoe_jax.options import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    STATIC,
    TRACED,
    Option,
    Range,
    is_whole,
)
from fedmoe_jax.pruning.scores import KINDS as PRUNINGS
from fedmoe_jax.tasks import list_augments
from fedmoe_jax.world.devices import ORDERS, WIDEST

# Fields that may change between the calls that run and resume one simulation. A
# comparison's lists may, as its runs are checked one by one.
FREE_FIELDS = frozenset(
    {
        "num_rounds",
        "data.dir",
        "evaluation.targets",
        "evaluation.baseline",
        "checkpoint.every",
        "checkpoint.keep",
        "run.memory_limit_gb",
        "run.tensorboard",
        "compare.strategies",
        "compare.changes",
        "compare.seeds",
        "compare.settings",
        "tune.rates",
        "tune.servers",
        "tune.measure",
    }
)


SEEDS = Range(0, 2**31 - 1)

# The lists of a comparison: what an element is, and what is allowed.
LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strategies": (lambda x: isinstance(x, str), "names of strategies, as ('greedy',)"),
    "changes": (
        lambda x: isinstance(x, str),
        "changes, as ('', 'fitness.idle=keep')",
    ),
    "seeds": (
        lambda x: is_whole(x) and x in SEEDS,
        f"whole numbers in {SEEDS}, as (0, 1, 2)",
    ),
    "settings": (
        lambda x: isinstance(x, str),
        "strategies with changes, as ('greedy: client.learning_rate=0.06',)",
    ),
}
OPTIONAL_LISTS = ("settings",)  # which may be empty or missing


def list_rate_options(side: str, gradient: str) -> tuple[Option, ...]:
    """The fields that optimisers of `client` and `server` have in common."""
    return (
        Option(
            f"{side}.weight_decay",
            NON_NEGATIVE,
            "weights times this are part of the gradient, or decay apart from it with "
            "adamw; 0: none",
            STATIC,
        ),
        Option(
            f"{side}.clip",
            NON_NEGATIVE,
            f"largest norm of {gradient} over the whole model; 0: any",
            STATIC,
        ),
        Option(
            f"{side}.warm_up",
            Range(0),
            f"rounds in which {side}.learning_rate is reached linearly",
            STATIC,
        ),
        Option(
            f"{side}.cosine_rounds",
            Range(0),
            f"round from which {side}.learning_rate is {side}.floor of itself, at the "
            "end of half a cosine; 0: it stays",
            STATIC,
        ),
        Option(
            f"{side}.floor",
            SHARE,
            f"share of {side}.learning_rate that the cosine ends at",
            STATIC,
        ),
    )


OPTIONS: tuple[Option, ...] = (
    Option(
        "seed",
        SEEDS,
        "seed of the split, the devices, the initial weights and every draw",
    ),
    Option(
        "num_rounds",
        COUNT,
        "federated rounds, a multiple of eval_every; may grow when a run is resumed",
    ),
    Option(
        "eval_every",
        COUNT,
        "rounds from one evaluation to the next, a multiple of chunk_rounds",
    ),
    Option("chunk_rounds", COUNT, "rounds in one compiled call", STATIC),
    Option("num_clients", COUNT, "clients in the population"),
    Option("cohort_size", COUNT, "clients of a round, at most num_clients"),
    Option("num_experts", COUNT, "experts of the server's model"),
    Option(
        "max_held", COUNT, "expert slots of the largest client, at most num_experts"
    ),
    Option(
        "num_active",
        COUNT,
        "experts that the gate mixes for an example, at most max_held",
    ),
    Option("local_steps", COUNT, "optimiser steps of a client in a round"),
    Option(
        "local_epochs",
        NON_NEGATIVE,
        "passes over the client's data in a round; 0: local_steps instead",
    ),
    Option("batch_size", COUNT, "examples of a local step"),
    Option(
        "strategy",
        None,
        "name of the strategy, which decides which client trains which experts; see "
        "docs/strategies.md",
    ),
    Option(
        "plugins",
        None,
        "modules whose records have joined the tables; set by --plugins",
    ),
    Option(
        "data.name",
        None,
        "data set: digits (scikit-learn's), digit_pairs (two of them, 100 classes), "
        "synthetic (images whose best assignment is known), markov (text likewise), "
        "arrays (data.file), text (data.dir), or one that TFDS has prepared, such as "
        "cifar10, mnist or emnist/byclass",
    ),
    Option(
        "data.public",
        NON_NEGATIVE,
        "training examples that the server sets aside, drawn at random",
    ),
    Option(
        "data.dir",
        None,
        "TFDS folder; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets; of text the "
        "folder of .txt files",
    ),
    Option("data.file", None, ".npz file of arrays, see docs/running.md"),
    Option(
        "data.client",
        tuple(CLIENTS),
        "client of text: a file, its first folder (not of TFDS), or the speaker of a "
        "line NAME: after a blank one",
    ),
    Option("data.length", COUNT, "tokens of a window of text that are predicted"),
    Option(
        "data.kilobytes",
        NON_NEGATIVE,
        "text that each client trains on, from its start; 0: all but the last tenth",
    ),
    Option(
        "data.test_kilobytes",
        NON_NEGATIVE,
        "text of each client's test, or of a TFDS test split, from its start; 0: all",
    ),
    Option(
        "data.tokenizer",
        None,
        "file tokenizer.json of the package tokenizers, for text; empty: its bytes are "
        "the tokens",
    ),
    Option("data.image_key", None, "TFDS feature of the images; empty: the only one"),
    Option("data.label_key", None, "TFDS feature of the labels; empty: the only one"),
    Option("data.text_key", None, "TFDS feature of the text; empty: the only one"),
    Option(
        "partition.kind",
        tuple(KINDS),
        "division of the examples: Dirichlet over labels, shards of sorted "
        "labels, so many classes for each client, skewed sizes, equal shares at "
        "random, or the data set's own clients",
    ),
    Option(
        "partition.alpha",
        POSITIVE,
        "concentration of dirichlet (labels) and quantity (sizes); small is skewed",
    ),
    Option(
        "partition.classes_per_client",
        COUNT,
        "shards of each client, of shards, or its classes, of classes",
    ),
    Option("partition.min_size", COUNT, "examples that every client gets at least"),
    Option(
        "partition.overlap",
        NON_NEGATIVE,
        "examples that each client draws among all of them, so that they have several "
        "owners and a population may be larger than the data; 0: each has one owner",
    ),
    Option(
        "partition.test_share",
        Range(0, 1, open_high=True),
        "share of each client's examples that are its own test set, not trained on",
        STATIC,
    ),
    Option(
        "partition.validation_share",
        Range(0, 1, open_high=True),
        "share of each client's examples that are set aside for tuning, not trained on",
        STATIC,
    ),
    Option(
        "partition.unseen",
        NON_NEGATIVE,
        "clients beyond num_clients that own examples, never take part and are "
        "evaluated",
        STATIC,
    ),
    Option(
        "groups.kind",
        GROUPS,
        "transformation by which groups of clients differ: images rotated by 90 "
        "degrees more in each group, pixels inverted in the second of two, class "
        "labels permuted, or rotation and permutation; images with labels alone",
    ),
    Option(
        "groups.count",
        Range(2),
        "groups of clients, at most num_clients: 2 of inversion, up to 4 of rotation, "
        "up to the number of classes of permuted",
    ),
    Option(
        "groups.skew",
        NON_NEGATIVE,
        "s of the number of clients in group g = 0, 1, ..., which is in proportion to "
        "(g + 1) ** -s; 0: equally many in each",
    ),
    Option("model.kind", MODELS, "builder of the model"),
    Option(
        "model.dtype",
        DTYPES,
        "numbers that a model computes with; parameters, sums and scores are float32",
    ),
    Option(
        "model.stem",
        tuple(STEMS),
        "stem: none, one hidden layer, two convolutions at half or at full "
        "resolution, LeNet-5's, or ResNet-8",
    ),
    Option("model.stem_width", COUNT, "hidden units or channels of the stem"),
    Option(
        "model.expert",
        tuple(EXPERTS),
        "expert: one layer, one hidden layer, or a convolution and a layer",
    ),
    Option("model.expert_width", COUNT, "hidden units or channels of an expert"),
    Option(
        "model.feature_width",
        COUNT,
        "outputs of an expert; a dense one has expert_width",
    ),
    Option(
        "model.stem_dropout",
        Range(0, 1, open_high=True),
        "share of the stem's outputs that training drops",
    ),
    Option(
        "model.expert_dropout",
        Range(0, 1, open_high=True),
        "share of each expert's outputs that training drops",
    ),
    Option("model.blocks", COUNT, "blocks of a transformer"),
    Option(
        "model.moe_every",
        Range(1, 2),
        "a mixture in every block of a transformer, or in every second one",
    ),
    Option("model.heads", COUNT, "heads of queries, divisors of model.stem_width"),
    Option("model.kv_heads", COUNT, "heads of keys and values, divisors of heads"),
    Option(
        "model.dense_width",
        COUNT,
        "hidden units of a transformer's blocks without a mixture",
    ),
    Option(
        "model.shared_width",
        NON_NEGATIVE,
        "hidden units or channels of a shared expert beside the routed ones, which "
        "every client trains; 0: none",
    ),
    Option(
        "model.tied",
        None,
        "whether a client holds the same experts in all MoE layers of a transformer",
    ),
    Option(
        "model.remat",
        None,
        "whether backward passes of a transformer compute blocks again, for memory",
    ),
    Option(
        "model.scan",
        None,
        "whether a transformer's blocks are one loop, which compiles one of them",
    ),
    Option(
        "model.base",
        None,
        "folder of a pretrained model for lora and finetune: config.json and "
        "*.safetensors",
    ),
    Option("model.lora_rank", COUNT, "rank of an expert's pairs of lora"),
    Option("model.lora_alpha", POSITIVE, "lora scales its pairs by it over the rank"),
    Option(
        "model.lora_attention",
        NON_NEGATIVE,
        "rank of the pairs of queries and values of lora, which every client trains; "
        "0: none",
    ),
    Option(
        "model.lora_fixed",
        None,
        "whether the first matrix of every pair stays as it was drawn",
    ),
    Option(
        "gate.input",
        GATE_INPUTS,
        "hidden states that a transformer's gates score: each token's, or the mean of "
        "those so far",
    ),
    Option(
        "gate.mode",
        ("global", "holder_rows", "personal"),
        "gate rows: averaged over all clients, over the expert's holders "
        "alone, or kept by each client",
    ),
    Option(
        "gate.bias",
        NON_NEGATIVE,
        "added to a client's gate logit of the expert that suits it best, and less to "
        "others, in training and in the client's own inference; 0: none",
        TRACED,
    ),
    Option(
        "loss.calibration",
        NON_NEGATIVE,
        "weight of -log(gate mass on held experts) in the local loss",
        TRACED,
    ),
    Option(
        "loss.load", NON_NEGATIVE, "weight of the Switch load-balancing loss", TRACED
    ),
    Option("loss.z", NON_NEGATIVE, "weight of the router z-loss", TRACED),
    Option(
        "loss.latency",
        NON_NEGATIVE,
        "weight in the local loss of the time of the links to the experts that the "
        "gate expects to take, in deadlines of an answer; see expert_links",
        TRACED,
    ),
    Option(
        "client.optimizer",
        ("sgd", "adam", "adamw"),
        "optimiser of the local steps",
        STATIC,
    ),
    Option(
        "client.augment",
        list_augments,
        "how clients change their examples at random in every local step: images "
        "shifted by up to 4 pixels and mirrored",
        STATIC,
    ),
    Option("client.learning_rate", POSITIVE, "step size of the local steps", TRACED),
    Option("client.momentum", Range(0, 1, open_high=True), "momentum of sgd", STATIC),
    Option("client.prox", NON_NEGATIVE, "mu of the FedProx term; 0: none", TRACED),
    *list_rate_options("client", "a client's gradient"),
    Option(
        "server.optimizer",
        ("sgd", "momentum", "adam", "adamw", "fedadam", "yogi", "adagrad"),
        "optimiser that takes the mean update as a gradient; fedadam is the published "
        "form of adam, without correction of bias",
        STATIC,
    ),
    Option(
        "server.learning_rate",
        POSITIVE,
        "step size of the server; 1 with sgd is plain averaging",
        TRACED,
    ),
    *list_rate_options("server", "the mean update"),
    Option(
        "upcycle.rounds",
        NON_NEGATIVE,
        "first rounds in which all clients train the first expert alone, of which all "
        "others are copies: a dense warm-up; 0: none",
        TRACED,
    ),
    Option(
        "pruning.kind",
        PRUNINGS,
        "which hidden units clients keep of what they hold: by Taylor importance with "
        "one threshold for all layers (lamp), the same without what is behind a "
        "layer's first gap, by the norm of weights, or the same share of every layer: "
        "of the most important, random or first ones; see docs/strategies.md",
        STATIC,
    ),
    Option(
        "pruning.parts",
        ("experts", "all"),
        "parts whose hidden units are pruned: experts, or the stem, too",
        STATIC,
    ),
    Option(
        "pruning.spread",
        Range(1),
        "experts that a client holds for each whole one that it has room for, pruned "
        "to its bytes",
        TRACED,
    ),
    Option(
        "pruning.ramp",
        NON_NEGATIVE,
        "rounds in which that grows from 1, along a cubic curve; 0: from the start",
        TRACED,
    ),
    Option(
        "pruning.floor",
        Range(0, 1, open_low=True),
        "share of the units of every layer that each client keeps at least",
        TRACED,
    ),
    Option(
        "pruning.rotation",
        Range(0, 1, open_high=True),
        "share of the units of every layer that take turns, others in each round and "
        "client, whatever their importance",
        TRACED,
    ),
    Option(
        "pruning.rate",
        Range(0, 1, open_low=True),
        "weight of the newest importance in its moving average",
        TRACED,
    ),
    Option(
        "pruning.gap",
        NON_NEGATIVE,
        "deviations above the median that make a gap a large one, of gap",
        TRACED,
    ),
    Option(
        "merge.weight",
        ("examples", "routed"),
        "weight of an update in an expert's mean: examples that its client "
        "owns, or the share of them that is routed through the expert",
    ),
    Option(
        "fitness.feedback",
        tuple(SCORES),
        "feedback of a client about an expert: gate-weighted training accuracy, "
        "exp(-loss_scale * loss), accuracy mixed with frequency, or accuracy or loss "
        "against the mean of the client's experts; or the loss of each expert before "
        "training, alone or against that mean; see docs/strategies.md",
        STATIC,
    ),
    Option(
        "fitness.rate",
        Range(0, 1, open_low=True),
        "weight of the newest feedback in the moving average",
        TRACED,
    ),
    Option(
        "fitness.idle",
        ("keep", "decay", "prior"),
        "score of a pair without feedback in a round: it stays, decays to 0, "
        "or decays to the prior",
        STATIC,
    ),
    Option(
        "fitness.idle_decay",
        SHARE,
        "share of its distance to 0 or the prior that such a score keeps",
        TRACED,
    ),
    Option("fitness.prior", SHARE, "score before any feedback", TRACED),
    Option(
        "fitness.noise",
        SHARE,
        "half the width of the initial scores' noise; 0: experts are drawn at first",
        TRACED,
    ),
    Option(
        "fitness.exploration",
        SHARE,
        "chance that a client's scores are random in a round",
        TRACED,
    ),
    Option(
        "fitness.loss_scale",
        NON_NEGATIVE,
        "alpha of exp(-alpha * loss), of loss and probe; of the difference of "
        "relative_loss and relative_probe",
        TRACED,
    ),
    Option(
        "fitness.probe_share",
        Range(0, 0.5),
        "share of each client's examples that it never trains on and probes with, at "
        "least one, of probe and relative_probe, and of ifca; 0: it probes with those "
        "that it trains on, before the round",
        TRACED,
    ),
    Option(
        "fitness.frequency_share",
        SHARE,
        "share of the gate frequency in the feedback, of mixed",
        TRACED,
    ),
    Option("usage.decay", SHARE, "share of the usage that a round keeps", TRACED),
    Option(
        "weights.fitness",
        NON_NEGATIVE,
        "weight of the normalised fitness in the desirability",
        TRACED,
    ),
    Option(
        "weights.usage",
        NON_NEGATIVE,
        "weight of the normalised usage, which is subtracted",
        TRACED,
    ),
    Option(
        "devices.csv",
        None,
        "file of your own devices, instead of tiers; see docs/world.md",
    ),
    Option(
        "devices.tiers", None, "kinds of device, names of presets in world/devices.py"
    ),
    Option(
        "devices.shares", None, "share of each kind in the population; they sum to 1"
    ),
    Option(
        "devices.spread",
        Range(0, WIDEST),
        "standard deviation of the log of each capability within a kind",
    ),
    Option(
        "devices.order",
        ORDERS,
        "which client has which device: at random (or as devices.csv says), or, of "
        "labels, the less memory the lower the mean label (of groups and text: the "
        "mean stratum)",
    ),
    Option(
        "devices.free_memory",
        Range(0, 1, open_low=True),
        "share of the memory that training gets",
    ),
    Option(
        "devices.model_scale",
        POSITIVE,
        "bytes and FLOPs of the model that one simulated byte or FLOP stands for",
    ),
    Option(
        "devices.deadline",
        POSITIVE,
        "seconds of a round after which an update is late",
        STATIC,
    ),
    Option(
        "devices.communication_share",
        Range(0, 1, open_low=True, open_high=True),
        "share of the deadline for the links",
        STATIC,
    ),
    Option(
        "devices.buffer",
        Range(0, 1, open_high=True),
        "share of every resource that the server keeps in reserve",
        TRACED,
    ),
    Option(
        "devices.overload",
        ("ignore", "lose"),
        "update of a client that holds more than its memory: it counts all "
        "the same, or is lost",
        STATIC,
    ),
    Option(
        "profile.kind",
        ("oracle", "self_reported", "estimated"),
        "capacity that the server believes: the truth, reports with errors, "
        "or estimates from times and failures",
        STATIC,
    ),
    Option(
        "profile.links",
        ("round", "device"),
        "links by which a profile counts capacity: as they are in the round, with the "
        "radio channel as it is known, or the device's own; estimated has those of "
        "its times",
        STATIC,
    ),
    Option("profile.refresh", COUNT, "rounds from one profile to the next", TRACED),
    Option(
        "profile.deviation",
        Range(0, 1, open_high=True),
        "largest relative error of a report",
        TRACED,
    ),
    Option(
        "profile.fixed",
        SHARE,
        "share of the error that is each client's constant bias",
        TRACED,
    ),
    Option(
        "profile.rate",
        Range(0, 1, open_low=True),
        "weight of the newest observation in the estimates",
        TRACED,
    ),
    Option(
        "profile.exploration",
        SHARE,
        "chance that a client is given one expert more in a round, of estimated",
        TRACED,
    ),
    Option(
        "profile.caution",
        Range(1),
        "experts by which a failure lowers the estimate",
        TRACED,
    ),
    Option(
        "reaction.kind",
        ("none", "reset", "hasten"),
        "reaction when a client's feedback falls short of its fitness: its "
        "scores are reset, or learn faster",
        STATIC,
    ),
    Option(
        "reaction.slack", NON_NEGATIVE, "shortfall of fitness that is tolerated", TRACED
    ),
    Option(
        "reaction.threshold",
        POSITIVE,
        "accumulated shortfall that raises an alarm",
        TRACED,
    ),
    Option(
        "reaction.haste",
        Range(1),
        "rounds of learning in one after an alarm, of hasten",
        TRACED,
    ),
    Option("reaction.rounds", NON_NEGATIVE, "rounds of haste after an alarm", TRACED),
    Option(
        "reaction.evidence",
        COUNT,
        "scores of a pair before its shortfall counts",
        TRACED,
    ),
    Option(
        "fairness.floor",
        SHARE,
        "least share of the rounds, in the long run, in which each client's update "
        "counts, by virtual queues that choose the cohort; 0: none",
        TRACED,
    ),
    Option(
        "fairness.expert_floor",
        SHARE,
        "least share, in the long run, of the clients of each capacity that train an "
        "expert of the fitter half, by virtual queues that change assignments; 0: none",
        TRACED,
    ),
    Option(
        "fairness.tradeoff",
        POSITIVE,
        "V of these floors: the length of a queue that outweighs one unit of the draw, "
        "or of fitness; more is nearer to the run without a floor, and slower",
        TRACED,
    ),
    Option(
        "fairness.power",
        NON_NEGATIVE,
        "q of q-FFL: updates count times their client's loss of the model as received, "
        "in its first batch, to the power of it; 0: by their weights alone",
        TRACED,
    ),
    Option(
        "privacy.feedback_noise",
        NON_NEGATIVE,
        "standard deviation of the Gaussian noise that each client adds to every "
        "number of its feedback, each of them within [0, 1]; 0: none",
        TRACED,
    ),
    Option(
        "privacy.selection",
        NON_NEGATIVE,
        "epsilon of each expert that is picked by fitness: strategies read clipped "
        "fitness plus Gumbel noise of scale 2 / epsilon; 0: as it is",
        TRACED,
    ),
    Option(
        "privacy.flip",
        NON_NEGATIVE,
        "epsilon of randomised response on each of the E bits of what a client asks "
        "for on the link, with cover traffic; 0: it asks for what it holds",
        TRACED,
    ),
    Option(
        "privacy.clip",
        NON_NEGATIVE,
        "largest L2 norm of a client's whole update, and equal weights of all clients; "
        "0: any, and weights as configured",
        TRACED,
    ),
    Option(
        "privacy.noise",
        NON_NEGATIVE,
        "standard deviation of the Gaussian noise on every sum of updates, in "
        "privacy.clip; 0: none",
        TRACED,
    ),
    Option(
        "privacy.delta",
        Range(0, 1, open_low=True, open_high=True),
        "delta of the epsilon that is reported, less than 1 / num_clients where "
        "anything is private",
    ),
    Option(
        "privacy.observe",
        None,
        "whether a run records what a server, or a listener on the link, sees of each "
        "client, for attacks; see docs/privacy.md",
        STATIC,
    ),
    Option(
        "evaluation.dense_experts",
        COUNT,
        "largest number of experts of which each one sees every test image; "
        "beyond it only those that some gate chooses",
    ),
    Option(
        "evaluation.clients",
        NON_NEGATIVE,
        "clients whose personal accuracy is evaluated, at most, where parts are "
        "personal, gates have a bias or more sets of held experts are possible, and "
        "with their own label priors in any case: a sample drawn from the seed, where "
        "parts are personal of those that have taken part; 0: all",
        STATIC,
    ),
    Option(
        "evaluation.finetune",
        None,
        "whether the last evaluation also scores clients after one more local round, "
        "at most evaluation.clients of them; each of their models sees the whole test "
        "set",
        STATIC,
    ),
    Option(
        "evaluation.finetune_rate",
        NON_NEGATIVE,
        "step size of that local round; 0: client.learning_rate, without its schedule",
        TRACED,
    ),
    Option(
        "evaluation.targets",
        None,
        "global accuracies in (0, 1] to which the report counts rounds; none: 50, 80, "
        "90 and 95 % of the best control's final one",
    ),
    Option(
        "tuned",
        None,
        "measure by which --tune has chosen the rates of this run; empty: not tuned",
    ),
    Option(
        "evaluation.baseline",
        None,
        "row from which the report takes the others' differences seed by seed: its "
        "strategy, and after a space what it changes, as the table has it; empty: the "
        "best control",
    ),
    Option(
        "checkpoint.every",
        COUNT,
        "rounds from one checkpoint to the next, a multiple of chunk_rounds",
    ),
    Option("checkpoint.keep", COUNT, "newest checkpoints that stay on disk"),
    Option(
        "run.client_chunk",
        NON_NEGATIVE,
        "clients vmapped at once on each device; 0: one on a CPU, elsewhere as many as "
        "run.memory_limit_gb allows",
        STATIC,
    ),
    Option(
        "run.num_devices",
        NON_NEGATIVE,
        "devices of all processes together; 0: all, at most one per client",
    ),
    Option(
        "run.memory_limit_gb",
        POSITIVE,
        "estimated memory beyond which a run is refused, GB",
    ),
    Option("run.tensorboard", None, "whether TensorBoard events are written"),
)

# (field, other): field <= other
AT_MOST = (
    ("cohort_size", "num_clients"),
    ("max_held", "num_experts"),
    ("num_active", "max_held"),
)

# (field, other): field is a whole multiple of other
MULTIPLE = (
    ("num_rounds", "eval_every"),
    ("eval_every", "chunk_rounds"),
    ("checkpoint.every", "chunk_rounds"),
)
