"""The server's decision for whole populations, against NumPy and one pass of memory.

    python -m benchmarks.alignment

Timed is what `load_balanced` does without exploration: normalise the fitness, subtract
the usage, take the best experts under each capacity, count the load that every expert
can expect and update the usage. Clients are shared out over the cores. One reading of
the fitness matrix is the limit for a program that keeps it in memory.
"""

import functools
import os
import statistics
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import page
from benchmarks.start import make_config, make_images, share_out, time_interleaved
from fedmoe_jax.align.learn import count_load
from fedmoe_jax.align.top_k import expected_load, running_top_k
from fedmoe_jax.align.usage import update_usage
from fedmoe_jax.federation import make_federation
from fedmoe_jax.options import replace
from fedmoe_jax.program import build_program, make_hyper
from fedmoe_jax.runtime.sharding import CLIENTS, build_mesh, spread
from fedmoe_jax.state import init_state
from fedmoe_jax.strategies.load_balanced import assign
from fedmoe_jax.types import Assignment, Evidence, Feedback, Hyper, Sizes

CASES = [(1_000_000, 64, 4), (1_000_000, 64, 8), (100_000, 256, 4), (100_000, 256, 8)]
PICKS = (100_000, 64, 4)
REPEATS = 5
CHECKED = 20_000  # rows compared with a stable sort
NUM_ACTIVE, NUMPY_BLOCK = 2, 2_048
WEIGHT, DECAY = 0.5, 0.9


def weigh_alike() -> Hyper:
    """Hyperparameters without exploration, fitness and usage weighed alike."""
    return replace(
        make_hyper(make_config()),
        weights={"fitness": np.float32(WEIGHT), "usage": np.float32(WEIGHT)},
        usage={"decay": np.float32(DECAY)},
        fitness={"exploration": np.float32(0)},
    )


def make_host(num_clients: int, num_experts: int, max_held: int) -> dict:
    """Fitness [N, E], usage [E], capacity [N] and load [N], in NumPy."""
    rng = np.random.default_rng(0)
    return {
        "fitness": rng.random((num_clients, num_experts), np.float32),
        "usage": rng.random(num_experts, np.float32),
        "capacity": rng.integers(1, max_held + 1, num_clients, np.int32),
        "load": np.full(num_clients, 64, np.float32),
    }


def decide(host: dict, hyper: Hyper, max_held: int) -> tuple[Assignment, jax.Array]:
    """One device's clients; the usage [E] is joined over the devices."""
    clients = jnp.arange(host["load"].shape[0])
    evidence = Evidence(
        round=jnp.int32(0),
        client=clients,
        size=jnp.ones_like(clients),
        held=jnp.zeros_like(host["fitness"], bool),
        times_held=jnp.zeros_like(host["fitness"], jnp.int32),
        **host,
    )
    sizes = Sizes(*[1] * len(Sizes._fields))._replace(max_held=max_held)
    assignment = assign(evidence, hyper, sizes, jax.random.key(0))
    share = expected_load(evidence.load, assignment.slot.sum(axis=1), NUM_ACTIVE)
    share = jnp.broadcast_to(share[:, None], assignment.slot.shape)
    feedback, arrived = Feedback(*[share] * 6), jnp.ones(len(share), bool)
    load = count_load(feedback, arrived, assignment, evidence.usage.shape[0])
    load = jax.lax.psum(load, CLIENTS)
    return assignment, update_usage(evidence.usage, load, hyper.usage.decay)


