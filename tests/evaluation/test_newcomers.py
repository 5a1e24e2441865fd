"""Clients that never take part, and what a strategy serves them with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import plan_run, start_run

from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.evaluation.held_sets import run_model
from fedmoe_jax.evaluation.newcomers import divide_pool, rank_examples
from fedmoe_jax.evaluation.scoring import Examples
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import Pool

GROUPS = {
    "strategy": "prototypes",
    "groups.kind": "permuted",
    "groups.count": 2,
    "partition.kind": "iid",
    "partition.unseen": 2,
}


def test_rank_examples_counts_within_a_group():
    group = jnp.array([2, 0, 2, 1, 2, 0])
    assert rank_examples(group, 3).tolist() == [0, 0, 1, 0, 2, 1]


def test_every_other_example_of_a_newcomer_is_asked_about():
    """Client 0 has examples 5, 7 and 8, client 1 example 9; the last one pads."""
    pool = Pool(jnp.array([5, 9, 7, 8, 0]), jnp.array([1, 2, 1, 1, 0]))
    asked, tested = divide_pool(pool, 2)
    assert asked.size.tolist() == [2, 1]
    rows = zip(asked.start, asked.size, strict=True)
    found = [asked.example[start : start + size].tolist() for start, size in rows]
    assert found == [[5, 8], [9]]
    assert tested.group.tolist() == [0, 0, 1, 0, 0]
    np.testing.assert_array_equal(tested.example, pool.example)


@pytest.mark.slow
def test_parts_of_the_clients_own_fit_no_newcomer():
    """Gates that are personal: the mean over the clients' models, as in all systems."""
    plan = plan_run(**GROUPS | {"gate.mode": "personal"})
    run = start_run(plan, plan.program)
    found = build_evaluate(plan.program)(run.state, run.federation, run.hyper)
    assert np.isfinite(found["unseen_accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_newcomers_meet_the_expert_of_the_nearest_group(groups, parts):
    """Whose message is as far from the one mean as it is near to the other."""
    plan = plan_run(**GROUPS)
    program, sizes = plan.program, plan.program.sizes
    if not parts:
        program = program._replace(model=program.model._replace(parts=None))
    run = start_run(plan, program)
    state, federation = run.state, run.federation
    noise = lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape)
    state = state.replace(params=jax.tree.map(noise, state.params))
    evaluate = build_evaluate(program)

    def serve(number, chosen):
        """Accuracy where group `chosen` is the nearest of `number` for everybody."""
        known = dict(state.align.strategy)
        far = jnp.arange(sizes.num_experts)[None, :, None, None] != chosen
        known["mu"] = jnp.broadcast_to(100.0 * far, known["mu"].shape)
        known["groups"] = jnp.full_like(known["groups"], number)
        align = state.align.replace(strategy=known)
        found = evaluate(state.replace(align=align), federation, run.hyper)
        return found["unseen_accuracy"]

    def answer(held):
        """Accuracy of a sub-model over the examples that are left for the test."""
        _, tested = divide_pool(federation.unseen, 2)
        right = []
        for client in range(2):
            example = tested.example[tested.group == client + 1]
            own = federation.train, example, federation.statistics
            right.append(score(take_batch(*own, program.task), held))
        return np.mean(right)

    def score(batch, held):
        own = take_submodel(state.params, {}, jnp.array([held]), 0)
        slots = jnp.array([held]), jnp.ones((1, len(held)), bool), None
        examples = Examples(batch, jnp.zeros((1, 1)), jnp.ones(1, bool))
        outputs, _ = run_model(own, {}, *slots, examples, program)
        return (outputs.argmax(axis=1) == batch["y"]).mean()

    everything = list(range(sizes.num_experts))
    for chosen in (0, 1):
        held = {0: everything, 1: [0], 2: [chosen]}[groups]
        np.testing.assert_allclose(serve(groups, chosen), answer(held), atol=1e-6)
