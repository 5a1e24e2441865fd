"""The records that a user fills: `Data`, `Task`, `Model`, `Strategy` and `Process`.

Each is a tuple of pure functions and constants, hashable, so that equal records share
one compiled program. Whatever is added lives in one file that fills one of these, and
in one row of the table that names its kind: `data.DATASETS`, `tasks.TASKS`,
`models.MODELS`, `strategies.STRATEGIES`, `world.PROCESSES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.options import Option, Range
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    Keys,
    PyTree,
    Sizes,
)

PARTS = ("stem", "gate", "experts", "head")  # of a model
GATE_STEM = "gate_stem"  # as one of `Strategy.frozen`
SHARED = "shared"  # the shared expert's params in a stem, see `Parts`
BASE = "base"  # pretrained weights among what is frozen, see `Base`
SHARED_EXPERT = "shared_expert"  # as a part that has FLOPs
ALL_EXPERTS = 2**31 - 1  # as `Strategy.local_experts`
# None in the record that a user fills, and never None in a program: the config decides.
Open = Any


class Data(NamedTuple):
    """A data set on the host, as NumPy arrays. It never depends on a run's seed.

    Attributes:
      train: leaves [X, ...] of any dtype, by name; what they mean is the task's affair.
      test: the same names, leaves [X', ...].
      stratum: [X] int32 in [0, L), what the partition skews: label, topic, language.
      test_stratum: [X'] int32, likewise.
      stratum_names: L names.
      task: the name of its task in `tasks.TASKS`.
      owner: [X] int in [0, n), the natural client of each training example, for
        `partition.kind=natural`; None where there is none.
      test_owner: [X'] int in [0, n), the natural client of each test example, whose
        own test set it then is; None where test examples have none.
      vocabulary: number of tokens, of text; else None.
      group_names: of Q groups of clients, () where there are none. The strata are then
        those of group 0, of group 1 and so on, one for each class; loaders leave it.
      limit: bits below which no model comes on the whole test text, but for chance, of
        a task with bits; None where it is unknown.
      notes: what a user should know about the data, a line each. A run prints them
        before its first round, once in a process.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    stratum: np.ndarray
    test_stratum: np.ndarray
    stratum_names: tuple[str, ...]
    task: str
    owner: np.ndarray | None = None
    test_owner: np.ndarray | None = None
    vocabulary: int | None = None
    group_names: tuple[str, ...] = ()
    limit: float | None = None
    notes: tuple[str, ...] = ()


class Scores(NamedTuple):
    """The quality of a batch of outputs, leaves [B, ...positions].

    Attributes:
      loss: float32, what training minimises; nats for cross-entropies.
      score: float32 in [0, 1], 1 is best: 1 where a class is predicted right.
      weight: float32 >= 0, 0 for padding; None where every position counts alike.
      bytes: float32 >= 0, bytes of text that the position stands for, by which bits are
        divided; None for one each.
    """

    loss: Array
    score: Array
    weight: Array | None = None
    bytes: Array | None = None


class Task(NamedTuple):
    """The meaning of a data set: its batches, its loss, its score.

    Attributes:
      statistics: Data -> pytree of arrays that `prepare` reads, of the training data.
      prepare: (rows, statistics) -> batch; rows have the leaves of `Data.train`,
        [B, ...], and so has the batch, as the model reads it.
      loss: (outputs of the model, batch) -> Scores.
      num_outputs: Data -> the width of the model's outputs: classes, vocabulary, or 1.
      drifts: (name, (rows, amount []) -> rows) of every way in which rows can drift.
      augments: (name, (rows, key) -> rows) of every way in which rows that are trained
        on can be changed at random.
      add_prior: (outputs, log shares of the strata [L], of groups' strata those of the
        classes [L / Q]) -> outputs, of outputs that are logits of these; None for
        others, which no label prior shifts.
      labels: batch -> classes [B] int32 in [0, L), of groups in [0, L / Q); None where
        examples have none.
      bits: whether evaluation also gives the loss, in bits of a byte (of a position,
        without `Scores.bytes`), whose `Scores.loss` then is a cross-entropy in nats.
    """

    statistics: Callable[[Data], PyTree]
    prepare: Callable[[PyTree, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree], Scores]
    num_outputs: Callable[[Data], int]
    drifts: tuple[tuple[str, Callable[[PyTree, Array], PyTree]], ...] = ()
    augments: tuple[tuple[str, Callable[[PyTree, Array], PyTree]], ...] = ()
    add_prior: Callable[[PyTree, Array], PyTree] | None = None
    labels: Callable[[PyTree], Array] | None = None
    bits: bool = False


class Links(NamedTuple):
    """The links between the gate and the experts for the examples of one batch.

    Attributes:
      snr: [B, E] float32 > 0, linear, of the features that arrive; infinity for a
        perfect link.
      seen: [B, E] float32 <= 0, what the gate sees of its links, 0 of perfect ones.
      charge: [B, E] float32 >= 0, taken off the gate's logits for the time of the link
        as it is known.
      time: [B, E] float32 in [0, 1], the time of the link, in deadlines of an answer.
      key: [B], of the noise of each example; each expert folds its number into it.
    """

    snr: Array
    seen: Array
    charge: Array
    time: Array
    key: Array


class Route(NamedTuple):
    """The routing inside the model, as a strategy has it.

    Attributes:
      num_active: A.
      mix: `outputs` of the experts, or their `probabilities`.
      priority: gates [B, K] -> value [K] of training each expert on the batch; the
        `budget` most valuable get gradients. None: all.
      budget: [] int32, experts that the client has room to train; read with `priority`.
      gating: the gates of an example, see `Strategy.gating`.
      bias: [G, K] float32, added to the logits of the held experts where gates are made
        of them, but not in `Routing.logits`; [K] of ONE layer. None: nothing.
      links: to all E experts, the same from each MoE layer, whose gate sees them; None:
        perfect ones.
    """

    num_active: int
    mix: str = "outputs"
    priority: Callable[[Array], Array] | None = None
    budget: Array | None = None
    gating: str = "chosen"
    bias: Array | None = None
    links: Links | None = None

    def of_layer(self, layer: int) -> "Route":
        """The routing in ONE layer, as `models.routing.make_gates` takes it."""
        return self if self.bias is None else self._replace(bias=self.bias[layer])


class Routing(NamedTuple):
    """The decisions of the gates of one forward pass, of G MoE layers.

    Attributes:
      logits: [G, P, E] float32 over all experts, without `Route.bias`, P positions of
        the batch (images or tokens), of tied layers those of each, one after the other;
        None for a model with one expert.
      gates: [G, P, K] float32 over the held experts, rows sum to 1 but for some
        `Strategy.gating`.
      trained: [G, K] bool, the slots that get gradients from the batch; None for all.
      weight: [G, P] float32 >= 0 of the positions of the logits, 0 for padding, as the
        task has them in `Scores.weight`; models leave it out. None where every position
        counts alike.
    """

    logits: Array | None
    gates: Array
    trained: Array | None = None
    weight: Array | None = None


class Parts(NamedTuple):
    """The functions of a model with ONE MoE layer.

    With them evaluation computes every expert once per batch, for all clients.

    A shared expert answers every example, on every client. It belongs to the stem: it
    is trained, averaged, personal or frozen with it, but for a `gate_stem`, which has
    none. Its outputs s are added once, whatever the gates g sum to: to the mixture of
    the routed outputs o, `head(sum_k g_k o_k + s)`, or to every routed expert's where
    probabilities are mixed, `sum_k g_k softmax(head(o_k + s))`.

    Attributes:
      stem: (stem params, batch, key or None) -> features [B, ...].
      expert: (ONE expert's params, features, key or None) -> outputs [B, O].
      head: (head params, outputs [..., O]) -> outputs of the model [..., L].
      platform: as the builder got it; experts are vmapped, but on a `cpu` looped over.
      shared: (the shared expert's params, features, key or None) -> outputs [B, O];
        the params are the stem's subtree `shared`. None: there is no shared expert.
    """

    stem: Callable[[PyTree, PyTree, Array | None], Array]
    expert: Callable[[PyTree, Array, Array | None], Array]
    head: Callable[[PyTree, Array], Array]
    platform: str
    shared: Callable[[PyTree, Array, Array | None], Array] | None = None


class Base(NamedTuple):
    """The pretrained weights of a model, which nothing trains and all runs share.

    Attributes:
      shapes: () -> their shapes, a tree of `jax.ShapeDtypeStruct`.
      load: () -> the weights, host arrays.
      sparse: whether its own experts are the model's, of which none works alone; then
        the weights of these are below keys `experts`.
    """

    shapes: Callable[[], PyTree]
    load: Callable[[], PyTree]
    sparse: bool = False


class Units(NamedTuple):
    """Hidden units that pruning can leave out, of ONE expert or of the stem.

    Channels of convolutions are hidden units, too.

    Unit j of n is, in each of the leaves, the entries j, j + n, j + 2 n, ... along an
    axis. Where all of them are 0 the unit answers nothing, and the others compute as
    they would alone, but that a norm over units counts it.

    Attributes:
      name: of its own in a model.
      part: `experts` or `stem`.
      count: n.
      leaves: (path, axis) of every leaf that has a share of the units, the path below
        the part, of experts below the name of a MoE layer, the axis that of ONE
        expert's leaf. A leaf between two layers is in the units of both.
      entries: numbers in ONE unit, a leaf between two layers counted with the later
        one; a program fills it.
    """

    name: str
    part: str
    count: int
    leaves: tuple[tuple[tuple[str, ...], int], ...]
    entries: float = 0.0


class Model(NamedTuple):
    """Pure functions of a mixture of experts with G MoE layers.

    Attributes:
      init: key -> (params, frozen). Params are `{"stem", "gate", "experts", "head"}`;
        `gate` and `experts` hold one subtree per MoE layer, named so that they sort in
        the order of the layers, and every leaf there has a leading E axis. A gate has
        leaves `kernel` [E, D] and `bias` [E]. Frozen is what is never trained, {} for
        most.
      apply: (params, frozen, batch, held [G, K], slot [G, K], route, key or None) ->
        outputs, Routing; the experts of `params` are the held ones, [K, ...]. Where
        the model has parts, `params` may have a `gate_stem`, which the gate reads.
      parts: the functions of a model with one MoE layer, or None.
      base: pretrained weights, which `apply` finds in `frozen["base"]`; None without.
      units: what pruning can leave out, of every MoE layer alike; in the order in which
        examples pass them.
    """

    init: Callable[[Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, Routing]]
    parts: Parts | None = None
    base: Base | None = None
    units: tuple[Units, ...] = ()


# (evidence, hyper, sizes, key) -> Assignment
AssignFn = Callable[[Evidence, Hyper, Sizes, Array], Assignment]
# (evidence, hyper) -> [C, E] float32 in [0, 1]
AffinityFn = Callable[[Evidence, Hyper], Array]
# (evidence, assignment, feedback [C, K], reports [C, ...], hyper) -> state
UpdateFn = Callable[[Evidence, Assignment, Feedback, PyTree, Hyper], PyTree]


def same_config(config: ConfigDict) -> ConfigDict:
    """The config as the user gave it."""
    return config


def no_state(sizes: Sizes) -> PyTree:
    """For strategies that learn nothing beyond fitness and usage."""
    return {}


def same_state(
    evidence: Evidence,
    assignment: Assignment,
    feedback: Feedback,
    reports: PyTree,
    hyper: Hyper,
) -> PyTree:
    """The state as it was."""
    return evidence.state


class Strategy(NamedTuple):
    """One published system or control.

    `assign`, `affinity`, `init`, `update`, `report`, `choose`, `gate_weight`,
    `expert_weight` and `gate_loss` are written for ONE MoE layer and mapped over the
    layers G at one place, `moe_layers`. What is None is taken from the config when the
    program is built.

    Attributes:
      about: its decision, one sentence.
      assign: (evidence, hyper, sizes, key) -> Assignment of the cohort.
      affinity: (evidence, hyper) -> how well each expert suits each client, [C, E]
        float32 in [0, 1]; `gate.bias` times it is added to the client's gate logits.
        None: the client's fitness, scaled to [0, 1], see `align.affinity`. In a program
        None where `gate.bias` is 0.
      timed: whether its evidence has `times`, of the round's work on the known links.
      needs: its advantages beyond the shared rules, "" for none; the report prints it.
      reference: whether it knows what no server could: the others are measured by it,
        and a report never names it as the best one.
      options: its config fields.
      allowed: (field, allowed values) of other fields in which it allows less.
      at_most: (field, other field) of the config: the one may not exceed the other.
      configure: config -> config of its program: sizes, optimisers, loss weights. Data,
        split, devices and capacity keep the user's config.
      init: sizes -> its own state before the first round, a dict of arrays; scalars
        among them are metrics of every round.
      update: (evidence, assignment, feedback, reports, hyper) -> its state after a
        round; feedback is 0 for clients whose update did not arrive.
      report: (routing of the layer, batch, hyper) -> pytree that a client sends beside
        its update, the mean over its local batches; None for nothing. The routing has
        the `weight` [P] of its positions.
      stages: (rounds, (state, federation, hyper, key, model=, task=, sizes=) ->
        (state, frozen)), run between chunks, once so many rounds are done; the number,
        a multiple of `chunk_rounds`, may be the name of a config field, or a pair of
        such names or numbers: of the first stage, and of the rounds from one to the
        next, 0 for no next one. One at `num_rounds` acts only if the run is extended.
        The federation is that of the world as it is then, with the examples that
        clients own by then. `frozen` is `federation.frozen`, as the stage leaves it.
      server_examples: (round [], hyper, sizes) -> examples [] on which the stages just
        before the round train a stem, one expert and a head, repeats included; None
        for none.
      message: (round [], hyper, sizes) -> numbers [] that every client of the
        population sends to the stages just before the round, after it has received
        stem, first expert and head, and passes of its own examples through them, 1
        forward or 3 with the backward pass; None for none.
      stage_bytes: (sizes) -> bytes that a stage holds at once beside state and data, a
        float; None where they are few.
      welcome: (state, federation, index [M], size [], hyper, model=, task=, sizes=) of
        ONE client that has never taken part and owns the first `size` examples of
        `index` -> the experts that serve it, [G, E] bool, some in each layer; it asks
        the client once. None: the server's whole model serves it.
      exchange: (personal parts [N, ...], state, evidence, arrived [C], hyper) ->
        personal parts, state, and the experts that each client of the cohort has sent
        to and received from others, [C] each; it sees all layers. None for nothing.
      gate_weight: (held [E] bool, feedback [K], examples [], hyper) of ONE client ->
        weight of each of its gate rows in their averages, [E].
      expert_weight: (slot [K] bool, feedback [K], examples [], hyper) of ONE client ->
        weight of the expert in each slot in its average, [K].
      gate_loss: (logits [P, E], weight [P], held [E] bool, factor [], hyper) -> []
        nats; `weight` is of the positions, None where all count alike, and `factor`
        the assignment's factor of the calibration loss.
      expert_priority: (gates [P, K], weight [P] or None, hyper) -> value [K] of
        training each held expert on a batch; the most valuable get gradients, as many
        as the client has room for. None: all.
      choose: (probe [K], slot [K] bool, hyper, key) of ONE client that has received its
        experts -> slots [K] bool that it trains and keeps, one or more of the valid
        ones, from the loss of each, see `probe`. What it does not choose is not sent.
        None: all, and no probe unless `fitness.feedback` is one.
      mix: `outputs` of the experts, or their `probabilities`.
      gating: the gates of an example over the experts that may answer it, in training
        and evaluation: softmax over the A `chosen` ones; softmax over `all` of them, of
        which the A largest are kept and not renormalised; or, without any gate, the
        `sum` of all of them, scaled by E over their number.
      step_scale: (steps [C], examples [C], momentum) -> factors [C] of the cohort's
        deltas; None for 1.
      personal: parts that stay with the clients, of `stem`, `gate`, `experts`, `head`.
      local_experts: the last experts, as many of them stay with the clients, where
        `experts` is personal.
      frozen: of `stem` and `head` the parts that are not trained, and `gate_stem`, a
        copy of the stem as it is before the first round, or as the stages leave it,
        which the gate reads instead of the one that is trained; every client receives
        them once.
      silent: whether nothing travels between clients and server.
      pooled: whether one client owns all data and takes the steps of a whole cohort.
      variates: whether clients correct their gradients by control variates.
      gate_period: hyper -> rounds from one showing of personal gates to the next; None
        for never.
      test_active: experts per example in evaluation, 0 for as many as in training.
      every_expert: whether evaluation computes all E experts for every example.
      one_layer: whether it is defined for models with one MoE layer and `parts` only.
      alone: whether it gives each client the top k_c of the client's own fitness and
        reads nothing else about its data, so that `privacy.selection` bounds what the
        client's held sets say; see `privacy.selection`.
    """

    about: str
    assign: AssignFn
    affinity: AffinityFn | None = None
    timed: bool = False
    needs: str = ""
    reference: bool = False
    options: tuple[Option, ...] = ()
    allowed: tuple[tuple[str, Range | tuple[str, ...]], ...] = ()
    at_most: tuple[tuple[str, str], ...] = ()
    configure: Callable[[ConfigDict], ConfigDict] = same_config
    init: Callable[[Sizes], PyTree] = no_state
    update: UpdateFn = same_state
    report: Callable[..., PyTree] | None = None
    stages: tuple[tuple[Any, Callable[..., tuple[Any, PyTree]]], ...] = ()
    server_examples: Callable[[Array, Hyper, Sizes], Array] | None = None
    message: Callable[[Array, Hyper, Sizes], tuple[Array, int]] | None = None
    stage_bytes: Callable[[Sizes], float] | None = None
    welcome: Callable[..., Array] | None = None
    exchange: Callable[..., tuple[PyTree, PyTree, Array, Array]] | None = None
    gate_weight: Callable[..., Array] | Open = None
    expert_weight: Callable[..., Array] | Open = None
    gate_loss: Callable[..., Array] | Open = None
    expert_priority: Callable[[Array, Array | None, Hyper], Array] | None = None
    choose: Callable[[Array, Array, Hyper, Array], Array] | None = None
    mix: str = "outputs"
    gating: str = "chosen"
    step_scale: Callable[[Array, Array, float], Array] | None = None
    personal: tuple[str, ...] | Open = None
    local_experts: int = 0
    frozen: tuple[str, ...] = ()
    silent: bool = False
    pooled: bool = False
    variates: bool = False
    gate_period: Callable[[Hyper], Array] | None = None
    test_active: int = 0
    every_expert: bool | Open = None
    one_layer: bool = False
    alone: bool = False


class Process(NamedTuple):
    """One process of the world: what varies over rounds, and how clients meet it.

    `world.step` chains the processes that are on, in the order of their table, for all
    N clients at once. One that is off is neither in the program nor in the state.

    Attributes:
      about: what it does, one sentence.
      is_on: config -> whether it would change anything.
      init: (keys, hyper, sizes) -> its state before the first round, a pytree of
        arrays, from its stationary law. What never changes is drawn here, from
        `keys.always(purpose)`; purposes from 2**31 to 2**32 - 100 are free, smaller
        ones are the numbers of rounds.
      step: (state, keys, round [], hyper) -> its state in the round. All draws of the
        round are made here, from `keys.of(purpose)`; purposes from 2000 on are free.
      apply: (state, view, hyper) -> view of the round, a `world.step.View`, from the
        one that the processes before it have left. It draws nothing, so that
        evaluation sees the world of the round.
      options: the config fields that it reads. Processes of one group may share rows.
      always: names of those options that a run reads while it is off, too, besides
        `is_on`; the others may then change when the run is resumed.
      after: (state, cohort [C], outcome [C], late [C], hyper) -> its state after the
        round; `late` are the clients that still worked at the deadline. None: the same.
      metrics: state -> metrics of the round, by name. None: no metrics.
    """

    about: str
    is_on: Callable[[ConfigDict], bool]
    init: Callable[[Keys, Hyper, Sizes], PyTree]
    step: Callable[[PyTree, Keys, Array, Hyper], PyTree]
    apply: Callable[[PyTree, Any, Hyper], Any]
    options: tuple[Option, ...] = ()
    always: tuple[str, ...] = ()
    after: Callable[[PyTree, Array, Any, Array, Hyper], PyTree] | None = None
    metrics: Callable[[PyTree], dict[str, Array]] | None = None
