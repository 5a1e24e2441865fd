"""Defences: what turns them on, what does not fit, and that off costs nothing."""

import jax
import pytest
from factories import make_config, make_program, plan_run, start, tiny_config

from fedmoe_jax.config import list_idle_fields, validate
from fedmoe_jax.options import UserError
from fedmoe_jax.privacy.defences import DEFENCES, find_flags, is_private
from fedmoe_jax.program import make_static
from fedmoe_jax.round import scan_rounds
from fedmoe_jax.runtime.sharding import spread

FIELDS = [f"privacy.{name}" for name in (*DEFENCES, "noise")]
ON = dict.fromkeys(FIELDS, 0.5)


def test_is_private_by_any_number():
    assert not is_private(make_config())
    assert not is_private(make_config(**{"privacy.observe": True}))
    for name in FIELDS:
        assert is_private(make_config(**{name: 0.1}))


def test_find_flags_of_what_is_on():
    config = make_config(**{"privacy.clip": 0.1})
    assert find_flags(config, False) == dict.fromkeys(FIELDS, False) | {
        "privacy.clip": True
    }
    assert not any(find_flags(make_config(**ON), silent=True).values())


def test_make_static_has_the_flags_of_strategies_that_talk():
    flags = lambda name: make_static(make_config(strategy=name, **ON)).privacy
    assert flags("greedy").flip and flags("greedy").noise
    assert not flags("local").flip and not flags("centralised").clip


@pytest.mark.parametrize("name", FIELDS)
def test_check_privacy_refuses_negative_numbers(name):
    with pytest.raises(UserError, match=rf"{name}=-0.1 is not allowed; allowed: >= 0"):
        validate(make_config(**{name: -0.1}))


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0])
def test_check_privacy_refuses_a_delta_that_is_no_probability(delta):
    with pytest.raises(UserError, match=r"privacy\.delta=.* allowed: \(0, 1\)"):
        validate(make_config(**{"privacy.delta": delta}))


def test_check_privacy_refuses_noise_without_a_bound():
    told = r"privacy\.noise=1.0 is not allowed with privacy\.clip=0.0, .*; allowed: 0"
    with pytest.raises(UserError, match=told):
        validate(make_config(**{"privacy.noise": 1.0}))
    validate(make_config(**{"privacy.noise": 1.0, "privacy.clip": 1.0}))


def test_check_privacy_refuses_weights_by_loss_of_bounded_updates():
    told = r"fairness\.power=1.0 is not allowed with privacy\.clip=2.0, .*allowed: 0"
    with pytest.raises(UserError, match=told):
        validate(make_config(**{"privacy.clip": 2.0, "fairness.power": 1.0}))
    validate(make_config(**{"fairness.power": 1.0}))


def test_check_privacy_refuses_a_delta_that_lets_a_client_be_published():
    told = r"privacy\.delta=0.05 .* num_clients=20, .*; allowed: less than .* = 0.05"
    with pytest.raises(UserError, match=told):
        validate(make_config(**{"privacy.delta": 0.05, "privacy.flip": 1.0}))
    validate(make_config(**{"privacy.delta": 0.05}))  # nothing is private
    validate(make_config(**{"privacy.delta": 0.049, "privacy.flip": 1.0}))


def test_fields_are_idle_where_nothing_is_private_or_observed():
    idle = lambda **changes: list_idle_fields(tiny_config(**changes))[1]
    fields = {*FIELDS, "privacy.delta", "privacy.observe"}
    assert fields <= idle()
    assert not fields & idle(**{"privacy.flip": 1.0})
    assert not fields & idle(**{"privacy.observe": True})


def test_a_program_without_defences_reads_none_of_their_numbers():
    plan = plan_run()
    assert plan.program == plan_run(**{"privacy.delta": 0.01}).program
    run = start(plan, plan.program)
    rounds = spread(scan_rounds(run.program), run.program.mesh)
    jaxpr = jax.make_jaxpr(rounds)(*run[1:]).jaxpr
    (inner,) = (e.params["jaxpr"] for e in jaxpr.eqns)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(run[1:])]
    unread = {
        path.rpartition(".")[2]
        for path, var in zip(paths, inner.invars, strict=True)
        if ".privacy." in path and not any(var in e.invars for e in inner.eqns)
    }
    assert unread == {*DEFENCES, "noise"}


def test_a_sweep_over_epsilon_is_one_program():
    one, other = (make_program(**{"privacy.flip": e}) for e in (0.5, 2.0))
    assert one.static == other.static != make_program().static
