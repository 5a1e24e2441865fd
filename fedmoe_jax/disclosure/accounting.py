"""What the defences of a run guarantee, by the package dp-accounting; on the host.

The unit of privacy is a client: neighbours differ in all data of one client, which is
replaced by another's of the same device. Nothing is claimed for single examples.

Every mechanism has a channel of its own, and its epsilon is of that channel alone:
feedback towards the server, held sets towards whoever sees the link, the server's model
towards whoever sees it. `epsilon` composes those that are on. What a run has no
mechanism for, is not covered; where a strategy reads or sends more than a mechanism
covers, there is no epsilon, but a reason.

Guarantees are conditional on the models that a client was sent: what its update does to
the held sets and reports of others is covered where updates are clipped and noisy.
Where the feedback of a client moves the held sets of others, by usage, bounds or
floors, sums and requests have a guarantee only beside noisy feedback, given which it
holds. What a strategy decides from is found in its traced decision (`reads`), or what
its record says (`Strategy.needs`, `update`, `stages`).

Only sums of updates gain from the sampling of cohorts, if that is uniform, of fixed
size and secret to whoever sees the models. A link shows who takes part, and the number
of holders of each expert may: so they gain only in a run without other defences, of a
model with one expert; cohorts that are drawn by size or reach gain nothing.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fedmoe_jax.base import Strategy, same_state
from fedmoe_jax.disclosure.reads import find_reads
from fedmoe_jax.options import UserError
from fedmoe_jax.privacy.defences import DEFENCES, is_private
from fedmoe_jax.program import Program
from fedmoe_jax.pruning.scores import MEASURED
from fedmoe_jax.world.costs import FEEDBACK_NUMBERS

UNIT = "a client, replaced by another"
REPLACED = 2  # norms C by which a sum changes where a client is replaced
BIASED = "a biased gate (gate.bias) sends the client's fitness along"
BOUNDED_RANGE = 8  # epsilon-bounded-range is epsilon^2 / 8 zCDP, arXiv 2004.07223


class Cost(NamedTuple):
    """What one mechanism spends.

    Attributes:
      covers: what its epsilon is of.
      rounds: in which it is at work.
      event: the name of a mechanism of a round, and its numbers, see `make_event`; None
        where there is no guarantee.
      reason: why there is none; empty where there is one.
    """

    covers: str
    rounds: int
    event: tuple[str, tuple[float, ...]] | None
    reason: str = ""


def check_package(config: ConfigDict) -> None:
    """Raises UserError where a config asks for guarantees that nothing can count."""
    if not is_private(config):
        return
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        name = next(name for name in DEFENCES if config.privacy[name] > 0)
        raise UserError(
            f"privacy.{name}={config.privacy[name]} is not allowed without the package "
            "dp-accounting; allowed: 0, or after 'pip install dp-accounting' any"
        ) from None


def name_unhidden(strategy: Strategy) -> str:
    """What clients send that no noise covers; empty for nothing."""
    sent = {
        "messages to its stages": strategy.message is not None,
        "gates that are shown": strategy.gate_period is not None,
        "experts that clients exchange": strategy.exchange is not None,
    }
    return " and ".join(what for what, is_sent in sent.items() if is_sent)


def has_memory(program: Program) -> bool:
    """Whether held sets follow what clients have sent, beside fitness and usage.

    Also by the time of pruned experts, which follows the importance of their units.
    """
    strategy, static = program.strategy, program.static
    kept = bool(strategy.stages) or strategy.update is not same_state
    timed = strategy.timed and static.pruning.kind in MEASURED
    return kept or timed or static.fairness.expert_floor


def is_learning(config: ConfigDict, program: Program) -> bool:
    """Whether held sets follow what clients have sent."""
    if program.sizes.num_experts == 1:
        return False
    return has_memory(program) or bool(find_reads(config, program))


def is_blind(config: ConfigDict, program: Program) -> bool:
    """Whether held sets follow no data of any client."""
    strategy = program.strategy
    told = bool(strategy.needs) or strategy.choose is not None
    return program.sizes.num_experts == 1 or not (told or is_learning(config, program))


def is_own(config: ConfigDict, program: Program) -> bool:
    """Whether each client's held sets follow nothing sent but its own feedback."""
    alone = program.strategy.alone and not has_memory(program)
    return alone and "usage" not in find_reads(config, program)


def is_coupled(config: ConfigDict, program: Program) -> bool:
    """Whether what a client sends may move the held sets of other clients."""
    return is_learning(config, program) and not is_own(config, program)


def explain_coupling(config: ConfigDict, program: Program) -> str:
    """Why neither sums nor requests have a guarantee; empty where they have."""
    if program.static.privacy.feedback_noise or not is_coupled(config, program):
        return ""
    return (
        f"{config.strategy} decides about other clients, too, by feedback without noise"
    )


