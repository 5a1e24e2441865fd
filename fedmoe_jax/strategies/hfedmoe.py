"""HFedMoE (arXiv 2601.00583): what a batch needs decides what is trained.

From the published description; equation numbers are the paper's. Clients get all
experts and route freely, by a softmax over all experts whose A largest answer and are
not renormalised (1, 2), but only as many as they have room for are trained on a batch
(15). Chosen here: an example counts with a gate of 0 for experts that do not answer it;
mean gates in (16) are divided by their sum over the experts; the largest gate in (19)
is the mean of the batches' largest; momentum still moves an expert on batches that do
not train it. Three repairs are ours: the weights of the gates are divided by their sum,
which (21) needs to be an average; an expert that was trained on no batch is not sent,
however high its mean gate (17); and (18), which nothing uses, is left out.
"""

import jax.numpy as jnp
from jax.scipy.special import xlogy

from fedmoe_jax.align.top_k import give_all_slots, hold_all
from fedmoe_jax.base import Strategy
from fedmoe_jax.options import NON_NEGATIVE, SHARE, TRACED, Option
from fedmoe_jax.positions import average
from fedmoe_jax.types import Array, Feedback, Hyper


def importance(mean: Array, peak: Array, hyper: Hyper) -> Array:
    """`lambda * mean gate + (1 - lambda) * largest gate` (3 to 5)."""
    share = hyper.hfedmoe.share
    return share * mean + (1 - share) * peak


def expert_value(gates: Array, weight: Array | None, hyper: Hyper) -> Array:
    """Information-bottleneck value [K] of each expert for a batch of gates [P, K] (14).

    Importance less `beta` times the information of the choice about the example;
    minus infinity where no example of the batch is routed to it. Positions count with
    their weights [P].
    """
    mean = average(gates, weight)  # (10)
    relative = gates / jnp.maximum(mean, 1e-12)[None]
    information = average(xlogy(gates, relative), weight)
    counted = gates if weight is None else jnp.where(weight[:, None] > 0, gates, 0.0)
    peak = counted.max(axis=0)
    value = importance(mean, peak, hyper) - hyper.hfedmoe.beta * information
    return jnp.where(peak > 0, value, -jnp.inf)


def weigh_experts(slot: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """The client's examples [K] where its mean gate reaches `threshold` (16, 17)."""
    used = feedback.frequency >= hyper.hfedmoe.threshold
    return jnp.where(used, size.astype(jnp.float32), 0.0)


def weigh_gate(held: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """Usage times importance, summed over the experts that are used (19, 20): [E]."""
    usage = feedback.frequency
    value = usage * importance(usage, feedback.peak, hyper)
    total = jnp.where(usage >= hyper.hfedmoe.threshold, value, 0.0).sum()
    return jnp.full(held.shape, total)


VALUE = (
    Option(
        "hfedmoe.share",
        SHARE,
        "share of the mean gate in an expert's importance",
        TRACED,
    ),
    Option(
        "hfedmoe.beta",
        NON_NEGATIVE,
        "weight of the information in the choice of an expert",
        TRACED,
    ),
)

HFEDMOE_SHARED_GATE = Strategy(
    about=(
        "Chooses experts as hfedmoe does, with gate, loss and weights of all systems."
    ),
    assign=hold_all,
    needs="all experts on every client, forward",
    options=VALUE,
    configure=give_all_slots,
    expert_priority=expert_value,
)

HFEDMOE = HFEDMOE_SHARED_GATE._replace(
    about=(
        "Sends every client all experts and trains, on each batch, as many as the "
        "client has room for, those of the highest information-bottleneck value."
    ),
    options=(
        *VALUE,
        Option(
            "hfedmoe.threshold",
            SHARE,
            "mean gate from which an expert is merged",
            TRACED,
        ),
    ),
    allowed=(("gate.mode", ("global",)),),
    gate_weight=weigh_gate,
    expert_weight=weigh_experts,
    gating="all",
)
