"""FedJETs, later DDOME (arXiv 2306.08586): anchors teach the gate its experts.

A feature extractor, the common expert, is trained on a public slice of the data
(`data.public`) and frozen; it feeds the gate alone. One anchor client per expert,
chosen for its labels, trains that expert alone and teaches the gate that its images
belong there. Every other client trains the two experts that the gate prefers on its
data. At test time the best expert answers.

Changed here: in the paper experts are whole networks, each with layers of its own.
Here they share stem and head, as in all systems; clients train and send the stem, from
the same initial weights as in all systems, beside the frozen one that the gate reads,
which is sent once and run forward for every example (the paper keeps its outputs). The
gate is the linear one of all systems, with the clients' learning rate. The paper asks
the gate that a client has just received. Here the server decides before it sends
anything, by what the client reported when it last took part (at first: by lot), so that
the choice is a round old and of the gate as that client had trained it. An anchor works
in the rounds whose cohort it is in.

`fedjets_frozen_stem` has no second stem: experts read the frozen one as the gate does,
and nobody trains it, so that a client's bytes and FLOPs are less than the paper's.
`fedjets_no_anchors` knows no labels of clients; those of the public slice train its
common expert, too. The `_shared_gate` ones train the stem as all systems do, without a
slice. A shared expert (`model.shared_width`) is trained with the stem on the slice;
`fedjets_frozen_stem` keeps it, frozen, and in `fedjets` clients train their own from
the initial weights, as the gate needs none.
"""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from fedmoe_jax.align.gate_mass import (
    init_mass,
    mass_or_random,
    report_mass,
    update_mass,
)
from fedmoe_jax.align.ties import LOTS, first_by_lot, top_k_by_lot
from fedmoe_jax.base import GATE_STEM, Model, Strategy, Task
from fedmoe_jax.groups import mix_classes
from fedmoe_jax.models.one_layer import run_shared, take_gate_stem
from fedmoe_jax.options import COUNT, TRACED, Option
from fedmoe_jax.positions import mean_loss
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Federation,
    Feedback,
    Hyper,
    PyTree,
    SimState,
    Sizes,
)

HELD = 2  # experts of a client that is no anchor
MOMENTUM = 0.9
CLIP = 1.0  # as rates that clients survive by clipping are the server's, too


def train_stem(
    key: Array,
    stem: PyTree,
    params: PyTree,
    federation: Federation,
    hyper: Hyper,
    model: Model,
    task: Task,
    batch_size: int,
) -> PyTree:
    """The stem after `steps` steps on the public slice, with an expert and a head.

    Expert and head are thrown away; experts of a run start as in every other system. A
    shared expert is trained as a part of the stem.
    """
    (experts,), parts = params["experts"].values(), model.parts
    assert parts is not None
    one = jax.tree.map(lambda leaf: leaf[0], experts)
    start = {"stem": stem, "expert": one, "head": params["head"]}
    descent = optax.sgd(hyper.client.learning_rate, momentum=MOMENTUM)
    tx = optax.chain(optax.clip_by_global_norm(CLIP), descent)

    def loss(trained: PyTree, batch: PyTree) -> Array:
        features = parts.stem(trained["stem"], batch, None)
        outputs = parts.expert(trained["expert"], features, None)
        shared = run_shared(parts, trained["stem"], features, None)
        outputs = outputs if shared is None else outputs + shared
        return mean_loss(task.loss(parts.head(trained["head"], outputs), batch))

    def step(number: Array, carry: tuple) -> tuple:
        trained, opt_state = carry
        drawn = jax.random.fold_in(key, number), (batch_size,), 0
        place = jax.random.randint(*drawn, len(federation.public))
        ids = federation.public[place]
        batch = take_batch(federation.train, ids, federation.statistics, task)
        grads = jax.grad(loss)(trained, batch)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(trained, updates), opt_state

    start = start, tx.init(start)
    return jax.lax.fori_loop(0, hyper.fedjets.steps, step, start)[0]["stem"]


def choose_anchors(
    label_mix: Array, size: Array, num_experts: int, key: Array
) -> Array:
    """The expert that each client anchors, -1 for none: [N] int32.

    One after the other, the client with most examples of labels that no anchor has, of
    labels that anchors have in part that much less; ties are drawn.

    Args:
      label_mix: [N, L] float32, each client's histogram of labels, rows sum to 1. An
        anchor covers a label to this share of its own examples.
      size: [N] int32, examples of each client.
      num_experts: E.
      key: a JAX key, consumed.
    """
    lots = jax.random.uniform(key, size.shape)

    def choose(expert: Array, carry: tuple) -> tuple:
        anchor, covered = carry
        gain = size * (label_mix * (1 - covered)[None]).sum(axis=1)
        client = first_by_lot(jnp.where(anchor >= 0, -1.0, gain), lots)
        covered = jnp.minimum(covered + label_mix[client], 1.0)
        return anchor.at[client].set(expert), covered

    none = jnp.full(label_mix.shape[0], -1, jnp.int32)
    start = none, jnp.zeros(label_mix.shape[1])
    return jax.lax.fori_loop(0, num_experts, choose, start)[0]


def prepare(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    model: Model,
    task: Task,
    sizes: Sizes,
) -> tuple[SimState, PyTree]:
    """Trains the frozen stem, the gate's or that of all, on the public slice."""
    frozen, static = federation.frozen, (model, task, sizes.batch_size)
    # Before the first round the gate's is that of all, but for the shared expert.
    stem = frozen["stem"] if "stem" in frozen else state.params["stem"]
    trained = train_stem(*(key, stem, state.params, federation, hyper, *static))
    if "stem" in frozen:
        return state, frozen | {"stem": trained}
    return state, frozen | {GATE_STEM: take_gate_stem(model.parts, trained)}


