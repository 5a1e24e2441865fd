"""Dense controls: one network, without experts to choose, that every client trains.

Each is there three times: as large as the mixture in total, as large as what an example
uses of it (`_active`), and as large as one expert, the least that a mixture asks of any
client (`_smallest`); `fedavg_held` is as wide as all that a client may hold. A shared
expert stays beside it, as in the mixture: the two hidden layers are one of their total
width, but for their initial weights. FedNova equals FedAvg but for rounding where all
clients take equally many steps (`local_epochs=0`). SCAFFOLD's mean of the control
variates weighs clients by their examples, as the averages of all systems here do; the
paper weighs clients alike in both. Where labels drift, these are the examples before
the drift.
"""

from collections.abc import Callable

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import PARTS, Strategy
from fedmoe_jax.optimizers import step_weights
from fedmoe_jax.options import POSITIVE, TRACED, Option, Range
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes

ConfigureFn = Callable[[ConfigDict], ConfigDict]


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds the one expert, whatever its capacity."""
    shape = (evidence.client.shape[0], sizes.max_held)
    return Assignment(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


def be_dense(config: ConfigDict, width_factor: int) -> ConfigDict:
    """One expert, `width_factor` times as wide, that every client holds.

    On a pretrained base it is that one with pairs of a rank so many times as high, or
    all of it, as wide as it is.
    """
    config.num_experts = config.max_held = config.num_active = 1
    if config.model.kind == "lora":
        config.model.lora_rank *= width_factor
        config.model.lora_alpha *= width_factor
    elif config.model.kind != "finetune":
        config.model.expert_width *= width_factor
    return config


def be_total(config: ConfigDict) -> ConfigDict:
    """A dense model of the mixture's total size: E experts' hidden units in one."""
    return be_dense(config, config.num_experts)


def be_active(config: ConfigDict) -> ConfigDict:
    """A dense model of the mixture's active size: A experts' hidden units in one."""
    return be_dense(config, config.num_active)


def be_held(config: ConfigDict) -> ConfigDict:
    """A dense model of the size that the strongest client holds: K experts in one."""
    return be_dense(config, config.max_held)


def be_smallest(config: ConfigDict) -> ConfigDict:
    """A dense model of the size of one expert."""
    return be_dense(config, 1)


def drop_outputs(config: ConfigDict) -> ConfigDict:
    """Dropout of the expert's outputs in training, as on an ensemble of networks."""
    config.model.expert_dropout = config.fedavg_dropout.rate
    return be_active(config)


def add_prox(config: ConfigDict) -> ConfigDict:
    """FedProx (arXiv 1812.06127): a proximal term in the local objective."""
    config.client.prox = config.fedprox.coefficient
    return config


def use_adam(config: ConfigDict) -> ConfigDict:
    """FedAdam (arXiv 2003.00295): a server that sees deltas as Adam's gradients."""
    config.server.optimizer = "fedadam"
    config.server.learning_rate = config.fedadam.server_learning_rate
    return config


def pool(config: ConfigDict) -> ConfigDict:
    """One client owns all data; its device has no limits, its world no events."""
    config.num_clients = config.cohort_size = 1
    config.availability.sampling, config.devices.overload = "uniform", "ignore"
    config.profile.kind, config.late.kind = "oracle", "wait"
    config.reaction.kind = "none"
    config.fairness.floor = config.fairness.power = 0.0
    config.pruning.kind = "none"
    return config


def normalise_steps(steps: Array, size: Array, momentum: float) -> Array:
    """FedNova's factors [C]: each delta per gradient, times their mean number."""
    weights = step_weights(steps, momentum)
    share = size / size.sum()
    return (share * weights).sum() / weights


ROOM = "room for the whole network on every client"
TWO_VARIATES = "room for two control variates of its size"
SGD_ONLY = (("client.optimizer", ("sgd",)),)  # `step_weights` knows no other


def make(
    about: str,
    change: ConfigureFn | None = None,
    needs: tuple[str, ...] = (),
    room: str = ROOM,
    **fields,
) -> tuple[Strategy, Strategy, Strategy]:
    """A control of the mixture's total, of its active and of one expert's size.

    Args:
      about: the control, without its size.
      change: of the config, beside the size of the model.
      needs: advantages of all three.
      room: what the larger two need in addition.
      **fields: of the records.
    """

    def control(size: str, resize: ConfigureFn, needs: tuple[str, ...]) -> Strategy:
        def configure(config: ConfigDict) -> ConfigDict:
            return change(resize(config)) if change else resize(config)

        return Strategy(
            about=f"Dense as {size}; {about}.",
            assign=assign,
            needs=", ".join(filter(None, needs)),
            configure=configure,
            **fields,
        )

    return (
        control("all experts together", be_total, (room, *needs)),
        control("the active experts", be_active, (room, *needs)),
        control("one expert", be_smallest, needs),
    )


FEDAVG, FEDAVG_ACTIVE, FEDAVG_SMALLEST = make("every client trains all of it")
FEDPROX, FEDPROX_ACTIVE, FEDPROX_SMALLEST = make(
    "FedAvg with a proximal term that holds clients near the server",
    add_prox,
    options=(
        Option("fedprox.coefficient", POSITIVE, "mu of the FedProx term", TRACED),
    ),
)
FEDNOVA, FEDNOVA_ACTIVE, FEDNOVA_SMALLEST = make(
    "FedAvg that does not let clients with more steps count for more; the same where "
    "all take equally many",
    allowed=SGD_ONLY,
    step_scale=normalise_steps,
)
FEDADAM, FEDADAM_ACTIVE, FEDADAM_SMALLEST = make(
    "FedAvg with Adam on the server",
    use_adam,
    options=(
        Option(
            "fedadam.server_learning_rate",
            POSITIVE,
            "step size of the server's Adam",
            TRACED,
        ),
    ),
)
LOCAL, LOCAL_ACTIVE, LOCAL_SMALLEST = make(
    "every client trains for itself alone",
    personal=PARTS,
    local_experts=1,
    every_expert=True,
    silent=True,
)
SCAFFOLD, SCAFFOLD_ACTIVE, SCAFFOLD_SMALLEST = make(
    "FedAvg with gradients corrected by control variates, which travel as well",
    needs=(TWO_VARIATES,),
    allowed=SGD_ONLY,
    variates=True,
)
CENTRALISED, CENTRALISED_ACTIVE, CENTRALISED_SMALLEST = make(
    "trained on the data of all clients in one place",
    pool,
    needs=("all data in one place",),
    room="",
    pooled=True,
    silent=True,
    reference=True,
)
FEDAVG_HELD = FEDAVG_ACTIVE._replace(
    about="Dense as the experts that a client may hold; every client trains all of it.",
    configure=be_held,
)
FEDAVG_DROPOUT = FEDAVG_ACTIVE._replace(
    about="Dense as the active experts; every client trains it with dropout.",
    configure=drop_outputs,
    options=(
        Option(
            "fedavg_dropout.rate",
            Range(0, 1, open_high=True),
            "share of the outputs of the network that training drops",
        ),
    ),
)
