"""One load-balanced run on the embedded digits; every default of the project.

    python -m fedmoe_jax --workdir=DIR

`python -m fedmoe_jax --help` and docs/config.md describe every field. Other studies
start from this file and change what they study. The argument `smoke`
(`--config=configs/default.py:smoke`) is the same run in a few seconds.
"""

from typing import Any

from ml_collections import ConfigDict

from fedmoe_jax.tables import list_defaults, list_plugins


def get_config(argument: str = "") -> ConfigDict:
    """The default run. `argument` is empty or `smoke`."""
    config = ConfigDict()
    config.seed = 0
    config.num_rounds = 40
    config.eval_every = 2
    config.chunk_rounds = 2
    config.num_clients = 20
    config.cohort_size = 20
    config.num_experts = 8
    config.max_held = 4
    config.num_active = 2
    config.local_steps = 5
    config.local_epochs = 0.0
    config.batch_size = 32
    config.strategy = "load_balanced"
    config.plugins = list_plugins()
    config.tuned = ""

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.public = 0
    config.data.dir = ""
    config.data.file = ""
    config.data.client = "file"
    config.data.length = 32
    config.data.kilobytes = 0
    config.data.test_kilobytes = 0
    config.data.tokenizer = ""
    config.data.image_key = ""
    config.data.label_key = ""
    config.data.text_key = ""

    config.partition = ConfigDict()
    config.partition.kind = "dirichlet"
    config.partition.alpha = 0.1
    config.partition.classes_per_client = 2
    config.partition.min_size = 10
    config.partition.overlap = 0
    config.partition.test_share = 0.0
    config.partition.validation_share = 0.0
    config.partition.unseen = 0

    config.groups = ConfigDict()
    config.groups.kind = "none"
    config.groups.count = 4
    config.groups.skew = 0.0

    config.model = ConfigDict()
    config.model.kind = "image_moe"
    config.model.dtype = "float32"
    config.model.stem = "mlp"
    config.model.stem_width = 64
    config.model.expert = "mlp"
    config.model.expert_width = 64
    config.model.feature_width = 64
    config.model.stem_dropout = 0.0
    config.model.expert_dropout = 0.0
    config.model.blocks = 2
    config.model.moe_every = 1
    config.model.heads = 4
    config.model.kv_heads = 4
    config.model.dense_width = 64
    config.model.shared_width = 0
    config.model.tied = False
    config.model.remat = False
    config.model.scan = False
    config.model.base = ""
    config.model.lora_rank = 8
    config.model.lora_alpha = 16.0
    config.model.lora_attention = 0
    config.model.lora_fixed = False

    config.gate = ConfigDict()
    config.gate.mode = "global"
    config.gate.input = "token"
    config.gate.bias = 0.0

    config.loss = ConfigDict()
    config.loss.calibration = 0.2
    config.loss.load = 0.0
    config.loss.z = 0.0
    config.loss.latency = 0.0

    config.upcycle = ConfigDict()
    config.upcycle.rounds = 0

    config.pruning = ConfigDict()
    config.pruning.kind = "none"
    config.pruning.parts = "experts"
    config.pruning.spread = 2.0
    config.pruning.ramp = 0
    config.pruning.floor = 0.05
    config.pruning.rotation = 0.1
    config.pruning.rate = 0.3
    config.pruning.gap = 3.0

    config.client = ConfigDict()
    config.client.optimizer = "sgd"
    config.client.augment = "none"
    config.client.learning_rate = 0.02
    config.client.momentum = 0.9
    config.client.prox = 0.0
    config.client.weight_decay = 0.0
    config.client.clip = 0.0
    config.client.warm_up = 0
    config.client.cosine_rounds = 0
    config.client.floor = 0.0

    config.server = ConfigDict()
    config.server.optimizer = "sgd"
    config.server.learning_rate = 1.0
    config.server.weight_decay = 0.0
    config.server.clip = 0.0
    config.server.warm_up = 0
    config.server.cosine_rounds = 0
    config.server.floor = 0.0

    config.merge = ConfigDict()
    config.merge.weight = "examples"

    config.fitness = ConfigDict()
    config.fitness.feedback = "accuracy"
    config.fitness.rate = 0.3
    config.fitness.idle = "prior"
    config.fitness.idle_decay = 0.9
    config.fitness.prior = 0.5
    config.fitness.noise = 0.01
    config.fitness.exploration = 0.0
    config.fitness.loss_scale = 1.0
    config.fitness.probe_share = 0.0
    config.fitness.frequency_share = 0.5

    config.usage = ConfigDict()
    config.usage.decay = 0.9

    config.weights = ConfigDict()
    config.weights.fitness = 0.5
    config.weights.usage = 0.5

    config.channel_aware = ConfigDict()
    config.channel_aware.price = 1.0

    config.flex_moe = ConfigDict()
    config.flex_moe.low = 0.8
    config.flex_moe.high = 1.2
    config.flex_moe.deficit = 0.1

    config.hfedmoe = ConfigDict()
    config.hfedmoe.share = 0.5
    config.hfedmoe.beta = 0.1
    config.hfedmoe.threshold = 0.05

    config.fedmoe = ConfigDict()
    config.fedmoe.warm_up = 2
    config.fedmoe.coverage = 0.8
    config.fedmoe.period = 5

    config.fedmoe_da = ConfigDict()
    config.fedmoe_da.neighbours = 5
    config.fedmoe_da.temperature = 1.0
    config.fedmoe_da.period = 5

    config.fedmix = ConfigDict()
    config.fedmix.threshold = 0.05
    config.fedmix.sparsity = 0.1
    config.fedmix.variety = 0.1

    config.fedjets = ConfigDict()
    config.fedjets.steps = 200

    config.prototypes = ConfigDict()
    config.prototypes.period = 0
    config.prototypes.shrink = 5.0

    config.fedprox = ConfigDict()
    config.fedprox.coefficient = 0.1
    config.fedavg_dropout = ConfigDict()
    config.fedavg_dropout.rate = 0.5
    config.fedadam = ConfigDict()
    config.fedadam.server_learning_rate = 0.01

    config.devices = ConfigDict()
    config.devices.csv = ""
    config.devices.tiers = ("phone", "laptop", "workstation")
    config.devices.shares = (0.4, 0.4, 0.2)
    config.devices.spread = 0.4
    config.devices.order = "random"
    config.devices.free_memory = 1.0
    config.devices.model_scale = 1500.0
    config.devices.deadline = 60.0
    config.devices.communication_share = 0.5
    config.devices.buffer = 0.1
    config.devices.overload = "ignore"

    config.late = ConfigDict()
    config.late.kind = "wait"
    config.late.discount = 0.5

    config.profile = ConfigDict()
    config.profile.kind = "oracle"
    config.profile.links = "round"
    config.profile.refresh = 1
    config.profile.deviation = 0.3
    config.profile.fixed = 0.5
    config.profile.rate = 0.3
    config.profile.exploration = 0.1
    config.profile.caution = 2.0

    config.pressure = ConfigDict()
    config.pressure.share = 0.0
    config.pressure.persistence = 0.5
    config.pressure.left = 0.5

    config.background = ConfigDict()
    config.background.most = 0.0
    config.background.persistence = 0.5

    config.bandwidth = ConfigDict()
    config.bandwidth.spread = 0.0
    config.bandwidth.persistence = 0.5

    config.availability = ConfigDict()
    config.availability.share = 1.0
    config.availability.persistence = 0.0
    config.availability.swing = 0.0
    config.availability.day = 24.0
    config.availability.sampling = "uniform"
    config.availability.capacity_bias = 0.0
    config.availability.dropout = 0.0
    config.availability.early = 0.5

    config.channel = ConfigDict()
    config.channel.kind = "wired"
    config.channel.radius = 0.5
    config.channel.shadowing = 8.0
    config.channel.persistence = 0.9
    config.channel.csi = 1.0
    config.channel.refresh = 1
    config.channel.backoff = 1.0
    config.channel.min_snr = -6.0
    config.channel.bandwidth = 5e6
    config.channel.power_up = 23.0
    config.channel.power_down = 43.0

    config.fairness = ConfigDict()
    config.fairness.floor = 0.0
    config.fairness.expert_floor = 0.0
    config.fairness.tradeoff = 1.0
    config.fairness.power = 0.0

    config.expert_links = ConfigDict()
    config.expert_links.kind = "none"
    config.expert_links.snr = 5.0
    config.expert_links.spread = 5.0
    config.expert_links.persistence = 1.0
    config.expert_links.csi = 1.0
    config.expert_links.sight = 1.0
    config.expert_links.price = 0.0
    config.expert_links.airtime = 0.2
    config.expert_links.start = 0

    config.drift = ConfigDict()
    config.drift.labels = 0.0
    config.drift.images = "none"
    config.drift.strength = 30.0
    config.drift.share = 1.0
    config.drift.start = 20
    config.drift.rounds = 10

    config.reaction = ConfigDict()
    config.reaction.kind = "none"
    config.reaction.slack = 0.05
    config.reaction.threshold = 0.3
    config.reaction.haste = 3.0
    config.reaction.rounds = 5
    config.reaction.evidence = 3

    config.privacy = ConfigDict()
    config.privacy.feedback_noise = 0.0
    config.privacy.selection = 0.0
    config.privacy.flip = 0.0
    config.privacy.clip = 0.0
    config.privacy.noise = 0.0
    config.privacy.delta = 1e-5
    config.privacy.observe = False

    config.evaluation = ConfigDict()
    config.evaluation.dense_experts = 16
    config.evaluation.clients = 1000
    config.evaluation.finetune = False
    config.evaluation.finetune_rate = 0.0
    config.evaluation.targets = ()
    config.evaluation.baseline = ""

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20
    config.checkpoint.keep = 2

    config.run = ConfigDict()
    config.run.client_chunk = 0
    config.run.num_devices = 0
    config.run.memory_limit_gb = 8.0
    config.run.tensorboard = True

    for name, value in list_defaults().items():
        add_field(config, name, value)

    if argument == "smoke":
        shrink(config)
    elif argument:
        raise ValueError(f"config argument {argument!r} is unknown; allowed: smoke")
    return config


def add_field(config: ConfigDict, name: str, value: Any) -> None:
    """Adds the field of a plug-in, and its group where there is none yet, in place."""
    group, _, field = name.rpartition(".")
    if group and group not in config:
        config[group] = ConfigDict()
    (config[group] if group else config)[field] = value


def shrink(config: ConfigDict) -> None:
    """Makes any study a few seconds long, in place."""
    with config.unlocked():
        config.num_rounds, config.eval_every, config.chunk_rounds = 4, 2, 2
        config.local_steps, config.checkpoint.every = 2, 4
        config.fedmoe.warm_up, config.fedmoe.period = 1, 2
        config.fedjets.steps = 5
        config.drift.start, config.drift.rounds = 1, 2
