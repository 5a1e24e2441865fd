"""Tiny runs for the tests of whole rounds: sizes, a model, what tells states apart."""

import functools
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from fedmoe_jax.broadcast import broadcast
from fedmoe_jax.client import ClientUpdate, build_client_update
from fedmoe_jax.models.image_moe import Model
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.train import run as train
from fedmoe_jax.types import Federation, Hyper, SimState
from fedmoe_jax.world import PROCESSES
from fedmoe_jax.world.step import observe

N, C, E, K, A, T, B, R = 10, 4, 4, 2, 2, 2, 4, 2
NO_CLASS = 999
TINY = {
    "data.name": "synthetic",
    "partition.kind": "iid",
    "num_clients": N,
    "cohort_size": C,
    "num_experts": E,
    "max_held": K,
    "num_active": A,
    "local_steps": T,
    "batch_size": B,
    "chunk_rounds": R,
    "model.stem_width": 8,
    "model.expert_width": 4,
    "model.feature_width": 4,
    "devices.model_scale": 1e5,  # some clients can hold one expert, some two
    "data.public": 8,
    "fedjets.steps": 2,
    "run.num_devices": 1,
}

# Whole runs on the digits.
SMALL = {
    "num_rounds": 4,
    "eval_every": 2,
    "chunk_rounds": 1,
    "num_clients": 4,
    "cohort_size": 3,
    "num_experts": 3,
    "max_held": 2,
    "local_steps": 2,
    "batch_size": 4,
    "partition.alpha": 1.0,
    "model.stem_width": 4,
    "model.expert_width": 4,
    "model.feature_width": 4,
    "checkpoint.every": 2,
    "run.num_devices": 1,
}

# A world in which everything happens.
STORM = {
    "devices.overload": "lose",
    "devices.free_memory": 0.1,
    "devices.deadline": 600.0,
    "late.kind": "stale",
    "profile.kind": "estimated",
    "pressure.share": 0.3,
    "background.most": 0.5,
    "bandwidth.spread": 0.5,
    "availability.share": 0.8,
    "availability.persistence": 0.5,
    "availability.swing": 0.2,
    "availability.dropout": 0.2,
    "channel.kind": "wireless",
    "channel.csi": 0.9,
    "channel.backoff": 0.7,
    "drift.labels": 0.5,
    "drift.images": "rotate",
    "drift.start": 0,
    "drift.rounds": 2,
    "reaction.kind": "hasten",
}

# Compiles as without the flags of conftest, under which sums may be rounded otherwise.
USERS_OPTIONS = {"xla_backend_optimization_level": 3}
if version("jaxlib").startswith("0.10."):
    USERS_OPTIONS["xla_cpu_use_fusion_emitters"] = True


def tiny_config(**changes):
    config = default.get_config("smoke")
    config.update_from_flattened_dict(TINY | changes)
    return config


def breakable(*args):
    """The real client update, all NaN where the client's labels are no classes."""
    update = build_client_update(*args)

    def client_update(params, inputs, federation, hyper, key):
        result = update(params, inputs, federation, hyper, key)
        broken = federation.y[federation.index[inputs.client, 0]] >= NO_CLASS
        spoil = lambda leaf: jnp.where(broken, jnp.nan, leaf)
        numbers = (result.delta, result.feedback, result.loss, result.accuracy)
        delta, feedback, loss, accuracy = jax.tree.map(spoil, numbers)
        return ClientUpdate(delta, feedback, loss, accuracy, result.finite & ~broken)

    return client_update


class Parts(NamedTuple):
    """A run on the devices, before its first round."""

    program: Program
    state: SimState
    federation: Federation
    hyper: Hyper


def choose(*names):
    """These processes of the world, in the order of the table."""
    return tuple(row for row in PROCESSES.items() if row[0] in names)


def plan_run(**changes):
    config = tiny_config(**changes)
    return train.plan_run(config, build_mesh(config.run.num_devices))


def send_inputs(parts, state, evidence, assignment):
    """The inputs of a cohort in a world without events."""
    view = observe({}, parts.federation, parts.hyper, ())
    return broadcast(state, view, evidence, assignment, parts.program)


def assert_same(left, right, atol=0.0, rtol=0.0):
    """Equal leaves, keys by their data; bitwise unless a tolerance is given."""
    data = lambda leaf: (
        jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(data(a), data(b), rtol=rtol, atol=atol),
        left,
        right,
    )


def all_finite(tree):
    leaves = jax.tree.leaves(tree)
    numbers = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(bool(jnp.isfinite(x).all()) for x in numbers)


@functools.cache
def make_linear_model(num_experts):
    """Linear stem, experts and head: the least model in which every part learns."""
    product = lambda params, x, key=None: x @ params["kernel"]

    def init(key):
        stem, gate, expert, head = jax.random.split(key, 4)
        gates = {
            "kernel": 0.1 * jax.random.normal(gate, (num_experts, 4)),
            "bias": jnp.zeros(num_experts),
        }
        return {
            "stem": {"kernel": jax.random.normal(stem, (64, 4)) / 8},
            "gate": gates,
            "experts": {"kernel": jax.random.normal(expert, (num_experts, 4, 4)) / 2},
            "head": {"kernel": jax.random.normal(head, (4, 16)) / 2},
        }

    return Model(
        init=init,
        stem=lambda params, x, key: product(params, x.reshape(x.shape[0], -1)),
        expert=product,
        head=product,
    )


def stems(one, other):
    """Pairs of leaves of two states' stems."""
    leaves = [jax.tree.leaves(state.params["stem"]) for state in (one, other)]
    return zip(*leaves, strict=True)
