"""Stages between chunks of rounds, and the parts that they freeze, on disk and back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SMALL,
    assert_same,
    assert_same_results,
    plan_run,
    restart,
    rows_of,
    run_alone,
    stop_at,
)

from configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.strategies.greedy import GREEDY
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train.loop import (
    Job,
    Programs,
    make_rows,
    restore_frozen,
    run_stages,
)

pytestmark = pytest.mark.slow


def make_job(value, *rounds, frozen=("stem",)):
    """A job with stages at these rounds, which add one to the run's own frozen part.

    Its state is the number of stages that have acted.
    """
    mesh = build_mesh(1)
    parts = {"stem": {"kernel": jnp.full(3, value)}, "base": jnp.full(2, value)}
    plan = plan_run()
    federation = replicate(plan.federation.replace(frozen=parts), mesh)

    def act(state, federation, hyper):
        stem = jax.tree.map(lambda leaf: leaf + 1, federation.frozen["stem"])
        return state + 1, federation.frozen | {"stem": stem}

    stages = tuple((when, act) for when in rounds)
    programs = Programs(run_rounds=None, evaluate=None, finetune=None, stages=stages)
    fields = dict(names=["a"], folders=[None], state=0, programs=programs, split=None)
    return Job(inputs=(federation, plan.hyper), frozen=frozen, **fields)


def values(inputs):
    """First numbers of `base` and of `stem`."""
    return [float(leaf[0]) for leaf in jax.tree.leaves(inputs[0].frozen)]


def stages_of(job, folder, done):
    return run_stages(job, folder, done, job.state, job.inputs)


def test_run_stages_acts_at_its_rounds_alone(tmp_path):
    job = make_job(1.0, 0, 4, 4)
    state, inputs = stages_of(job, tmp_path, 2)
    assert state == 0 and inputs is job.inputs and not list(tmp_path.iterdir())
    for done, acted in ((0, 1), (4, 2)):
        state, inputs = stages_of(job, tmp_path, done)
        assert state == acted and values(inputs) == [1.0, 1.0 + acted]
    assert inputs[1] is job.inputs[1]
    steps = {path.name for path in (tmp_path / "frozen").iterdir()}
    assert steps == {"0", "4"}


def test_run_stages_saves_nothing_without_frozen_parts_or_a_folder(tmp_path):
    state, inputs = stages_of(make_job(1.0, 0, frozen=()), tmp_path, 0)
    assert state == 1 and values(inputs) == [1.0, 2.0]
    assert stages_of(make_job(1.0, 0), None, 0)[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_restore_frozen_reads_what_the_runs_have_frozen(tmp_path):
    stages_of(make_job(1.0, 0, 4), tmp_path, 0)
    stages_of(make_job(6.0, 0, 4), tmp_path, 4)
    job = make_job(3.0, 0, 4)
    # Only what the run froze itself is kept; `base` is the model's own.
    assert values(restore_frozen(job, tmp_path, 2)) == [3.0, 2.0]
    # The state that was saved after 4 rounds has not seen the stage of round 4.
    assert values(restore_frozen(job, tmp_path, 4)) == [3.0, 2.0]
    assert values(restore_frozen(job, tmp_path, 6)) == [3.0, 7.0]


def test_restore_frozen_needs_nothing_before_the_first_stage(tmp_path):
    (tmp_path / "2").mkdir()
    for job in (make_job(1.0, 2), make_job(1.0), make_job(1.0, 0, frozen=())):
        assert restore_frozen(job, tmp_path, 2) is job.inputs


def test_restore_frozen_refuses_checkpoints_without_their_frozen_parts(tmp_path):
    (tmp_path / "40").mkdir()
    with pytest.raises(UserError, match="frozen is missing.*start again"):
        restore_frozen(make_job(1.0, 0), tmp_path, 40)
    stages_of(make_job(1.0, 0, 4), tmp_path, 0)
    with pytest.raises(UserError, match="frozen is missing.*start again"):
        restore_frozen(make_job(1.0, 0, 4), tmp_path, 40)


def test_make_rows_numbers_rounds_and_adds_to_the_last():
    metrics = {"train_loss": np.array([3.0, 2.0]), "load": np.arange(4).reshape(2, 2)}
    first, last = make_rows(metrics, 6, {"global_accuracy": 0.5})
    assert (first["round"], last["round"]) == (5, 6)
    assert first.keys() | {"global_accuracy"} == last.keys()
    assert last["train_loss"] == 2.0 and last["load"].tolist() == [2, 3]


TINY = SMALL | {"num_rounds": 6, "checkpoint.every": 2, "run.tensorboard": False}


def shift_stem(state, federation, hyper, key, *, model, task, sizes):
    """Moves the frozen stem and counts itself in the strategy's own state."""
    shift = lambda leaf: leaf + 0.25
    acted = jax.tree.map(lambda leaf: leaf + 1, state.align.strategy)
    frozen = federation.frozen | {
        "stem": jax.tree.map(shift, federation.frozen["stem"])
    }
    return state.replace(align=state.align.replace(strategy=acted)), frozen


