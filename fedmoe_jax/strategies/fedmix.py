"""FedMix-style (arXiv 2107.06724): an ensemble whose members each user chooses.

From the abstract and recollections of the text, which could not be read. Each client
has a gate `pi` of its own and mixes the experts' predictions, `p(y|x) = sum_k pi_k(x)
p_k(y|x)`; sparse but varied use is asked of the gate; experts are averaged by their
responsibilities. Experts share the stem here; in the paper they are whole networks.
`fedmix_all` gives everyone all experts, as papers that compare with FedMix do.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from fedmoe_jax.aggregate import no_rows
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.client import ClientInput, ClientUpdate
from fedmoe_jax.options import NON_NEGATIVE, SHARE
from fedmoe_jax.rules import Rules
from fedmoe_jax.strategies.hfedmoe import assign as assign_all
from fedmoe_jax.strategies.random import uniform_scores
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    PyTree,
    Sizes,
    Strategy,
)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """The experts that the client's gate asks for, as many as it has room for.

    Those whose mean gate is below `threshold` are left out; a client that has not
    taken part yet draws its experts.
    """
    mass = evidence.memory["mass"][evidence.client]
    drawn = uniform_scores(key, evidence.client, sizes.num_experts)
    new = mass.sum(axis=1) == 0
    scores = jnp.where(new[:, None], drawn, mass)
    asked = jnp.where(new, sizes.num_experts, (mass >= hyper.own["threshold"]).sum(1))
    return top_k(scores, jnp.minimum(asked, evidence.capacity), sizes.max_held)


def remember(sizes: Sizes) -> PyTree:
    """No gate has chosen yet."""
    return {"mass": jnp.zeros((sizes.num_clients, sizes.num_experts))}


def learn(
    evidence: Evidence, assignment: Assignment, feedback: Feedback, hyper: Hyper
) -> PyTree:
    """The mean gate of every client over all experts, as it last trained."""
    mass, client = evidence.memory["mass"], evidence.client
    told = feedback.mass.sum(axis=1, keepdims=True) > 0
    return {"mass": mass.at[client].set(jnp.where(told, feedback.mass, mass[client]))}


def gate_loss(logits: Array, inputs: ClientInput, hyper: Hyper) -> Array:
    """`-variety H(mean pi) + sparsity mean H(pi)` of gate logits [B, E], nats."""
    gates = jax.nn.softmax(logits)
    variety = entr(gates.mean(axis=0)).sum()
    sparsity = entr(gates).sum(axis=1).mean()
    return hyper.own["sparsity"] * sparsity - hyper.own["variety"] * variety


def by_responsibility(
    inputs: ClientInput, update: ClientUpdate, size: Array, hyper: Hyper
) -> Array:
    """Experts [K] by the gate mass that they have on the client's examples."""
    return size * update.feedback.frequency


def soften(sizes: Sizes) -> Sizes:
    """All held experts answer every example."""
    return sizes._replace(num_active=sizes.max_held)


def soften_all(sizes: Sizes) -> Sizes:
    """All experts are held, and all answer."""
    return sizes._replace(max_held=sizes.num_experts, num_active=sizes.num_experts)


def adapt_all(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """As below, but nobody reads which experts a gate asks for."""
    return adapt(rules, sizes, options)._replace(report_mass=False)


def adapt(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """Personal gates, mixed predictions, averages by responsibility."""
    return rules._replace(
        personal=("gate",),
        gate_weight=no_rows,
        expert_weight=by_responsibility,
        gate_loss=gate_loss,
        probabilities=True,
        report_mass=True,
    )


ALLOWED = (
    ("fedmix.threshold", SHARE),
    ("fedmix.sparsity", NON_NEGATIVE),
    ("fedmix.variety", NON_NEGATIVE),
)

FEDMIX = Strategy(
    assign=assign,
    note=(
        "Mixes predictions by a personal gate, whose mean also chooses the client's "
        "experts; experts are averaged by responsibility."
    ),
    needs="personal gates, all held experts active",
    options="fedmix",
    allowed=ALLOWED,
    resize=soften,
    adapt=adapt,
    remember=remember,
    learn=learn,
)

FEDMIX_ALL = Strategy(
    assign=assign_all,
    note=("As fedmix, but every client trains all experts."),
    needs="personal gates, all experts on every client, all active",
    options="fedmix",
    allowed=ALLOWED,
    resize=soften_all,
    adapt=adapt_all,
)
