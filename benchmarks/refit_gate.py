"""A finished run's global accuracy with other gates: is the gate at fault?

    python -m benchmarks.refit_gate FOLDER

FOLDER is a run of a model with one MoE layer, no part of which is personal or frozen;
its server set images aside (`data.public`). Stem, experts and head stay; the gate, or
its biases alone, is fitted to these images.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmoe_jax.api import Run, load_run
from fedmoe_jax.models.one_layer import add_shared, apply_experts, run_shared
from fedmoe_jax.models.routing import gate_logits, pool, route
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array, PyTree

STEPS, RATE, BATCH = 400, 0.02, 500
NEVER = -1e9  # logit of an expert that is not chosen while others are there


class Seen(NamedTuple):
    """Examples behind the stem and every expert.

    Attributes:
      features: [n, D] float, as the gate sees them.
      answers: [n, E, L] float, logits of each expert alone.
      target: [n] int32, classes.
    """

    features: Array
    answers: Array
    target: Array


def see(run: Run, rows: PyTree, target: Array) -> Seen:
    """Passes rows, leaves [n, ...] uint8 or int32, through a run's server model."""
    assert run.plan is not None and run.plan.program.model.parts is not None
    program, params = run.plan.program, run.params
    parts, statistics = run.plan.program.model.parts, run.plan.federation.statistics
    (experts,) = params["experts"].values()

    @jax.jit
    def answer(rows: PyTree) -> tuple[Array, Array]:
        batch = program.task.prepare(rows, statistics)
        features = parts.stem(params["stem"], batch, None)
        outputs = apply_experts(parts, experts, features, None)
        shared = run_shared(parts, params["stem"], features, None)
        return pool(features), parts.head(params["head"], add_shared(outputs, shared))

    take = lambda start: {name: x[start : start + BATCH] for name, x in rows.items()}
    found = [answer(take(start)) for start in range(0, len(target), BATCH)]
    features, answers = (jnp.concatenate(x) for x in zip(*found, strict=True))
    return Seen(features, answers, target)


def mix(logits: Array, answers: Array, num_active: int) -> Array:
    """Class logits [n, L] of the top-A of all experts, from gate logits [n, E]."""
    gates = route(logits, jnp.ones(logits.shape[1], bool), num_active)
    return jnp.einsum("ne,nel->nl", gates, answers)


def measure(gate: PyTree, seen: Seen, num_active: int) -> tuple[float, np.ndarray]:
    """Share of examples classified rightly, and the gate mass [E] of every expert."""
    logits = gate_logits(gate, seen.features)
    right = mix(logits, seen.answers, num_active).argmax(1) == seen.target
    gates = route(logits, jnp.ones(logits.shape[1], bool), num_active)
    return float(right.mean()), np.asarray(gates.mean(0))


def level(gate: PyTree, seen: Seen, held: Array) -> PyTree:
    """The gate with biases that give every expert of `held` [E] the mean logit 0.

    Others are never chosen.
    """
    level = gate["bias"] - gate_logits(gate, seen.features).mean(0)
    return gate | {"bias": jnp.where(held, level, NEVER)}


def fit(gate: PyTree, seen: Seen, parts: tuple[str, ...]) -> PyTree:
    """The gate with some of its `parts` fitted to the examples, by all experts' mix."""
    spread = seen.features.std(0) + 1e-6  # steps alike in every feature

    def build(change: PyTree) -> PyTree:
        scale = {"kernel": spread[None], "bias": 1.0}
        return gate | {name: gate[name] + change[name] / scale[name] for name in parts}

    def loss(change: PyTree) -> Array:
        logits = gate_logits(build(change), seen.features)
        outputs = mix(logits, seen.answers, logits.shape[1])
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, seen.target)
        return losses.mean()

    tx = optax.adam(RATE)
    change = {name: jnp.zeros_like(gate[name]) for name in parts}

    def step(_: int, carry: tuple) -> tuple:
        change, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(change), opt_state)
        return optax.apply_updates(change, updates), opt_state

    return build(jax.lax.fori_loop(0, STEPS, step, (change, tx.init(change)))[0])


def list_gates(run: Run) -> list[tuple[str, PyTree]]:
    """The run's own gate and others, each with its name."""
    assert run.plan is not None and run.state is not None
    data, ids = run.plan.data, np.asarray(run.plan.federation.public)
    rows = {name: x[ids] for name, x in data.train.items()}
    public = see(run, rows, jnp.asarray(data.stratum[ids]))
    (gate,) = run.params["gate"].values()
    gate = jax.tree.map(jnp.asarray, gate)
    return [
        ("as it is", gate),
        ("equal mean logits", level(gate, public, run.state.align.held.any((0, 1)))),
        ("biases fitted", fit(gate, public, ("bias",))),
        ("gate fitted", fit(gate, public, ("kernel", "bias"))),
    ]


def check_run(run: Run) -> None:
    """Raises UserError unless the server has the whole model and images of its own."""
    if run.plan is None or run.state is None:
        raise UserError("run has no checkpoint; allowed: one with a checkpoint")
    program = run.plan.program
    if program.model.parts is None or program.strategy.personal:
        raise UserError(
            f"strategy={run.config.strategy!r}, model.kind={run.config.model.kind!r} "
            "are not allowed; allowed: one MoE layer, nothing of which is personal"
        )
    usual = program.strategy.mix == "outputs" and program.strategy.gating == "chosen"
    if program.strategy.frozen or program.strategy.test_active or not usual:
        raise UserError(
            f"strategy={run.config.strategy!r} is not allowed; allowed: one that "
            "trains all parts and routes as `random` does"
        )
    if not run.config.data.public:
        raise UserError("data.public=0 is not allowed; allowed: images to fit to")


def main(folder: str) -> None:
    run = load_run(folder)
    check_run(run)
    assert run.plan is not None and run.state is not None
    print("clients that hold each expert", *run.state.align.held[:, 0].sum(0))
    test = see(run, run.plan.data.test, jnp.asarray(run.plan.data.test_stratum))
    for name, gate in list_gates(run):
        accuracy, mass = measure(gate, test, run.config.num_active)
        shares = " ".join(f"{share:.2f}" for share in mass)
        print(f"{name:18} {100 * accuracy:.1f} %  gate mass {shares}")


if __name__ == "__main__":
    main(sys.argv[1])