def init_count(sizes):
    return {"acted": jnp.zeros(())}


def staged_config(monkeypatch, when, **changes):
    """A run of greedy whose stem is frozen and shifted at this round."""
    own = dict(init=init_count, frozen=("stem",), stages=((when, shift_stem),))
    monkeypatch.setitem(STRATEGIES, "staged", GREEDY._replace(**own))
    config = default.get_config("smoke")
    config.update_from_flattened_dict(TINY | {"strategy": "staged"} | changes)
    return config


def newest(config, folder):
    """The newest state on disk, its round, and how far its stem was shifted."""
    job = restart(config)
    state, done = checkpoint.read_latest(folder / "checkpoints", job.state)[:2]
    inputs = restore_frozen(job, folder / "checkpoints", done)
    kernel = lambda inputs: inputs[0].frozen["stem"]["Dense_0"]["kernel"]
    return state, done, float((kernel(inputs) - kernel(job.inputs)).mean())


def acted(state):
    """The number of times that the stage has acted, in a run with one layer."""
    return int(state.align.strategy["acted"][0, 0])


def test_drive_runs_a_stage_once_between_chunks(tmp_path, monkeypatch):
    config = staged_config(monkeypatch, "fedmoe.period", **{"fedmoe.period": 2})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_alone(config, whole)
    expected, done, shift = newest(config, whole)
    assert (done, acted(expected)) == (6, 1) and shift == pytest.approx(0.25)
    # Stopped exactly there, the run is saved before its stage.
    assert not run_alone(config, parts, stop_at(parts, 2))
    state, done, shift = newest(config, parts)
    assert (done, acted(state), shift) == (2, 0, 0)
    assert not run_alone(config, parts, stop_at(parts, 4))
    state, done, shift = newest(config, parts)
    assert (done, acted(state)) == (4, 1) and shift == pytest.approx(0.25)
    assert run_alone(config, parts)
    assert_same(newest(config, parts)[0], expected)
    assert_same_results(parts, whole)
    assert [row["acted"] for row in rows_of(whole)] == [0, 0, 1, 1, 1, 1]


def test_drive_is_refused_a_stage_within_a_chunk(tmp_path, monkeypatch):
    config = staged_config(monkeypatch, 3, chunk_rounds=2)
    with pytest.raises(UserError) as caught:
        run_alone(config, tmp_path / "run")
    assert str(caught.value) == (
        "strategy='staged' has a stage at round 3, which is not allowed; allowed: "
        "multiples of chunk_rounds=2, 0 to num_rounds=6"
    )
    assert list(tmp_path.iterdir()) == []


def test_drive_resumes_with_the_stem_that_the_run_began_with(tmp_path):
    def run(name, rounds):
        config = default.get_config("smoke")
        own = {"strategy": "fedjets", "data.public": 50, "num_rounds": rounds}
        config.update_from_flattened_dict(TINY | own)
        assert run_alone(config, tmp_path / name)
        return rows_of(tmp_path / name)

    run("resumed", 2)
    assert run("resumed", 4) == run("whole", 4)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "frozen")
    with pytest.raises(UserError) as caught:
        run("resumed", 6)
    folder = tmp_path / "resumed" / "checkpoints"
    assert str(caught.value) == (
        f"{folder / 'frozen'} is missing, which the checkpoints beside it need; remove "
        f"{folder} to start again from round 0"
    )
