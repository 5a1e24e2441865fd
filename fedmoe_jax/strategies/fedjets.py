"""FedJETs, later DDOME (arXiv 2306.08586): a gate that anchors teach who knows what.

A feature extractor is trained on a public slice of the data (`data.public`) and
frozen. One anchor client per expert, chosen for its labels, trains that expert alone
and teaches the gate that its images belong there. Every other client trains the two
experts that the gate prefers on its data. At test time the best expert answers.

Chosen here: the frozen extractor is the stem; experts share the head; the gate is the
linear one of all systems, with the clients' learning rate. The paper asks the gate that
a client has just received. Here the server decides before it sends anything, by what
the client reported when it last took part (at first: by lot), so that the choice is a
round old and of the gate as that client had trained it. An anchor works in the rounds
whose cohort it is in. `fedjets_no_anchors` does without the labels.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.client import ClientInput, ClientUpdate, normalise
from fedmoe_jax.models.image_moe import Model
from fedmoe_jax.options import COUNT
from fedmoe_jax.rules import Rules
from fedmoe_jax.strategies.fedmix import learn as learn_mass
from fedmoe_jax.strategies.random import uniform_scores
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Federation,
    Feedback,
    Hyper,
    PyTree,
    Sizes,
    Strategy,
)

HELD = 2  # experts of a client that is no anchor
MOMENTUM = 0.9


def train_stem(
    key: Array,
    params: PyTree,
    federation: Federation,
    hyper: Hyper,
    model: Model,
    batch_size: int,
) -> PyTree:
    """The stem after `steps` steps on the public slice, with an expert and a head.

    Expert and head are thrown away; experts of a run start as in every other system.
    """
    one = jax.tree.map(lambda leaf: leaf[0], params["experts"])
    start = {"stem": params["stem"], "expert": one, "head": params["head"]}
    tx = optax.sgd(hyper.client_learning_rate, momentum=MOMENTUM)

    def loss(parts: PyTree, x: Array, y: Array) -> Array:
        features = model.stem(parts["stem"], x, None)
        outputs = model.expert(parts["expert"], features, None)
        logits = model.head(parts["head"], outputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(number: Array, carry: tuple) -> tuple:
        parts, opt_state = carry
        drawn = jax.random.fold_in(key, number), (batch_size,), 0
        place = jax.random.randint(*drawn, len(federation.public))
        ids = federation.public[place]
        x = normalise(federation.x[ids], federation.mean, federation.std)
        grads = jax.grad(loss)(parts, x, federation.y[ids])
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(parts, updates), opt_state

    steps = hyper.own["steps"].astype(jnp.int32)
    return jax.lax.fori_loop(0, steps, step, (start, tx.init(start)))[0]["stem"]


def choose_anchors(label_mix: Array, num_experts: int) -> Array:
    """The expert that each client anchors, -1 for none: [N] int32.

    One after the other, whoever has most examples of labels that no anchor has yet.
    """

    def choose(expert: Array, carry: tuple) -> tuple:
        anchor, covered = carry
        gain = (label_mix * (1 - covered)[None]).sum(axis=1)
        client = jnp.where(anchor >= 0, -1.0, gain).argmax()
        covered = jnp.minimum(covered + label_mix[client], 1.0)
        return anchor.at[client].set(expert), covered

    none = jnp.full(label_mix.shape[0], -1, jnp.int32)
    start = none, jnp.zeros(label_mix.shape[1])
    return jax.lax.fori_loop(0, num_experts, choose, start)[0]


def prepare(
    key: Array,
    params: PyTree,
    memory: PyTree,
    federation: Federation,
    hyper: Hyper,
    *,
    model: Model,
    sizes: Sizes,
    anchors: bool,
) -> tuple[PyTree, PyTree]:
    """Trains the stem on the public slice and chooses the anchors."""
    stem = train_stem(key, params, federation, hyper, model, sizes.batch_size)
    if anchors:
        chosen = choose_anchors(federation.label_mix, sizes.num_experts)
        memory = memory | {"anchor": chosen}
    return params | {"stem": stem}, memory


def remember(sizes: Sizes) -> PyTree:
    """No gate has chosen yet, and nobody is an anchor."""
    return {
        "mass": jnp.zeros((sizes.num_clients, sizes.num_experts)),
        "anchor": jnp.full(sizes.num_clients, -1, jnp.int32),
    }


def learn(
    evidence: Evidence, assignment: Assignment, feedback: Feedback, hyper: Hyper
) -> PyTree:
    """The mean gate of every client over all experts, as it last trained."""
    return evidence.memory | learn_mass(evidence, assignment, feedback, hyper)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Anchors hold their expert, others the two of highest summed gate.

    Only anchors pay for gate mass beside their expert, which is the cross-entropy of
    the gate against their expert.
    """
    mass = evidence.memory["mass"][evidence.client]
    drawn = uniform_scores(key, evidence.client, sizes.num_experts)
    scores = jnp.where((mass.sum(axis=1) == 0)[:, None], drawn, mass)
    anchor = evidence.memory["anchor"][evidence.client]
    is_anchor = anchor >= 0
    mine = anchor[:, None] == jnp.arange(sizes.num_experts)[None]
    scores = jnp.where(mine, jnp.inf, scores)
    count = jnp.where(is_anchor, 1, evidence.capacity)
    picked = top_k(scores, count, sizes.max_held)
    return picked.replace(calibration=is_anchor.astype(jnp.float32))


def each_alike(
    inputs: ClientInput, update: ClientUpdate, size: Array, hyper: Hyper
) -> Array:
    """A plain average of the experts [K]."""
    return jnp.ones(inputs.slot.shape)


def rows_alike(
    inputs: ClientInput, update: ClientUpdate, size: Array, hyper: Hyper
) -> Array:
    """A plain average of all gate rows [E]."""
    return jnp.ones_like(update.delta["gate"]["bias"])


def resize(sizes: Sizes) -> Sizes:
    """Two experts a client, both active in training."""
    held = min(HELD, sizes.max_held)
    return sizes._replace(max_held=held, num_active=held)


def adapt(rules: Rules, sizes: Sizes, options: dict[str, float]) -> Rules:
    """A frozen stem, plain averages, one expert an image at test time."""
    return rules._replace(
        frozen=("stem",),
        test_active=1,
        gate_weight=rows_alike,
        expert_weight=each_alike,
        report_mass=True,
    )


def tune(hyper: Hyper) -> Hyper:
    """The calibration loss of an anchor is the whole cross-entropy of its gate."""
    return hyper.replace(calibration=1.0)


def make(anchors: bool, note: str, needs: str) -> Strategy:
    """FedJETs with or without anchor clients."""
    return Strategy(
        assign=assign,
        note=note,
        needs=needs,
        options="fedjets",
        allowed=(
            ("fedjets.steps", COUNT),
            ("data.public", COUNT),
            ("gate.mode", ("global",)),
        ),
        at_most=(("num_experts", "num_clients"),) if anchors else (),
        resize=resize,
        adapt=adapt,
        tune=tune,
        prepare=functools.partial(prepare, anchors=anchors),
        remember=remember,
        learn=learn,
    )


FEDJETS = make(
    True,
    note=(
        "Trains the two experts that the gate prefers on a client's data; one anchor "
        "client per expert, chosen by its labels, teaches the gate."
    ),
    needs="a public slice for the frozen stem, the labels of all clients",
)

FEDJETS_NO_ANCHORS = make(
    False,
    note="As fedjets, but no client is an anchor, so no labels are known.",
    needs="a public slice for the frozen stem",
)
