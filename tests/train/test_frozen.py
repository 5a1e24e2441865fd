"""Frozen parts are saved once, read back, and missed where they are gone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.train import run
from fedmoe_jax.train.loop import Job, settle_frozen


def make_job(value):
    config = default.get_config("smoke")
    plan = run.plan_run(config, build_mesh(1))
    frozen = {"stem": {"kernel": jnp.full(3, value)}, "base": jnp.full(2, value)}
    federation = replicate(plan.federation.replace(frozen=frozen), build_mesh(1))
    parts = dict(names=["a"], folders=[], state=None, inputs=(federation, plan.hyper))
    return Job(**parts, frozen=("stem",), run_rounds=None, evaluate=None, split=None)


def values(job):
    federation, _ = job.inputs
    return [float(leaf[0]) for leaf in jax.tree.leaves(federation.frozen)]


def test_what_a_run_has_frozen_is_read_back(tmp_path):
    assert values(settle_frozen(make_job(1.0), tmp_path)) == [1.0, 1.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen"]
    # Only what the run froze itself is kept; `base` is the model's own.
    assert values(settle_frozen(make_job(2.0), tmp_path)) == [2.0, 1.0]


def test_checkpoints_without_their_frozen_parts_are_refused(tmp_path):
    (tmp_path / "40").mkdir()
    with pytest.raises(UserError, match="frozen is missing.*start again"):
        settle_frozen(make_job(1.0), tmp_path)
    nothing = make_job(1.0)._replace(frozen=())
    assert settle_frozen(nothing, tmp_path) is nothing


def test_a_resumed_run_has_the_stem_that_it_began_with(tmp_path):
    def train(folder, rounds):
        config = default.get_config("smoke")
        config.strategy, config.data.public = "fedjets", 50
        config.num_rounds, config.checkpoint.every = rounds, 2
        config.run.num_devices, config.run.tensorboard = 1, False
        stop = lambda: False
        assert run.train(config, folder, stop=stop, label="x", profile=False)
        with np.load(folder / "final.npz") as arrays:
            return arrays["fitness"], arrays["specialisation"]

    train(tmp_path / "resumed", 2)
    resumed = train(tmp_path / "resumed", 4)
    whole = train(tmp_path / "whole", 4)
    for one, other in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(one, other)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "frozen")
    with pytest.raises(UserError, match="frozen is missing"):
        train(tmp_path / "resumed", 6)