def decide_numpy(host: dict, max_held: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for a block of rows: experts [rows, K], best first, and load [E]."""
    fitness, usage = host["fitness"], host["usage"]
    low = fitness.min(axis=1, keepdims=True)
    span = fitness.max(axis=1, keepdims=True) - low
    score = low - fitness  # negative, because argpartition looks for the smallest
    score /= np.where(span > 0, span, 1)
    score *= np.float32(WEIGHT)
    score += np.float32(WEIGHT) * (usage / usage.max())
    best = np.argpartition(score, max_held - 1, axis=1)[:, :max_held]
    order = np.argsort(np.take_along_axis(score, best, axis=1), axis=1)
    held = np.take_along_axis(best, order, axis=1)
    capacity = host["capacity"]
    slot = np.arange(max_held) < capacity[:, None]
    share = host["load"] * np.minimum(NUM_ACTIVE, capacity) / capacity
    weight = np.broadcast_to(share[:, None], slot.shape)[slot]
    return held, np.bincount(held[slot], weight, usage.shape[0])


def numpy_in_blocks(
    host: dict, max_held: int, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    """`decide_numpy` on blocks that fit the cache, with all cores."""

    def block(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(start, start + NUMPY_BLOCK)
        taken = {k: v if k == "usage" else v[rows] for k, v in host.items()}
        return decide_numpy(taken, max_held)

    starts = range(0, len(host["fitness"]), NUMPY_BLOCK)
    held, load = zip(*pool.map(block, starts), strict=True)
    return np.concatenate(held), DECAY * host["usage"] + sum(load)


def measure(forms: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of each form, all forms in turn; the first turn warms up."""
    seconds = time_interleaved(forms, REPEATS + 1)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def numpy_peak(form: Callable) -> int:
    """Bytes that NumPy allocates at most while `form` runs."""
    tracemalloc.start()
    form()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def check(host: dict, max_held: int, held: jax.Array) -> None:
    """Compares the first rows with a stable sort; ties go to the lowest id."""
    fitness, usage = host["fitness"][:CHECKED], host["usage"]
    low, high = fitness.min(1, keepdims=True), fitness.max(1, keepdims=True)
    weight = np.float32(WEIGHT)
    score = weight * ((fitness - low) / (high - low)) - weight * (usage / usage.max())
    oracle = np.argsort(-score, axis=1, kind="stable")[:, :max_held]
    np.testing.assert_array_equal(np.asarray(held[:CHECKED]), oracle)


def run_case(case: tuple[int, int, int], pool: ThreadPoolExecutor) -> tuple:
    """One row of the table."""
    host, max_held, mesh = make_host(*case), case[2], build_mesh(0)
    specs = {name: P(CLIENTS) for name in host} | {"usage": P()}
    placed = {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in host.items()
    }
    one_device = functools.partial(decide, hyper=weigh_alike(), max_held=max_held)
    share = spread(one_device, mesh, (specs,), (P(CLIENTS), P()))
    program = jax.jit(share).lower(placed).compile()
    read = jax.jit(spread(lambda x: x.sum()[None], mesh, P(CLIENTS), P(CLIENTS)))
    check(host, max_held, program(placed)[0].held)
    forms = {
        "read": lambda: read(placed["fitness"]),
        "jax": lambda: program(placed),
        "numpy": lambda: decide_numpy(host, max_held),
        "blocks": lambda: numpy_in_blocks(host, max_held, pool),
    }
    seconds = measure(forms)
    memory = program.memory_analysis()
    assert memory is not None
    scratch = mesh.size * memory.temp_size_in_bytes / 1e6
    return (
        "{:,} x {}, K = {}".format(*case),
        seconds["numpy"] / seconds["jax"],
        seconds["blocks"] / seconds["jax"],
        seconds["jax"] / seconds["read"],
        *(1e3 * seconds[name] for name in ("jax", "read", "numpy", "blocks")),
        scratch,
        numpy_peak(forms["numpy"]) / 1e6,
    )


def seconds_per_pick() -> float:
    """Of the solver whose every pick is seen by the next, on one device."""
    count, num_experts, max_held = PICKS
    host = make_host(*PICKS)
    solve = functools.partial(running_top_k, max_held=max_held, num_active=NUM_ACTIVE)
    args = {
        "scores": host["fitness"],
        "usage": host["usage"],
        "usage_weight": np.full(count, WEIGHT, np.float32),
        "load": host["load"],
        "capacity": host["capacity"],
        "order": np.arange(count, dtype=np.int32),
        "lots": np.random.default_rng(0).random((count, num_experts), np.float32),
    }
    program, args = jax.jit(solve), jax.device_put(args)
    return measure({"pick": lambda: program(**args)})["pick"] / count


def state_bytes(num_clients: int, num_experts: int) -> int:
    """Bytes of the alignment state that a run starts with; nothing is allocated."""
    config = make_config(num_clients=num_clients, num_experts=num_experts)
    data = make_images(10, (8, 8, 1), 10)
    # Of one client, as nothing of the clients' data counts here.
    federation = make_federation(
        make_config(num_clients=1), data, share_out(1, 10, 10, 10)
    )
    program = build_program(config, data, federation, build_mesh(1))
    start = functools.partial(init_state, program=program)
    state, _ = jax.eval_shape(start, jax.random.key(0), make_hyper(config))
    leaves = jax.tree.leaves(state.align)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


HEADER = (
    "clients x experts",
    "NumPy / ours",
    "NumPy in blocks on all cores / ours",
    "ours / one pass",
    "ours ms",
    "one pass ms",
    "NumPy ms",
    "NumPy in blocks ms",
    "scratch ours MB",
    "peak NumPy MB",
)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [run_case(case, pool) for case in CASES]
    body = (
        f"{page.table(HEADER, rows)}\n\n"
        f"Medians of {REPEATS} interleaved repetitions. The first {CHECKED:,} rows of "
        "each case equal a stable sort in NumPy. One pass is a sum over the fitness "
        "matrix with all cores. Scratch is what the program allocates beside its "
        "arguments and results. Clients are shared out over the cores here; in a run "
        "every device decides for the whole cohort.\n\n"
        f"Each pick seen by the next (`running_top_k`, {PICKS[0]:,} x {PICKS[1]}, "
        f"K = {PICKS[2]}, one core): {1e6 * seconds_per_pick():.2f} us a pick.\n\n"
        "Alignment state of 1,000,000 clients and 64 experts: "
        f"{state_bytes(1_000_000, 64) / 1e6:,.0f} MB."
    )
    print(body)
    page.write_section(
        "alignment",
        "The decision for whole populations",
        "python -m benchmarks.alignment",
        body,
    )


if __name__ == "__main__":
    main()
