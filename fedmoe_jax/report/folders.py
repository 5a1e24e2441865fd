"""Folders of finished runs, of one study or of many, each checked before it is read."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmoe_jax.options import UserError
from fedmoe_jax.report.rows import check_count
from fedmoe_jax.report.runs import INCIDENTAL, Run, load_run
from fedmoe_jax.runtime.files import flatten, read_json
from fedmoe_jax.runtime.seals import METRICS, SEALED


def list_runs(folder: Path) -> list[Path]:
    """The folders of a study's runs, in the order of its report; a run's own otherwise.

    Strategies are as the study lists them, seed 2 before seed 10, and runs with a
    change are behind all others.

    Raises:
      UserError: the folder holds neither a run nor a study, or is damaged.
    """
    recorded = folder / "config.json"
    if not recorded.is_file():
        raise UserError(
            f"{recorded} is missing; allowed: the folder of a run or a comparison"
        )
    config = read_json(recorded)
    if "compare" not in config:
        return [folder]
    if not isinstance(lists := config["compare"], dict):
        raise UserError(f"{recorded} is damaged: compare={lists!r}; restore it")
    strategies = [*lists.get("strategies", ())]

    def place(path: Path) -> tuple:
        strategy, _, rest = path.name.partition("-")
        known = strategy in strategies
        number = strategies.index(strategy) if known else len(strategies)
        return not rest.startswith("seed"), number, _natural(path.name)

    runs = (path for path in (folder / "runs").glob("*") if path.is_dir())
    return sorted(runs, key=place)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their size."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def is_done(folder: Path) -> bool:
    """Whether a run has ended, with its files whole or not."""
    return (folder / "summary.json").is_file()


def check_whole(folder: Path) -> None:
    """Checks the files of a finished run.

    Raises:
      UserError: one is missing or damaged; names it.
    """
    for name in SEALED:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; restore it")
    run = load_run(folder)
    check_count(folder / METRICS, run.rows, run.summary["num_rounds"])


def add_finished(folders: Sequence[Path], workdir: Path) -> list[Path]:
    """The folders, then those of other finished runs that the study has, if it is one.

    Damaged ones are left out, each with one line.
    """
    others = [path for path in list_runs(workdir) if path not in folders]
    return [*folders, *keep_whole(filter(is_done, others))]


def keep_whole(folders: Iterable[Path]) -> list[Path]:
    """The folders whose files are whole; prints a line about each of the others."""
    kept = []
    for folder in folders:
        try:
            check_whole(folder)
            kept.append(folder)
        except UserError as error:
            print(f"left out of the report: {error}", flush=True)
    return kept


def join(sources: Sequence[Path]) -> list[Path]:
    """The folders of the finished runs of several runs and studies, each run once.

    Prints a line about each one that is left out: damaged, unfinished, or there twice.

    Args:
      sources: folders of runs, or of studies, which stand for their finished runs.

    Raises:
      UserError: a folder holds neither, or nothing is left.
    """
    listed = [folder for source in sources for folder in list_runs(source)]
    done = [folder for folder in dict.fromkeys(listed) if is_done(folder)]
    for folder in dict.fromkeys(listed):
        if folder not in done:
            missing = folder / "summary.json"
            print(f"left out of the report: {missing} is missing, not finished")
    runs: dict[str, Run] = {}
    for folder in keep_whole(done):
        run = load_run(folder)
        first = runs.setdefault(identify(run), run)
        if first is not run:
            print(f"left out of the report: {folder} is the run of {first.folder}")
    if not runs:
        names = ",".join(map(str, sources))
        raise UserError(f"--report={names} has no finished run; allowed: one or more")
    return [run.folder for run in runs.values()]


def identify(run: Run) -> str:
    """Equal for runs of the same config and seed."""
    fields = flatten(run.config)
    free: list[Any] = [*run.summary.get("idle", ())]
    kept = (
        (name, value)
        for name, value in sorted(fields.items())
        if name == "seed" or not (name.startswith(INCIDENTAL) or name in free)
    )
    return str(list(kept))
