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
| E | experts |
| K | expert slots a client may hold (the maximum over clients) |
| A | experts active per example |
| L | label classes |
| R | rounds in one compiled chunk |
| S | runs of a sweep |
| X | examples of a data set |

Words: `mask` is bool, `weight` >= 0, `size` counts examples, `load` counts examples
trained through an expert, `gates` are probabilities, `logits` are unnormalised, `key`
is a JAX key and is consumed, `rng` is a NumPy generator and stays on the host, and
`delta = client_params - params`, so that adding a delta moves towards the client.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
PyTree = Any


class Sizes(NamedTuple):
    """The static sizes of one run. Changing any of them compiles a new program.

    Attributes:
      num_clients: N.
      cohort_size: C, at most N.
      num_experts: E.
      max_held: K, at most E.
      num_active: A, at most K.
      local_steps: T, the most that any client takes.
      batch_size: B.
      expert_width: hidden units (MLP) or channels (convolution) of one expert.
      num_classes: L.
      max_capacity: the most experts that any client has room for; K, unless the
        strategy has changed K.
    """

    num_clients: int
    cohort_size: int
    num_experts: int
    max_held: int
    num_active: int
    local_steps: int
    batch_size: int
    expert_width: int
    num_classes: int
    max_capacity: int


@struct.dataclass
class Hyper:
    """Hyperparameters that are traced: varying one does not compile anything anew.

    Every field but `strategy`, `own` and `world` is a float32 scalar.

    Attributes:
      strategy: [] int32, which of the program's strategies decides, see
        `strategies.either`.
      client_learning_rate: step size of the local optimiser, > 0.
      server_learning_rate: step size of the server optimiser, > 0.
      prox: FedProx coefficient mu >= 0 of `mu / 2 * |params - received|^2`; read only
        where `Rules.prox` says that the term is there.
      calibration: weight >= 0 of the gate calibration loss.
      load_loss: weight >= 0 of the Switch load loss.
      z_loss: weight >= 0 of the router z-loss.
      prior: fitness in [0, 1] before any feedback.
      noise: spread >= 0 of the initial fitness about the prior.
      fitness_rate: beta in (0, 1], weight of the newest feedback in the fitness EMA.
      idle_decay: rho in [0, 1], what an unheld pair keeps of its distance to
        `idle_target` (1 keeps the fitness as it is).
      idle_target: fitness towards which unheld pairs decay.
      loss_scale: alpha >= 0 of the loss-driven feedback `exp(-alpha * loss)`, 1 / nats.
      frequency_share: share in [0, 1] of selection frequency in the mixed feedback.
      usage_decay: gamma in [0, 1], what the usage keeps from round to round.
      fitness_weight: weight of the normalised fitness in the desirability.
      usage_weight: weight of the normalised usage, subtracted in the desirability.
      exploration: probability in [0, 1] that a client's scores are drawn at random.
      buffer: share in [0, 1) of every resource that the profile keeps in reserve.
      own: numbers that only the run's strategy reads, by name; see `Strategy.options`.
      world: numbers of the world's processes, by the config's groups and fields; read
        only where `Rules.world` says that the process is on.
    """

    strategy: Array
    client_learning_rate: Array
    server_learning_rate: Array
    prox: Array
    calibration: Array
    load_loss: Array
    z_loss: Array
    prior: Array
    noise: Array
    fitness_rate: Array
    idle_decay: Array
    idle_target: Array
    loss_scale: Array
    frequency_share: Array
    usage_decay: Array
    fitness_weight: Array
    usage_weight: Array
    exploration: Array
    buffer: Array
    own: dict[str, Array] = struct.field(default_factory=dict)
    world: dict[str, dict[str, Array]] = struct.field(default_factory=dict)


class Dataset(NamedTuple):
    """Images and labels on the host, as NumPy arrays.

    Attributes:
      train_x: [X, H, W, F] uint8.
      train_y: [X] int32 in [0, L).
      test_x: [X', H, W, F] uint8.
      test_y: [X'] int32.
      label_names: L strings.
    """

    train_x: Any
    train_y: Any
    test_x: Any
    test_y: Any
    label_names: tuple[str, ...]


class Partition(NamedTuple):
    """Which client owns which training example, on the host.

    Attributes:
      index: [N, M] int32, row c lists the examples of client c and then zeros.
      size: [N] int32, how many entries of each row count.
      label_counts: [N, L] int32, examples of each class that each client owns.
      public: [Q] int32, examples that the server has and no client owns.
    """

    index: Any
    size: Any
    label_counts: Any
    public: Any


