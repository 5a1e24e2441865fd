"""Programs for TPUs and GPUs, traced and lowered without one; nothing is compiled."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import EXPERTS, D, save_checkpoint
from factories import (
    SIZES,
    assert_same,
    make_data,
    make_evidence,
    make_hyper,
    make_lora,
    make_times,
    plan_run,
    sizes_of,
    start_run,
    tiny_study,
)
from jax import export

from fedmoe_jax import program
from fedmoe_jax.models.flops import shape_base
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train import plan as planning
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.plan import Member
from fedmoe_jax.train.run import build_programs, stack_federations

DEVICES = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu"}  # JAX's platform: its devices'
CNN = {
    "model.stem": "cnn",
    "model.expert": "conv",
    "partition.kind": "iid",
    "partition.min_size": 1,
    "run.num_devices": 1,
}
MANY = SIZES._replace(num_clients=4_000, cohort_size=3_000)  # several blocks on CPU


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lower(function, platform, *arguments):
    """A jitted function lowered for such shapes."""
    return export.export(function, platforms=(platform,))(*arguments)


def plan_two_runs(monkeypatch, platform):
    """Two runs of a CNN on images like those of CIFAR-10, on one such device."""
    monkeypatch.setattr(program, "find_platform", lambda mesh: DEVICES[platform])
    data = make_data(100, (32, 32, 3))
    monkeypatch.setattr(planning, "load_dataset_once", lambda options: data)
    (wave,) = planning.plan_waves(list_members(tiny_study(("greedy",), **CNN)))
    assert wave.program.platform == DEVICES[platform]
    return wave


def lower_wave(wave, platform):
    """`init`, `run_rounds` and `evaluate` of a wave, lowered."""
    mesh, plans = wave.program.mesh, wave.plans
    federation = shapes_of(stack_federations([p.federation for p in plans], mesh))
    stack = lambda *leaves: np.stack(leaves)
    hyper = shapes_of(jax.tree.map(stack, *(plan.hyper for plan in plans)))
    init, programs = build_programs(wave.program)
    start = shapes_of(np.arange(len(plans))), federation, hyper
    state, frozen = shapes_of(jax.eval_shape(init, *start))
    base = shape_base(wave.program.model)
    inputs = state, federation.replace(frozen=frozen, base=base), hyper
    return (
        lower(init, platform, *start),
        lower(programs.run_rounds, platform, *inputs),
        lower(programs.evaluate, platform, *inputs),
    )


@pytest.mark.slow
@pytest.mark.parametrize("platform", DEVICES)
def test_a_sweep_of_cnns_has_the_form_of_its_platform(monkeypatch, platform):
    wave = plan_two_runs(monkeypatch, platform)
    lowered, on_cpu = lower_wave(wave, platform), platform == "cpu"
    assert all(each.platforms == (platform,) for each in lowered)
    _, rounds, evaluate = (each.mlir_module() for each in lowered)
    # Layouts are pinned on CPU alone. Vmapped runs, clients and experts would be groups
    # of a convolution, so that it is a product elsewhere.
    assert ("optimization_barrier" in rounds) == on_cpu
    for text in (rounds, evaluate):
        assert ("stablehlo.convolution" in text) == on_cpu
        assert "feature_group_count = 2" not in text
    assert wave.program.static.run.client_chunk == (1 if on_cpu else 3)
    # Over rounds, chunks and local steps, and over the schedule's hands, which a metric
    # deals again; none over runs, clients or experts.
    assert on_cpu or rounds.count("stablehlo.while") == 5
    # One loop over batches, one over models, one over the priors of a model's clients,
    # and on CPU one over runs.
    assert evaluate.count("stablehlo.while") == (4 if on_cpu else 3)


def list_float32_products(text):
    """The operands of the products of a lowered program that are float32, as text."""
    products = re.findall(r"stablehlo\.dot_general.*: \((.*?)\) ->", text)
    return [operands for operands in products if "f32" in operands], len(products)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "finetune", "olmoe"])
def test_low_rank_experts_are_products_in_bfloat16_both_ways(
    kind, monkeypatch, tmp_path
):
    """Of two runs of four clients, 32 windows of 12 tokens, through CUDA's form."""
    monkeypatch.setattr(program, "find_platform", lambda mesh: "gpu")
    sparse = kind == "olmoe"
    base = save_checkpoint(tmp_path / "base", kind if sparse else "llama")
    changes = {"model.kind": "lora" if sparse else kind, "model.dtype": "bfloat16"}
    changes |= {"strategy": "random", "num_experts": EXPERTS}
    configs = [make_lora(base, seed=seed, **changes) for seed in (0, 1)]
    (wave,) = planning.plan_waves([Member(f"{c.seed}", c) for c in configs])
    text = lower_wave(wave, "cuda")[1].mlir_module()
    assert wave.program.static.run.client_chunk == 4
    assert text.count("stablehlo.while") == 5 and "stablehlo.convolution" not in text
    wide, count = list_float32_products(text)
    # Of tokens: gates, and what is averaged by them, one number an expert; no hidden
    # layer, no heads, no pairs of positions and no vocabulary.
    tokens = "32x(4x)?12x|x384x"
    gate = rf"(32x12|2x384)(x{D}|x{EXPERTS}|)xf32|x384xf32"
    of_tokens = [each for each in wide if re.search(tokens, each)]
    for operands in of_tokens:
        for each in operands.split(", "):
            assert re.search(gate, each) or not re.search(tokens, each), operands
    assert 0 < len(of_tokens) < count / 4


