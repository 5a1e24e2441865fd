"""The axis letters, the words, and every pytree that crosses a file boundary.

Axis letters, used in every docstring, comment and einsum of this package:

| letter | axis |
|---|---|
| N | clients in the population |
| C | clients in the cohort of one round |
| M | padded examples per client |
| T | local steps |
| B | batch of examples |
| H W F | image height, width, channels |
| D | gate features |
| G | MoE layers |
| E | experts |
| K | expert slots of a layer that a client may hold (the maximum over clients) |
| A | experts active per example |
| L | strata of the data: label classes, topics |
| R | rounds in one compiled chunk |
| S | runs of a sweep |
| V | values of a score in evaluation: accuracy and, of some tasks, bits, and bytes |
| X | examples of a data set |

Words: `mask` is bool, `weight` >= 0, `size` counts examples, `load` counts examples
trained through an expert, `gates` are probabilities, `logits` are unnormalised, `key`
is a JAX key and is consumed, `rng` is a NumPy generator and stays on the host, and
`delta = client_params - params`, so that adding a delta moves towards the client.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

Array = jax.Array
PyTree = Any

# The traced numbers of a run in the config's own groups, `hyper.fitness.rate`, float32
# or int32 scalars, and `hyper.strategy`, [] int32, which of the program's strategies
# decides (see `strategies.either`). Varying one compiles nothing anew. The groups
# depend on what plug-ins add; see `program.make_hyper`.
Hyper = Any
# The config's fields that shape a program, hashable, in the same groups.
Static = Any


class Keys(NamedTuple):
    """The keys of a round.

    Attributes:
      round: of the round; each purpose folds its number into it.
      run: of the run, the same in every round.
      cohort: of the sampling of the cohort.
      align: of the strategy's decision.
      train: of the clients' training; each client folds its id into it.
    """

    round: Array
    run: Array
    cohort: Array
    align: Array
    train: Array

    def of(self, purpose: int) -> Array:
        """The round's key for one purpose."""
        return jax.random.fold_in(self.round, purpose)

    def always(self, purpose: int) -> Array:
        """The run's key for one purpose."""
        return jax.random.fold_in(self.run, purpose)


def make_keys(run: Array, round: Array | int) -> Keys:
    """The keys of a round from the run's key, which is not consumed."""
    key = jax.random.fold_in(run, round)
    return Keys(key, run, *jax.random.split(key, 3))


class Sizes(NamedTuple):
    """The static sizes of one run. Changing any of them compiles a new program.

    Attributes:
      num_clients: N.
      cohort_size: C, at most N.
      num_layers: G, MoE layers of the model.
      num_experts: E, of each layer.
      max_held: K, at most E.
      num_active: A, at most K.
      local_steps: T, the most that any client takes.
      batch_size: B.
      num_strata: L.
      num_groups: Q, groups of clients whose strata are apart, of L / Q classes each; 1
        where there are none, see `data.groups`, and L where strata are no classes.
      max_capacity: the most experts that any client has room for; K, unless the
        strategy has changed K.
      gate_width: D, numbers of an expert's row in the first layer's gate, without bias.
    """

    num_clients: int
    cohort_size: int
    num_layers: int
    num_experts: int
    max_held: int
    num_active: int
    local_steps: int
    batch_size: int
    num_strata: int
    num_groups: int
    max_capacity: int
    gate_width: int

    @property
    def num_classes(self) -> int:
        """L / Q, classes of each group; 1 where examples have none."""
        return self.num_strata // self.num_groups


NOTHING = np.zeros(0, np.int32)


class Partition(NamedTuple):
    """The owner of each training example, on the host.

    Attributes:
      index: [N, M] int32, row c lists the examples that client c trains on and then
        zeros.
      size: [N] int32, how many entries of each row count.
      label_counts: [N, L] int32, of these examples those of each stratum.
      public: [Q] int32, examples that the server has and no client owns.
      own_test: [Q] int32, examples that clients set aside as their own test sets, or,
        numbered after the training examples, the data's test examples of each client.
      own_test_client: [Q] int32 in [0, N), the client of each.
      validation: [Q] int32, examples that clients set aside for tuning.
      unseen: [Q] int32, examples of clients that never take part.
      unseen_client: [Q] int32, the client of each, numbered from 0 among these.
    """

    index: Any
    size: Any
    label_counts: Any
    public: Any
    own_test: Any = NOTHING
    own_test_client: Any = NOTHING
    validation: Any = NOTHING
    unseen: Any = NOTHING
    unseen_client: Any = NOTHING