def name_given(config: ConfigDict, program: Program) -> str:
    """What a guarantee takes as given beside the models."""
    noisy = program.static.privacy.feedback_noise and is_coupled(config, program)
    return ", given its noisy feedback" if noisy else ""


def count_numbers(program: Program) -> int:
    """Numbers that one client reports in a round, at most."""
    sizes = program.sizes
    slots = sizes.num_layers * sizes.max_held
    each = FEEDBACK_NUMBERS + program.static.probes
    return each * slots + program.report_numbers


def cost_feedback(config: ConfigDict, program: Program) -> Cost:
    """Gaussian noise on n numbers in [0, 1]: their L2 sensitivity is sqrt(n)."""
    multiplier = config.privacy.feedback_noise / math.sqrt(count_numbers(program))
    unhidden = name_unhidden(program.strategy)
    if program.strategy.choose is not None:
        unhidden = "the client's choice among its experts"
    if program.static.fairness.power:
        unhidden = "a client's loss, as a weight,"
    if program.static.pruning.kind in MEASURED:
        unhidden = "the importance of hidden units"
    return Cost(
        covers="a client's feedback and report, towards the server",
        rounds=config.num_rounds,
        event=None if unhidden else ("gaussian", (multiplier,)),
        reason=f"{config.strategy} has {unhidden} without noise" if unhidden else "",
    )


def cost_selection(config: ConfigDict, program: Program) -> Cost:
    """G K picks of epsilon-bounded-range each."""
    sizes = program.sizes
    picks = sizes.num_layers * sizes.max_held
    event, reason = None, ""
    if sizes.num_experts == 1:
        event = "nothing", ()
    elif program.strategy.affinity is not None:
        reason = BIASED
    elif program.static.fairness.expert_floor:
        reason = "fairness.expert_floor swaps experts by fitness without noise"
    elif is_blind(config, program):
        event = "nothing", ()
    elif is_own(config, program):
        event = "zcdp", (picks * config.privacy.selection**2 / BOUNDED_RANGE,)
    else:
        reason = (
            f"{config.strategy} does not give each client the top of its own fitness "
            "alone"
        )
    return Cost(
        "a client's held sets, towards whoever sees them",
        count_rounds(config, program),
        event,
        reason,
    )


def cost_flip(config: ConfigDict, program: Program) -> Cost:
    """Two held sets differ in at most min(2 K, E) bits of each layer."""
    sizes = program.sizes
    travelling = sizes.num_experts - program.strategy.local_experts
    bits = sizes.num_layers * min(2 * sizes.max_held, travelling)
    event: tuple[str, tuple[float, ...]] = "nothing", ()
    reason = explain_coupling(config, program)
    if program.strategy.affinity is not None:
        reason = BIASED
    if travelling > 1 and not is_blind(config, program):
        event = "randomised", (config.privacy.flip, bits)
        if program.static.pruning.kind != "none":
            reason = "the bytes of a pruned model follow which experts are held"
    return Cost(
        "the sets of experts that a client asks for, towards a listener on the link"
        + name_given(config, program),
        count_rounds(config, program),
        None if reason else event,
        reason,
    )


def cost_updates(config: ConfigDict, program: Program) -> Cost:
    """A client that is replaced changes a sum by 2 C, whose noise is z C."""
    sizes, noise = program.sizes, config.privacy.noise
    unhidden = name_unhidden(program.strategy)
    if program.strategy.variates:
        unhidden = "control variates"
    if program.static.pruning.kind in MEASURED:
        unhidden = "the importance of hidden units"
    reason = explain_coupling(config, program)
    if unhidden:
        reason = f"{config.strategy} has {unhidden} without noise"
    if not noise > 0:
        reason = "sums have no noise (privacy.noise=0)"
    multiplier = noise / REPLACED
    event: tuple[str, tuple[float, ...]] = "gaussian", (multiplier,)
    if is_amplified(config, program):
        event = "sampled", (multiplier, sizes.cohort_size, sizes.num_clients)
    return Cost(
        "the server's model, where the number of holders of each expert is public"
        + name_given(config, program),
        config.num_rounds,
        None if reason else event,
        reason,
    )


COSTS = {
    "feedback_noise": cost_feedback,
    "selection": cost_selection,
    "flip": cost_flip,
    "clip": cost_updates,
}


def count_rounds(config: ConfigDict, program: Program) -> int:
    """Rounds in which held sets say something: those after a dense warm-up."""
    return config.num_rounds - config.upcycle.rounds * program.static.upcycled


