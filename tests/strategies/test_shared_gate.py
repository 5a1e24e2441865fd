"""Systems in which only the assignment differs from the shared rules."""

import pytest
from factories import make_config

from fedmoe_jax.base import Strategy
from fedmoe_jax.program import find_overwritten
from fedmoe_jax.strategies import STRATEGIES

SHARED = tuple(name for name in STRATEGIES if name.endswith("_shared_gate"))
# What an assignment may bring along: its state, its evidence, its slots, its texts.
OWN = {"about", "assign", "reads", "needs", "options", "allowed", "at_most"}
OWN |= {"configure", "init", "update", "report", "stages", "expert_priority"}
SIZES = {"max_held", "num_active"}


def test_every_system_with_gates_losses_or_weights_of_its_own_has_one():
    systems = {name.removesuffix("_shared_gate") for name in SHARED}
    assert systems == {
        *("flex_moe", "flex_moe_examples", "hfedmoe", "fedmoe", "fedmix", "fedmix_all"),
        *("fedjets", "fedjets_no_anchors"),
    }


@pytest.mark.parametrize("name", SHARED)
def test_the_record_leaves_all_but_the_assignment_to_the_config(name):
    record, plain = STRATEGIES[name], Strategy("", lambda: None)
    differing = {
        field
        for field in Strategy._fields
        if getattr(record, field) != getattr(plain, field)
    }
    assert differing <= OWN
    system = STRATEGIES[name.removesuffix("_shared_gate")]
    for field in ("init", "update", "report", "expert_priority"):
        assert getattr(record, field) == getattr(system, field)
    assert set(record.options) <= set(system.options)


@pytest.mark.parametrize("name", SHARED)
def test_configure_changes_what_the_assignment_needs(name):
    config = make_config(strategy=name, num_active=3)
    changed = set(find_overwritten(config)) - SIZES
    keeps = "fitness.idle" if name.startswith("flex_moe") else None
    assert changed == {keeps} - {None}


def test_load_balanced_without_calibration_changes_nothing_else():
    config = make_config(strategy="load_balanced_no_calibration")
    assert find_overwritten(config) == {"loss.calibration": 0.0}
    name = "load_balanced"
    same = {"about": "", "configure": None}
    one, other = STRATEGIES[f"{name}_no_calibration"], STRATEGIES[name]
    assert one._replace(**same) == other._replace(**same)
