"""HFedMoE (arXiv 2601.00583): what a batch needs decides what is trained.

From the published description; equation numbers are the paper's. Clients get all
experts and route freely, but only as many as they have room for are trained on a batch
(15). Chosen here: `G` is the gate over the A experts that an example is routed to, and
the largest gate in (19) is the mean of the batches' largest; momentum still moves an
expert on batches that do not train it. Two repairs are ours: the
weights of the gates are divided by their sum, which (21) needs to be an average, and
(18), which nothing uses, is left out.
"""

import jax.numpy as jnp
from jax.scipy.special import xlogy

from fedmoe_jax.client import ClientInput, ClientUpdate
from fedmoe_jax.options import NON_NEGATIVE, SHARE
from fedmoe_jax.rules import Rules
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes, Strategy


def hold_all(sizes: Sizes) -> Sizes:
    """Every client has a slot for every expert."""
    return sizes._replace(max_held=sizes.num_experts)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds all experts, whatever its capacity, which bounds training."""
    shape = (evidence.client.shape[0], sizes.num_experts)
    held = jnp.broadcast_to(jnp.arange(sizes.num_experts, dtype=jnp.int32), shape)
    return Assignment(held, jnp.ones(shape, bool))


def importance(mean: Array, peak: Array, hyper: Hyper) -> Array:
    """`lambda * mean gate + (1 - lambda) * largest gate` (3 to 5)."""
    share = hyper.own["share"]
    return share * mean + (1 - share) * peak


def focus(gates: Array, hyper: Hyper) -> Array:
    """Information-bottleneck value [K] of each expert for a batch of gates [B, K] (14).

    Importance less `beta` times what the choice of the expert tells about an example;
    minus infinity where no example of the batch is routed to it.
    """
    mean = gates.mean(axis=0)  # (10)
    relative = gates / jnp.maximum(mean, 1e-12)[None]
    told = xlogy(gates, relative).mean(axis=0)
    peak = gates.max(axis=0)
    value = importance(mean, peak, hyper) - hyper.own["beta"] * told
    return jnp.where(peak > 0, value, -jnp.inf)


def weigh_experts(
    inputs: ClientInput, update: ClientUpdate, size: Array, hyper: Hyper
) -> Array:
    """The client's examples where its mean gate reaches `threshold` (16, 17)."""
    used = update.feedback.frequency >= hyper.own["threshold"]
    return jnp.where(used, size.astype(jnp.float32), 0.0)


def weigh_gate(
    inputs: ClientInput, update: ClientUpdate, size: Array, hyper: Hyper
) -> Array:
    """Usage times importance, summed over the experts that are used (19, 20)."""
    usage = update.feedback.frequency
    value = usage * importance(usage, update.feedback.peak, hyper)
    total = jnp.where(usage >= hyper.own["threshold"], value, 0.0).sum()
    return jnp.full_like(update.delta["gate"]["bias"], total)


def adapt(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """Training by value, experts and gates averaged by their use."""
    return rules._replace(
        focus=focus, gate_weight=weigh_gate, expert_weight=weigh_experts
    )


HFEDMOE = Strategy(
    assign=assign,
    note=(
        "Sends everyone all experts and trains, on each batch, as many as the client "
        "has room for, those of the highest information-bottleneck value."
    ),
    needs="all experts on every client, forward",
    options="hfedmoe",
    allowed=(
        ("hfedmoe.share", SHARE),
        ("hfedmoe.beta", NON_NEGATIVE),
        ("hfedmoe.threshold", SHARE),
        ("gate.mode", ("global",)),
    ),
    resize=hold_all,
    adapt=adapt,
)
