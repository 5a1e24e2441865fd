"""Costs and outcomes of whole rounds, against a slow twin in Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import STORM, assert_same, plan_run, start_run, use_linear_model

import fedmoe_jax.capacity as capacity_file
import fedmoe_jax.round as round_file
from fedmoe_jax.round import build_round
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.types import Devices
from fedmoe_jax.world.costs import scale_costs
from fedmoe_jax.world.outcome import OUTCOMES
from fedmoe_jax.world.step import Events

pytestmark = pytest.mark.slow

ROUNDS = 5
# What happens to the three clients in each round, and from which moment of training.
NEVER, AT_START, HALFWAY = np.inf, 0.0, 0.5
SCRIPT = {
    "reachable": [[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "dropout": [
        [NEVER, NEVER, NEVER],
        [NEVER, HALFWAY, NEVER],
        [AT_START, NEVER, HALFWAY],
        [NEVER, NEVER, NEVER],
        [NEVER, NEVER, NEVER],
    ],
    "no_download": [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]],
    "no_upload": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]],
}
DEADLINE = 60.0
LATENCY, POWER, RADIO = [0.5, 0.0, 1.0], [5.0, 50.0, 10.0], [2.0, 1.0, 0.5]
MODEL_SCALE = 100.0


@functools.cache
def play(late, overload):
    """Five rounds of three clients.

    Returns the program, the federation, the states, the rounds' metrics, and the round
    as a function of a state.
    """
    plan = plan_run(
        **{
            "num_clients": 3,
            "cohort_size": 3,
            "late.kind": late,
            "devices.overload": overload,
            "strategy": "random",
        }
    )
    flops = dict(stem=100.0, gate=50.0, head=0.0, experts=200.0)
    program = use_linear_model(plan.program, **flops)
    costs, device_costs = program.costs, scale_costs(program.costs, MODEL_SCALE)
    program = program._replace(device_costs=device_costs)
    ones = np.ones(3, np.float32)
    whole = device_costs.shared_bytes + device_costs.gate_bytes
    whole += 2 * device_costs.expert_bytes
    devices = Devices(
        # client 2 has room for 1.5 experts; client 1 sends so slowly that it is late
        memory=4 * np.float32([2 * whole, 2 * whole, whole - costs.expert_bytes * 50]),
        flops=1e5 * ones,
        upload=np.float32([1e5, 1e3, 1e5]),
        download=1e5 * ones,
        latency=np.float32(LATENCY),
        power=np.float32(POWER),
        radio=np.float32(RADIO),
        tier=np.zeros(3, np.int32),
    )
    plan = plan._replace(federation=plan.federation.replace(devices=devices))
    program, state, federation, hyper = start_run(plan, program)
    step_world, observe = round_file.step_world, round_file.observe
    now = []

    def noting(state, keys, round, hyper, processes):
        now.append(round)
        return step_world(state, keys, round, hyper, processes)

    def scripted(state, federation, hyper, processes):
        view = observe(state, federation, hyper, processes)
        script = {name: jnp.asarray(rows)[now[-1]] for name, rows in SCRIPT.items()}
        script = {k: v if k == "dropout" else v > 0 for k, v in script.items()}
        busy = state.get("busy", jnp.zeros(3, bool))
        script["reachable"] &= ~busy
        return view.replace(events=Events(**script))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_file, "step_world", noting)
        patch.setattr(round_file, "observe", scripted)
        # A belief of two experts a client, whatever the devices can hold.
        patch.setattr(capacity_file, "update_belief", lambda belief, *_: belief)
        states, metrics = [state], []
        one_round = jax.jit(spread(build_round(program), program.mesh))
        for _ in range(ROUNDS):
            state, measured = one_round(states[-1], federation, hyper)
            states.append(state)
            metrics.append(jax.device_get(measured))
    again = lambda state: one_round(state, federation, hyper)[0]
    return program, federation, states, metrics, again


def slow_round(program, devices, busy, number, late, overload):
    """The costs of one round, client by client, and the clients busy in the next."""
    costs, scale = program.costs, MODEL_SCALE
    examples = program.sizes.local_steps * program.sizes.batch_size
    shared = costs.shared_bytes + costs.gate_bytes
    book = dict.fromkeys(
        ["up", "down", "flops", "wasted_bytes", "wasted_flops", "watt", "radio"], 0.0
    )
    outcomes, ends = [], []
    for c in range(3):
        held = 2
        down = shared + held * costs.expert_bytes
        feedback = 4 * 5 * held  # bytes of feedback, however large the model is
        up = down + feedback
        flops = examples * (costs.shared_flops + held * costs.expert_flops)
        seconds = [
            scale * down / float(devices.download[c]) + LATENCY[c],
            scale * flops / float(devices.flops[c]),
            (scale * down + feedback) / float(devices.upload[c]) + LATENCY[c],
        ]
        spent, outcome = [1.0, 1.0, 1.0], "merged"
        dropout = SCRIPT["dropout"][number][c]
        memory_needed = 4 * scale * (shared + held * costs.expert_bytes)
        if not SCRIPT["reachable"][number][c] or c in busy:
            spent, outcome = [0.0, 0.0, 0.0], "lost_unreachable"
        elif SCRIPT["no_download"][number][c]:
            spent, outcome = [1.0, 0.0, 0.0], "lost_outage"
        elif overload == "lose" and memory_needed > float(devices.memory[c]):
            spent, outcome = [1.0, 0.0, 0.0], "lost_memory"
        elif dropout < 1:
            spent, outcome = [1.0, dropout, 0.0], "lost_dropout"
        elif SCRIPT["no_upload"][number][c]:
            outcome = "lost_outage"
        work = [s * share for s, share in zip(seconds, spent, strict=True)]
        if sum(work) > DEADLINE and late == "drop":
            outcome, left, spent = "dropped", DEADLINE, []
            for length in seconds:
                spent.append(min(1.0, max(0.0, left / length)))
                left -= length
        if sum(work) > DEADLINE and late == "stale" and outcome == "merged":
            outcome = "stale"
        work = [s * share for s, share in zip(seconds, spent, strict=True)]
        traffic = down * spent[0], up * spent[2]
        book["down"] += traffic[0]
        book["up"] += traffic[1]
        book["flops"] += flops * spent[1]
        book["watt"] += POWER[c] * work[1]
        book["radio"] += RADIO[c] * (work[0] + work[2])
        if outcome not in ("merged", "stale"):
            book["wasted_bytes"] += sum(traffic)
            book["wasted_flops"] += flops * spent[1]
        outcomes.append(outcome)
        ends.append(sum(work))
    longest = max(ends)
    book["seconds"] = min(longest, DEADLINE) if late != "wait" else longest
    # Clients that still work for this round, for its update or in vain.
    still = {c for c in range(3) if ends[c] > DEADLINE} if late == "stale" else set()
    return book, outcomes, still


@pytest.mark.parametrize(
    ("late", "overload"), [("wait", "lose"), ("drop", "lose"), ("stale", "ignore")]
)
def test_rounds_cost_what_a_slow_twin_counts(late, overload):
    program, federation, states, metrics, _ = play(late, overload)
    busy, seen = set(), set()
    took_part = np.zeros(3, int)
    for number, row in enumerate(metrics):
        book, outcomes, busy = slow_round(
            program, federation.devices, busy, number, late, overload
        )
        participation = states[number + 1].participation
        got = [OUTCOMES[code] for code in np.array(participation.outcome.code)]
        assert got == outcomes
        seen |= set(outcomes)
        for name in OUTCOMES:
            assert row[f"{name}_clients"] == outcomes.count(name)
        for field, name in {
            "bytes_up": "up",
            "bytes_down": "down",
            "client_flops": "flops",
            "simulated_seconds": "seconds",
            "compute_joules": "watt",
            "radio_joules": "radio",
            "wasted_bytes": "wasted_bytes",
            "wasted_flops": "wasted_flops",
        }.items():
            np.testing.assert_allclose(row[field], book[name], rtol=1e-5, err_msg=field)
        took_part += [outcome in ("merged", "stale") for outcome in outcomes]
        np.testing.assert_array_equal(participation.rounds, took_part)
        fair = took_part.sum() ** 2 / max(3 * (took_part**2).sum(), 1e-9)
        np.testing.assert_allclose(row["participation_jain"], fair, rtol=1e-6)
        reached = [outcome != "lost_unreachable" for outcome in outcomes]
        # clients 1, whose network is too slow for two, and 2
        assert row["capacity_violations"] == sum(reached[1:])
        assert row["participation"].tolist() == took_part.tolist()
    # Client 1 is lost in the fourth round, after the deadline.
    assert (outcomes[1] == "lost_unreachable") == (late == "stale")
    expected = {"wait": "merged", "drop": "dropped", "stale": "stale"}[late]
    assert {expected, "merged", "lost_outage", "lost_dropout"} <= seen
    assert "lost_unreachable" in seen and ("lost_memory" in seen) == (
        overload != "ignore"
    )


def test_a_stale_update_is_merged_a_round_later_with_its_discount():
    _, federation, states, _, again = play("stale", "ignore")
    first, second = states[1], states[2]
    assert int(first.participation.outcome.code[1]) == OUTCOMES.index("stale")
    assert float(first.stale.weight["stem"]) > 0
    # In the second round client 1 is at work for the first, and client 0 unreachable.
    codes = [OUTCOMES[code] for code in np.array(second.participation.outcome.code)]
    assert codes[:2] == ["lost_unreachable", "lost_unreachable"]
    assert float(second.stale.weight["stem"]) == 0
    # Client 2 is merged now. With its mean D / W and the stale sums d and w, the round
    # moves the params by (D + d / 2) / (W + w).
    assert codes[2] == "merged"
    nothing = jax.tree.map(jnp.zeros_like, first.stale)
    fresh = again(first.replace(stale=nothing))
    size = float(federation.size[2])
    weight = {"stem": size, "gate": size, "head": size}
    held = second.align.times_held[2, 0] - first.align.times_held[2, 0]
    weight["experts"] = size * np.array(held, float)
    for part, now in weight.items():
        stale = np.atleast_2d(first.stale.weight[part])[0]  # of the one layer
        for before, alone, delta, after in zip(
            *map(
                jax.tree.leaves,
                (
                    first.params[part],
                    fresh.params[part],
                    first.stale.delta[part],
                    second.params[part],
                ),
            ),
            strict=True,
        ):
            rows = lambda x, leaf=before: np.reshape(
                np.broadcast_to(x, leaf.shape[:1]), (-1,) + (1,) * (leaf.ndim - 1)
            )
            both = np.maximum(rows(now) + rows(stale), 1e-9)
            moved = (alone - before) * rows(now) + 0.5 * delta
            np.testing.assert_allclose(after - before, moved / both, atol=1e-6)
            assert np.abs(after - alone).max() > 1e-5


def test_a_round_in_which_all_are_lost_changes_no_params():
    program, _, states, metrics, _ = play("wait", "lose")
    assert metrics[2]["merged_clients"] == 0
    assert_same(states[2].params, states[3].params)
    assert np.isnan(metrics[2]["train_loss"])
    assert (
        metrics[2]["wasted_bytes"] == metrics[2]["bytes_up"] + metrics[2]["bytes_down"]
    )


# ---- a world in which everything happens


@functools.cache
def weather(strategy, late):
    """Eight rounds in the storm: every round's outcomes, held slots and metrics."""
    changes = STORM | {"strategy": strategy, "late.kind": late, "num_rounds": 8}
    plan = plan_run(**changes | {"eval_every": 2})
    program, state, federation, hyper = start_run(plan, use_linear_model(plan.program))
    round_step = build_round(program)

    def eight_rounds(state, federation, hyper):
        def step(carry, _):
            carry, metrics = round_step(carry, federation, hyper)
            return carry, (
                metrics,
                carry.participation,
                carry.align.times_held[:, 0],
                carry.stale,
            )

        return jax.lax.scan(step, state, length=8)

    run = jax.jit(spread(eight_rounds, program.mesh))
    state, history = run(state, federation, hyper)
    return program, *jax.device_get((federation.size, state.params, *history))