class Lists(struct.PyTreeNode):
    """Training examples of each client.

    Attributes:
      index: [N, M] int32, zeros beyond `size`.
      size: [N] int32.
    """

    index: Array
    size: Array


class Pool(struct.PyTreeNode):
    """Training examples of all clients together.

    Attributes:
      example: [Q] int32, zeros where they only pad.
      group: [Q] int32, 1 + the group by which scores are summed, 0 where it only pads.
    """

    example: Array
    group: Array


class Devices(struct.PyTreeNode):
    """The devices of all clients, true values.

    Attributes:
      memory: [N] float32, bytes free for training.
      flops: [N] float32, floating-point operations per second.
      upload: [N] float32, bytes per second.
      download: [N] float32, bytes per second.
      latency: [N] float32, seconds one way between the device and the server.
      power: [N] float32, watts drawn by training.
      radio: [N] float32, watts drawn while sending or receiving.
      tier: [N] int32, index into the names of the tiers.
    """

    memory: Array
    flops: Array
    upload: Array
    download: Array
    latency: Array
    power: Array
    radio: Array
    tier: Array


class Federation(struct.PyTreeNode):
    """Everything a round reads and never writes; replicated on every device.

    Attributes:
      train: training examples of all clients, leaves [X, ...] by name.
      index: [N, M] int32, examples of each client, zeros beyond `size`.
      size: [N] int32, examples of each client, >= 1.
      steps: [N] int32, local steps of each client in a round, 1 to T.
      label_mix: [N, L] float32, each client's histogram of strata, rows sum to 1.
        Where the data are pooled, N is 1 in other fields, and these and the
        `sample_order` are the clients' still.
      public: [Q] int32, examples that the server has and no client owns.
      test: test examples, leaves [X', ...] of the same names.
      test_stratum: [X'] int32 in [0, L).
      statistics: of the training examples, as the task's `prepare` reads them.
      devices: the clients' devices, before anything varies over time.
      frozen: the parts of the model that nothing trains, by name like params, and what
        the model itself keeps fixed; {} for most.
      base: pretrained weights under the name `base`, see `Model.base`; {} for most.
      sample_order: [N] int32, a permutation: the order in which clients join the sample
        that evaluation scores; see `panel`.
      drift_source: [N] int32, a permutation: towards whose data each client drifts,
        itself if it does not; see `world.drift`.
      own_test: each client's own test set, of all clients where the data are pooled,
        too; numbers from X on are test examples; None without any.
      validation: examples set aside for tuning, by stratum; None without any.
      unseen: examples of clients that never take part, by client; None without any.
    """

    train: dict[str, Array]
    index: Array
    size: Array
    steps: Array
    label_mix: Array
    public: Array
    test: dict[str, Array]
    test_stratum: Array
    statistics: PyTree
    devices: Devices
    frozen: PyTree
    sample_order: Array
    drift_source: Array
    own_test: Lists | None
    validation: Pool | None
    unseen: Pool | None
    base: PyTree = struct.field(default_factory=dict)

    @property
    def fixed(self) -> PyTree:
        """All that `Model.apply` reads beside the params."""
        return self.frozen | self.base


# Fields of the federation that every run of a sweep has for itself; it shares the rest.
PER_RUN = (
    *("index", "size", "steps", "label_mix", "public", "devices", "frozen"),
    *("sample_order", "drift_source", "own_test", "validation", "unseen"),
)


class ExpertLinks(struct.PyTreeNode):
    """The links between gate and experts in one round, see `world.expert_links`.

    Attributes:
      snr: [E] float32 > 0, linear, mean signal-to-noise ratio of each expert's link.
      simulated: [] bool, whether clients train with such links, or with perfect ones.
    """

    snr: Array
    simulated: Array


class AlignState(struct.PyTreeNode):
    """The server's knowledge of clients and experts.

    Attributes:
      fitness: [N, G, E] float32, client-expert fitness score (paper section III-B-1).
      usage: [G, E] float32, decayed count of examples trained (section III-B-2).
      held: [N, G, E] bool, the last assignment that reached each client: where its
        round was lost before it received its experts, it has those from before. Where
        clients choose, see `Strategy.choose`, those that it has chosen of it.
      times_held: [N, G, E] int32, rounds in which the client was to hold the expert, or
        has chosen it.
      strategy: the strategy's own state, leaves [G, ...], {} for most.
      detector: of drift, see `align.drift_detector`, leaves [G, ...]; {} where none
        watches.

    In functions of ONE layer there is no axis G.
    """

    fitness: Array
    usage: Array
    held: Array
    times_held: Array
    strategy: PyTree = struct.field(default_factory=dict)
    detector: PyTree = struct.field(default_factory=dict)


