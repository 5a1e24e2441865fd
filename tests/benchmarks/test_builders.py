"""Every benchmark can be imported, and what it times is built and traced, small."""

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    alignment,
    bounded,
    devices,
    evaluation,
    experts,
    first_rows,
    maps,
    memory,
    smoke,
    start,
    sweeps,
    world,
)
from fedmoe_jax.capacity import count_capacity, count_workload
from fedmoe_jax.models.flops import count_forward_flops
from fedmoe_jax.state import init_state
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.plan import plan_waves

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def fill_state(key, hyper, program):
    """A first state of the right shapes, for rounds that are traced alone."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    fill = lambda leaf: key if is_key(leaf) else np.zeros(leaf.shape, leaf.dtype)
    init = functools.partial(init_state, program=program)
    return jax.tree.map(fill, jax.eval_shape(init, key, hyper))


@pytest.fixture
def traced(monkeypatch):
    """Benchmarks trace their rounds instead of compiling them."""
    monkeypatch.setattr(start, "init_state", fill_state)
    trace = lambda functions, *inputs: (
        [functools.partial(jax.eval_shape, function) for function in functions],
        0.0,
    )
    monkeypatch.setattr(start, "compile_once", trace)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_a_case_of_the_decision_for_whole_populations(monkeypatch):
    monkeypatch.setattr(alignment, "REPEATS", 1)
    monkeypatch.setattr(alignment, "PICKS", (64, 8, 2))
    with ThreadPoolExecutor(1) as pool:
        row = alignment.run_case((256, 8, 2), pool)
    assert len(row) == len(alignment.HEADER) and row[0] == "256 x 8, K = 2"
    assert alignment.seconds_per_pick() > 0


def test_alignment_state_is_counted_without_being_there():
    # Fitness, held and times_held of every pair, and the usage of every expert.
    expected = 1_000_000 * 64 * (4 + 1 + 4) + 64 * 4
    assert alignment.state_bytes(1_000_000, 64) == expected


@pytest.mark.parametrize(
    ("case", "network", "shape"),
    [
        (world.NOTHING, {}, world.DIGITS),
        (world.ALL, world.ONE_STEP, world.CIFAR10),
    ],
)
def test_rounds_in_a_world(monkeypatch, traced, case, network, shape):
    monkeypatch.setattr(world, "CLIENTS", 8)
    for size in ("num_clients", "cohort_size"):
        monkeypatch.setitem(world.FIELDS, size, 8)
    (changes,) = world.add_network((case,), network).values()
    started = world.start_with(changes, shape)
    state, metrics = started.run_rounds(
        started.state, started.federation, started.hyper
    )
    assert len(state.world) == (0 if case == world.NOTHING else 9)
    assert metrics["train_loss"].shape == (1,)


@pytest.mark.parametrize("every_expert", [True, False])
def test_evaluation_with_all_experts_or_dispatched(monkeypatch, traced, every_expert):
    build = experts.build_evaluate
    trace = lambda program: functools.partial(jax.eval_shape, build(program))
    monkeypatch.setattr(experts, "build_evaluate", trace)
    found = experts.evaluation(experts.start_with(8, 1), every_expert)()
    assert ("expert_accuracy" in found) == every_expert


@pytest.mark.parametrize("case", evaluation.CASES)
def test_evaluation_of_a_large_population(monkeypatch, traced, case):
    build = evaluation.build_evaluate
    trace = lambda program: functools.partial(jax.eval_shape, build(program))
    monkeypatch.setattr(evaluation, "build_evaluate", trace)
    monkeypatch.setitem(evaluation.FIELDS, "cohort_size", 4)
    shape, _, changes = evaluation.CASES[case]
    started = evaluation.start_with(shape, 1_200, changes)
    assert len(started.federation.test_stratum) == evaluation.TESTS[shape]
    found = evaluation.evaluation(started)()
    assert found["client_accuracy"].shape == (1_200,)


def test_rounds_beside_peers(monkeypatch, traced):
    monkeypatch.syspath_prepend(ROOT / "runners")
    fedmoe, meter = map(importlib.import_module, ("fedmoe", "meter"))
    work = meter.works.WORKS["A"]._replace(clients=4, cohort=2)
    started = start.start(fedmoe.describe(work), *fedmoe.load(work), 1)
    inputs = started.federation, started.hyper
    state, _ = started.run_rounds(started.state, *inputs)
    check = functools.partial(fedmoe.check, program=started.program)
    loss = jax.eval_shape(check, state.params, started.federation)
    assert loss.shape == ()


@pytest.fixture
def runners(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "runners")
    return importlib.import_module


def test_the_mixture_is_ours(runners, traced):
    """Params, operations, held experts and rates are those of work M."""
    fedmoe, works = runners("fedmoe"), runners("meter").works
    work = works.WORKS["M"]._replace(examples=50)
    config = fedmoe.describe(work)
    assert config.client.learning_rate == works.MIXTURE_LEARNING_RATE
    assert config.client.momentum == works.MOMENTUM and config.client.clip == 0
    assert config.loss.calibration == works.CALIBRATION
    started = start.start(config, *fedmoe.load(work), 1)
    program, federation, hyper = started.program, started.federation, started.hyper
    assert program.sizes.local_steps == work.steps
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part))
    params = {part: count(tree) for part, tree in started.state.params.items()}
    assert params == works.mixture_parameters()
    workload = count_workload(federation, program)
    capacity = count_capacity(federation.devices, hyper.devices.buffer, workload)
    held = np.clip(capacity, 1, program.sizes.max_held)
    assert tuple(held) == works.HELD
    flops = dict(count_forward_flops(program.model, program.batch))
    active = np.minimum(works.HELD, works.ACTIVE).mean()
    total = flops.pop("experts") * active + sum(flops.values())
    assert total == pytest.approx(2 * sum(works.layer_macs("mixture")), rel=0.05)


def test_the_mixture_in_pytorch(runners):
    torch = pytest.importorskip("torch", reason="lives in the peers' environment")
    works, model = runners("meter").works, runners("torch_mixture_model")
    params = {part: 0 for part in works.mixture_parameters()}
    for name, value in model.init().items():
        params[name.partition(".")[0]] += value.numel()
    assert params == works.mixture_parameters()
    work = works.WORKS["M"]._replace(clients=2, examples=100, steps=3)
    data = model.load(work)
    client, server, held = model.build(2), model.init(), [5, 1]
    client.receive(server, held)
    generator = torch.Generator().manual_seed(0)
    accuracy, load = model.train(client, data, 1, work, generator)
    assert load.tolist() == [96, 96] and 0 <= accuracy.min() <= accuracy.max() <= 1
    total = {name: torch.zeros_like(value) for name, value in server.items()}
    client.add_change(server, total)
    moved = total["experts.0.weight"].abs().sum((1, 2)) > 0
    assert moved.nonzero().squeeze(1).tolist() == sorted(held)


@jax.numpy_rank_promotion("allow")  # as in the peers' own processes
def test_the_models_of_jax_peers(monkeypatch):
    """Both forms of their convolution are one function, of finite gradients."""
    monkeypatch.syspath_prepend(ROOT / "runners")
    models = importlib.import_module("jax_models")
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    params, labels = models.init("cnn", jax.random.key(0)), jnp.array([3])
    found = [
        jax.value_and_grad(models.loss)(params, images, labels, None, convolution)
        for convolution in (models.native_convolution, models.matmul_convolution)
    ]
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(compare, *found)
    mlp = models.init("mlp", jax.random.key(0))
    shape = jax.eval_shape(lambda p: models.loss(p, images, labels, None, None), mlp)
    assert shape.shape == () and np.isfinite(found[0][0])


@pytest.mark.parametrize(("count", "programs"), [(1, 1), (3, 2)])
def test_a_short_study_is_run_and_read(monkeypatch, count, programs):
    def run(command, *, env, **others):
        """As launch.py, whose runs took 2 s to compile each."""
        workdir = Path(command[-1].removeprefix("--workdir="))
        assert not Path(env["JAX_COMPILATION_CACHE_DIR"]).exists()
        assert command[-2] == "--config=configs/compare.py:smoke"
        names = [f"runs/{i}" for i in range(count)] if count > 1 else [""]
        for folder in [workdir / name for name in names]:
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text("{}")
            rows = '{"round": 1, "compile_seconds": 2.0}', '{"round": 2}'
            (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
        for number in range(programs):
            (workdir / "checkpoints" / str(number)).mkdir(parents=True)

    monkeypatch.setattr(smoke.subprocess, "run", run)
    (row,) = smoke.measure(["compare"])
    assert row[:3] == ("`compare.py:smoke`", count, programs)
    assert row[-1] == 2.0 * count and len(row) == len(smoke.HEADER)
    assert "compare" in smoke.list_studies()


def test_a_launch_is_timed_to_its_first_row(monkeypatch, tmp_path):
    """By a program that stands for launch.py and needs no caches."""
    text = (
        "import os, pathlib, sys, time\n"
        "*flags, workdir = sys.argv[1:]\n"
        "folder = pathlib.Path(workdir.removeprefix('--workdir='), 'runs', 'a')\n"
        "assert flags in ([], ['--fail']) and os.environ['XDG_CACHE_HOME']\n"
        "if flags: sys.exit(2)\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'metrics.jsonl').write_text('{}')\n"
        "time.sleep(0.2)\n"
    )
    (tmp_path / "launch.py").write_text(text)
    monkeypatch.setattr(first_rows, "ROOT", tmp_path)
    monkeypatch.setattr(first_rows, "LAUNCHES", {"`launch.py`": ()})
    monkeypatch.setattr(first_rows, "REPETITIONS", 1)
    launches = first_rows.time_pair(())
    assert all(0 < each.first_row < each.seconds for each in launches)
    rows = first_rows.measure()
    assert [row[:2] for row in rows] == [("`launch.py`", c) for c in ("empty", "warm")]
    assert {len(row) for row in rows} == {len(first_rows.HEADER)}
    with pytest.raises(RuntimeError, match="--fail .*: code 2"):
        first_rows.time_launch(("--fail",), str(tmp_path))


def test_the_round_whose_compiling_is_timed(monkeypatch, traced):
    monkeypatch.setattr(memory, "keep_programs", lambda: None)
    started = []
    record = lambda *study: started.append(start.start(*study)) or started[-1]
    monkeypatch.setattr(memory, "start", record)
    assert memory.compile_round() == {"compile_seconds": 0.0}
    (run,) = started
    _, metrics = run.run_rounds(run.state, run.federation, run.hyper)
    rounds = memory.cifar10.get_config().chunk_rounds
    assert metrics["train_loss"].shape == (rounds,)


def test_no_two_runs_whose_maps_are_counted_share_a_program():
    waves = plan_waves(list_members(maps.list_shapes(3)))
    assert [len(wave.names) for wave in waves] == [1, 1, 1]


def test_maps_after_every_other_run():
    seen = [(0, 5), (0, 7), (1, 6), (1, 9), (2, 8), (2, 12), (3, 4), (4, 3)]
    assert maps.make_rows(seen, 2) == [("2", 8, 9), ("4", 3, 12)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_maps_are_seen_after_every_run(monkeypatch):
    def compare(config, workdir, *, stop, profile):
        for name in "ab":
            (workdir / "runs" / name).mkdir(parents=True)
            assert not stop()
            (workdir / "runs" / name / "summary.json").touch()
            assert not stop()

    monkeypatch.setattr(maps, "compare", compare)
    seen = maps.watch(maps.list_shapes(2))
    assert [finished for finished, _ in seen] == [0, 1, 1, 2]
    assert all(count > 10 for _, count in seen)


def test_the_sweep_is_one_program():
    config = sweeps.study()
    config.run.num_devices = 1
    (wave,) = plan_waves(list_members(config))
    assert len(wave.names) == len(sweeps.STRATEGIES) * len(sweeps.SEEDS)


@pytest.mark.parametrize("whole", [True, False])
def test_gaps_of_bounded_assignments_to_the_optimum(monkeypatch, whole):
    monkeypatch.setattr(bounded, "CASES", 1)
    row = bounded.measure_gaps((12, 4), whole)
    assert row[0] == "12 x 4" and -1e-3 <= float(row[2]) < 10
    monkeypatch.setattr(bounded, "REPETITIONS", 1)
    assert min(bounded.time_case((12, 4), whole)[2:]) > 0


def test_the_waste_of_ragged_clients():
    table = devices.waste_table()
    assert len(table.splitlines()) == 2 + 4
