"""Clients' accuracy after one more local round, at a step size that suits it.

    python -m benchmarks.local_rounds runs/permuted --workdir=runs/permuted_local

Steps of the size of training may be too large for one client alone: it lacks the mean
of many clients, which takes out their noise. So the runs of a finished comparison are
scored again from their last checkpoints, at several sizes (`--rates`) beside that of
training; each run counts at the one that is best for the other seeds of its row, so
that none chooses by its own score. It goes on where it stopped.

`runs.csv` and `table.md` are those of the comparison with these scores: what else was
measured after a local round is left out. The names of rows are those of its `table.md`.
"""

import argparse
import csv
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.studies import find_label, read_csv, read_rates
from fedmoe_jax.api import Run, load_run
from fedmoe_jax.evaluation.finetune import build_finetune_share
from fedmoe_jax.options import UserError, replace
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.files import read_json, write_atomically
from fedmoe_jax.runtime.sharding import spread

RATES = (0.03, 0.01, 0.003)
SCORES, FIELD = "local_rounds.csv", "final_personal_finetuned_accuracy"
Scores = dict[str, dict[float, float]]  # by run and step size


@functools.lru_cache(maxsize=1)
def build_scoring(program: Program) -> Callable:
    """The compiled local round of a program, which all seeds of a row share."""
    jax.clear_caches()  # of the row before: a compiled round takes many memory maps
    return jax.jit(spread(build_finetune_share(program), program.mesh))


def score_run(run: Run, rates: Sequence[float]) -> list[float]:
    """Mean personal accuracy of a run's clients after a local round, at each size.

    Raises:
      UserError: the run has no checkpoint.
    """
    if run.plan is None or run.state is None:
        raise UserError("a run has no checkpoint; allowed: one with a checkpoint")
    program, hyper = run.plan.program, run.plan.hyper
    federation = run.plan.federation.replace(frozen=run.frozen)
    finetune = build_scoring(program)
    unknown = jnp.zeros((1, program.sizes.num_clients))  # who has never taken part

    def score(rate: float) -> float:
        own = replace(hyper, evaluation={"finetune_rate": np.float32(rate)})
        found = finetune(run.state, federation, own, unknown)
        return float(found["personal_finetuned_accuracy"])

    return [score(rate) for rate in rates]


def read_scores(path: Path) -> Scores:
    """The scores so far; none without the file."""
    found: Scores = {}
    for row in read_csv(path) if path.is_file() else []:
        found.setdefault(row["run"], {})[float(row["rate"])] = float(row["accuracy"])
    return found


def write_scores(path: Path, scores: Scores) -> None:
    """Writes the scores, a line for each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "rate", "accuracy"])
    for run, of in scores.items():
        writer.writerows([run, f"{rate:g}", f"{a:.6f}"] for rate, a in of.items())
    write_atomically(path, text.getvalue())


def choose(of_row: Mapping[int, Mapping[float, float]]) -> dict[int, float]:
    """The size at which each seed of ONE row counts: the best mean of the others.

    Args:
      of_row: scores by seed and size.

    Raises:
      UserError: there is one seed alone.
    """
    if len(of_row) < 2:
        raise UserError("a row has one seed; allowed: two or more, to choose by others")
    rates = sorted(next(iter(of_row.values())), reverse=True)

    def score_others(seed: int, rate: float) -> float:
        return float(np.mean([of[rate] for s, of in of_row.items() if s != seed]))

    return {seed: max(rates, key=lambda r: score_others(seed, r)) for seed in of_row}


def tabulate(rows: Mapping[str, Any], rates: Sequence[float], tuned: Mapping) -> str:
    """A table of the mean at every size, and at those that were chosen.

    Args:
      rows: the scores by label, seed and size.
      rates: all sizes.
      tuned: what the comparison says of each row's rates, by label.
    """
    heads = [f"At {rate:g} %" for rate in rates]
    lines = [" | ".join(["| Strategy", "Rates", *heads, "At the chosen % |"])]
    lines += ["|" + " --- |" * (len(heads) + 3)]
    for label, of_row in rows.items():
        chosen = choose(of_row)
        of_rates = [[of.get(rate, np.nan) for of in of_row.values()] for rate in rates]
        counted = [of_row[seed][rate] for seed, rate in chosen.items()]
        means = [100 * np.mean(values) for values in (*of_rates, counted)]
        cells = ["–" if np.isnan(mean) else f"{mean:.1f}" for mean in means]
        lines += ["| " + " | ".join([f"`{label}`", tuned[label], *cells]) + " |"]
    return "\n".join(lines) + "\n"


def count_again(records: Sequence[dict[str, str]], scores: Scores, rates: dict) -> str:
    """The text of `runs.csv` with the scores at the chosen sizes.

    Args:
      records: of the comparison.
      scores: of its runs.
      rates: the chosen size of each run.
    """
    kept = [name for name in records[0] if "finetuned" not in name]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*kept, FIELD, "local_rate"])
    for record in records:
        run = record["folder"]
        own = [f"{scores[run][rates[run]]:.6f}", f"{rates[run]:g}"]
        writer.writerow([*(record[name] for name in kept), *own])
    return text.getvalue()


def main(argv: Sequence[str]) -> None:
    """Scores the runs that are not scored yet, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    flags = parser.parse_args(argv)
    rates = [float(rate) for rate in flags.rates.split(",")]
    flags.workdir.mkdir(parents=True, exist_ok=True)
    records = [row for row in read_csv(flags.folder / "runs.csv") if row.get(FIELD)]
    scores = read_scores(flags.workdir / SCORES)
    for record in records:
        run = record["folder"]
        folder, of = flags.folder / "runs" / run, scores.setdefault(run, {})
        usual = read_json(folder / "config.json")["client"]["learning_rate"]
        of.setdefault(usual, float(record[FIELD]))
        if left := [rate for rate in rates if rate not in of]:
            of.update(zip(left, score_run(load_run(folder), left), strict=True))
            write_scores(flags.workdir / SCORES, scores)
            print(run, *(f"{r:g}: {a:.4f}" for r, a in of.items()), flush=True)
    tuned = read_rates((flags.folder / "table.md").read_text())
    rows: dict[str, dict[int, dict[float, float]]] = {}
    places = {}
    for record in records:
        label, seed = str(find_label(record, tuned)), int(record["seed"])
        places[record["folder"]] = label, seed
        rows.setdefault(label, {})[seed] = scores[record["folder"]]
    chosen = {run: choose(rows[label])[seed] for run, (label, seed) in places.items()}
    every = sorted({rate for of in scores.values() for rate in of}, reverse=True)
    write_atomically(flags.workdir / "table.md", tabulate(rows, every, tuned))
    text = count_again(records, scores, chosen)
    write_atomically(flags.workdir / "runs.csv", text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
