"""Assignment under load bounds inside the compiled round, against SciPy's HiGHS.

    python -m benchmarks.bounded

Gaps come from random cases of 30 x 8 to 1000 x 64 clients x experts. Where a slot
counts as one, the linear program is integral and the gap is to its optimum. Where it
counts as the client's examples, the gap is to the linear program's bound, which no
whole assignment need reach; up to 60 clients also to the best whole assignment (to one
in a thousand, within 10 seconds a case).
"""

import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, linprog, milp

from benchmarks import page
from fedmoe_jax.align.bounded import bounded_top_k, violation
from fedmoe_jax.align.prices import Bounds, sum_load

SHAPES = ((30, 8), (60, 8), (100, 16), (300, 32), (1000, 64))
CASES = 20  # of each shape and kind of load: 200 in all
TIMED = ((1000, 64), (20_000, 64))
REPETITIONS = 3
WHOLE_LIMIT, SECONDS = 60, 10.0
MAX_HELD, LOW, HIGH = 4, 0.8, 1.2

solve = jax.jit(bounded_top_k, static_argnames=("max_held", "whole"))


def make_case(seed: int, shape: tuple[int, int], whole: bool) -> tuple:
    """Scores with popular experts, capacities of 1 to 4, bounds about the mean load."""
    clients, experts = shape
    rng = np.random.default_rng([seed, clients, whole])
    scores = rng.random(shape) + rng.random(experts)
    capacity = rng.integers(1, MAX_HELD + 1, clients).astype(np.int32)
    weight = np.ones(clients) if whole else rng.integers(20, 400, clients)
    mean = (weight * capacity).sum() / experts
    low, high = LOW * mean, HIGH * mean
    if whole:
        low, high = np.floor(low), np.ceil(high)
    every = np.ones(experts, np.float32)
    weight, low, high = np.float32(weight), np.float32(low), np.float32(high)
    fields: dict[str, Any] = dict(weight=weight, low=low * every, high=high * every)
    bounds = Bounds(**fields)
    return np.float32(scores), capacity, bounds


def rows_of(scores: np.ndarray, bounds: Bounds) -> tuple:
    """Matrices of capacities and loads over the flattened unknowns [C * E]."""
    clients, experts = scores.shape
    capacities = sparse.kron(sparse.eye(clients), np.ones((1, experts))).tocsr()
    return capacities, sparse.kron(bounds.weight[None], sparse.eye(experts)).tocsr()


def linear_program(scores: np.ndarray, capacity: np.ndarray, bounds: Bounds) -> float:
    """HiGHS: the largest total of the linear program."""
    capacities, loads = rows_of(scores, bounds)
    found = linprog(
        -scores.ravel(),
        A_ub=sparse.vstack([loads, -loads]),
        b_ub=np.concatenate([bounds.high, -bounds.low]),
        A_eq=capacities,
        b_eq=capacity,
        bounds=(0, 1),
        method="highs",
    )
    return -found.fun


def whole_program(scores: np.ndarray, capacity: np.ndarray, bounds: Bounds) -> float:
    """HiGHS: the largest total of whole assignments that it finds in time."""
    capacities, loads = rows_of(scores, bounds)
    found = milp(
        -scores.ravel(),
        constraints=[
            LinearConstraint(capacities, capacity, capacity),
            LinearConstraint(loads, bounds.low, bounds.high),
        ],
        integrality=np.ones(scores.size),
        bounds=Box(0, 1),
        options={"mip_rel_gap": 1e-3, "time_limit": SECONDS},
    )
    return -found.fun if found.x is not None else float("nan")


def measure_gaps(shape: tuple[int, int], whole: bool) -> tuple:
    """One row: gaps in percent, and the worst share by which a bound is missed."""
    gaps, whole_gaps, missed = [], [], []
    for seed in range(CASES):
        scores, capacity, bounds = case = make_case(seed, shape, whole)
        found = jax.device_get(solve(*case, max_held=MAX_HELD, whole=whole))
        taken = np.take_along_axis(scores.astype(float), found.held, axis=1)
        total = taken[found.slot].sum()
        assert (found.slot.sum(1) == capacity).all()
        best = linear_program(*case)
        gaps.append(100 * (best - total) / best)
        if not whole and shape[0] <= WHOLE_LIMIT:
            best = whole_program(*case)
            whole_gaps.append(100 * (best - total) / best)
        load = sum_load(found, jnp.asarray(bounds.weight), shape[1])
        share = violation(load, bounds).sum() / load.sum()
        missed.append(float(share))
    near = f"{median(whole_gaps):.3f}, {max(whole_gaps):.3f}" if whole_gaps else ""
    return (
        "{:,} x {}".format(*shape),
        "slots" if whole else "examples",
        f"{median(gaps):.3f}",
        f"{max(gaps):.3f}",
        near,
        max(missed),
    )


def time_case(shape: tuple[int, int], whole: bool) -> tuple:
    """One row: seconds of HiGHS and ours in turn, medians."""
    seconds = {"highs": [], "ours": []}
    for seed in range(REPETITIONS):
        case = make_case(seed, shape, whole)
        placed = jax.device_put(case)
        jax.block_until_ready(solve(*placed, max_held=MAX_HELD, whole=whole))
        begin = time.perf_counter()
        jax.block_until_ready(solve(*placed, max_held=MAX_HELD, whole=whole))
        seconds["ours"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        linear_program(*case)
        seconds["highs"].append(time.perf_counter() - begin)
    ours, highs = median(seconds["ours"]), median(seconds["highs"])
    kind = "slots" if whole else "examples"
    return "{:,} x {}".format(*shape), kind, highs / ours, 1e3 * ours, 1e3 * highs


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    kinds = (True, False)
    gaps = [measure_gaps(shape, whole) for whole in kinds for shape in SHAPES]
    times = [time_case(shape, whole) for whole in kinds for shape in TIMED]
    body = "\n\n".join(
        [
            "Time of HiGHS on the linear program, divided by ours (one case at a time, "
            "one device), and what the totals lack of the optimum.",
            page.table(
                ("clients x experts", "load in", "HiGHS / ours", "ours ms", "HiGHS ms"),
                times,
            ),
            f"Gaps over {CASES} random cases a row, in percent of the linear program's "
            "total; for whole assignments (median, worst) where HiGHS found them.",
            page.table(
                (
                    "clients x experts",
                    "load in",
                    "gap, median",
                    "gap, worst",
                    "gap to the best whole one",
                    "load outside bounds",
                ),
                gaps,
            ),
        ]
    )
    print(body)
    page.write_section(
        "bounded", "Assignment under load bounds", "python -m benchmarks.bounded", body
    )


if __name__ == "__main__":
    main()
