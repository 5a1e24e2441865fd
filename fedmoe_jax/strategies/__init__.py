"""The strategies: who holds which experts. One table names them all."""

import functools

import jax

from fedmoe_jax.strategies.fedavg import FEDAVG, FEDAVG_ACTIVE
from fedmoe_jax.strategies.greedy import GREEDY
from fedmoe_jax.strategies.load_balanced import LOAD_BALANCED, LOAD_BALANCED_RUNNING
from fedmoe_jax.strategies.random import RANDOM
from fedmoe_jax.strategies.round_robin import ROUND_ROBIN
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Hyper,
    Sizes,
    Strategy,
    UserError,
)

STRATEGIES: dict[str, Strategy] = {
    "random": RANDOM,
    "round_robin": ROUND_ROBIN,
    "greedy": GREEDY,
    "load_balanced": LOAD_BALANCED,
    "load_balanced_running": LOAD_BALANCED_RUNNING,
    "fedavg": FEDAVG,
    "fedavg_active": FEDAVG_ACTIVE,
}


def find_strategy(name: str) -> Strategy:
    """The strategy called `name`.

    Raises:
      UserError: if there is none; the message lists the names.
    """
    if name not in STRATEGIES:
        allowed = ", ".join(STRATEGIES)
        raise UserError(f"strategy={name!r} is unknown; allowed: {allowed}")
    return STRATEGIES[name]


@functools.cache
def either(names: tuple[str, ...]) -> Strategy:
    """One strategy that decides as the one that `hyper.strategy` counts to.

    So runs of several strategies, of equal sizes, share one compiled program.
    """
    strategies = [find_strategy(name) for name in names]
    if len(strategies) == 1:
        return strategies[0]

    def assign(
        evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
    ) -> Assignment:
        def branch(strategy: Strategy):
            return lambda: strategy.assign(evidence, hyper, sizes, key)

        return jax.lax.switch(hyper.strategy, [branch(s) for s in strategies])

    return Strategy(assign=assign, note=f"One of {', '.join(names)}.")
