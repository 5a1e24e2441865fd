"""The local objective and the feedback from it, by hand, for one MoE layer and two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    assert_same,
    fill,
    make_hyper,
    make_inputs,
    make_program,
    make_windows,
    use_model,
)

from fedmoe_jax.base import Model, Routing, Scores, Task
from fedmoe_jax.loss import (
    local_loss,
    mean_report,
    sum_batch,
    sum_gate_losses,
    summarise_feedback,
    zero_sums,
)
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.routing import route as route_top
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.positions import mean_loss
from fedmoe_jax.tasks.batches import shape_batch

pytestmark = pytest.mark.slow

REPORT = {"mass": jnp.array([[0.25, 0.75]])}


def sum_one(loss, score, gates, weight=None, report=None):
    """The sums over one batch of one layer."""
    arrays = [jnp.asarray(row, jnp.float32) for row in (loss, score)]
    scores = Scores(*arrays, None if weight is None else jnp.asarray(weight))
    routing = Routing(None, jnp.asarray(gates, jnp.float32)[None])
    return sum_batch(scores, routing, report, 1)


def close(found, expected):
    np.testing.assert_allclose(found, np.float32(expected), rtol=1e-5, atol=1e-6)


def test_summarise_feedback_by_hand():
    gates = [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]  # [P=2, K=3]
    sums = sum_one([2.0, 4.0], [1.0, 0.0], gates, report=REPORT)
    assert (sums.total_loss, sums.total_score, sums.batches) == (6, 1, 1)
    assert sums.weight is None and sums.report is REPORT
    feedback = summarise_feedback(sums)
    close(feedback.accuracy, [[1 / 1.25, 0, 0]])
    close(feedback.loss, [[3 / 1.25, 4, 0]])
    close(feedback.frequency, [[0.625, 0.375, 0]])
    close(feedback.load, [[2, 1, 0]])
    close(feedback.routed, [[1, 1 / 2, 0]])
    close(feedback.peak, [[1, 0.75, 0]])


def test_load_counts_the_positions_of_trained_experts_only():
    loss, score = jnp.array([2.0, 4.0, 1.0]), jnp.array([1.0, 0.0, 1.0])
    gates = jnp.array([[0.5, 0.2, 0.0], [0.25, 0.75, 0.0], [0.5, 0.0, 0.1]])[None]
    total = 0.0
    for trained in ([True, False, True], [True, True, False]):  # of two batches
        routing = Routing(None, gates, jnp.array([trained]))
        sums = sum_batch(Scores(loss, score), routing, None, 1)
        total = sums if total == 0.0 else jax.tree.map(jnp.add, total, sums)
    feedback = summarise_feedback(total)
    close(feedback.load, [[6, 2, 1]])
    close(feedback.routed, [[1, 1 / 3, 1 / 6]])
    close(total.gates, [[2.5, 1.9, 0.2]])  # also of the batches that do not train it


def test_summarise_feedback_ignores_positions_without_weight():
    gates = [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    weight = [1.0, 0.0, 2.0]
    sums = sum_one([1.0, 100.0, 3.0], [1.0, 1.0, 0.0], gates, weight)
    assert (sums.total_loss, sums.total_score, sums.weight) == (7, 1, 3)
    feedback = summarise_feedback(sums)
    close(feedback.accuracy, [[1, 0.5 / 2.5]])
    close(feedback.loss, [[1, (0.5 + 6) / 2.5]])
    close(feedback.frequency, [[0.5 / 3, 2.5 / 3]])
    close(feedback.load, [[1, 2]])
    close(feedback.routed, [[1 / 2, 1]])
    close(feedback.peak, [[0.5, 1]])


def test_equal_weights_change_nothing_but_the_scale():
    rows = [1.0, 2.0, 4.0], [1.0, 0.0, 1.0], [[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]]
    plain, weighted = sum_one(*rows), sum_one(*rows, [2.0] * 3)
    found = summarise_feedback(weighted)
    assert_same(found, summarise_feedback(plain), rtol=1e-6)
    loss = jnp.array(rows[0])
    close(mean_loss(Scores(loss, loss, jnp.full(3, 2.0))), loss.mean())


def test_sum_batch_without_padding_is_that_of_the_other_positions():
    rng = np.random.default_rng(0)
    loss, score, gates = rng.random(9), rng.integers(0, 2, 9), rng.random((9, 3))
    real = np.arange(9) % 3 > 0
    padded = sum_one(loss, score, gates, real.astype(np.float32))
    found = sum_one(loss[real], score[real], gates[real])
    assert padded.weight == padded.positions == real.sum()
    assert_same(padded.replace(weight=None), found, atol=1e-6)


def test_sum_batch_adds_up_over_batches():
    rng = np.random.default_rng(0)
    rows = rng.random(8), rng.integers(0, 2, 8), rng.random((8, 3))
    program = make_program(num_experts=3, max_held=3)
    assert program.strategy.report is None
    sums = zero_sums(make_hyper(), program).replace(report={"mass": jnp.zeros(2)})
    for start in (0, 2, 4, 6):
        batch = (row[start : start + 2] for row in rows)
        mass = jnp.array([start / 6, 1 - start / 6])
        one = sum_one(*batch, report={"mass": mass})
        sums = jax.tree.map(jnp.add, sums, one)
    whole = sum_one(*rows, report=sums.report)
    apart = {"peak": sums.peak, "batches": sums.batches}
    assert_same(sums, whole.replace(**apart), atol=1e-5)
    assert sums.batches == 4
    peaks = rows[2].reshape(4, 2, 3).max(1)
    close(summarise_feedback(sums).peak, [peaks.mean(0)])
    close(mean_report(sums)["mass"], [0.5, 0.5])


@pytest.mark.parametrize("strategy", ["load_balanced", "fedmix"])
def test_zero_sums_are_no_feedback_and_no_nan(strategy):
    program = make_program(strategy=strategy)
    program = program._replace(sizes=program.sizes._replace(num_layers=1))
    sums = zero_sums(make_hyper(), program)
    found = summarise_feedback(sums), mean_report(sums)
    assert (found[1] is None) == (strategy == "load_balanced")
    for part in jax.tree.leaves(found):
        np.testing.assert_array_equal(part, np.zeros(part.shape))


# ---- two MoE layers

# Odds of four experts in each layer, [B, G, E].
ODDS = [
    [[1.0, 2.0, 5.0, 92.0], [9.0, 3.0, 50.0, 1.0]],
    [[4.0, 1.0, 1.0, 10.0], [1.0, 1.0, 1.0, 1.0]],
]
HELD = np.array([[[2, 0, 1], [3, 1, 0]]], np.int32)
SLOT = np.array([[[1, 1, 1], [1, 1, 0]]], bool)
# Top-2 of the odds of the valid slots; of equal ones the lower slot.
GATES = [
    [[5 / 7, 0, 2 / 7], [1 / 5, 4 / 5, 0]],  # of 5, 1, 2 and 1, 4, 1
    [[1 / 4, 3 / 4, 0], [1 / 2, 1 / 2, 0]],  # of 1, 3 and 1, 1
]
CALIBRATION = np.array([[1.0, 2.0]], np.float32)  # of each layer


def make_batch(shape):
    """Two positions of loss 2 and 3, of which the first is right."""
    loss, score = jnp.array([2.0, 3.0]), jnp.array([1.0, 0.0])
    return {
        "odds": jnp.array(ODDS).reshape(*shape, 2, 4),
        "loss": loss.reshape(shape),
        "score": score.reshape(shape),
    }


def route_odds(params, frozen, batch, held, slot, route, key):
    """Two layers that read their gates from the batch; no outputs."""
    logits = jnp.moveaxis(jnp.log(batch["odds"]).reshape(-1, 2, 4), 1, 0)
    allowed = lambda g: (logits[g][:, held[g]], slot[g])
    gates = [route_top(*allowed(g), route.num_active) for g in range(2)]
    return None, Routing(logits, jnp.stack(gates))


def init_layers(key):
    rows = {"first": {"bias": jnp.zeros(4)}, "second": {"bias": jnp.zeros(4)}}
    return {"stem": {}, "gate": rows, "experts": rows, "head": {}}, {}


TASK = Task(
    statistics=lambda data: {},
    prepare=lambda rows, statistics: rows,
    loss=lambda outputs, batch: Scores(batch["loss"], batch["score"]),
    num_outputs=lambda data: 1,
)


def make_two_layers(batch):
    program = make_program(num_experts=4, max_held=3, batch_size=2)
    report = lambda routing, batch, hyper: {"gates": routing.gates.sum(0)}
    program = program._replace(
        task=TASK,
        batch=shape_batch(batch, {}, TASK),
        strategy=program.strategy._replace(report=report),
    )
    return use_model(program, Model(init_layers, route_odds))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1)])
def test_local_loss_of_two_layers_by_hand(shape):
    """Two images, or two tokens of a text."""
    batch = make_batch(shape)
    program = make_two_layers(batch)
    assert program.sizes.num_layers == 2
    inputs = make_inputs(HELD, SLOT, calibration=CALIBRATION)
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    hyper = make_hyper(loss={"calibration": 0.3})
    params, frozen = init_layers(None)
    loss, sums = local_loss(
        *(params, frozen, batch, inputs, hyper, jax.random.key(0)), program=program
    )
    # Held mass: 8 / 100 and 6 / 16 in the first layer, 4 / 63 and 2 / 4 in the second.
    first, second = -np.log([8 / 100, 6 / 16]), -np.log([4 / 63, 2 / 4])
    close(loss, 2.5 + 0.3 * (first.mean() + 2 * second.mean()))
    feedback = summarise_feedback(sums)
    mass = np.array(GATES).sum(1)  # [G, K]
    share = 1 / np.maximum(mass, 1e-6)
    right = np.array([[5 / 7, 0, 2 / 7], [1 / 4, 3 / 4, 0]])
    lost = np.array([[10 / 7 + 3 / 5, 12 / 5, 4 / 7], [2, 3, 0]])
    close(feedback.accuracy, right * share)
    close(feedback.loss, lost * share)
    close(feedback.frequency, mass / 2)
    close(feedback.load, [[2, 1, 1], [2, 2, 0]])
    close(feedback.routed, [[1, 1 / 2, 1 / 2], [1, 1, 0]])
    close(feedback.peak, [[5 / 7, 4 / 5, 2 / 7], [1 / 2, 3 / 4, 0]])
    close(sums.report["gates"], mass)
    assert (sums.total_loss, sums.total_score) == (5, 1)
    start = zero_sums(hyper, program)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, sums)


def test_sum_gate_losses_of_one_expert_is_nothing():
    program = make_program()
    inputs = make_inputs(HELD[:, :1], SLOT[:, :1])
    routing = Routing(None, jnp.ones((1, 4, 1)))
    assert sum_gate_losses(routing, inputs, make_hyper(), program) == 0


# ---- windows that are padded

TOKENS = np.array([[1, 2, 3, 4, 0, 2, 2], [3, 3, 1, 0, 0, 4, 1]], np.int32)


def start_windows(cut, **changes):
    """A program of windows of 4 tokens to predict, and its batch of two.

    They end there, or 2 more places only pad them.
    """
    data = make_windows(TOKENS[:, : 5 if cut else 7], 5)
    rows = data.train | {"length": np.full(2, 5)}
    small = {"kind": "transformer", "stem_width": 8, "heads": 2, "kv_heads": 1}
    fields = {f"model.{name}": value for name, value in small.items()}
    fields |= {"num_experts": 4, "max_held": 3, "batch_size": 2, "num_active": 2}
    program = make_program(data, **fields | changes)
    return program, program.task.prepare(jax.tree.map(jnp.asarray, rows), {})


@pytest.mark.parametrize(
    ("strategy", "tied"),
    [("fedmix_shared_gate", False), ("fedmix_shared_gate", True), ("hfedmoe", False)],
)
def test_a_padded_window_is_the_window_cut_to_its_length(strategy, tied):
    """Losses of the gates, gradients, report, feedback and which slots are trained."""
    found = []
    for cut in (False, True):
        changes = {"strategy": strategy, "model.tied": tied}
        program, batch = start_windows(cut, **changes)
        sizes = program.sizes
        slots = 1, sizes.num_layers, sizes.max_held
        held = np.broadcast_to(np.arange(sizes.max_held)[::-1], slots)
        inputs = make_inputs(held, np.ones(slots, bool), budget=np.array([2]))
        inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
        params = take_submodel(fill(shape_params(program.model)[0]), {}, inputs.held, 0)
        hyper = make_hyper(loss={"calibration": 0.3, "load": 0.2, "z": 0.1})

        def losses(params, program=program, batch=batch, inputs=inputs, hyper=hyper):
            return local_loss(
                *(params, {}, batch, inputs, hyper, jax.random.key(0)), program=program
            )

        (loss, sums), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
        assert sums.positions == 8
        found.append((loss, sums, grads))
    assert_same(*found, rtol=1e-4, atol=1e-5)
    for part in ("gate", "experts"):  # none of it is nothing
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[part]))


# ---- the bias of the gates


@pytest.mark.parametrize("kind", ["images", "text"])
def test_losses_of_the_gates_do_not_see_the_bias(kind):
    """The rest of the objective is that of shifted gates."""
    if kind == "text":
        program, batch = start_windows(True)
    else:
        program = make_program(strategy="fedmix_shared_gate")  # with a report
        x = np.random.default_rng(0).normal(size=(4, 8, 8, 1))
        batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.arange(4)}
    sizes = program.sizes
    slots = 1, sizes.num_layers, sizes.max_held
    held = np.broadcast_to(np.arange(sizes.max_held)[::-1], slots)
    bias = np.arange(np.prod(slots), dtype=np.float32).reshape(slots)
    inputs = make_inputs(held, np.ones(slots, bool), bias=bias)
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    params = jax.tree.map(jnp.asarray, fill(shape_params(program.model)[0]))
    params = take_submodel(params, {}, inputs.held, 0)
    shift = lambda gate, g: (
        gate | {"bias": gate["bias"].at[inputs.held[g]].add(inputs.bias[g])}
    )
    names = sorted(params["gate"])
    gates = {name: shift(params["gate"][name], g) for g, name in enumerate(names)}

    @jax.jit
    def lose(params, inputs, calibration):
        hyper = make_hyper(loss={"calibration": calibration})
        arguments = params, {}, batch, inputs, hyper, jax.random.key(0)
        return local_loss(*arguments, program=program)

    plain = inputs.replace(bias=None)
    expected, feedback = lose(params | {"gate": gates}, plain, 0.0)
    (task, sums), (whole, _) = (lose(params, inputs, weight) for weight in (0, 0.5))
    (before, reported), (both, _) = (lose(params, plain, weight) for weight in (0, 0.5))
    close(task, expected)
    close(sums.gates, feedback.gates)
    assert abs(task - before) > 1e-3
    if kind == "images":  # there is one layer: nothing before its gate has moved
        close(whole - task, both - before)
        assert whole - task > 0.01
        assert_same(sums.report, reported.report)
