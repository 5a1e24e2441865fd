"""Attacks on what observed runs reveal of their clients, as tables.

    python -m fedmoe_jax.attack RUNS... --workdir=DIR

RUNS are folders of runs or comparisons with `privacy.observe=True`; of comparisons all
finished, observed runs are attacked, and seeds of a row are each other's shadows.
`attacks.html`, a page that needs no other file, and `attacks.md` have a row per
strategy and change with mean and 95 % interval over seeds, `attacks.csv` has a line per
run, `attack_experts.csv` one per expert. It needs neither data nor JAX. docs/privacy.md
says what the attackers know.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from fedmoe_jax.attack.runs import attack_runs
from fedmoe_jax.attack.tables import write_attacks
from fedmoe_jax.disclosure.observed import list_chunks
from fedmoe_jax.options import UserError
from fedmoe_jax.report.folders import identify, is_done, keep_whole, list_runs
from fedmoe_jax.report.runs import Run, load_run
from fedmoe_jax.runtime.folders import resolve_folder


def find_observed(sources: Sequence[str]) -> list[Run]:
    """The finished, observed runs of several runs and comparisons, each once.

    Prints a line about each run that is left out, where others are not. One that is
    there twice would be its own shadow.

    Args:
      sources: folders of runs or comparisons.

    Raises:
      UserError: a folder holds neither, or no run is left.
    """
    folders = [resolve_folder("RUNS", source) for source in sources]
    listed = dict.fromkeys(path for folder in folders for path in list_runs(folder))
    kept, left_out = [], []
    for path in listed:
        if not is_done(path):
            left_out.append(f"{path} is not finished")
        elif not list_chunks(path):
            left_out.append(f"{path} was not observed")
        else:
            kept.append(path)
    runs: dict[str, Run] = {}
    for run in map(load_run, keep_whole(kept)):
        first = runs.setdefault(identify(run), run)
        if first is not run:
            left_out.append(f"{run.folder} is the run of {first.folder}")
    if not runs:
        reasons = left_out[:1] or ["there is none"]
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise UserError(
            f"RUNS={','.join(map(str, sources))} has no finished run that was "
            f"observed ({reasons[0]}{more}); allowed: folders of runs or "
            "comparisons with privacy.observe=True"
        )
    for each in left_out:
        print(f"left out: {each}")
    return list(runs.values())


def attack(sources: Sequence[str], workdir: str) -> Path:
    """Attacks runs and writes the tables; returns the path of `attacks.md`.

    Args:
      sources: folders of runs or comparisons.
      workdir: folder of the tables, made if absent.

    Raises:
      UserError: see `find_observed`; there is no source, the folder is of other runs,
        or a file of a run is damaged.
    """
    if not sources:
        raise UserError(
            "RUNS are missing; allowed: folders of runs or comparisons with "
            "privacy.observe=True"
        )
    folder = resolve_folder("workdir", workdir)
    own = {resolve_folder("RUNS", source) for source in sources}
    if folder not in own and (folder / "config.json").exists():
        raise UserError(
            f"workdir={folder} is not allowed, as it holds other runs; allowed: a "
            "folder of RUNS, or one without runs"
        )
    runs = find_observed(sources)
    found, experts = attack_runs(runs)
    folder.mkdir(parents=True, exist_ok=True)
    return write_attacks(folder, runs, found, experts)


def main(argv: list[str]) -> None:
    """Attacks the runs of the arguments; exit code 2 on a mistake."""
    try:
        if not flags.FLAGS.workdir:
            raise UserError("--workdir is missing; allowed: the folder for the tables")
        path = attack(argv[1:], flags.FLAGS.workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(path.read_text(), end="")
    print(f"attacks: {path.with_suffix('.html')}")


def define_flags() -> None:
    """Defines the flags of `main`; importing this module must add none to a program."""
    flags.DEFINE_string("workdir", "", "Folder for the tables.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
