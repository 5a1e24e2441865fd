"""Epsilon against published values and closed forms, and where there is none."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from factories import SMALL, E, K, make_program, run_alone, tiny_config
from scipy.stats import norm

from fedmoe_jax.configs import default
from fedmoe_jax.disclosure import accounting
from fedmoe_jax.disclosure.accounting import (
    Cost,
    account,
    check_package,
    count_numbers,
    describe_privacy,
    find_epsilon,
    is_sampled,
    list_costs,
    make_event,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.report.runs import load_run, numbers
from fedmoe_jax.report.tables import markdown_table
from fedmoe_jax.runtime.files import read_json

ALL = {
    "privacy.feedback_noise": 10.0,
    "privacy.selection": 0.5,
    "privacy.flip": 0.1,
    "privacy.clip": 1.0,
    "privacy.noise": 8.0,
}

PRUNED = {"pruning.kind": "uniform", "data.name": "digits", "model.stem": "mlp"}


def cost(rounds, name, *numbers):
    return Cost("all", rounds, (name, numbers))


def make_pair(**changes):
    return tiny_config(**changes), make_program(**changes)


def test_the_accountant_finds_the_example_of_the_moments_accountant():
    """Abadi et al. (arXiv 1607.00133), section 1: 1.26 at delta 1e-5.

    Its cohorts are Poisson samples of q = 0.01, its noise is 4, and there are 10,000
    steps. The paper's own conversion from moments is looser than the library's.
    """
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = RdpAccountant(range(2, 33), neighboring_relation=relation)
    event = PoissonSampledDpEvent(0.01, make_event("gaussian", (4.0,)))
    accountant.compose(event, 10_000)
    orders = np.array(accountant.orders)
    published = (accountant.rdp + math.log(1e5) / (orders - 1)).min()
    assert round(published, 2) == 1.26
    assert 0.9 < accountant.get_epsilon(1e-5) < 1.26


def test_find_epsilon_of_selection_is_the_zcdp_of_its_picks():
    """eps0 = 0.5, k = 2, T = 50: rho = 3.125, and 15.1 by rho + 2 sqrt(rho ln 1/d)."""
    config, program = make_pair(strategy="greedy", **{"privacy.selection": 0.5})
    config.num_rounds = 50
    (found,) = list_costs(config, program).values()
    assert program.sizes.max_held == 2 and found.rounds == 50
    name, (rho,) = found.event
    assert name == "zcdp" and 50 * rho == 3.125
    loose = 3.125 + 2 * math.sqrt(3.125 * math.log(1e5))
    assert round(loose, 1) == 15.1
    epsilon = find_epsilon((found,), 1e-5)
    assert 0.85 * loose < epsilon < loose


@pytest.mark.parametrize("multiplier", [1.0, 5.0])
def test_find_epsilon_of_gaussians_is_close_to_the_exact_one(multiplier):
    """Balle and Wang (arXiv 1805.06530), theorem 8, 4 rounds as one of half noise."""
    deviation, delta = multiplier / 2, 1e-5
    epsilon = find_epsilon((cost(4, "gaussian", multiplier),), delta)

    def exact(epsilon):
        a, b = 1 / (2 * deviation), epsilon * deviation
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)

    assert exact(epsilon) < delta < exact(0.9 * epsilon)


@pytest.mark.parametrize(
    ("multiplier", "cohort", "clients", "rounds"),
    [(4, 2, 200, 1000), (5, 20, 1000, 500)],
)
def test_find_epsilon_of_cohorts_is_within_the_published_bound(
    multiplier, cohort, clients, rounds
):
    """Wang et al. (arXiv 1808.00087), theorem 9, of Gaussian noise: a looser bound.

    With the conversion of Canonne et al. (arXiv 2004.00010), proposition 12.
    """
    share, delta = cohort / clients, 1e-5
    power = lambda order: math.exp((order - 1) * order / (2 * multiplier**2))

    def renyi(order):
        pairs = min(4 * (power(2) - 1), 2 * power(2))
        total = 1 + share**2 * math.comb(order, 2) * pairs
        for j in range(3, order + 1):
            total += 2 * share**j * math.comb(order, j) * power(j)
        return math.log(total) / (order - 1)

    def convert(order):
        spent = rounds * renyi(order) + math.log1p(-1 / order)
        return spent - math.log(delta * order) / (order - 1)

    published = min(map(convert, range(2, 65)))
    event = cost(rounds, "sampled", multiplier, cohort, clients)
    assert 0.6 * published < find_epsilon((event,), delta) < published


def test_find_epsilon_of_one_bit_is_its_own():
    found = find_epsilon((cost(1, "randomised", 0.7, 1),), 1e-12)
    assert 0.7 <= found < 0.73
    assert find_epsilon((cost(1, "randomised", 800.0, 1),), 1e-5) > 500
    assert find_epsilon((cost(9, "nothing"),), 1e-5) == 0


def test_find_epsilon_gains_by_sampling_and_loses_by_rounds_and_company():
    whole = find_epsilon((cost(50, "gaussian", 4.0),), 1e-5)
    sampled = find_epsilon((cost(50, "sampled", 4.0, 20, 100),), 1e-5)
    everyone = find_epsilon((cost(50, "sampled", 4.0, 100, 100),), 1e-5)
    longer = find_epsilon((cost(100, "gaussian", 4.0),), 1e-5)
    assert sampled < 0.6 * whole and whole == everyone < longer
    both = find_epsilon((cost(50, "gaussian", 4.0), cost(50, "zcdp", 1 / 32)), 1e-5)
    np.testing.assert_allclose(both, longer)  # Gaussian noise of 4 is 1 / 32 zCDP
    assert (
        find_epsilon((cost(50, "gaussian", 4.0), Cost("", 5, None, "")), 1e-5) is None
    )


def test_count_numbers_by_hand():
    assert count_numbers(make_program()) == 5 * K
    probing = make_program(**{"fitness.feedback": "probe"})
    assert count_numbers(probing) == 6 * K
    assert count_numbers(make_program(strategy="fedmix")) == 5 * K + E


def test_list_costs_by_hand():
    changes = {"strategy": "greedy", "num_rounds": 12} | ALL
    config, program = make_pair(**changes)
    found = list_costs(config, program)
    events = {name: each.event for name, each in found.items()}
    slots, experts = 2, 4  # of one layer
    assert events == {
        "feedback_noise": ("gaussian", (10 / math.sqrt(5 * slots),)),
        "selection": ("zcdp", (slots * 0.5**2 / 8,)),
        "flip": ("randomised", (0.1, min(2 * slots, experts))),
        "clip": ("gaussian", (8 / 2,)),  # the link shows who takes part
    }
    assert {each.rounds for each in found.values()} == {12}
    assert list_costs(*make_pair()) == {}


def test_list_costs_of_cohorts_that_do_not_amplify():
    sums = {"privacy.clip": 1.0, "privacy.noise": 8.0}

    def event(strategy="fedavg", **changes):
        pair = make_pair(strategy=strategy, **sums, **changes)
        return list_costs(*pair)["clip"].event

    assert event() == ("sampled", (4.0, 4, 10))
    assert event(cohort_size=10) == ("gaussian", (4.0,))
    assert event("random") == ("gaussian", (4.0,))  # holders may tell who is there
    for sampling in ("size", "reachable"):
        assert event(**{"availability.sampling": sampling}) == ("gaussian", (4.0,))
    for other in ("privacy.selection", "privacy.flip", "privacy.feedback_noise"):
        assert event(**{other: 1.0}) == ("gaussian", (4.0,))
    assert is_sampled(tiny_config())
    assert not is_sampled(tiny_config(**{"fairness.floor": 0.1}))


def test_list_costs_of_pruned_updates_has_no_noise_on_importance():
    changes = {"data.name": "digits", "pruning.kind": "lamp"}
    costs = list_costs(*make_pair(**ALL, **changes))
    for name in ("clip", "feedback_noise"):
        assert costs[name].event is None
        assert "importance of hidden units" in costs[name].reason
    changes["pruning.kind"] = "magnitude"  # of what the server has anyway
    assert list_costs(*make_pair(**ALL, **changes))["clip"].event is not None


LEARNING = ("load_balanced", "flex_moe", "channel_aware", "fedmix")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flip", "clip"])
@pytest.mark.parametrize("strategy", [*LEARNING, "greedy", "random", "fedavg"])
def test_list_costs_of_clients_that_move_each_other_needs_noisy_feedback(
    strategy, name
):
    alone = {field: value for field, value in ALL.items() if "feedback" not in field}
    cost = list_costs(*make_pair(strategy=strategy, **alone))[name]
    noisy = list_costs(*make_pair(strategy=strategy, **ALL))[name]
    if strategy in LEARNING:
        assert cost.event is None
        assert "decides about other clients, too, by feedback" in cost.reason
        assert noisy.event is not None and "given its noisy feedback" in noisy.covers
    else:
        assert cost.event == noisy.event is not None
        assert "given its noisy feedback" not in noisy.covers


def test_list_costs_of_what_follows_no_data_is_nothing():
    for strategy in ("random", "fixed_random", "round_robin", "heterofl"):
        found = list_costs(*make_pair(strategy=strategy, **ALL))
        assert found["selection"].event == found["flip"].event == ("nothing", ())
    found = list_costs(*make_pair(strategy="oracle", **ALL))  # follows what it is told
    assert found["selection"].event is None and found["flip"].event[0] == "randomised"


def test_list_costs_of_a_dense_warm_up_spares_what_is_held():
    changes = {"strategy": "greedy", "num_rounds": 12, "upcycle.rounds": 4} | ALL
    rounds = {n: each.rounds for n, each in list_costs(*make_pair(**changes)).items()}
    assert rounds == {"feedback_noise": 12, "selection": 8, "flip": 8, "clip": 12}


@pytest.mark.parametrize(
    ("strategy", "name", "told"),
    [
        ("ifca", "feedback_noise", "choice among its experts"),
        ("load_balanced", "selection", "top of its own fitness alone"),
        ("flex_moe", "selection", "top of its own fitness alone"),
        ("prototypes", "feedback_noise", "messages to its stages"),
        ("fedmoe_da", "clip", "exchange"),
        ("scaffold", "clip", "control variates"),
    ],
)
def test_list_costs_has_a_reason_where_nothing_is_guaranteed(strategy, name, told):
    config, program = make_pair(strategy=strategy, **ALL)
    found = list_costs(config, program)[name]
    assert found.event is None and told in found.reason
    summary = account(config, program)
    assert summary["epsilon"] is summary["privacy"][name]["epsilon"] is None
    assert told in summary["privacy"][name]["text"]
    assert summary["privacy"]["flip"]["epsilon"] >= 0


@pytest.mark.parametrize(
    ("changes", "names", "told"),
    [
        ({"fairness.expert_floor": 0.5}, ("selection",), "swaps experts by fitness"),
        ({"gate.bias": 1.0}, ("selection", "flip"), "biased gate"),
        ({"fairness.power": 1.0}, ("feedback_noise",), "client's loss, as a weight"),
        (PRUNED, ("flip",), "bytes of a pruned model"),
    ],
)
def test_list_costs_has_a_reason_where_more_is_sent(changes, names, told):
    private = {f"privacy.{name}": ALL[f"privacy.{name}"] for name in names}
    found = list_costs(*make_pair(strategy="greedy", **private, **changes))
    for name in names:
        assert found[name].event is None and told in found[name].reason


def test_requests_of_pruned_experts_that_follow_no_data_say_nothing():
    found = list_costs(*make_pair(strategy="random", **PRUNED, **{"privacy.flip": 0.1}))
    assert found["flip"].event == ("nothing", ()) and not found["flip"].reason


def test_list_costs_of_one_expert_and_of_what_is_silent():
    dense = list_costs(*make_pair(strategy="fedavg", **ALL))
    assert dense["selection"].event == dense["flip"].event == ("nothing", ())
    assert list_costs(*make_pair(strategy="local", **ALL)) == {}


def test_list_costs_of_sums_without_noise():
    found = list_costs(*make_pair(**{"privacy.clip": 1.0}))["clip"]
    assert found.event is None and "privacy.noise=0" in found.reason


def test_check_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    told = r"privacy\.flip=0.1 is not allowed without .* dp-accounting; allowed: 0, or"
    with pytest.raises(UserError, match=told):
        check_package(tiny_config(**{"privacy.flip": 0.1}))
    check_package(tiny_config(**{"privacy.observe": True}))


def test_account_says_what_a_run_guarantees():
    assert account(*make_pair()) == {} and describe_privacy({}) == ""
    config, program = make_pair(strategy="greedy", **ALL)
    summary = account(config, program)
    line = describe_privacy(summary)
    for told in (
        "at delta 1e-05; unit: a client, replaced by another; 4 rounds",
        "4 of 10 clients a round, uniform; no amplification",
        "selection: epsilon",
        "held sets",
    ):
        assert told in line
    together = summary["epsilon"]
    alone = [summary["privacy"][name]["epsilon"] for name in accounting.COSTS]
    assert max(alone) < together < sum(alone)


@pytest.mark.slow
def test_a_run_prints_and_keeps_its_epsilon(tmp_path, capsys):
    config = default.get_config("smoke")
    fields = SMALL | {"run.tensorboard": False, "strategy": "greedy"}
    config.update_from_flattened_dict(fields | {"privacy.selection": 0.5})
    assert run_alone(config, tmp_path / "run")
    assert "unit: a client, replaced by another; 4 rounds" in capsys.readouterr().out
    summary = read_json(tmp_path / "run" / "summary.json")
    cost = ("zcdp", (2 * 0.25 / 8,))
    expected = find_epsilon((Cost("", 4, cost),), 1e-5)
    assert summary["epsilon"] == expected > 0
    run = load_run(tmp_path / "run")
    assert numbers(run, run.measures, {})["epsilon"] == expected
    table = markdown_table([run])
    assert "Epsilon" in table and "of a client's held sets" in table
