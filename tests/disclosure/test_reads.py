"""What strategies decide from, found in their decisions."""

import jax
import pytest
from factories import make_program, tiny_config

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.disclosure.accounting import is_blind, is_own
from fedmoe_jax.disclosure.reads import find_reads
from fedmoe_jax.strategies import STRATEGIES

BOTH, ONE = ("fitness", "usage"), ("fitness",)
READERS = {
    "greedy": ONE,
    "load_balanced": BOTH,
    "load_balanced_no_calibration": BOTH,
    "load_balanced_running": BOTH,
    "channel_aware": BOTH,
    "flex_moe": ONE,
    "flex_moe_shared_gate": ONE,
    "flex_moe_examples": ONE,
    "flex_moe_examples_shared_gate": ONE,
}
CONFIG = tiny_config()
PROGRAM = make_program()


def use(assign, **fields):
    """The program of a strategy that decides so."""
    record = STRATEGIES["greedy"]._replace(assign=assign, **fields)
    return PROGRAM._replace(strategy=record)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_find_reads_of_each_strategy(name):
    found = find_reads(tiny_config(strategy=name), make_program(strategy=name))
    assert found == READERS.get(name, ())


def test_find_reads_where_experts_are_pruned():
    changes = {"strategy": "load_balanced", "pruning.kind": "lamp"}
    program = make_program(**changes)
    assert program.units
    assert find_reads(tiny_config(**changes), program) == BOTH


def decide_by(value):
    """A decision by the `value` of the evidence, [C, E]."""

    def assign(evidence, hyper, sizes, key):
        evidence.usage.sum()  # read, but for nothing
        return top_k(value(evidence), evidence.capacity, sizes.max_held)

    return assign


def by_usage(evidence):
    return evidence.fitness - 1e-9 * evidence.usage[None]


def by_lot(evidence):
    return jax.random.uniform(jax.random.key(0), evidence.fitness.shape)


@pytest.mark.parametrize(
    ("value", "reads", "own", "blind"),
    [
        (by_usage, BOTH, False, False),
        (lambda evidence: evidence.fitness, ONE, True, False),
        (by_lot, (), True, True),
    ],
)
def test_guarantees_follow_the_decision_and_not_the_record(value, reads, own, blind):
    """`by_usage` says that it is `alone`, but reads what other clients have sent."""
    program = use(decide_by(value), alone=True)
    assert find_reads(CONFIG, program) == reads
    assert is_own(CONFIG, program) == own
    assert is_blind(CONFIG, program) == blind


@pytest.mark.parametrize(("kind", "blind"), [("none", True), ("lamp", False)])
def test_times_of_pruned_experts_follow_what_clients_report(kind, blind):
    changes = {"strategy": "channel_only", "pruning.kind": kind}
    assert is_blind(tiny_config(**changes), make_program(**changes)) == blind