@struct.dataclass
class Devices:
    """What every client's device can do, true values.

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


@struct.dataclass
class Federation:
    """Everything a round reads and never writes; replicated on every device.

    Attributes:
      x: [X, H, W, F] uint8 training images of all clients.
      y: [X] int32 labels.
      index: [N, M] int32, examples of each client, zeros beyond `size`.
      size: [N] int32, examples of each client, >= 1.
      steps: [N] int32, local steps of each client in a round, 1 to T.
      label_mix: [N, L] float32, each client's label histogram, rows sum to 1. Where the
        data are pooled, N is 1 in the other fields, and these are the clients' still.
      public: [Q] int32, examples that the server has and no client owns.
      test_x: [X', H, W, F] uint8.
      test_y: [X'] int32.
      mean: [H, W, F] float32 channel means of `x` as fractions of 255, at every pixel.
      std: [H, W, F] float32 channel standard deviations, likewise, > 0.
      devices: the clients' devices, before anything varies over time.
      drift_source: [N] int32, a permutation: towards whose data each client drifts,
        itself if it does not; see `world.drift`.
    """

    x: Array
    y: Array
    index: Array
    size: Array
    steps: Array
    label_mix: Array
    public: Array
    test_x: Array
    test_y: Array
    mean: Array
    std: Array
    devices: Devices
    drift_source: Array


# Fields of the federation that every run of a sweep has for itself; it shares the rest.
PER_RUN = ("index", "size", "steps", "label_mix", "public", "devices", "drift_source")


@struct.dataclass
class AlignState:
    """What the server has learnt about clients and experts.

    Attributes:
      fitness: [N, E] float32, client-expert fitness score (paper section III-B-1).
      usage: [E] float32, decayed count of examples trained (section III-B-2).
      held: [N, E] bool, what each client was to hold when it was last in a cohort.
      times_held: [N, E] int32, rounds in which the client was to hold the expert.
      memory: what the strategy keeps in mind for itself, {} for most.
      detector: of drift, see `align.detect`; {} where nobody reacts to drift.
    """

    fitness: Array
    usage: Array
    held: Array
    times_held: Array
    memory: PyTree = struct.field(default_factory=dict)
    detector: PyTree = struct.field(default_factory=dict)


@struct.dataclass
class SimState:
    """The simulation. One pytree of arrays; a checkpoint is exactly this.

    Attributes:
      round: [] int32, rounds done so far.
      key: [] the run's key; it never changes, uses fold the round into it.
      params: `{"stem", "gate", "experts", "head"}`; every leaf under `gate` and
        `experts` has a leading E axis.
      server_opt: state of the server's optax transformation.
      align: the alignment state.
      personal: the parts of the model that stay with the clients, by name like
        params, every leaf with a leading N axis; {} where the server has all.
      variate: control variates of SCAFFOLD, like params with a leading N axis, else {}.
      world: the state of every process of the world that is on, see `world.advance`.
      belief: what the server believes about the devices, see `profile`.
      stale: sums of the updates that came too late for the last round and are merged
        in the next, {} where no such update is merged.
      participation: who took part, and the last round in detail, see
        `world.participation`.
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


@struct.dataclass
class Assignment:
    """Which experts each cohort client holds, as slots.

    Attributes:
      held: [C, K] int32, expert ids; distinct among the valid slots of a row.
      slot: [C, K] bool, which slots are valid; the first k_c of each row.
      calibration: [C] float32, a factor of each client's calibration loss; None for 1.
    """

    held: Array
    slot: Array
    calibration: Array | None = None


@struct.dataclass
class Evidence:
    """What a strategy may look at when it decides for a cohort.

    Attributes:
      round: [] int32.
      client: [C] int32, client ids.
      fitness: [C, E] float32, rows of the cohort.
      usage: [E] float32.
      capacity: [C] int32 in [1, K], experts each client can hold.
      load: [C] float32, examples each client trains in one round.
      held: [C, E] bool, what each client held when it was last in a cohort.
      memory: the strategy's own memory, see `Strategy.remember`.
    """

    round: Array
    client: Array
    fitness: Array
    usage: Array
    capacity: Array
    load: Array
    held: Array
    memory: PyTree = struct.field(default_factory=dict)


@struct.dataclass
class Feedback:
    """What a client reports about the experts in its slots (leading C axis in a round).

    Attributes:
      accuracy: [K] float32 in [0, 1], gate-weighted share of correct predictions.
      loss: [K] float32 >= 0 nats, gate-weighted mean cross-entropy.
      frequency: [K] float32, share of the gate mass, sums to 1 over valid slots.
      load: [K] float32, examples whose top-A includes the slot's expert.
      peak: [K] float32 in [0, 1], largest gate of a batch, mean over the batches.
      mass: [E] float32 in [0, 1], mean gate over all experts, held or not, where
        `Rules.report_mass` asks for it, else [0].
    """

    accuracy: Array
    loss: Array
    frequency: Array
    load: Array
    peak: Array
    mass: Array


# (evidence, hyper, sizes, key) -> Assignment
AssignFn = Callable[[Evidence, Hyper, Sizes, Array], Assignment]
# (state, federation, hyper) -> (state, metrics), of one round or of R
RoundFn = Callable[[SimState, Federation, Hyper], tuple[SimState, dict[str, Array]]]
# Sizes -> Sizes, for strategies whose model differs from the configured one.
ResizeFn = Callable[[Sizes], Sizes]
# Sizes -> memory before the first round.
RememberFn = Callable[[Sizes], PyTree]
# (key, params, memory, federation, hyper, model=, sizes=) -> params, memory.
PrepareFn = Callable[..., tuple[PyTree, PyTree]]
# (evidence, assignment, feedback, hyper) -> memory after a round.
LearnFn = Callable[[Evidence, Assignment, Feedback, Hyper], PyTree]
# (personal parts [N, ...], memory, evidence, whose round counted [C], hyper) ->
# personal parts, memory, and how many experts each client of the cohort has sent to and
# received from others, [C] each.
ExchangeFn = Callable[
    [PyTree, PyTree, Evidence, Array, Hyper], tuple[PyTree, PyTree, Array, Array]
]
# (rules, sizes, options) -> the `rules.Rules` that the strategy needs.
AdaptFn = Callable[[Any, Sizes, dict[str, float]], Any]
# Hyperparameters as configured -> as the strategy needs them.
TuneFn = Callable[[Hyper], Hyper]


def as_it_is(value: Any) -> Any:
    """The configured sizes or hyperparameters unchanged."""
    return value


def same_rules(rules: Any, sizes: Sizes, options: dict[str, float]) -> Any:
    """The configured rules unchanged."""
    return rules


def no_memory(sizes: Sizes) -> PyTree:
    """For strategies that remember nothing but what all learn."""
    return {}


def same_memory(
    evidence: Evidence, assignment: Assignment, feedback: Feedback, hyper: Hyper
) -> PyTree:
    """The memory as it was."""
    return evidence.memory


def no_exchange(
    personal: PyTree, memory: PyTree, evidence: Evidence, arrived: Array, hyper: Hyper
) -> tuple[PyTree, PyTree, Array, Array]:
    """Clients keep their parts for themselves."""
    nothing = jnp.zeros(evidence.client.shape)
    return personal, memory, nothing, nothing


class Strategy(NamedTuple):
    """One published system or control, as a record of pure functions.

    Attributes:
      assign: decides which experts each cohort client holds.
      note: what it decides, one sentence.
      reads: which learnt evidence it decides from, of `fitness` and `usage`.
      needs: what it gets beyond the shared rules, "" for nothing; the report prints it.
      options: the config group whose numbers `adapt` gets and that are in `hyper.own`,
        "" for none.
      allowed: (field, what is allowed in it) of all its options, and of other fields
        of the config in which it allows less than others.
      at_most: (field, other field) of the config: the one may not exceed the other.
      pooled: whether one client owns all data and takes the steps of a whole cohort.
      resize: the sizes of the model it trains.
      adapt: the static rules that it trains and merges by, from the configured ones.
      tune: likewise its traced hyperparameters.
      remember: its own memory before the first round.
      prepare: params and memory after what the server does alone, before the first
        round; None for nothing.
      learn: its own memory after a round.
      exchange: the personal parts after clients have exchanged them, its memory, and
        what travelled.
    """

    assign: AssignFn
    note: str
    reads: tuple[str, ...] = ()
    needs: str = ""
    options: str = ""
    allowed: tuple[tuple[str, Any], ...] = ()
    at_most: tuple[tuple[str, str], ...] = ()
    pooled: bool = False
    resize: ResizeFn = as_it_is
    adapt: AdaptFn = same_rules
    tune: TuneFn = as_it_is
    remember: RememberFn = no_memory
    prepare: PrepareFn | None = None
    learn: LearnFn = same_memory
    exchange: ExchangeFn = no_exchange
