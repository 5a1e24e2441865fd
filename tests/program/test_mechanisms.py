"""Mechanisms on top of a round: not in the program where off, all at once where on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    assert_same,
    assert_same_results,
    plan_run,
    run_alone,
    start_run,
    stop_at,
    tiny_config,
)

from fedmoe_jax import aggregate, align_layers, broadcast, client, loss, prune, reply
from fedmoe_jax import round as round_file
from fedmoe_jax.client import all_finite
from fedmoe_jax.disclosure.observer import OBSERVED
from fedmoe_jax.models import one_layer
from fedmoe_jax.round import build_round, build_run_rounds, scan_rounds
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.state import init_state
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train.plan import make_wave, program_key

pytestmark = pytest.mark.slow

WIDTHS = ("_active", "_smallest", "_held")  # of dense models, otherwise alike
NAMES = [name for name in STRATEGIES if not name.endswith(WIDTHS)]

CLIP = {"privacy.clip": 1.0, "privacy.noise": 0.5}
LINKS = {"expert_links.kind": "wireless"}
PRUNING = {"pruning.kind": "lamp", "data.name": "digits"}
# The fields that turn a mechanism on, and functions that are called where it is.
MECHANISMS = {
    "observer": ({"privacy.observe": True}, [(round_file, "see_round")]),
    "feedback": ({"privacy.feedback_noise": 1.0}, [(reply, "hide_feedback")]),
    "selection": ({"privacy.selection": 1.0}, [(broadcast, "hide_fitness")]),
    "requests": ({"privacy.flip": 1.0}, [(align_layers, "request")]),
    "updates": (CLIP, [(reply, "clip_update"), (reply, "weigh_alike")]),
    "sums": (CLIP, [(aggregate, "hide_sums")]),
    "links": (LINKS, [(loss, "draw_training"), (one_layer, "receive")]),
    "times of links": (LINKS, [(loss, "expect_latency")]),
    "probe": ({"fitness.feedback": "probe"}, [(client, "probe_experts")]),
    "power": ({"fairness.power": 1.0}, [(reply, "emphasise")]),
    "pruning": (PRUNING, [(prune, "prune_client"), (prune, "learn_importance")]),
}


@functools.cache
def trace(**changes):
    """The jaxpr of two rounds, as text."""
    plan = plan_run(**changes)
    run, rounds = start_run(plan, plan.program), scan_rounds(plan.program)
    rounds = spread(rounds, plan.program.mesh)
    return str(jax.make_jaxpr(rounds)(run.state, run.federation, run.hyper))


def refuse(*args, **kwargs):
    raise AssertionError("on")


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_off_is_not_in_the_program(name, monkeypatch):
    changes, functions = MECHANISMS[name]
    rest = {"data.name": changes["data.name"]} if "data.name" in changes else {}
    plain = trace(**rest)
    assert len(trace(**changes)) > len(plain)
    for module, function in functions:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, refuse)
            trace.cache_clear()
            trace(**rest)
            with pytest.raises(AssertionError, match="on"):
                trace(**changes)
    trace.cache_clear()


def test_numbers_of_what_is_off_change_nothing():
    """Two rounds, bit for bit, and where they are static the program's equations."""
    idle = {
        "pruning.spread": 4.0,
        "pruning.rotation": 0.0,
        "fairness.tradeoff": 5.0,
        "expert_links.start": 3,
        "expert_links.price": 2.0,
        "privacy.feedback_noise": 0.0,
        "availability.early": 0.1,
        "channel.csi": 0.5,
    }
    plain, other = plan_run(), plan_run(**idle)
    rounds = build_run_rounds(plain.program)

    def play(plan):
        run = start_run(plan, plain.program)
        return rounds(run.state, run.federation, run.hyper)

    assert_same(play(other), play(plain))
    assert trace(**{"pruning.parts": "all"}) == trace()


