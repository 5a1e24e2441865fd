"""Whole runs of low-rank experts on a frozen base, and of its fine-tuning."""

import jax
import numpy as np
import pytest
from checkpoints import EXPERTS, D, F, V, measure_bytes, save_checkpoint
from factories import (
    assert_same_results,
    make_lora,
    rows_of,
    run_alone,
    stop_at,
)

from fedmoe_jax.api import load_run, predict
from fedmoe_jax.models import lora
from fedmoe_jax.models.flops import shape_base
from fedmoe_jax.options import UserError
from fedmoe_jax.state import init_state
from fedmoe_jax.train import memory
from fedmoe_jax.train.memory import CLIENT_COPIES, estimate_memory
from fedmoe_jax.train.plan import Member, estimate, plan_waves
from fedmoe_jax.train.run import build_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"), "llama")


def list_carries(jaxpr):
    """Shapes of what every loop of a program carries."""
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "scan":
            first = params["num_consts"]
            carried = equation.invars[first : first + params["num_carry"]]
            yield from (leaf.aval.shape for leaf in carried)
        if equation.primitive.name == "while":
            first = params["cond_nconsts"] + params["body_nconsts"]
            yield from (leaf.aval.shape for leaf in equation.invars[first:])
        for value in params.values():
            for each in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from list_carries(inner)


@pytest.mark.parametrize(
    ("family", "clients"), [("llama", 4), ("llama", 8), ("olmoe", 4)]
)
def test_the_base_is_in_no_carry_and_there_once(family, clients, tmp_path):
    base = save_checkpoint(tmp_path / "base", family)
    fields = {"strategy": "random", "num_experts": EXPERTS, "cohort_size": clients}
    configs = [make_lora(base, seed=seed, **fields) for seed in (0, 1)]
    (wave,) = plan_waves([Member(f"run{c.seed}", c) for c in configs])
    job = build_job(wave, [None, None])
    federation, hypers = job.inputs
    whole = jax.make_jaxpr(job.programs.run_rounds)(job.state, federation, hypers)
    carries = list(list_carries(whole.jaxpr))
    leaves, router = jax.tree.leaves(federation.base), EXPERTS * D
    shapes = {leaf.shape for leaf in leaves if leaf.size > router}  # nothing else has
    assert len(carries) > 50 and {(V, D), (D, F)} <= {own[-2:] for own in shapes}
    assert not shapes & {shape[-len(own) :] for shape in carries for own in shapes}
    sizes = [leaf.nbytes for leaf in leaves]
    assert sum(sizes) == measure_bytes(family)
    costs = wave.program.costs
    assert costs.frozen_bytes == sum(sizes)  # that every client downloads once