@pytest.mark.parametrize(
    ("strategy", "late"),
    [
        ("load_balanced", "wait"),
        ("load_balanced", "stale"),
        ("fedmoe_da", "drop"),  # clients exchange experts
        ("scaffold", "stale"),  # and have variates of their own
    ],
)
def test_every_assigned_unit_ends_exactly_once(strategy, late):
    program, sizes, params, metrics, participation, times_held, stale = weather(
        strategy, late
    )
    size = program.sizes.cohort_size
    total = sum(metrics[f"{name}_clients"] for name in OUTCOMES)
    np.testing.assert_array_equal(total, np.full(8, size))
    code = participation.outcome.code
    arrived = (code == 0) | (code == 1)
    np.testing.assert_array_equal(
        np.diff(participation.rounds.sum(1), prepend=0), arrived.sum(1)
    )
    # Pairs of client and expert that were assigned: those of clients that counted were
    # trained, those of late ones wait for the next round with the weight of their size.
    held = np.diff(times_held, axis=0, prepend=np.zeros_like(times_held[:1]))
    assert np.all(held.sum((1, 2)) > 0)
    for r in range(8):
        units, size = held[r][participation.client[r]], sizes[participation.client[r]]
        trained = (arrived[r][:, None] * units).sum(0) > 0
        np.testing.assert_array_equal(metrics["expert_load"][r] > 0, trained)
        if late == "stale":
            waits = ((code[r] == 1) * size)[:, None] * units
            np.testing.assert_allclose(stale.weight["experts"][r, 0], waits.sum(0))
            np.testing.assert_allclose(
                stale.weight["stem"][r], ((code[r] == 1) * size).sum()
            )
    lost = (code > 2).sum()
    assert 0 < lost < code.size  # a storm, but not the end of the world
    for name, leaf in metrics.items():
        if name not in ("train_loss", "train_accuracy"):
            assert np.isfinite(leaf).all(), name
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert np.all(
        metrics["wasted_bytes"] <= metrics["bytes_up"] + metrics["bytes_down"]
    )
