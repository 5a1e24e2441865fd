"""Runs by hand: rows and arrays in memory, and the folders of finished runs."""

import json

import numpy as np

from fedmoe_jax.measures import MEASURES, OUTCOMES
from fedmoe_jax.options import FINAL
from fedmoe_jax.report.runs import Run, load_run

IMAGES = [m.field for m in MEASURES.values() if not m.field.endswith("_bits")]
ACCURACIES = [m.field for m in MEASURES.values() if m.over == FINAL]
ACCURACIES = [field for field in ACCURACIES if field in IMAGES]
NAMES = [f"class{i}" for i in range(5)]
N, L = 6, len(NAMES)
CONFIG = {
    "strategy": "load_balanced",
    "seed": 0,
    "num_rounds": 8,
    "num_clients": N,
    "cohort_size": N,
    "num_experts": 4,
    "data": {"name": "digits", "dir": ""},
    "partition": {"kind": "dirichlet", "alpha": 0.1},
    "model": {"expert_width": 16},
    "client": {"learning_rate": 0.02},
    "fitness": {"rate": 0.3, "idle": "decay", "exploration": 0.0},
    "weights": {"fitness": 0.5, "usage": 0.5},
    "devices": {"tiers": ["phone", "laptop"], "deadline": 60.0, "buffer": 0.1},
    "run": {"tensorboard": True},
}


def make_row(number, **more):
    """One round of three clients: 6 MB, 30 s, 500 J, one client out of memory."""
    return {
        "round": number,
        "seconds": 0.1,
        "examples": 10,
        "wasted_share": 0.0,
        "expert_load": [1.0, 1.0],
        "bytes_up": 2e6,
        "bytes_down": 4e6,
        "client_flops": 1e9,
        "simulated_seconds": 30.0,
        "simulated_median_seconds": 20.0,
        "compute_joules": 400.0,
        "radio_joules": 100.0,
        "wasted_bytes": 1.5e6,
        "wasted_flops": 0.0,
        **{f"{name}_clients": 0.0 for name in OUTCOMES},
        "merged_clients": 2.0,
        "lost_memory_clients": 1.0,
        "capacity_violations": 1,
        "capacity_error": 0.5,
        "participation_jain": 0.9,
    } | more


ROWS = [
    make_row(1, dropped_clients=1.0, merged_clients=1.0, capacity_error=0.25),
    make_row(2, global_accuracy=0.3, personal_accuracy=0.5),
    make_row(3, stale_clients=2.0, merged_clients=0.0, drift_alarms=2.0),
    make_row(4, global_accuracy=0.42, personal_accuracy=0.6, participation_jain=0.8),
]
NOTHING = dict.fromkeys(
    ("bytes_up", "bytes_down", "simulated_seconds", "compute_joules", "radio_joules"),
    0.0,
) | {"wasted_bytes": 0.0, "lost_memory_clients": 0.0}
ARRAYS = {
    "capacity": np.array([1, 2, 2]),
    "belief": np.array([1, 1, 3]),
    "tier": np.array([0, 1, 1]),
    "tier_names": np.array(["phone", "desk"]),
    "participation": np.array([1, 4, 4]),
    "last_client": np.array([0, 1, 2]),
    "last_code": np.array([OUTCOMES.index("lost_memory"), 0, 1]),
    "last_phases": np.array([[2.0, 1.0, 5.0], [1.0, 1.0, 1.0], [4.0, 2.0, 9.0]]),
    "last_spent": np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    "label_counts": np.ones((3, 2), int),
    "label_names": np.array(["a", "b"]),
    "specialisation": np.full((2, 2), 0.5),
    "times_held": np.ones((3, 2), int),
    "fitness": np.full((3, 2), 0.5),
}


def make_run(tmp_path, label="greedy", rows=ROWS, arrays=ARRAYS, seed=0):
    """A run of three clients and two experts, in memory alone."""
    config = CONFIG | {"strategy": label, "seed": seed}
    config |= {"num_clients": 3, "cohort_size": 3, "num_experts": 2}
    folder = tmp_path / f"{label}-{seed}"
    return Run(config, rows, {}, arrays, folder, label, MEASURES)


def make_text_run(tmp_path, label="greedy"):
    """A finished run on text whose limit is known."""
    rows = [row | {"global_bits": 2.5, "personal_bits": 2.0} for row in ROWS]
    run = make_run(tmp_path, label, rows)
    return run._replace(summary={"num_rounds": 4, "limit_bits": 1.75})


