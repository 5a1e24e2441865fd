"""A transformer's blocks as one loop (`model.scan`) against one by one.

python -m benchmarks.blocks

Whole rounds on the embedded Markov languages, on one device. Seconds to compile are
those of the processor, over all threads, so that other jobs count little.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks import page
from benchmarks.start import make_config, time_interleaved
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.federation import make_federation, make_partition
from fedmoe_jax.program import build_program, make_hyper
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.runtime.xla import set_cpu_devices
from fedmoe_jax.state import init_state

BLOCKS, REPETITIONS = (2, 8, 16), 5
FIELDS = {
    "data.name": "markov",
    "partition.kind": "iid",
    "model.kind": "transformer",
    "num_clients": 4,
    "cohort_size": 4,
    "num_experts": 8,
    "max_held": 4,
    "local_steps": 2,
    "batch_size": 16,
    "chunk_rounds": 1,
}


class Compiled(NamedTuple):
    """Rounds ready to be timed, and the processor's seconds until then."""

    call: Callable[[], object]
    trace_seconds: float
    compile_seconds: float


def compile_rounds(blocks: int, scan: bool) -> Compiled:
    """One round of a transformer with so many blocks, each call from the same state."""
    config = make_config(**FIELDS | {"model.blocks": blocks, "model.scan": scan})
    data, mesh = load_dataset(config.data), build_mesh(1)
    federation = make_federation(config, data, make_partition(config, data))
    program = build_program(config, data, federation, mesh)
    hyper = make_hyper(config)
    state, frozen = init_state(jax.random.key(0), hyper, program)
    run = replicate((state, federation.replace(frozen=frozen), hyper), mesh)
    begin = time.process_time()
    lowered = jax.jit(build_run_rounds(program)).lower(*run)
    traced = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - traced
    return Compiled(lambda: compiled(*run), traced - begin, seconds)


def main() -> None:
    set_cpu_devices(1)
    rows, steps = [], []
    for blocks in BLOCKS:
        both = {scan: compile_rounds(blocks, scan) for scan in (False, True)}
        calls = {str(scan): each.call for scan, each in both.items()}
        time_interleaved(calls, 1)
        seconds = time_interleaved(calls, REPETITIONS)
        steps.append(min(seconds["True"]) / min(seconds["False"]))
        total = [each.trace_seconds + each.compile_seconds for each in both.values()]
        rows.append((blocks, *total, total[1] / total[0], steps[-1]))
    most, saved = BLOCKS[-1], rows[-1][3]
    body = "\n\n".join(
        [
            f"With {most} blocks the rounds of a loop compile in **{saved:.2f}** times "
            f"the time of blocks one by one, and a round takes **{steps[-1]:.2f}** "
            "times as long. Params stay one subtree a block, and every one is stacked "
            "for the loop, averaged and moved by itself: what grows with depth is left "
            "of those.",
            page.table(
                (
                    "blocks",
                    "processor's seconds to trace and compile, one by one",
                    "as a loop",
                    "ratio",
                    "a round, loop / one by one",
                ),
                rows,
            ),
            f"Rounds are the shortest of {REPETITIONS}, in turn.",
        ]
    )
    print(body)
    command = "python -m benchmarks.blocks"
    page.write_section("blocks", "A transformer's blocks as a loop", command, body)


if __name__ == "__main__":
    main()
