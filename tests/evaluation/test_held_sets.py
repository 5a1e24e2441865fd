"""The distinct sets of experts that clients hold; scores of models without parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import K, N, make_program, plan_run, start_run, use_linear_model

from fedmoe_jax.evaluation.distinct import WORD
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.evaluation.held_sets import find_sets, score_sets
from fedmoe_jax.evaluation.priors import gather_priors
from fedmoe_jax.evaluation.scoring import ClientView, Examples

pytestmark = pytest.mark.slow


def test_find_sets_by_hand():
    """Of two layers; client 1 holds as client 0, client 3 more than two experts."""
    held = jnp.array(
        [
            [[1, 0, 0, 1], [0, 1, 0, 0]],
            [[1, 0, 0, 1], [0, 1, 0, 0]],
            [[1, 0, 0, 1], [0, 0, 1, 0]],
            [[1, 0, 0, 1], [1, 1, 1, 0]],
        ],
        bool,
    )
    wanted = jnp.eye(4)
    sets = find_sets(ClientView({}, held, wanted), 2)
    assert sets.whole.tolist() == [False, False, False, True]
    of_client = sets.of_client.tolist()
    assert of_client[0] == of_client[1] and len(set(of_client)) == sets.count == 3
    expected = {of_client[0]: [1, 1, 0, 0], of_client[2]: [0, 0, 1, 0]}
    for number, strata in expected.items():
        assert sets.wanted[number].tolist() == strata
    assert sets.wanted.sum() == 3  # the fourth uses all experts
    for client, number in enumerate(of_client[:3]):
        rows = zip(sets.held[number], sets.slot[number], held[client], strict=True)
        for ids, slot, mask in rows:
            assert ids[slot].tolist() == np.flatnonzero(mask).tolist()


def test_find_sets_shares_none_with_a_bias():
    held = jnp.array([[[1, 0, 1, 0]], [[1, 0, 1, 0]], [[1, 1, 1, 0]]], bool)
    bias = jnp.arange(12.0).reshape(3, 1, 4)
    sets = find_sets(ClientView({}, held, jnp.eye(3), bias), 2)
    assert sets.count == 3 and sets.of_client.tolist() == [0, 1, 2]
    assert sets.held[:2, 0].tolist() == [[0, 2], [0, 2]]
    assert sets.bias[:2, 0].tolist() == [[0, 2], [4, 6]]
    assert sets.whole.tolist() == [False, False, True]


@pytest.mark.parametrize("experts", [3, WORD, WORD + 1])
def test_find_sets_tells_any_two_sets_apart(experts):
    """Every client holds one expert of its own in the second layer."""
    first = jnp.zeros((experts, experts), bool).at[:, 0].set(True)
    held = jnp.stack([first, jnp.eye(experts, dtype=bool)], axis=1)
    wanted = jnp.ones((2 * experts, 1))
    sets = find_sets(ClientView({}, jnp.concatenate([held, held]), wanted), 1)
    assert sets.count == experts
    np.testing.assert_array_equal(sets.of_client[:experts], sets.of_client[experts:])
    own = sets.held[sets.of_client, 1, 0]
    np.testing.assert_array_equal(own, np.tile(np.arange(experts), 2))


@pytest.mark.parametrize("first, runs_expected", [(1, 2), (0, 1)])
def test_score_sets_runs_the_model_once_for_each_set_that_has_the_strata(
    first, runs_expected
):
    """Of two strata, the examples are of the first; sets have it or the second."""
    program = use_linear_model(make_program(num_clients=6))
    runs, apply = [], program.model.apply

    def counting(*arguments):
        jax.debug.callback(lambda: runs.append(1))
        return apply(*arguments)

    model = program.model._replace(apply=counting, parts=None)
    program = program._replace(model=model)
    held = jnp.array([[1, 1, 0, 0], [0, 0, 1, 0]] * 3, bool)[:, None]
    params, frozen = model.init(jax.random.key(0))
    batch = {"x": jnp.ones((2, 8, 8, 1)), "y": jnp.zeros(2, jnp.int32)}
    stratum = jnp.array([[1.0, 0.0]] * 2)
    examples = Examples(batch, stratum, jnp.ones(2, bool))
    wanted = jnp.array([[first, 1], [1, 0]] * 3, jnp.float32)
    sets = find_sets(ClientView({}, held, wanted), program.sizes.max_held)
    mix = jnp.ones((6, 16))
    priors = gather_priors(mix, sets.of_client, jnp.arange(6), 7)
    rows = score_sets(params, frozen, sets, priors, examples, program)
    jax.effects_barrier()
    assert len(runs) == runs_expected and rows["personal"].shape == (7, 1, 2)
    assert not rows["personal"][2:].any() and rows["prior"].shape == (6, 1, 2)


@pytest.mark.parametrize(
    "strategy",
    [
        *("greedy", "flex_moe", "fedmix", "pfedmoe", "fedjets", "local"),
        *("hfedmoe", "heterofl"),
    ],
)
def test_score_model_gives_the_scores_of_the_model_with_parts(strategy):
    """Of images that drift, one client without experts; heads have a bias."""
    drift = {"drift.images": "contrast", "drift.strength": 0.8}
    plan = plan_run(strategy=strategy, **drift)
    program = plan.program
    run = start_run(plan, program)
    noise = lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape)
    params, personal = jax.tree.map(noise, (run.state.params, run.state.personal))
    drawn = jax.random.uniform(jax.random.key(2), (N, 1, program.sizes.num_experts))
    held = (drawn.argsort(axis=2) < K).at[0].set(False)
    participation = run.state.participation
    state = run.state.replace(
        params=params,
        personal=personal,
        align=run.state.align.replace(held=held),
        participation=participation.replace(rounds=participation.rounds + 1),
    )
    whole = program._replace(model=program.model._replace(parts=None))
    found, expected = (
        build_evaluate(each)(state, run.federation, run.hyper)
        for each in (whole, program)
    )
    assert set(expected) - set(found) <= {"global_soft_accuracy", "expert_accuracy"}
    assert found["drifted_accuracy"].shape == ()
    for name, value in found.items():
        assert value.shape == expected[name].shape
        # One image of 1,024 whose best classes are equal to rounding may differ.
        np.testing.assert_allclose(value, expected[name], atol=4e-3, err_msg=name)
