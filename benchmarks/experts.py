"""The cost of E: rounds and evaluation with 64 experts against 8, all else equal.

python -m benchmarks.experts
"""

import functools
import statistics

import jax

from benchmarks import page
from benchmarks.start import (
    keep_running,
    make_config,
    make_images,
    share_out,
    start,
    time_interleaved,
)
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.runtime.xla import count_cores, set_cpu_devices

CLIENTS, CLASSES, REPETITIONS = 20, 10, 9
FIELDS = {
    "chunk_rounds": 1,
    "eval_every": 1,
    "local_steps": 30,
    "model.stem": "cnn",
    "model.stem_width": 32,
    "model.expert_width": 128,
    "client.learning_rate": 0.01,
}


def start_with(num_experts: int, devices: int):
    """The CIFAR-10 study's model on noise; each client has four of the classes."""
    config = make_config(num_experts=num_experts, **FIELDS)
    data = make_images(10_000, (32, 32, 3), CLASSES)
    partition = share_out(CLIENTS, 500, 10_000, CLASSES)
    own = [[(c + k) % CLASSES for k in range(4)] for c in range(CLIENTS)]
    partition.label_counts[:] = 0
    for client, labels in enumerate(own):
        partition.label_counts[client, labels] = 1
    return start(config, data, partition, devices)


def evaluation(started, every_expert: bool):
    """A call that evaluates the state after one round."""
    program = started.program
    strategy = program.strategy._replace(every_expert=every_expert)
    evaluate = build_evaluate(program._replace(strategy=strategy))
    state = jax.tree.map(lambda leaf: leaf.copy(), started.state)
    state, _ = started.run_rounds(state, started.federation, started.hyper)
    call = functools.partial(evaluate, state, started.federation, started.hyper)
    jax.block_until_ready(call())
    return call


def main() -> None:
    set_cpu_devices(0)
    runs = {num: start_with(num, count_cores()) for num in (8, 64)}
    evaluations = {
        f"{num} experts, {name}": evaluation(runs[num], every)
        for num in runs
        for name, every in (("every expert", True), ("dispatched", False))
    }
    rounds = {f"{num} experts": keep_running(run) for num, run in runs.items()}
    time_interleaved(rounds, 2)
    seconds = time_interleaved(rounds, REPETITIONS)
    scratch = {
        f"{num} experts": count_cores()
        * run.run_rounds.memory_analysis().temp_size_in_bytes
        / 1e6
        for num, run in runs.items()
    }
    evaluated = time_interleaved(evaluations, REPETITIONS)
    middle = {name: statistics.median(v) for name, v in (seconds | evaluated).items()}
    ratio = middle["64 experts"] / middle["8 experts"]
    held = runs[8].program.costs
    sent = (held.shared_bytes + 4 * held.expert_bytes) / 1e6
    dense, sorted_out = (
        middle[f"64 experts, {name}"] for name in ("every expert", "dispatched")
    )
    body = "\n\n".join(
        [
            f"A round with 64 experts takes **{ratio:.2f}** times as long as with 8: "
            "a client trains its K = 4 slots, of which A = 2 answer each example. "
            f"What a client holds ({sent:.1f} MB without the gate) does not depend on "
            "E; what grows is the server's model, its running sums and the gate.",
            page.table(
                ("rounds", "seconds a round", "scratch MB, all devices"),
                [(name, page.spread(seconds[name]), scratch[name]) for name in rounds],
            ),
            f"Evaluation at E = 64 that computes only the experts that some gate "
            f"chooses is **{dense / sorted_out:.2f}** times as fast as computing "
            "all of them (beyond `evaluation.dense_experts`, 16 by default); it "
            "then leaves out the soft mixture and each expert's own accuracy.",
            page.table(
                ("evaluation of 2,000 images for 20 clients", "seconds"),
                [(name, page.spread(values)) for name, values in evaluated.items()],
            ),
        ]
    )
    print(body)
    page.write_section("experts", "Experts", "python -m benchmarks.experts", body)


if __name__ == "__main__":
    main()
