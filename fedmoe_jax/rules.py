"""What is static in how a run trains, merges and learns. Functions are choices too."""

from collections.abc import Callable
from typing import NamedTuple

from fedmoe_jax.types import Array, Hyper

PARTS = ("stem", "gate", "experts", "head")  # of a model


class World(NamedTuple):
    """Which processes of the world are on; what is off is not in the program.

    Attributes:
      pressure: whether other apps press on the devices' memory.
      background: whether other work takes compute.
      bandwidth: whether the links' speed varies.
      reach: whether clients can be out of reach.
      sampling: how cohorts are drawn, `uniform`, `size` or `reachable`.
      dropout: whether clients are lost before or in the middle of training.
      wireless: whether clients share a radio cell.
      labels: whether clients' labels drift.
      images: how clients' images drift, a name of `drift.DISTORTIONS`; "" for not.
      reaction: what an alarm of the drift detector does, `reset` or `hasten`; "" where
        there is no detector.
      profile: where the server's belief comes from, `oracle`, `self_reported` or
        `estimated`.
      overload: whether a client that holds more than its memory is lost.
      late: what becomes of updates past the deadline, `wait` (the round lasts longer),
        `drop`, or `stale` (they are merged in the next round).
    """

    pressure: bool
    background: bool
    bandwidth: bool
    reach: bool
    sampling: str
    dropout: bool
    wireless: bool
    labels: bool
    images: str
    reaction: str
    profile: str
    overload: bool
    late: str


CALM = World(
    pressure=False,
    background=False,
    bandwidth=False,
    reach=False,
    sampling="uniform",
    dropout=False,
    wireless=False,
    labels=False,
    images="",
    reaction="",
    profile="oracle",
    overload=False,
    late="wait",
)  # a world without processes


class Rules(NamedTuple):
    """The static choices of a run beside its sizes; names stand for pure functions.

    Attributes:
      personal: the parts of the model that stay with the clients, of `stem`, `gate`,
        `experts` and `head`.
      local_experts: how many experts, the last ones, stay with the clients, 0 unless
        `experts` is personal.
      frozen: parts that nobody trains; every client has them from the start.
      gate_period: rounds from one showing of personal gates to the next, 0 for never.
      silent: whether nothing travels between clients and server.
      gate_weight: (inputs, update, examples [], hyper) of ONE client -> the weight of
        each of its gate rows in the average, [E].
      expert_weight: likewise what the expert in each of its slots weighs, [K].
      feedback: `accuracy`, `loss` or `mixed`.
      client_optimizer: `sgd` or `adam`.
      momentum: of the local sgd, in [0, 1).
      prox: whether the FedProx term is in the local objective.
      focus: (gates [B, K], hyper) -> value [K] of training each expert on a batch; the
        most valuable get gradients, as many as the client has room for. None: all.
      gate_loss: (gate logits [B, E], inputs, hyper) -> [] what they cost, nats.
      probabilities: whether the experts' class probabilities are mixed, not their
        outputs.
      report_mass: whether clients report their mean gate over all E experts.
      variates: whether clients correct their gradients by control variates, for models
        of which every client holds all experts.
      step_scale: (steps [C], examples [C], momentum) -> factors [C] of the cohort's
        deltas; None for 1.
      server_optimizer: `sgd`, `momentum`, `adam`, `yogi` or `adagrad`.
      deadline: seconds a round may take on a device.
      communication_share: share of the deadline for the network.
      test_active: experts per image in evaluation, 0 for as many as in training.
      every_expert: whether evaluation computes all E experts for every image.
      ragged: whether clients take different numbers of local steps.
      world: which processes of the world are on.
      client_chunk: clients vmapped at once on each device.
      chunk_rounds: R.
    """

    personal: tuple[str, ...]
    local_experts: int
    frozen: tuple[str, ...]
    gate_period: int
    silent: bool
    gate_weight: Callable[..., Array]
    expert_weight: Callable[..., Array]
    feedback: str
    client_optimizer: str
    momentum: float
    prox: bool
    focus: Callable[[Array, Hyper], Array] | None
    gate_loss: Callable[..., Array]
    probabilities: bool
    report_mass: bool
    variates: bool
    step_scale: Callable[[Array, Array, float], Array] | None
    server_optimizer: str
    deadline: float
    communication_share: float
    test_active: int
    every_expert: bool
    ragged: bool
    world: World
    client_chunk: int
    chunk_rounds: int