class SimState(struct.PyTreeNode):
    """The simulation. One pytree of arrays; a checkpoint is exactly this.

    Attributes:
      round: [] int32, rounds done so far.
      key: [] the run's key; it never changes, uses fold the round into it.
      params: `{"stem", "gate", "experts", "head"}`, see `base.Model`, without the parts
        that are frozen.
      server_opt: state of the server's optax transformation.
      align: the alignment state.
      personal: the parts of the model that stay with the clients, by name like
        params, every leaf with a leading N axis; {} where the server has all.
      variate: control variates of SCAFFOLD: `own`, like params with a leading N axis,
        and `mean`, like params, their mean weighted by the clients' examples; else {}.
      world: the states of the world's processes that are on, by their names, see
        `world.step`.
      belief: what the server believes about the devices, see `capacity`.
      stale: sums of the updates that came too late for the last round and are merged
        in the next, {} where no such update is merged.
      participation: of the clients so far, and the last round in detail, see
        `world.participation`.
      pruning: the importance of units, see `prune.init_pruning`; {} where
        it is not measured.
      queues: virtual queues of the floors that are on, `clients` [N] and `tiers`,
        leaves [G, K] by capacities, see `align.queues`; {} without a floor.
    """

    round: Array
    key: Array
    params: PyTree
    server_opt: PyTree
    align: AlignState
    personal: PyTree
    variate: PyTree
    world: PyTree = struct.field(default_factory=dict)
    belief: PyTree = struct.field(default_factory=dict)
    stale: PyTree = struct.field(default_factory=dict)
    participation: PyTree = struct.field(default_factory=dict)
    pruning: PyTree = struct.field(default_factory=dict)
    queues: PyTree = struct.field(default_factory=dict)


class Assignment(struct.PyTreeNode):
    """The experts that each cohort client holds, as slots.

    Attributes:
      held: [C, K] int32, expert ids; distinct among the valid slots of a row.
      slot: [C, K] bool, which slots are valid; the first k_c of each row, and after
        clients have chosen, see `Strategy.choose`, any of these.
      calibration: [C] float32, a factor of each client's calibration loss; None for 1.
      bias: [C, K] float32 >= 0, of the gate logits of the experts in the slots; None
        for none. `align_layers.assign` adds it, see `Strategy.affinity`.
      asked: [C, E] bool, the experts that each client asks for on the link, where that
        is randomised; slots are then those of them that it trains, any of the first
        k_c. None where it asks for all that it holds. `align_layers.assign` adds it,
        see `privacy.request`.
      assigned: [C, E] bool, what the strategy gave each client, where `asked` hides it;
        else None. It is for the observer alone.

    Of all layers together the leaves are [C, G, ...].
    """

    held: Array
    slot: Array
    calibration: Array | None = None
    bias: Array | None = None
    asked: Array | None = None
    assigned: Array | None = None


class Times(struct.PyTreeNode):
    """The time of a round's work, as the server expects it, in deadlines of the round.

    Links are as fast as the server knows them to be, see `times`; what becomes of them
    in truth it does not know.

    Attributes:
      expert: [C, E] float32 >= 0, what one more expert adds: in every MoE layer its way
        down, its training and its way up.
      room: [C] float32, what stem, gate, head and the server's margin leave for
        experts; negative where these alone take longer.
    """

    expert: Array
    room: Array


class Evidence(struct.PyTreeNode):
    """The evidence on which a strategy decides for a cohort.

    Attributes:
      round: [] int32.
      client: [C] int32, client ids.
      fitness: [C, E] float32, rows of the cohort, noisy with `privacy.selection`.
      usage: [E] float32.
      capacity: [C] int32 in [1, K], experts each client can hold.
      size: [C] int32 >= 1, examples that each client owns.
      load: [C] float32, examples each client trains in one round, repeats included.
      held: [C, E] bool, what each client has of the last assignment that reached it.
      times_held: [C, E] int32, rounds in which each client was to hold the expert.
      state: the strategy's own state, see `Strategy.init`.
      room: [C] float32, whole experts and a part of one that each client has room for,
        of which pruning makes more; None where nothing is pruned.
      times: of the round's work on the known links; None unless the strategy asks for
        them, see `Strategy.timed`.
    """

    round: Array
    client: Array
    fitness: Array
    usage: Array
    capacity: Array
    size: Array
    load: Array
    held: Array
    times_held: Array
    state: PyTree = struct.field(default_factory=dict)
    room: Array | None = None
    times: Times | None = None


