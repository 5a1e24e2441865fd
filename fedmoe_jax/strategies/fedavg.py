"""Dense controls: one network, without experts to choose, that every client trains.

Each is there twice: as large as the mixture in total, and as large as what an example
uses of it (`_active`). FedNova equals FedAvg but for rounding where all clients take
equally many steps (`local_epochs=0`). SCAFFOLD's mean of the control variates weighs
clients by their examples, as the averages of all systems here do; the paper weighs
clients alike in both.
"""

import jax.numpy as jnp

from fedmoe_jax.client import step_weights
from fedmoe_jax.options import POSITIVE
from fedmoe_jax.rules import PARTS, Rules
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes, Strategy


def _dense(sizes: Sizes, width_factor: int) -> Sizes:
    """One expert, `width_factor` times as wide, that everyone holds."""
    return sizes._replace(
        num_experts=1,
        max_held=1,
        num_active=1,
        expert_width=width_factor * sizes.expert_width,
    )


def resize_total(sizes: Sizes) -> Sizes:
    """A dense model of the mixture's total size: E experts' hidden units in one."""
    return _dense(sizes, sizes.num_experts)


def resize_active(sizes: Sizes) -> Sizes:
    """A dense model of the mixture's active size: A experts' hidden units in one."""
    return _dense(sizes, sizes.num_active)


def resize_pooled(sizes: Sizes) -> Sizes:
    """One client, with a dense model of the mixture's total size."""
    return resize_total(sizes)._replace(num_clients=1, cohort_size=1)


def resize_pooled_active(sizes: Sizes) -> Sizes:
    """One client, with a dense model of the mixture's active size."""
    return resize_active(sizes)._replace(num_clients=1, cohort_size=1)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds the one expert, whatever its capacity."""
    shape = (evidence.client.shape[0], sizes.max_held)
    return Assignment(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


def add_prox(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """FedProx (arXiv 1812.06127): a proximal term in the local objective."""
    return rules._replace(prox=True)


def set_prox(hyper: Hyper) -> Hyper:
    """FedProx: the coefficient mu of the proximal term."""
    return hyper.replace(prox=hyper.own["coefficient"])


def normalise_steps(steps: Array, size: Array, momentum: float) -> Array:
    """FedNova's factors [C]: each delta per gradient, times their mean number."""
    weights = step_weights(steps, momentum)
    share = size / size.sum()
    return (share * weights).sum() / weights


def add_normalisation(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """FedNova: clients that take more steps do not count for more."""
    return rules._replace(step_scale=normalise_steps)


def use_adam(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """FedAdam (arXiv 2003.00295): Adam on the server, seeing deltas as gradients."""
    return rules._replace(server_optimizer="adam")


def set_server_rate(hyper: Hyper) -> Hyper:
    """FedAdam: the server's own learning rate."""
    return hyper.replace(server_learning_rate=hyper.own["server_learning_rate"])


def add_variates(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """SCAFFOLD (arXiv 1910.06378): gradients corrected for what clients differ in."""
    return rules._replace(variates=True)


def stay_local(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """Every client has a whole network of its own."""
    return rules._replace(
        personal=PARTS, local_experts=1, every_expert=True, silent=True
    )


def stay_silent(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """Nothing travels."""
    return rules._replace(silent=True)


ROOM = "room for the whole network on every client"
SGD_ONLY = (("client.optimizer", ("sgd",)),)  # `step_weights` knows no other


def make(note: str, needs: str = ROOM, **fields) -> tuple[Strategy, Strategy]:
    """A control of the mixture's total size, and one of its active size."""
    fields = {"assign": assign, "needs": needs, **fields}
    total, active = "Dense as all experts together", "Dense as the active experts"
    return (
        Strategy(resize=resize_total, note=f"{total}; {note}.", **fields),
        Strategy(resize=resize_active, note=f"{active}; {note}.", **fields),
    )


FEDAVG, FEDAVG_ACTIVE = make("every client trains all of it")
FEDPROX, FEDPROX_ACTIVE = make(
    "FedAvg with a proximal term that holds clients near the server",
    options="fedprox",
    allowed=(("fedprox.coefficient", POSITIVE),),
    adapt=add_prox,
    tune=set_prox,
)
FEDNOVA, FEDNOVA_ACTIVE = make(
    "FedAvg that does not let clients with more steps count for more; the same where "
    "all take equally many",
    allowed=SGD_ONLY,
    adapt=add_normalisation,
)
FEDADAM, FEDADAM_ACTIVE = make(
    "FedAvg with Adam on the server",
    options="fedadam",
    allowed=(("fedadam.server_learning_rate", POSITIVE),),
    adapt=use_adam,
    tune=set_server_rate,
)
LOCAL, LOCAL_ACTIVE = make("every client trains for itself alone", adapt=stay_local)
SCAFFOLD, SCAFFOLD_ACTIVE = make(
    "FedAvg with gradients corrected by control variates, which travel as well",
    needs=f"{ROOM}, and for two control variates of its size",
    allowed=SGD_ONLY,
    adapt=add_variates,
)
CENTRALISED, CENTRALISED_ACTIVE = make(
    "trained on the data of all clients in one place",
    needs="all data in one place",
    pooled=True,
    adapt=stay_silent,
)
CENTRALISED = CENTRALISED._replace(resize=resize_pooled)
CENTRALISED_ACTIVE = CENTRALISED_ACTIVE._replace(resize=resize_pooled_active)
