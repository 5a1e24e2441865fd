"""Attacks on membership: closed forms, a planted leak, and what shadows cannot say."""

import numpy as np
import pytest
from scipy.stats import norm

from fedmoe_jax.attack.membership import (
    NOTHING,
    Cases,
    attack_members,
    average_shadows,
    compare_shadows,
    judge,
    judge_experts,
    judge_halves,
    list_cases,
    measure_confidence,
)

Q, RUNS = 400, 8


def draw(shift, run, hardness=3.0):
    """The cases of a run: each example is hard by itself, and easier for members."""
    rng = np.random.default_rng(run)
    level = hardness * np.random.default_rng(99).normal(size=Q)
    member = rng.random(Q) < 0.5
    confidence = level + shift * member + rng.normal(size=Q)
    return Cases(np.arange(Q), member, confidence, np.arange(Q) % 4)


def test_measure_confidence_is_the_logit_of_the_likelihood():
    chance = np.array([0.01, 0.5, 0.99])
    found = measure_confidence(-np.log(chance).astype(np.float32))
    np.testing.assert_allclose(found, np.log(chance / (1 - chance)), atol=1e-4)
    assert np.isfinite(measure_confidence(np.array([0.0, 1e9]))).all()


def test_list_cases_of_clients_that_have_taken_part():
    exposed = {
        "served": np.array([True, False]),
        "member_example": np.array([[4, 2, -1], [3, 5, 6]]),
        "member_loss": np.array([[0.1, np.nan, 7.0], [0.1, 0.1, 0.1]]),
        "member_expert": np.array([[1, 0, 0], [0, 0, 0]]),
        "other_example": np.array([[9, -1], [8, 7]]),
        "other_loss": np.array([[np.log(2), 5.0], [0.1, 0.1]]),
        "other_expert": np.array([[3, 0], [0, 0]]),
    }
    found = list_cases(exposed)
    assert found.example.tolist() == [4, 9] and found.member.tolist() == [True, False]
    assert found.expert.tolist() == [1, 3]
    np.testing.assert_allclose(found.confidence[1], 0, atol=1e-12)


def test_judge_of_gaussians_is_their_closed_form():
    rng = np.random.default_rng(0)
    member = np.arange(200_000) < 100_000
    found = judge(rng.normal(size=200_000) + member, member)
    np.testing.assert_allclose(found.auc, norm.cdf(1 / np.sqrt(2)), atol=0.005)
    sure = norm.cdf(1 - norm.isf(0.01))
    np.testing.assert_allclose(found.sure, sure, atol=0.005)
    np.testing.assert_allclose(found.advantage, 2 * norm.cdf(0.5) - 1, atol=0.01)
    assert found.cases == 200_000


def test_judge_leaves_out_what_has_no_score_and_needs_both():
    member = np.array([True, True, False, False])
    found = judge(np.array([2.0, np.nan, 1.0, 0.0]), member)
    assert found[:2] == (1.0, pytest.approx(float("nan"), nan_ok=True))
    assert found[2:] == (1.0, 3)
    assert judge(np.zeros(2), np.array([True, True])) == NOTHING


@pytest.mark.slow
@pytest.mark.parametrize("others", [110, 450])
def test_judge_finds_one_percent_of_what_cannot_be_told(others):
    rng, member = np.random.default_rng(0), np.arange(others + 50) < 50
    draws = [judge(rng.normal(size=len(member)), member).sure for _ in range(4000)]
    assert 0.009 < np.mean(draws) < 0.011
    few = judge(rng.normal(size=148), np.arange(148) < 50)
    assert np.isnan(few.sure) and np.isfinite(few.auc)


def test_average_shadows_by_hand():
    """Example 0 is in twice, 1 once, 2 never; the deviation is within examples."""
    shadows = [
        Cases(np.array([0, 1]), np.array([True, True]), np.array([1.0, 5.0]), None),
        Cases(np.array([0, 2]), np.array([True, False]), np.array([3.0, 9.0]), None),
    ]
    mean, spread = average_shadows(shadows, True, 3)
    np.testing.assert_array_equal(mean, [2, 5, np.nan])
    np.testing.assert_allclose(spread, np.sqrt(2))
    mean, spread = average_shadows(shadows, False, 3)
    np.testing.assert_array_equal(mean, [np.nan, np.nan, 9])
    assert spread == pytest.approx(1e-6)


def test_compare_shadows_is_the_ratio_of_two_gaussians():
    shadows = [draw(1.0, run) for run in range(1, RUNS)]
    target, count = draw(1.0, 0), Q
    found = compare_shadows(target, shadows)
    ins, outs = (average_shadows(shadows, member, count) for member in (True, False))
    expected = norm.logpdf(target.confidence, *ins) - norm.logpdf(
        target.confidence, *outs
    )
    np.testing.assert_allclose(found, expected)
    one = compare_shadows(target, shadows[:1])
    assert np.isnan(one).all()  # no example is both in and out of one shadow


def test_attack_members_beats_the_loss_where_examples_differ_in_hardness():
    runs = [draw(2.0, run) for run in range(RUNS)]
    scores = attack_members(runs)
    by = lambda name: np.mean(
        [judge(s[name], r.member).auc for s, r in zip(scores, runs, strict=True)]
    )
    assert 0.55 < by("loss") < 0.75 and by("lira") > 0.85


def test_attack_members_of_nothing_is_chance():
    runs = [draw(0.0, run) for run in range(RUNS)]
    for name in ("loss", "lira"):
        found = [
            judge(s[name], r.member).auc
            for s, r in zip(attack_members(runs), runs, strict=True)
        ]
        assert abs(np.mean(found) - 0.5) < 0.04
    assert set(attack_members(runs[:1])[0]) == {"loss"}


def test_judge_experts_leaves_out_those_with_few_examples():
    cases = draw(3.0, 0, hardness=0.0)
    expert = np.where(np.arange(Q) < 30, 5, cases.expert)
    found = judge_experts(cases.confidence, cases._replace(expert=expert), 6)
    assert set(found) == {0, 1, 2, 3} and all(f.auc > 0.9 for f in found.values())


def test_judge_halves_by_the_number_of_holders():
    """Experts 1 and 3 are rare, and leak."""
    cases = draw(0.0, 0, hardness=0.0)
    leak = cases.member * 4.0 * np.isin(cases.expert, (1, 3))
    holders = np.array([9.0, 1.0, 7.0, 2.0])
    rare, common = judge_halves(cases.confidence + leak, cases, holders)
    assert rare.auc > 0.95 and abs(common.auc - 0.5) < 0.1
    assert rare.cases + common.cases == Q and abs(rare.cases - Q / 2) < Q / 8