class Feedback(struct.PyTreeNode):
    """One client's feedback on the experts in its slots (a leading C axis in a round).

    Attributes:
      accuracy: [K] float32 in [0, 1], gate-weighted mean of `Scores.score`.
      loss: [K] float32, gate-weighted mean of `Scores.loss`, nats of cross-entropies.
      frequency: [K] float32, share of the gate mass, sums to 1 over valid slots.
      load: [K] float32, positions (images or tokens) that the expert was trained on:
        those whose top-A includes it, in batches that train it.
      routed: [K] float32 in [0, 1], `load` as a share of the client's positions.
      peak: [K] float32 >= 0, largest gate of a batch, mean over the batches.
      probe: [K] float32 >= 0, mean of `Scores.loss` before training with this expert
        alone in its layer, see `probe`; of slots without an expert any number. None
        where clients do not probe.
    """

    accuracy: Array
    loss: Array
    frequency: Array
    load: Array
    routed: Array
    peak: Array
    probe: Array | None = None


class ClientInput(struct.PyTreeNode):
    """The inputs of one client's round (a leading C axis in a round).

    Attributes:
      client: [] int32, client id.
      steps: [] int32, local steps to take; 0 for what only pads the cohort.
      budget: [] int32 >= 1, experts that the client has room to train.
      scale: [] float32, factor of its delta in the averages, 1 for most.
      held: [G, K] int32, ids of the held experts of each MoE layer.
      slot: [G, K] bool, which of them count.
      calibration: [G] float32 >= 0, factor of the calibration loss, 1 for most.
      correction: what control variates add to its gradients, like params; {} for none.
      personal: the client's own parts, by name like params; {} where there are none.
      distortion: [] float32, how far its images have drifted; None where none do.
      hold_key: [] the key of the choice of the examples that it does not train on, the
        same in every round; None where clients do not probe.
      bias: [G, K] float32 >= 0, of the gate logits of the held experts; None for none.
      masks: the units that the client keeps of its sub-model, bool, by the name of the
        units: [n] of the stem's, [G, K, n] of the experts'; None where nothing is
        pruned.
      links: of the experts, with which it trains; None where they have none.
    """

    client: Array
    steps: Array
    budget: Array
    scale: Array
    held: Array
    slot: Array
    calibration: Array
    correction: PyTree
    personal: PyTree
    distortion: Array | None = None
    hold_key: Array | None = None
    bias: Array | None = None
    masks: PyTree = None
    links: ExpertLinks | None = None


class ClientUpdate(struct.PyTreeNode):
    """The result of one client's round.

    Attributes:
      delta: sub-model `{stem, gate, experts, head}`, trained less received; leaves of
        each MoE layer [E, ...] under `gate` and [K, ...] under `experts`.
      feedback: of every slot, leaves [G, K].
      report: the strategy's, mean over the batches; None without one.
      loss: [] float32, mean of `Scores.loss` over the steps.
      accuracy: [] float32 in [0, 1], mean of `Scores.score` over the steps.
      finite: [] bool, whether every number of the update is finite.
      chosen: [G, K] bool, the slots that the client has trained, see `Strategy.choose`;
        None where it trains all that it has received.
      keep: factors of the parts that are pruned, see `pruning.units.keep_params`; {}
        where nothing is.
      importance: of the units, mean over the steps, by name; {} where it is not
        measured.
      first_loss: [] float32, mean of `Scores.loss` in the first batch, thus of the
        params as received; None where no weight follows it.
    """

    delta: PyTree
    feedback: Feedback
    report: PyTree
    loss: Array
    accuracy: Array
    finite: Array
    chosen: Array | None = None
    keep: PyTree = struct.field(default_factory=dict)
    importance: PyTree = struct.field(default_factory=dict)
    first_loss: Array | None = None


# (state, federation, hyper) -> (state, metrics), of one round or of R
RoundFn = Callable[[SimState, Federation, Hyper], tuple[SimState, dict[str, Array]]]