@pytest.mark.parametrize("kind", ["lora", "finetune"])
def test_a_run_learns_and_goes_on_alike(kind, base, tmp_path):
    """Broken off after two of four rounds; the model that was saved is the one read."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = make_lora(base, **{"model.kind": kind, "cohort_size": 8})
    assert run_alone(config, whole)
    assert not run_alone(config, parts, stop=stop_at(parts, 2))
    assert run_alone(config, parts)
    assert_same_results(whole, parts)
    rows = rows_of(whole)
    assert rows[-1]["personal_bits"] < rows[1]["personal_bits"]
    down = [row["bytes_down"] for row in rows]
    size = measure_bytes("llama")
    np.testing.assert_allclose(down[0] - down[1], 8 * size)  # once for every client
    np.testing.assert_allclose(down[1:], down[1])
    run = load_run(whole)
    saved = {leaf.shape for leaf in jax.tree.leaves(run.state)}
    assert ((V, D) in saved) == (kind == "finetune")  # its differences, no base
    rows = {name: leaf[:3] for name, leaf in run.plan.data.test.items()}
    logits = predict(run, rows)
    assert logits.shape[::2] == (3, V) and np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "llama",
            {"strategy": "heterofl"},
            "strategy='heterofl' is not allowed with",
        ),
        ("olmoe", {"strategy": "prototypes"}, "strategy='prototypes' is not allowed w"),
        ("olmoe", {"upcycle.rounds": 2}, "upcycle.rounds=2 is not allowed with model."),
        ("olmoe", {"strategy": "fedavg_active"}, "num_experts=1, as strategy='fedavg"),
    ],
)
def test_strategies_that_do_not_fit_a_base_are_refused(family, changes, told, tmp_path):
    base = save_checkpoint(tmp_path / "base", family)
    config = make_lora(base, **{"num_experts": EXPERTS} | changes)
    with pytest.raises(UserError, match=told):
        plan_waves([Member("tiny", config)])


def test_memory_has_the_base_once(base):
    """Not in each of the copies that a client at work has of what it trains."""
    (wave,) = plan_waves([Member("tiny", make_lora(base))])
    (plan,), program = wave.plans, wave.program
    key = jax.random.key(0)
    state, frozen = jax.eval_shape(lambda: init_state(key, plan.hyper, program))
    federation = plan.federation.replace(frozen=frozen, base=shape_base(program.model))
    without = plan.federation.replace(frozen=frozen)
    found, less = (
        estimate_memory(state, each, program, 0.0, 0.0, 1)
        for each in (federation, without)
    )
    costs = program.costs
    own = costs.stem_bytes + costs.gate_bytes
    own += program.sizes.max_held * costs.expert_bytes
    assert found["compute"] == CLIENT_COPIES * own
    size = measure_bytes("llama")
    assert found["data"] - less["data"] == size == costs.frozen_bytes


def test_memory_has_copies_of_the_experts_of_a_base(tmp_path, monkeypatch):
    """Three matrices [D, F] of each, in both layers: K in training, E in evaluation."""
    base = save_checkpoint(tmp_path / "base", "olmoe")
    fields = {"num_experts": EXPERTS, "max_held": 3, "num_active": 2}
    (wave,) = plan_waves([Member("tiny", make_lora(base, **fields))])
    expert = 4 * 2 * 3 * D * F
    assert memory.count_base_experts(wave.program.model) == EXPERTS * expert

    def measure(gathered):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "count_base_experts", lambda model: gathered)
            return estimate(wave.plans, wave.program)["compute"]

    assert measure(EXPERTS * expert) - measure(0.0) == EXPERTS * expert  # evaluation
    # With an example at once evaluation needs less than training.
    monkeypatch.setattr(memory, "choose_batch", lambda program: 1)
    assert measure(EXPERTS * expert) - measure(0.0) == 3 * expert


def test_a_base_beyond_the_memory_is_refused_before_it_is_read(base, monkeypatch):
    read = []
    monkeypatch.setattr(lora, "load_base", lambda *files: read.append(files))
    config = make_lora(base, **{"run.memory_limit_gb": 1e-5})
    with pytest.raises(UserError, match="memory_limit_gb=1e-05 is too low"):
        plan_waves([Member("tiny", config)])
    assert not read


def test_other_weights_are_refused(base, tmp_path):
    mine, folder = tmp_path / "mine", tmp_path / "run"
    save_checkpoint(mine, "llama")
    config = make_lora(mine)
    assert not run_alone(config, folder, stop=stop_at(folder, 2))

    def change(config, tensors):
        tensors["model.norm.weight"] += 1

    save_checkpoint(mine, "llama", change)
    told = "model.base=.* has changed since the run was started"
    with pytest.raises(UserError, match=told):
        run_alone(config, folder)
    with pytest.raises(UserError, match=told):
        load_run(folder)


def test_runs_of_a_sweep_are_those_alone(base):
    """As one program; gates, experts and the pairs of attention of each."""
    configs = [make_lora(base, seed=seed, strategy="random") for seed in (0, 1)]
    (wave,) = plan_waves([Member(f"run{c.seed}", c) for c in configs])
    job = build_job(wave, [None, None])
    together, _ = job.programs.run_rounds(job.state, *job.inputs)
    for row, config in enumerate(configs):
        (single,) = plan_waves([Member("alone", config)])
        own = build_job(single, [None])
        alone, _ = own.programs.run_rounds(own.state, *own.inputs)
        for part in ("stem", "gate", "experts"):
            found, known = together.params[part], alone.params[part]
            leaves = zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True)
            for leaf, expected in leaves:
                np.testing.assert_allclose(leaf[row], expected[0], atol=1e-5)


def test_devices_share_the_work_and_not_the_result(base, tmp_path):
    runs = []
    for count in (1, 8):
        folder = tmp_path / str(count)
        changes = {"run.num_devices": count, "cohort_size": 8}
        assert run_alone(make_lora(base, **changes), folder)
        runs.append((rows_of(folder), load_run(folder).params))
    (rows, params), (others, shared) = runs
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(row["train_loss"], other["train_loss"], rtol=1e-4)
    for leaf, other in zip(*map(jax.tree.leaves, (params, shared)), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-4)