def lower_decision(name, platform):
    """A strategy's assignment of a large cohort, lowered."""
    strategy, sizes = STRATEGIES[name], sizes_of(name, MANY)
    state = jax.eval_shape(lambda: strategy.init(sizes))
    evidence = make_evidence(sizes, times=make_times(sizes) if strategy.timed else None)
    evidence = shapes_of(evidence).replace(state=state)
    key = jax.eval_shape(lambda: jax.random.key(0))
    decide = functools.partial(strategy.assign, sizes=sizes)
    in_order = lambda evidence, hyper, key: decide(evidence, hyper, key=key)
    return lower(jax.jit(in_order), platform, evidence, shapes_of(make_hyper()), key)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_decides_on_any_platform(name, platform):
    held, slot = lower_decision(name, platform).out_avals[:2]
    shape = MANY.cohort_size, sizes_of(name, MANY).max_held
    assert (held.shape, held.dtype, slot.shape) == (shape, np.int32, shape)


@pytest.mark.slow
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", ["random", "greedy", "load_balanced"])
def test_scores_are_sorted_but_on_a_cpu(name, platform):
    text = lower_decision(name, platform).mlir_module()
    assert ("chlo.top_k" in text) == (platform != "cpu")
    # Blocks of clients, one after the other.
    assert ("stablehlo.dynamic_slice" in text) == (platform == "cpu")


def test_no_trace_asks_for_the_default_backend():
    """What is lowered for one platform must not depend on another that is at hand."""
    package = Path(program.__file__).parent
    asking = [p for p in package.rglob("*.py") if "default_backend" in p.read_text()]
    assert [path.name for path in asking] == ["api.py"]  # in a message to the user


@pytest.mark.slow
@pytest.mark.parametrize("late", ["drop", "stale"])
def test_rounds_in_the_form_of_accelerators_are_those_on_a_cpu(monkeypatch, late):
    """Clients in chunks with some padding, products for convolutions and for sums."""
    changes = CNN | {"late.kind": late, "run.client_chunk": 2}
    monkeypatch.setattr(
        planning, "load_dataset_once", lambda options: make_data(100, (32, 32, 3))
    )

    def train(platform):
        monkeypatch.setattr(program, "find_platform", lambda mesh: platform)
        plan = plan_run(**changes, cohort_size=3)
        assert plan.program.platform == platform
        run = start_run(plan, plan.program)
        rounds = build_run_rounds(plan.program)
        return rounds(run.state, run.federation, run.hyper)

    (state, rows), (expected, on_cpu) = train("gpu"), train("cpu")
    assert_same(state.params, expected.params, atol=2e-4)
    np.testing.assert_allclose(rows["train_loss"], on_cpu["train_loss"], rtol=1e-3)
    np.testing.assert_array_equal(rows["load_cv"], on_cpu["load_cv"])
