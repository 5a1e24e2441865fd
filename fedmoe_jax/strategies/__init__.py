"""The strategies: which client holds which experts. One table names them all."""

import functools
from collections.abc import Callable, Hashable
from difflib import get_close_matches

import jax
from ml_collections import ConfigDict

from fedmoe_jax.align.fitness import PROBES
from fedmoe_jax.base import AssignFn, Strategy
from fedmoe_jax.options import UserError
from fedmoe_jax.strategies.channel_aware import CHANNEL_AWARE, CHANNEL_ONLY
from fedmoe_jax.strategies.fedavg import (
    CENTRALISED,
    CENTRALISED_ACTIVE,
    CENTRALISED_SMALLEST,
    FEDADAM,
    FEDADAM_ACTIVE,
    FEDADAM_SMALLEST,
    FEDAVG,
    FEDAVG_ACTIVE,
    FEDAVG_DROPOUT,
    FEDAVG_HELD,
    FEDAVG_SMALLEST,
    FEDNOVA,
    FEDNOVA_ACTIVE,
    FEDNOVA_SMALLEST,
    FEDPROX,
    FEDPROX_ACTIVE,
    FEDPROX_SMALLEST,
    LOCAL,
    LOCAL_ACTIVE,
    LOCAL_SMALLEST,
    SCAFFOLD,
    SCAFFOLD_ACTIVE,
    SCAFFOLD_SMALLEST,
)
from fedmoe_jax.strategies.fedjets import (
    FEDJETS,
    FEDJETS_FROZEN_STEM,
    FEDJETS_NO_ANCHORS,
    FEDJETS_NO_ANCHORS_SHARED_GATE,
    FEDJETS_SHARED_GATE,
)
from fedmoe_jax.strategies.fedmix import (
    FEDMIX,
    FEDMIX_ALL,
    FEDMIX_ALL_SHARED_GATE,
    FEDMIX_SHARED_GATE,
)
from fedmoe_jax.strategies.fedmoe import FEDMOE, FEDMOE_SHARED_GATE
from fedmoe_jax.strategies.fedmoe_da import FEDMOE_DA
from fedmoe_jax.strategies.flex_moe import (
    FLEX_MOE,
    FLEX_MOE_EXAMPLES,
    FLEX_MOE_EXAMPLES_SHARED_GATE,
    FLEX_MOE_SHARED_GATE,
)
from fedmoe_jax.strategies.greedy import GREEDY
from fedmoe_jax.strategies.heterofl import HETEROFL
from fedmoe_jax.strategies.hfedmoe import HFEDMOE, HFEDMOE_SHARED_GATE
from fedmoe_jax.strategies.ifca import IFCA
from fedmoe_jax.strategies.load_balanced import (
    LOAD_BALANCED,
    LOAD_BALANCED_NO_CALIBRATION,
    LOAD_BALANCED_RUNNING,
)
from fedmoe_jax.strategies.oracle import ORACLE
from fedmoe_jax.strategies.pfedmoe import PFEDMOE
from fedmoe_jax.strategies.prototypes import PROTOTYPES, PROTOTYPES_BOUNDED
from fedmoe_jax.strategies.random import FIXED_RANDOM, RANDOM
from fedmoe_jax.strategies.round_robin import ROUND_ROBIN
from fedmoe_jax.strategies.update_groups import UPDATE_GROUPS
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes

