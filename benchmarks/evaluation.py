"""The time of evaluation beside that of training, where the population is large.

    python -m benchmarks.evaluation

Evaluation after every second round of 100 clients. Clients hold what the strategy gave
them in the rounds before, or sets drawn at random where they never took part.
"""

import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import page
from benchmarks.start import (
    Started,
    keep_running,
    make_config,
    make_images,
    share_out,
    start,
    time_interleaved,
)
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import replicate
from fedmoe_jax.runtime.xla import count_cores, keep_host, set_cpu_devices
from fedmoe_jax.types import SimState

REPETITIONS = 3
FIELDS = {"cohort_size": 100, "chunk_rounds": 2, "eval_every": 2}
# The network and the local steps of the CIFAR-10 study.
CNN = {
    "model.stem": "cnn",
    "model.stem_width": 32,
    "model.expert_width": 128,
    "client.learning_rate": 0.01,
    "local_steps": 30,
}
DIGITS, CIFAR10 = (8, 8, 1), (32, 32, 3)
TESTS = {DIGITS: 360, CIFAR10: 10_000}  # as many test images as the data sets have
GATES = "personal gates"
CASES = {
    "digits, shared gate, N = 10,000": (DIGITS, 10_000, {}),
    "digits, shared gate, N = 100,000": (DIGITS, 100_000, {}),
    f"digits, {GATES}, N = 10,000": (DIGITS, 10_000, {"gate.mode": "personal"}),
    "CIFAR-10, shared gate, N = 10,000": (CIFAR10, 10_000, CNN),
    f"CIFAR-10, {GATES}, N = 10,000": (
        CIFAR10,
        10_000,
        CNN | {"gate.mode": "personal"},
    ),
}


def start_with(shape: tuple[int, int, int], clients: int, changes: dict) -> Started:
    """The default study on noise of this shape, with as many test images as there."""
    data = make_images(20_000, shape, 10)
    rows = jnp.arange(TESTS[shape]) % len(data.test_stratum)
    test = {name: leaf[rows] for name, leaf in data.test.items()}
    data = data._replace(test=test, test_stratum=data.test_stratum[rows])
    partition = share_out(clients, 20, 20_000, 10)
    config = make_config(**FIELDS, **changes, num_clients=clients)
    return start(config, data, partition, count_cores())


def spread_sets(state: SimState, program: Program) -> SimState:
    """The state as if every client had taken part with K experts drawn at random."""
    sizes = program.sizes
    shape = state.align.held.shape
    drawn = jax.random.uniform(jax.random.key(0), shape).argsort(axis=2)
    rounds = jnp.ones_like(state.participation.rounds)
    return state.replace(
        align=state.align.replace(held=drawn < sizes.max_held),
        participation=state.participation.replace(rounds=rounds),
    )


def evaluation(started: Started) -> Callable[[], dict]:
    """A call that evaluates a population of which every client has taken part."""
    state = jax.tree.map(lambda leaf: leaf.copy(), started.state)
    state = replicate(spread_sets(state, started.program), started.program.mesh)
    evaluate = build_evaluate(started.program)
    return functools.partial(evaluate, state, started.federation, started.hyper)


def time_case(
    shape: tuple[int, int, int], clients: int, changes: dict
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of two rounds, of an evaluation, and its share of both together."""
    started = start_with(shape, clients, changes)
    evaluate = evaluation(started)
    calls = {"rounds": keep_running(started), "evaluation": evaluate}
    time_interleaved(calls, 1)
    seconds = time_interleaved(calls, REPETITIONS)
    pairs = zip(seconds["rounds"], seconds["evaluation"], strict=True)
    shares = [evaluated / (trained + evaluated) for trained, evaluated in pairs]
    return seconds["rounds"], seconds["evaluation"], shares


def main() -> None:
    set_cpu_devices(0)
    keep_host()
    timed = {name: time_case(*case) for name, case in CASES.items()}
    share = lambda name: 100 * statistics.median(timed[name][2])
    rows = [
        (name, *map(page.spread, (trained, evaluated, shares)))
        for name, (trained, evaluated, shares) in timed.items()
    ]
    heads = ("study", "seconds of two rounds", "seconds of an evaluation", "its share")
    cases = list(CASES)
    body = "\n\n".join(
        [
            "Two rounds of 100 clients, then an evaluation, as `eval_every=2` has it. "
            f"Of 10,000 clients evaluation takes **{share(cases[0]):.1f}** % of the "
            f"time on images of the size of digits and **{share(cases[3]):.1f}** % on "
            "those of CIFAR-10: clients that hold the same experts are scored once. "
            f"With {GATES} at most `evaluation.clients` (1,000) of them are scored, "
            f"**{share(cases[2]):.1f}** % and **{share(cases[4]):.1f}** %.",
            page.table(heads, rows),
        ]
    )
    print(body)
    page.write_section(
        "evaluation", "Evaluation", "python -m benchmarks.evaluation", body
    )


if __name__ == "__main__":
    main()
