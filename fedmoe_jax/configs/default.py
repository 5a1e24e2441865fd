"""One load-balanced run on the embedded digits; every default of the project.

    python launch.py --workdir=DIR

Other studies start from this file and change what they study. The argument `smoke`
(`--config=configs/default.py:smoke`) is the same run in a few seconds.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """The default run. `argument` is empty or `smoke`."""
    config = ConfigDict()
    config.seed = 0  # of data split, devices, initial weights and every draw
    config.num_rounds = 40  # federated rounds
    config.eval_every = 2  # rounds; divides num_rounds
    config.chunk_rounds = 2  # rounds in one compiled call; divides eval_every
    config.num_clients = 20  # population
    config.cohort_size = 20  # clients per round, at most num_clients
    config.num_experts = 8  # experts in the server's model
    config.max_held = 4  # expert slots of the largest client, at most num_experts
    config.num_active = 2  # experts per example, at most max_held
    config.local_steps = 5  # optimiser steps per client and round
    config.local_epochs = 0.0  # passes over the client's data instead; 0: local_steps
    config.batch_size = 32  # examples per local step
    config.strategy = "load_balanced"  # see the README's table of strategies

    config.data = ConfigDict()
    config.data.name = "digits"  # digits | synthetic | cifar10
    config.data.public = 0  # training examples of the server, drawn at random
    config.data.dir = ""  # TFDS folder; empty: TFDS_DATA_DIR or ~/tensorflow_datasets

    config.partition = ConfigDict()
    config.partition.kind = "dirichlet"  # dirichlet | shards | quantity | iid | natural
    config.partition.alpha = 0.1  # > 0; of dirichlet (labels) and quantity (sizes)
    config.partition.classes_per_client = 2  # of shards
    config.partition.min_size = 10  # examples every client gets at least

    config.model = ConfigDict()
    config.model.kind = "image_moe"  # image_moe
    config.model.stem = "mlp"  # flat | mlp | cnn | simple_cnn | resnet8
    config.model.stem_width = 64  # hidden units or channels
    config.model.expert = "mlp"  # dense | mlp | conv
    config.model.expert_width = 64  # hidden units or channels
    config.model.feature_width = 64  # outputs of an expert; dense has expert_width
    config.model.stem_dropout = 0.0  # share of the stem's outputs dropped in training
    config.model.expert_dropout = 0.0  # share of each expert's outputs dropped

    config.gate = ConfigDict()
    config.gate.mode = "global"  # global | holder_rows | personal

    config.loss = ConfigDict()
    config.loss.calibration = 0.2  # weight of -log(gate mass on held experts)
    config.loss.load = 0.0  # weight of the Switch load loss
    config.loss.z = 0.0  # weight of the router z-loss

    config.client = ConfigDict()
    config.client.optimizer = "sgd"  # sgd | adam
    config.client.learning_rate = 0.02  # > 0
    config.client.momentum = 0.9  # of sgd
    config.client.prox = 0.0  # FedProx coefficient

    config.server = ConfigDict()
    config.server.optimizer = "sgd"  # sgd | momentum | adam | yogi | adagrad
    config.server.learning_rate = 1.0  # > 0; 1 with sgd is plain averaging

    config.merge = ConfigDict()
    config.merge.weight = "examples"  # examples (owned) | routed (trained through it)

    config.fitness = ConfigDict()
    config.fitness.feedback = "accuracy"  # accuracy | loss | mixed
    config.fitness.rate = 0.3  # weight of the newest feedback in the EMA
    config.fitness.idle = "prior"  # keep | decay | prior
    config.fitness.idle_decay = 0.9  # per round, of decay and prior
    config.fitness.prior = 0.5  # score before any feedback, 0 to 1
    config.fitness.noise = 0.01  # spread of the initial scores about the prior
    config.fitness.exploration = 0.0  # chance per client and round of random scores
    config.fitness.loss_scale = 1.0  # alpha of exp(-alpha * loss), of loss
    config.fitness.frequency_share = 0.5  # of mixed

    config.usage = ConfigDict()
    config.usage.decay = 0.9  # share of the usage kept per round

    config.weights = ConfigDict()
    config.weights.fitness = 0.5  # of normalised fitness in the desirability
    config.weights.usage = 0.5  # of normalised usage, subtracted

    config.flex_moe = ConfigDict()
    config.flex_moe.low = 0.8  # least load of an expert, as a share of the mean
    config.flex_moe.high = 1.2  # largest load
    config.flex_moe.deficit = 0.1  # weight of what an expert has lacked, in mean loads

    config.hfedmoe = ConfigDict()
    config.hfedmoe.share = 0.5  # of the mean gate in an expert's importance
    config.hfedmoe.beta = 0.1  # weight of the information in the choice of an expert
    config.hfedmoe.threshold = 0.05  # mean gate from which an expert is merged

    config.fedmoe = ConfigDict()
    config.fedmoe.warm_up = 2  # first rounds of each client, with all experts
    config.fedmoe.coverage = 0.8  # share of its routing that a sub-model answers
    config.fedmoe.period = 5  # rounds from one recommendation to the next

    config.fedmoe_da = ConfigDict()
    config.fedmoe_da.neighbours = 5  # experts that each is mixed with
    config.fedmoe_da.temperature = 1.0  # > 0, of the softmax of similarities
    config.fedmoe_da.period = 5  # rounds from one renewal of the weights to the next

    config.fedmix = ConfigDict()
    config.fedmix.threshold = 0.05  # mean gate below which an expert is not asked for
    config.fedmix.sparsity = 0.1  # weight of the mean entropy of the gates
    config.fedmix.variety = 0.1  # weight of the entropy of the mean gate, subtracted

    config.fedjets = ConfigDict()
    config.fedjets.steps = 200  # local steps on data.public that train the stem

    config.fedprox = ConfigDict()
    config.fedprox.coefficient = 0.1  # mu of the proximal term
    config.fedadam = ConfigDict()
    config.fedadam.server_learning_rate = 0.01  # > 0

    config.devices = ConfigDict()
    config.devices.csv = ""  # file of one's own devices instead of tiers; see README
    config.devices.tiers = ("phone", "laptop", "workstation")  # kinds of device
    config.devices.shares = (0.4, 0.4, 0.2)  # of the population, sum to 1
    config.devices.spread = 0.4  # standard deviation of the log within a tier, to 5
    config.devices.free_memory = 1.0  # share of the memory that training gets
    config.devices.model_scale = 1500.0  # one simulated byte or FLOP stands for so many
    config.devices.deadline = 60.0  # seconds a round may take
    config.devices.communication_share = 0.5  # of the deadline, for the links
    config.devices.buffer = 0.1  # share of every resource kept in reserve
    config.devices.overload = "ignore"  # ignore | lose (whoever holds too much)

    config.late = ConfigDict()
    config.late.kind = "wait"  # wait | drop | stale (merged a round later)
    config.late.discount = 0.5  # share of a stale update that is applied

    config.profile = ConfigDict()
    config.profile.kind = "oracle"  # oracle | self_reported | estimated
    config.profile.refresh = 1  # rounds from one profile to the next
    config.profile.deviation = 0.3  # largest relative error of a report
    config.profile.fixed = 0.5  # share of the error that is each client's bias
    config.profile.rate = 0.3  # weight of the newest observation in the estimates
    config.profile.exploration = 0.1  # chance per client and round of one expert more
    config.profile.caution = 2.0  # experts by which a failure lowers the aim

    config.pressure = ConfigDict()
    config.pressure.share = 0.0  # of the time that other apps press on memory
    config.pressure.persistence = 0.5  # correlation from round to round
    config.pressure.left = 0.5  # share of the memory that is left under pressure

    config.background = ConfigDict()
    config.background.most = 0.0  # largest share of compute that other work takes
    config.background.persistence = 0.5  # correlation from round to round

    config.bandwidth = ConfigDict()
    config.bandwidth.spread = 0.0  # standard deviation of the log of a link's speed
    config.bandwidth.persistence = 0.5  # correlation from round to round

    config.availability = ConfigDict()
    config.availability.share = 1.0  # of the time that a client can be reached
    config.availability.persistence = 0.0  # correlation from round to round
    config.availability.swing = 0.0  # by how much the share rises and falls in a day
    config.availability.day = 24.0  # rounds
    config.availability.sampling = "uniform"  # uniform | size | reachable
    config.availability.dropout = 0.0  # chance per client and round of being lost
    config.availability.early = 0.5  # share of the lost that never start training

    config.channel = ConfigDict()
    config.channel.kind = "wired"  # wired | wireless
    config.channel.radius = 0.5  # km, of the cell
    config.channel.shadowing = 8.0  # dB, standard deviation
    config.channel.persistence = 0.9  # correlation of the fading from round to round
    config.channel.csi = 1.0  # correlation of the known and the true fading
    config.channel.backoff = 1.0  # share of the known channel's rate that is used
    config.channel.min_snr = -6.0  # dB, below it there is no link
    config.channel.bandwidth = 5e6  # Hz for each client
    config.channel.power_up = 23.0  # dBm, of a client
    config.channel.power_down = 43.0  # dBm, of the station

    config.drift = ConfigDict()
    config.drift.labels = 0.0  # share of their examples that clients hand on
    config.drift.images = "none"  # none | rotate | blur | contrast
    config.drift.strength = 30.0  # degrees, pixels, or share of the contrast
    config.drift.share = 1.0  # of the clients
    config.drift.start = 20  # first round with drift, counted from 0
    config.drift.rounds = 10  # until it is complete; 1 is abrupt

    config.reaction = ConfigDict()
    config.reaction.kind = "none"  # none | reset | hasten, when fitness falls short
    config.reaction.slack = 0.05  # shortfall of fitness that is tolerated
    config.reaction.threshold = 0.3  # accumulated shortfall that is an alarm
    config.reaction.haste = 3.0  # rounds of learning in one, of hasten
    config.reaction.rounds = 5  # of haste after an alarm
    config.reaction.evidence = 3  # scores of a pair before it raises any suspicion

    config.evaluation = ConfigDict()
    config.evaluation.dense_experts = 16  # up to so many, all see every test image

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # rounds; a multiple of chunk_rounds
    config.checkpoint.keep = 2  # newest checkpoints that stay on disk

    config.run = ConfigDict()
    config.run.client_chunk = 1  # clients vmapped at once on each device
    config.run.num_devices = 0  # of all processes; 0: all, one per client at most
    config.run.memory_limit_gb = 8.0  # estimated memory beyond which a run is refused
    config.run.tensorboard = True  # write TensorBoard events

    if argument == "smoke":
        shrink(config)
    elif argument:
        raise ValueError(f"config argument {argument!r} is unknown; allowed: smoke")
    return config


def shrink(config: ConfigDict) -> None:
    """Makes any study a few seconds long, in place."""
    with config.unlocked():
        config.num_rounds, config.eval_every, config.chunk_rounds = 4, 2, 2
        config.local_steps, config.checkpoint.every = 2, 4
        config.fedmoe.warm_up, config.fedmoe.period = 1, 2
        config.fedjets.steps = 5
        config.drift.start, config.drift.rounds = 1, 2