EVERYTHING = {
    "privacy.observe": True,
    "privacy.feedback_noise": 1.0,
    "privacy.selection": 1.0,
    "privacy.flip": 1.0,
    **CLIP,
    "fairness.floor": 0.1,
    "fairness.expert_floor": 0.1,
    "channel.kind": "wireless",
    "gate.bias": 1.0,
    "late.kind": "stale",
    "fitness.feedback": "probe",
}
IMAGES = {**PRUNING, "pruning.parts": "all", "model.stem": "mlp", **LINKS}
IMAGES |= {"loss.latency": 1.0, "expert_links.start": 1}
TEXT = {"data.name": "markov", "data.length": 8, "model.kind": "transformer"}
TEXT |= {"pruning.kind": "lamp", "partition.kind": "natural", "num_clients": 8}
TEXT |= {**LINKS, "loss.latency": 1.0}


@functools.cache
def plan_all():
    """The plan of every strategy and its program, which some of them share."""
    groups, found = {}, {}
    for name in NAMES:
        plan = plan_run(strategy=name, **EVERYTHING | IMAGES)
        groups.setdefault(program_key(plan), []).append((name, plan))
    for wave in map(make_wave, groups.values()):
        plans = zip(wave.names, wave.plans, strict=True)
        found |= {name: (plan, wave.program) for name, plan in plans}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_runs_with_every_mechanism(name):
    """Two rounds: numbers are finite, and what is observed is what travels."""
    check_all(*plan_all()[name])


@pytest.mark.parametrize("name", ["greedy", "fedmoe_da"])
def test_whole_experts_run_with_every_other_mechanism(name):
    plan = plan_run(strategy=name, **EVERYTHING | IMAGES | {"pruning.kind": "none"})
    check_all(plan, plan.program)


def check_all(plan, program):
    """Runs two rounds and checks what is observed of them."""
    run = start_run(plan, program)
    state, metrics = build_run_rounds(program)(run.state, run.federation, run.hyper)
    # Without a client of that capacity, or two holders, there is no number.
    seen, by_capacity = metrics.pop(OBSERVED), metrics.pop("kept_by_capacity", None)
    metrics.pop("mask_overlap", None)
    assert all_finite(state) and all_finite(metrics)
    # Pooled data are on a device without limits.
    assert (by_capacity is None) == (program.static.pruning.kind == "none")
    assert not (program.strategy.pooled and by_capacity is not None)
    if by_capacity is not None:
        share = np.array(metrics["kept_share"])
        assert (share > 0).all() and (share <= 1).all() and np.nanmax(by_capacity) <= 1
    held = np.array(seen["held"])
    if program.strategy.silent:
        assert not held.any() and not np.array(seen["bytes_up"]).any()
        return
    # All but clients that still work for the last round ask for something, and pay for
    # whole experts.
    costs, there = program.costs, np.array(seen["bytes_down"]) > 0
    assert there.mean() > 0.5
    travels = program.strategy.local_experts < program.sizes.num_experts
    assert held.any(-1)[there].all() if travels else not held.any()
    received = costs.expert_bytes * held.sum((2, 3))
    assert (np.array(seen["bytes_down"]) >= received).all()
    assert (np.array(seen["bytes_up"]) >= received).all()
    reports = np.array(seen["accuracy"])
    assert np.isfinite(reports).any(-1)[there].all() and np.nanmax(reports) <= 1


def trace_all(**changes):
    """The rows of a round in which everything is on; shapes of the state agree."""
    plan = plan_run(**EVERYTHING | changes)
    program = plan.program
    state, frozen = jax.eval_shape(
        lambda key: init_state(key, plan.hyper, program), jax.random.key(0)
    )
    federation = plan.federation.replace(frozen=frozen)
    step = spread(build_round(program), program.mesh)
    after, metrics = jax.eval_shape(step, state, federation, plan.hyper)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return metrics


@pytest.mark.parametrize(
    "name",
    ["random", "load_balanced", "flex_moe", "prototypes", "channel_aware", "fedavg"],
)
def test_several_layers_run_with_every_mechanism(name):
    """One round is traced: shapes agree, and what is pruned is counted."""
    metrics = trace_all(strategy=name, **TEXT)
    assert metrics["kept_share"].shape == () and OBSERVED in metrics


def test_a_run_with_every_mechanism_goes_on_alike(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fields = {"num_rounds": 4, "chunk_rounds": 2, "checkpoint.every": 2}
    config = tiny_config(strategy="load_balanced", **EVERYTHING | IMAGES | fields)
    assert run_alone(config, whole)
    assert not run_alone(config, parts, stop=stop_at(parts, 2))
    assert run_alone(config, parts)
    assert_same_results(whole, parts)