STRATEGIES: dict[str, Strategy] = {
    "random": RANDOM,
    "fixed_random": FIXED_RANDOM,
    "round_robin": ROUND_ROBIN,
    "oracle": ORACLE,
    "prototypes": PROTOTYPES,
    "prototypes_bounded": PROTOTYPES_BOUNDED,
    "update_groups": UPDATE_GROUPS,
    "ifca": IFCA,
    "greedy": GREEDY,
    "load_balanced": LOAD_BALANCED,
    "load_balanced_no_calibration": LOAD_BALANCED_NO_CALIBRATION,
    "load_balanced_running": LOAD_BALANCED_RUNNING,
    "channel_aware": CHANNEL_AWARE,
    "channel_only": CHANNEL_ONLY,
    "flex_moe": FLEX_MOE,
    "flex_moe_shared_gate": FLEX_MOE_SHARED_GATE,
    "flex_moe_examples": FLEX_MOE_EXAMPLES,
    "flex_moe_examples_shared_gate": FLEX_MOE_EXAMPLES_SHARED_GATE,
    "hfedmoe": HFEDMOE,
    "hfedmoe_shared_gate": HFEDMOE_SHARED_GATE,
    "fedmoe": FEDMOE,
    "fedmoe_shared_gate": FEDMOE_SHARED_GATE,
    "fedmoe_da": FEDMOE_DA,
    "pfedmoe": PFEDMOE,
    "fedjets": FEDJETS,
    "fedjets_frozen_stem": FEDJETS_FROZEN_STEM,
    "fedjets_shared_gate": FEDJETS_SHARED_GATE,
    "fedjets_no_anchors": FEDJETS_NO_ANCHORS,
    "fedjets_no_anchors_shared_gate": FEDJETS_NO_ANCHORS_SHARED_GATE,
    "fedmix": FEDMIX,
    "fedmix_shared_gate": FEDMIX_SHARED_GATE,
    "fedmix_all": FEDMIX_ALL,
    "fedmix_all_shared_gate": FEDMIX_ALL_SHARED_GATE,
    "heterofl": HETEROFL,
    "fedavg": FEDAVG,
    "fedavg_active": FEDAVG_ACTIVE,
    "fedavg_smallest": FEDAVG_SMALLEST,
    "fedavg_held": FEDAVG_HELD,
    "fedavg_dropout": FEDAVG_DROPOUT,
    "fedprox": FEDPROX,
    "fedprox_active": FEDPROX_ACTIVE,
    "fedprox_smallest": FEDPROX_SMALLEST,
    "fednova": FEDNOVA,
    "fednova_active": FEDNOVA_ACTIVE,
    "fednova_smallest": FEDNOVA_SMALLEST,
    "scaffold": SCAFFOLD,
    "scaffold_active": SCAFFOLD_ACTIVE,
    "scaffold_smallest": SCAFFOLD_SMALLEST,
    "fedadam": FEDADAM,
    "fedadam_active": FEDADAM_ACTIVE,
    "fedadam_smallest": FEDADAM_SMALLEST,
    "centralised": CENTRALISED,
    "centralised_active": CENTRALISED_ACTIVE,
    "centralised_smallest": CENTRALISED_SMALLEST,
    "local": LOCAL,
    "local_active": LOCAL_ACTIVE,
    "local_smallest": LOCAL_SMALLEST,
}


def find_strategy(name: str) -> Strategy:
    """The strategy called `name`.

    Raises:
      UserError: if there is none; the message lists the names, the likeliest first.
    """
    if name not in STRATEGIES:
        near = get_close_matches(name, STRATEGIES, n=3)
        allowed = ", ".join(dict.fromkeys([*near, *STRATEGIES]))
        raise UserError(f"strategy={name!r} is unknown; allowed: {allowed}")
    return STRATEGIES[name]


def does_probe(config: ConfigDict) -> bool:
    """Whether clients probe their experts before training.

    Their feedback is such a probe, or they choose by it what they train.
    """
    choose = find_strategy(config.strategy).choose
    return config.fitness.feedback in PROBES or choose is not None


def either(names: tuple[str, ...]) -> AssignFn:
    """Decides as the strategy of these names that `hyper.strategy` counts to.

    So runs of several strategies of equal traits share one compiled program.
    """
    decisions = tuple(find_strategy(name).assign for name in names)
    return _switch(decisions) if decisions[1:] else decisions[0]


@functools.cache  # equal decisions give one function, so that programs are shared
def _switch(decisions: tuple[AssignFn, ...]) -> AssignFn:
    def assign(
        evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
    ) -> Assignment:
        def branch(decide: AssignFn) -> Callable[[], Assignment]:
            return lambda: decide(evidence, hyper, sizes, key)

        return jax.lax.switch(hyper.strategy, [branch(d) for d in decisions])

    return assign


def traits(strategy: Strategy) -> Hashable:
    """All but the decision: strategies with equal traits can share a program."""
    texts = {"about": "", "needs": "", "allowed": (), "at_most": ()}
    texts |= {"assign": None, "configure": None, "options": (), "reference": False}
    texts |= {"alone": False}
    return strategy._replace(**texts)