def draw_rows(rng, top, num_experts):
    """Eight rounds, every other one evaluated; the accuracy rises to `top`."""
    rows = []
    for at in range(1, 9):
        load = rng.integers(100, 900, num_experts)
        row = {
            "round": at,
            "seconds": 0.5,
            "expert_load": load.tolist(),
            "load_cv": float(load.std() / load.mean()),
            "load_entropy": 0.9 if num_experts > 1 else None,
            "starved_experts": 0,
            "bytes_up": 2_000_000,
            "bytes_down": 3_000_000,
            "fitness_change": 0.01,
            "assignment_change": 0.1,
            "simulated_seconds": 50.0,
            "simulated_median_seconds": 30.0,
            "late_clients": 0,
        }
        if at % 2 == 0:
            for name in ACCURACIES:
                row[name] = top * at / 8
            row["expert_accuracy"] = rng.uniform(0.1, 0.4, num_experts).tolist()
        rows.append(row)
    return rows


def summarise(strategy, seed, rows):
    """The `summary.json` of a finished run, as far as a report reads it."""
    final = {f"final_{name}": rows[-1][name] for name in ACCURACIES}
    reached = [r["round"] for r in rows if (r.get("global_accuracy") or 0) >= 0.35]
    return final | {
        "strategy": strategy,
        "seed": seed,
        "num_rounds": 8,
        "note": f"{strategy} <needs> | nothing",
        "rounds_to": {"0.35": reached[0] if reached else None, "0.50": None},
        "rounds_to_95_percent_of_final": 8,
        "mean_load_cv": 0.3,
        "mean_load_entropy": 0.9,
        "starved_experts": 0.0,
        "total_bytes_up": 16e6,
        "total_bytes_down": 24e6,
        "total_client_flops": 32e9,
        "peak_client_parameters": 5e4,
        "needs": "luck" if strategy == "greedy" else "",
        "nonfinite_clients": 0,
        "wall_seconds": 4.5,
    }


def write_rows(folder, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))


def change_summary(folder, **changes):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_run(folder, strategy="greedy", seed=0, top=0.5, num_experts=4, **weights):
    """Writes the files of a finished run and returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = CONFIG | {"strategy": strategy, "seed": seed}
    config["weights"] = CONFIG["weights"] | weights
    (folder / "config.json").write_text(json.dumps(config))
    rows = draw_rows(rng, top, num_experts)
    write_rows(folder, rows)
    (folder / "summary.json").write_text(json.dumps(summarise(strategy, seed, rows)))
    np.savez(
        folder / "final.npz",
        fitness=rng.random((N, num_experts), np.float32),
        times_held=rng.integers(0, 9, (N, num_experts)),
        capacity=rng.integers(1, 5, N),
        tier=rng.integers(0, 2, N),
        label_counts=rng.integers(0, 90, (N, L)),
        specialisation=rng.dirichlet(np.ones(num_experts), L).T,
        label_names=np.array(NAMES),
    )
    return folder


def stop_run(folder, num_rows):
    """Leaves a folder as a run killed while it wrote the row after `num_rows`."""
    for name in ("summary.json", "final.npz"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    half_a_row = lines[num_rows][:20]
    (folder / "metrics.jsonl").write_text("".join(lines[:num_rows]) + half_a_row)
    return folder


def load_three(root):
    """A dense control that ends at 0.5 and two mixtures, two seeds each."""
    made = []
    for name, experts, tops in (
        ("fedavg", 1, (0.4, 0.6)),
        ("greedy", 4, (0.5, 0.8)),
        ("random", 4, (0.3, 0.5)),
    ):
        for seed, top in enumerate(tops):
            made.append(write_run(root / f"{name}{seed}", name, seed, top, experts))
    return [load_run(folder) for folder in made]


def load_runs(root):
    """Two strategies and a dense control, two seeds each; one seed diverged."""
    made = []
    for strategy, num_experts in (("fedavg", 1), ("greedy", 4), ("random", 4)):
        for seed, top in ((0, 0.4), (1, 0.6)):
            folder = root / f"{strategy}-{seed}"
            made.append(write_run(folder, strategy, seed, top, num_experts))
    change_summary(made[-1], final_global_accuracy=None)
    return [load_run(folder) for folder in made]


def make_labels(root, **finals):
    """Runs of labels in memory, one round each.

    Args:
      root: of their folders.
      finals: the final global accuracy of each seed, by label.
    """
    return [
        make_run(root, label, [make_row(1, global_accuracy=value)], seed=seed)
        for label, seeds in finals.items()
        for seed, value in seeds.items()
    ]


# A system, its sibling with the shared gate, and what they are compared with.
IN_PARTS = {
    "random": {0: 0.4, 1: 0.5, 2: 0.6},
    "flex_moe_shared_gate": {0: 0.5, 1: 0.6, 2: 0.7},
    "flex_moe": {0: 0.4, 1: 0.55, 2: 0.6, 3: 0.9},
}
