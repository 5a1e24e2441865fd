"""What is static in how a run trains, merges and learns. Functions are choices too."""

from collections.abc import Callable
from typing import NamedTuple

from fedmoe_jax.types import Array, Hyper

PARTS = ("stem", "gate", "experts", "head")  # of a model


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
      gate_weight: (task, update, examples [], hyper) of ONE client -> what each of its
        gate rows weighs in the average, [E].
      expert_weight: likewise what the expert in each of its slots weighs, [K].
      feedback: `accuracy`, `loss` or `mixed`.
      client_optimizer: `sgd` or `adam`.
      momentum: of the local sgd, in [0, 1).
      prox: whether the FedProx term is in the local objective.
      focus: (gates [B, K], hyper) -> value [K] of training each expert on a batch; the
        most valuable get gradients, as many as the client has room for. None: all.
      gate_loss: (gate logits [B, E], task, hyper) -> [] what they cost, nats.
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
    client_chunk: int
    chunk_rounds: int