def count_public(round: Array, hyper: Hyper, sizes: Sizes) -> Array:
    """Examples of the public slice on which `prepare` trains, before round 0: []."""
    return jnp.where(round == 0, hyper.fedjets.steps * sizes.batch_size, 0)


def prepare_anchors(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    model: Model,
    task: Task,
    sizes: Sizes,
) -> tuple[SimState, PyTree]:
    """Trains the stem and chooses the anchors."""
    state, frozen = prepare(
        *(state, federation, hyper, key), model=model, task=task, sizes=sizes
    )
    return appoint_anchors(
        *(state, federation.replace(frozen=frozen), hyper, key),
        model=model,
        task=task,
        sizes=sizes,
    )


def appoint_anchors(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    model: Model,
    task: Task,
    sizes: Sizes,
) -> tuple[SimState, PyTree]:
    """Chooses the anchors, the same in every layer."""
    anchor = choose_anchors(
        mix_classes(federation.label_mix, sizes.num_groups),
        *(federation.size, sizes.num_experts),
        jax.random.fold_in(key, LOTS),
    )
    every = jnp.tile(anchor[None], (sizes.num_layers, 1))
    own = state.align.strategy | {"anchor": every}
    align = state.align.replace(strategy=own)
    return state.replace(align=align), federation.frozen


def init(sizes: Sizes) -> PyTree:
    """No client has reported its gate, and none is an anchor."""
    return init_mass(sizes) | {"anchor": jnp.full(sizes.num_clients, -1, jnp.int32)}


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Anchors hold their expert, others the two of highest summed gate."""
    scores, _, _ = mass_or_random(evidence, sizes, key)
    anchor = evidence.state["anchor"][evidence.client]
    is_anchor = anchor >= 0
    anchored = anchor[:, None] == jnp.arange(sizes.num_experts)[None]
    scores = jnp.where(anchored, jnp.inf, scores)
    count = jnp.where(is_anchor, 1, evidence.capacity)
    return top_k_by_lot(scores, count, sizes.max_held, evidence.client, key)


def assign_and_teach(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
) -> Assignment:
    """As `assign`, and only anchors pay for gate mass beside their expert.

    That is the cross-entropy of the gate against their expert.
    """
    is_anchor = evidence.state["anchor"][evidence.client] >= 0
    picked = assign(evidence, hyper, sizes, key)
    return picked.replace(calibration=is_anchor.astype(jnp.float32))


def slots_alike(slot: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """A plain average of the experts [K]."""
    return jnp.ones(slot.shape)


def rows_alike(held: Array, feedback: Feedback, size: Array, hyper: Hyper) -> Array:
    """A plain average of all gate rows [E]."""
    return jnp.ones(held.shape)


def hold_two(config: ConfigDict) -> ConfigDict:
    """At most two experts a client."""
    config.max_held = min(HELD, config.max_held)
    config.num_active = min(config.num_active, config.max_held)
    return config


def configure(config: ConfigDict) -> ConfigDict:
    """Two experts a client, both active; anchors teach the gate by cross-entropy."""
    config = hold_two(config)
    config.num_active, config.loss.calibration = config.max_held, 1.0
    return config


FEDJETS_NO_ANCHORS_SHARED_GATE = Strategy(
    about=(
        "Chooses experts as fedjets_no_anchors does, with stem, gate, loss and weights "
        "of all systems."
    ),
    assign=assign,
    configure=hold_two,
    init=init,
    update=update_mass,
    report=report_mass,
)

FEDJETS_SHARED_GATE = FEDJETS_NO_ANCHORS_SHARED_GATE._replace(
    about=(
        "Chooses experts and anchors as fedjets does, with stem, gate, loss and "
        "weights of all systems."
    ),
    needs="the labels of all clients",
    at_most=(("num_experts", "num_clients"),),
    stages=((0, appoint_anchors),),
)

FEDJETS_NO_ANCHORS = FEDJETS_NO_ANCHORS_SHARED_GATE._replace(
    about="As fedjets, but no client is an anchor, so no labels of clients are known.",
    assign=assign_and_teach,
    needs="a labelled public slice for the stem that its gate reads",
    options=(
        Option(
            "fedjets.steps",
            COUNT,
            "local steps on data.public that train the frozen stem",
            TRACED,
        ),
    ),
    allowed=(("data.public", COUNT), ("gate.mode", ("global",))),
    configure=configure,
    stages=((0, prepare),),
    server_examples=count_public,
    gate_weight=rows_alike,
    expert_weight=slots_alike,
    frozen=(GATE_STEM,),
    test_active=1,
    one_layer=True,
)

FEDJETS = FEDJETS_NO_ANCHORS._replace(
    about=(
        "Trains the two experts that the gate prefers on a client's data; one anchor "
        "client per expert, chosen by its labels, teaches the gate."
    ),
    needs=(
        "a labelled public slice for the stem that its gate reads, the labels of all "
        "clients"
    ),
    at_most=(("num_experts", "num_clients"),),
    stages=((0, prepare_anchors),),
)

FEDJETS_FROZEN_STEM = FEDJETS._replace(
    about="As fedjets, but experts, too, read the frozen stem, which nobody trains.",
    needs="a labelled public slice for the frozen stem, the labels of all clients",
    frozen=("stem",),
)