def is_sampled(config: ConfigDict) -> bool:
    """Whether cohorts are uniform draws of some of the clients."""
    uniform = config.availability.sampling == "uniform"
    uniform &= not config.fairness.floor > 0  # whose queues choose, too
    return uniform and config.cohort_size < config.num_clients


def is_amplified(config: ConfigDict, program: Program) -> bool:
    """Whether nobody who sees the models can know who took part."""
    private = program.static.privacy
    shown = private.feedback_noise or private.selection or private.flip
    return is_sampled(config) and program.sizes.num_experts == 1 and not shown


def list_costs(config: ConfigDict, program: Program) -> dict[str, Cost]:
    """The cost of every mechanism that is on, by the name of its number.

    Args:
      config: of the run, whose rounds are all done.
      program: its static parts.
    """
    private = program.static.privacy
    return {
        name: cost(config, program)
        for name, cost in COSTS.items()
        if getattr(private, name)
    }


def make_event(name: str, numbers: Sequence[float]) -> Any:
    """One round of a mechanism as dp-accounting has it.

    Args:
      name: `gaussian` (standard deviation over sensitivity), `sampled` (the same of a
        uniform cohort without replacement, its size, that of the population), `zcdp`
        (rho), `randomised` (epsilon of a bit, number of bits), or `nothing`.
      numbers: of the mechanism.
    """
    import dp_accounting as dp

    if name == "gaussian":
        return dp.GaussianDpEvent(*numbers)
    if name == "sampled":
        multiplier, cohort, clients = numbers
        inner = dp.GaussianDpEvent(multiplier)
        return dp.SampledWithoutReplacementDpEvent(int(clients), int(cohort), inner)
    if name == "zcdp":
        return dp.ZCDpEvent(*numbers)
    if name == "randomised":
        epsilon, bits = numbers
        drawn_anew = 2 / (1 + math.exp(min(epsilon, 700.0)))  # a coin, heads or tails
        bit = dp.RandomizedResponseDpEvent(drawn_anew, 2)
        return dp.SelfComposedDpEvent(bit, int(bits))
    assert name == "nothing"
    return dp.NoOpDpEvent()


@functools.cache  # seeds of a row have the same costs
def find_epsilon(costs: tuple[Cost, ...], delta: float) -> float | None:
    """The epsilon of mechanisms together; None where one has no guarantee.

    Args:
      costs: of the mechanisms.
      delta: in (0, 1).
    """
    from dp_accounting import NeighboringRelation, rdp

    relation = NeighboringRelation.REPLACE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    for cost in costs:
        if cost.event is None:
            return None
        if cost.rounds:
            accountant.compose(make_event(*cost.event), cost.rounds)
    return float(accountant.get_epsilon(delta))


def account(config: ConfigDict, program: Program) -> dict[str, Any]:
    """The fields of `summary.json` about privacy; {} where nothing is private.

    `epsilon` is of all mechanisms together, None where one of them has no guarantee;
    `privacy` has `delta`, `unit`, `rounds`, `sampling`, and by the name of its field
    each mechanism's own `epsilon` and a `text` that says what that is of.

    Args:
      config: of the run, whose rounds are all done.
      program: its static parts.
    """
    costs, delta = list_costs(config, program), config.privacy.delta
    if not costs:
        return {}
    cohort, clients = config.cohort_size, config.num_clients
    sampling = f"{cohort} of {clients} clients a round, {config.availability.sampling}"
    amplified = "clip" in costs and is_amplified(config, program)
    return {
        "epsilon": find_epsilon(tuple(costs.values()), delta),
        "privacy": {
            "delta": delta,
            "unit": UNIT,
            "rounds": config.num_rounds,
            "sampling": f"{sampling}; "
            + ("it amplifies" if amplified else "no amplification"),
            **{name: summarise(cost, delta) for name, cost in costs.items()},
        },
    }


def summarise(cost: Cost, delta: float) -> dict[str, Any]:
    """One mechanism's own `epsilon` and `text`."""
    epsilon = find_epsilon((cost,), delta)
    size = f"epsilon {epsilon:.3g}" if epsilon is not None else "no epsilon"
    why = f", as {cost.reason}" if cost.reason else ""
    return {"epsilon": epsilon, "text": f"{size} of {cost.covers}{why}"}


def describe_privacy(summary: Mapping[str, Any]) -> str:
    """What a run guarantees, on one line; empty where nothing is private."""
    found = summary.get("privacy")
    if not found:
        return ""
    parts = [f"{k}: {v['text']}" for k, v in found.items() if k in COSTS]
    total = summary.get("epsilon")
    total = "no epsilon" if total is None else f"epsilon {total:.3g}"
    return (
        f"{total} at delta {found['delta']:g}; unit: {found['unit']}; "
        f"{found['rounds']} rounds; {found['sampling']}; " + "; ".join(parts)
    )
