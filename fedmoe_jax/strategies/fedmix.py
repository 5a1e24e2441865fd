"""FedMix-style (arXiv 2107.06724): an ensemble whose members each user chooses.

From the abstract and recollections of the text, which could not be read. Each client
has a gate `pi` of its own and mixes the experts' predictions, `p(y|x) = sum_k pi_k(x)
p_k(y|x)`; sparse but varied use is asked of the gate; experts are averaged by their
responsibilities. Experts share the stem here; in the paper they are whole networks.
`fedmix_all` gives every client all experts, as papers that compare with FedMix do.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from ml_collections import ConfigDict

from fedmoe_jax.align.gate_mass import (
    init_mass,
    mass_or_random,
    report_mass,
    update_mass,
)
from fedmoe_jax.align.ties import top_k_by_lot
from fedmoe_jax.align.top_k import give_all_slots, hold_all
from fedmoe_jax.base import Strategy
from fedmoe_jax.options import NON_NEGATIVE, SHARE, TRACED, Option
from fedmoe_jax.positions import average
from fedmoe_jax.types import Array, Assignment, Evidence, Feedback, Hyper, Sizes


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """The experts that the client's gate asks for, as many as it has room for.

    Those whose mean gate is below `threshold` are left out; a client that has not
    taken part yet draws its experts.
    """
    scores, mass, new = mass_or_random(evidence, sizes, key)
    asked = (mass >= hyper.fedmix.threshold).sum(1)
    asked = jnp.where(new, sizes.num_experts, asked)
    count = jnp.minimum(asked, evidence.capacity)
    return top_k_by_lot(scores, count, sizes.max_held, evidence.client, key)


def gate_loss(
    logits: Array, weight: Array | None, held: Array, factor: Array, hyper: Hyper
) -> Array:
    """`-variety H(mean pi) + sparsity mean H(pi)` of gate logits [P, E], nats.

    Its gradient is finite where a gate rounds to 0, too, at which `entr` has none.
    """
    log_gates = jax.nn.log_softmax(logits)
    gates = jnp.exp(log_gates)
    mean = average(gates, weight)
    variety = entr(jnp.where(mean > 0, mean, 1.0)).sum()
    sparsity = -average((gates * log_gates).sum(axis=1), weight)
    return hyper.fedmix.sparsity * sparsity - hyper.fedmix.variety * variety


def by_responsibility(
    slot: Array, feedback: Feedback, size: Array, hyper: Hyper
) -> Array:
    """Experts [K] by the gate mass that they have on the client's examples."""
    return size * feedback.frequency


def activate_held(config: ConfigDict) -> ConfigDict:
    """All held experts answer every example; gates stay with the clients."""
    config.num_active = config.max_held
    config.gate.mode = "personal"
    return config


def activate_all(config: ConfigDict) -> ConfigDict:
    """All experts are held, and all answer."""
    return activate_held(give_all_slots(config))


THRESHOLD = Option(
    "fedmix.threshold",
    SHARE,
    "mean gate below which an expert is not asked for",
    TRACED,
)

FEDMIX_SHARED_GATE = Strategy(
    about="Chooses experts as fedmix does, with gate, loss and weights of all systems.",
    assign=assign,
    options=(THRESHOLD,),
    init=init_mass,
    update=update_mass,
    report=report_mass,
)

FEDMIX_ALL_SHARED_GATE = Strategy(
    about=(
        "Every client trains all experts, with gate, loss and weights of all systems."
    ),
    assign=hold_all,
    needs="all experts on every client",
    configure=give_all_slots,
)

FEDMIX = FEDMIX_SHARED_GATE._replace(
    about=(
        "Mixes predictions by a personal gate, whose mean also chooses the client's "
        "experts; experts are averaged by responsibility."
    ),
    needs="personal gates, all held experts active",
    options=(
        THRESHOLD,
        Option(
            "fedmix.sparsity",
            NON_NEGATIVE,
            "weight of the mean entropy of the gates",
            TRACED,
        ),
        Option(
            "fedmix.variety",
            NON_NEGATIVE,
            "weight of the entropy of the mean gate, subtracted",
            TRACED,
        ),
    ),
    configure=activate_held,
    expert_weight=by_responsibility,
    gate_loss=gate_loss,
    mix="probabilities",
)

FEDMIX_ALL = Strategy(
    about="As fedmix, but every client trains all experts.",
    assign=hold_all,
    needs="personal gates, all experts on every client, all active",
    options=FEDMIX.options,
    configure=activate_all,
    expert_weight=by_responsibility,
    gate_loss=gate_loss,
    mix="probabilities",
)
