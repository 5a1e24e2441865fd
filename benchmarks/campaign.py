"""Every way in which a run can end, tried on the command line: what is lost, silently?

    python -m benchmarks.campaign                    all
    python -m benchmarks.campaign --trials=kills     one of its parts, printed alone

Each trial disturbs a small run on the digits, gives its command again and compares what
it leaves with an undisturbed run, bit for bit but for times. All of them write
`results/reliability.md`. Full disks need the right to mount a tmpfs.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from benchmarks.page import RESULTS, describe_machine, table
from fedmoe_jax.config import list_options
from fedmoe_jax.configs import default
from fedmoe_jax.options import Range
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.report.summary import SPENT
from fedmoe_jax.runtime.files import flatten, read_arrays, write_atomically
from fedmoe_jax.runtime.seals import SEALED, SEALS
from fedmoe_jax.runtime.stop import ENDINGS

ROOT = Path(__file__).parents[1]
FIELDS = {"num_rounds": 8, "checkpoint.every": 2, "num_clients": 8, "cohort_size": 4}
WORDS = [f"--config.{name}={value}" for name, value in FIELDS.items()]
STUDY = ("--config.compare.strategies=('greedy','random')",)  # one program
KILLS, FLIPS, STUDIES, VALUES, DISKS, PROFILES = 30, 60, 20, 100, 8, 2
SLOWEST = 300  # seconds that a trial may take
AT_ONCE = 2

UNDISTURBED = "as undisturbed"
REFUSED = "named in one line"
LOST, SILENT, UGLY = "lost", "silent", "many lines"
VERDICTS = (UNDISTURBED, REFUSED, LOST, SILENT, UGLY)


class Trial(NamedTuple):
    """One trial: what it did, and one of the `VERDICTS`."""

    what: str
    verdict: str


class Campaign(NamedTuple):
    """What trials share.

    Attributes:
      folder: for their runs.
      whole: an undisturbed run.
      part: the same run, stopped after half of its rounds.
      seconds: that the undisturbed run took.
      draw: random numbers of the whole campaign.
    """

    folder: Path
    whole: Path
    part: Path
    seconds: float
    draw: random.Random


def begin(
    workdir: Path,
    *words: str,
    cache: Path,
    name: str = "default.py:smoke",
    surroundings: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    """Starts a run in a process of its own, of the config with this name."""
    config = f"--config={ROOT / 'configs' / name}"
    command = [sys.executable, str(ROOT / "launch.py"), config, *WORDS, *words]
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **surroundings,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=variables,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process."""
    out, err = process.communicate(timeout=SLOWEST)
    return process.returncode, out, err


def read_outcome(folder: Path) -> tuple:
    """What a finished run leaves, without times."""
    rows = [
        {name: value for name, value in row.items() if name not in SPENT}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    arrays = read_arrays(folder / "final.npz")
    summary = json.loads((folder / "summary.json").read_text())
    numbers = {k: v for k, v in summary.items() if k[:6] in ("final_", "total_")}
    return rows, {name: x.tobytes() for name, x in arrays.items()}, numbers


def read_outcomes(folder: Path) -> dict[str, tuple]:
    """What every run of a finished comparison leaves."""
    return {run.name: read_outcome(run) for run in folder.glob("runs/*")}


def judge(
    code: int,
    err: str,
    folder: Path,
    expected: tuple | dict[str, tuple],
    read: Callable[[Path], tuple | dict[str, tuple]] = read_outcome,
) -> str:
    """The verdict on a run that was given its command again.

    Args:
      code: its exit code.
      err: its stderr.
      folder: its work folder.
      expected: what `read` gives of an undisturbed one.
      read: takes the folder.
    """
    if code == 2:
        return REFUSED if err.count("\n") == 1 else UGLY
    if code:
        return UGLY if "Traceback" in err else LOST
    if read(folder) != expected:
        return SILENT
    return UGLY if "Traceback" in err else UNDISTURBED


def again(campaign: Campaign, folder: Path) -> str:
    """Gives a run's command again; the verdict."""
    code, _, err = finish(begin(folder, cache=campaign.folder / "cache"))
    return judge(code, err, folder, read_outcome(campaign.whole))


@contextlib.contextmanager
def prepare() -> Iterator[Campaign]:
    """Yields an undisturbed run, and one that was stopped after half of its rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache, whole, part = folder / "cache", folder / "whole", folder / "part"
        for _ in range(2):  # the second with compiled programs at hand
            shutil.rmtree(whole, ignore_errors=True)
            start = time.monotonic()
            code, _, err = finish(begin(whole, cache=cache))
            assert code == 0, err
            seconds = time.monotonic() - start
        words = ["--config.num_rounds=4"]
        code, _, err = finish(begin(part, *words, cache=cache))
        assert code == 0, err
        yield Campaign(folder, whole, part, seconds, random.Random(0))


def list_kills(campaign: Campaign) -> list[Callable[[], Trial]]:
    """kill -9 at random moments, up to two of them before the run may finish."""

    def kill(number: int, moments: list[float]) -> Trial:
        folder = campaign.folder / f"kill{number}"
        for moment in moments:
            process = begin(folder, cache=campaign.folder / "cache")
            time.sleep(moment)
            process.kill()
            finish(process)
        what = " and ".join(f"after {moment:.2f} s" for moment in moments)
        return Trial(what, again(campaign, folder))

    most, trials = 1.2 * campaign.seconds, []
    for number in range(KILLS):
        moments = [campaign.draw.uniform(0, most) for _ in range(1 + number % 2)]
        trials.append(partial(kill, number, moments))
    return trials


def flip(path: Path, draw: random.Random) -> None:
    """Flips one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    """Cuts a file off."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)])


def remove(path: Path, draw: random.Random) -> None:
    """Removes a file."""
    path.unlink()


def spoil(path: Path, draw: random.Random) -> None:
    """Leaves a file of the same format that holds something else."""
    if path.suffix == ".npz":
        np.savez(path, other=np.ones(3))
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines(keepends=True)
        del lines[draw.randrange(len(lines))]
        path.write_text("".join(lines))
    else:
        tree = json.loads(path.read_text())
        tree[draw.choice(sorted(tree))] = draw.choice((3, "x", [1], {}))
        path.write_text(json.dumps(tree))


def list_flips(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Flipped bits, cut and missing files, of finished and of stopped runs."""

    def damage(number: int, source: Path, file: Path, act: Callable) -> Trial:
        folder = campaign.folder / f"flip{number}"
        shutil.copytree(source, folder)
        act(folder / file, random.Random(number))
        what = f"{act.__name__} {file} of a {source.name} run"
        return Trial(what, again(campaign, folder))

    trials = []
    for number in range(FLIPS):
        source = (campaign.whole, campaign.part)[number % 2]
        among = campaign.draw.choice([source, source / "checkpoints"])
        found = among.glob("*" if among == source else "**/*")
        file = campaign.draw.choice(sorted(path for path in found if path.is_file()))
        file = file.relative_to(source)
        act = campaign.draw.choice([flip, flip, cut, remove])
        trials.append(partial(damage, number, source, file, act))
    return trials


def list_unsealed(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Lost rows and damaged results of finished runs without seals."""

    def damage(number: int, file: str, act: Callable, seals: str | None) -> Trial:
        folder = campaign.folder / f"unsealed{number}"
        shutil.copytree(campaign.whole, folder)
        remove(folder / "sha256.json", campaign.draw)
        if seals is not None:
            (folder / "sha256.json").write_text(seals)
        act(folder / file, random.Random(number))
        return Trial(f"{act.__name__} {file}, seals {seals}", again(campaign, folder))

    acts = {
        "metrics.jsonl": (spoil, cut, remove),
        "final.npz": (spoil, cut, flip, remove),
        "summary.json": (cut, remove),
    }
    pairs = [(file, act) for file, some in acts.items() for act in some]
    seals = itertools.cycle((None, "{}"))
    each = zip(range(len(pairs)), pairs, seals, strict=False)
    return [partial(damage, n, *pair, sealed) for n, pair, sealed in each]


def run_study(campaign: Campaign, folder: Path, *words: str) -> tuple[int, str]:
    """Runs or resumes a small comparison; its exit code and stderr."""
    cache, name = campaign.folder / "cache", "compare.py:digits,smoke"
    code, _, err = finish(begin(folder, *STUDY, *words, cache=cache, name=name))
    return code, err


# Files of a comparison that a report or a resume reads.
STUDY_FILES = (
    "config.json",
    "checkpoints/*/members.json",
    *(f"runs/*/{name}" for name in (SEALS, *SEALED)),
)


def list_studies(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Files of a comparison damaged: its config, members, rows, results and seals."""
    whole, part = campaign.folder / "study", campaign.folder / "study_part"
    for folder, words in ((whole, ()), (part, ("--config.num_rounds=4",))):
        code, err = run_study(campaign, folder, *words)
        assert code == 0, err
    expected = read_outcomes(whole)

    def damage(number: int, source: Path, pattern: str, act: Callable) -> Trial:
        folder, draw = campaign.folder / f"study{number}", random.Random(number)
        shutil.copytree(source, folder)
        file = draw.choice(sorted(folder.glob(pattern)))
        act(file, draw)
        code, err = run_study(campaign, folder)
        verdict = judge(code, err, folder, expected, read_outcomes)
        what = f"{act.__name__} {file.relative_to(folder)} of a {source.name}"
        return Trial(what, verdict)

    sources = itertools.cycle((whole, part))
    acts = itertools.product((spoil, remove, cut, flip), STUDY_FILES)
    each = zip(range(STUDIES), sources, acts, strict=False)
    return [partial(damage, n, source, file, act) for n, source, (act, file) in each]


def list_bad_values() -> list[str]:
    """Flags with a value that no run can have."""
    bad, values = [], flatten(default.get_config("smoke").to_dict())
    for name, option in list_options().items():
        value = values.get(name)
        if isinstance(value, bool):
            bad += [f"{name}=7", f"{name}=maybe"]
        elif isinstance(value, int | float):
            bad += [f"{name}=many", f"{name}=nan", f"{name}=1e999", f"{name}=None"]
            if isinstance(option.allowed, Range):
                bad.append(f"{name}={option.allowed.low - 1:g}")
            if isinstance(value, int):
                bad += [f"{name}=2.5", f"{name}={2**40}", f"{name}=(1,2)"]
        elif isinstance(value, str) and option.allowed is not None:
            bad += [f"{name}=none_such", f"{name}="]
    return [f"--config.{each}" for each in bad]


def list_values(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Values of the wrong kind or beyond what is allowed, and no trace of a run."""

    def refuse(number: int, flag: str) -> Trial:
        folder = campaign.folder / f"value{number}"
        process = begin(folder, flag, cache=campaign.folder / "cache")
        code, _, err = finish(process)
        told = code == 2 and err.count("\n") == 1 and "allowed" in err
        verdict = REFUSED if told and not folder.exists() else UGLY
        return Trial(flag, SILENT if code == 0 else verdict)

    flags = campaign.draw.sample(list_bad_values(), VALUES)
    return [partial(refuse, *each) for each in enumerate(flags)]


def tells_one_error(err: str) -> bool:
    """Whether stderr is one line that says what is wrong, warnings before it aside."""
    lines = err.splitlines()
    warned = all(line.startswith("warning: ") for line in lines[:-1])
    return warned and bool(lines) and lines[-1].startswith("error: ")


def list_disks(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Full disks of 0.06 to 20 MB, some with a profile, and then room."""

    def fill(number: int, size: int, *words: str) -> Trial:
        disk = campaign.folder / f"disk{number}"
        disk.mkdir()
        what = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        subprocess.run(what, check=True)
        try:
            folder = disk / "run"
            cache = campaign.folder / "cache"
            code, _, err = finish(begin(folder, *words, cache=cache))
            told = code == 0 or (code == 2 and tells_one_error(err))
            more = ["mount", "-o", "remount,size=64m", str(disk)]
            subprocess.run(more, check=True)
            verdict = again(campaign, folder)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return Trial(" ".join((f"{size} kB", *words)), verdict if told else UGLY)

    bare = np.geomspace(60, 20000, DISKS).astype(int)
    traced = np.geomspace(1000, 4000, PROFILES).astype(int)
    trials = [(size,) for size in bare] + [(size, "--profile") for size in traced]
    return [partial(fill, number, *each) for number, each in enumerate(trials)]


# Phases of a run by what its folder has when they begin.
PHASES: dict[str, Callable[[Path], bool]] = {
    "starting": lambda folder: True,
    "compiling": lambda folder: (folder / "config.json").exists(),
    "training": lambda folder: bool(read_metrics(folder / "metrics.jsonl")),
    "reporting": lambda folder: (folder / "summary.json").exists(),
}


def list_signals(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Every signal that ends a process, in every phase: saved, then stopped."""

    def send(name: str, phase: str) -> Trial:
        folder = campaign.folder / f"{name}-{phase}"
        process = begin(folder, cache=campaign.folder / "cache")
        time.sleep(0.5)  # until Python listens
        while not PHASES[phase](folder) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        code, out, _ = finish(process)
        told = code == 0 or (code == 3 and "to resume: " in out)
        verdict = again(campaign, folder)
        return Trial(f"{name} while {phase}", verdict if told else LOST)

    pairs = itertools.product(ENDINGS, PHASES)
    return [partial(send, *pair) for pair in pairs]


def list_readers(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Readers of the output that leave after some lines, as `head` does."""

    def leave(lines: int) -> Trial:
        folder = campaign.folder / f"reader{lines}"
        process = begin(folder, cache=campaign.folder / "cache")
        assert process.stdout is not None and process.stderr is not None
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        told = process.wait() in (0, 3) and "Traceback" not in err
        verdict = again(campaign, folder)
        return Trial(f"after {lines} lines", verdict if told else UGLY)

    return [partial(leave, lines) for lines in (0, 1, 2, 4)]


# Variables that make JAX compute other numbers.
OTHER_NUMBERS = {
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


def list_surroundings(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Variables that make JAX compute other numbers: told, and refused on a resume."""

    def compute(variable: str, value: str, resumes: bool) -> Trial:
        folder = campaign.folder / f"{variable}{resumes}"
        if resumes:
            shutil.copytree(campaign.part, folder)
        here = {variable: value}
        code, out, err = finish(
            begin(folder, cache=campaign.folder / "cache", surroundings=here)
        )
        what = f"{variable}={value}, {'resumed' if resumes else 'new'}"
        if not resumes:
            told = code == 0 and f"{variable.lower()}=" in out
            summary = json.loads((folder / "summary.json").read_text()) if told else {}
            told = told and variable.lower() in summary["made_by"]["settings"]
            return Trial(what, UNDISTURBED if told else SILENT)
        if code != 2:
            return Trial(what, SILENT)
        told = tells_one_error(err) and variable in err
        return Trial(what, again(campaign, folder) if told else UGLY)

    trials = itertools.product(OTHER_NUMBERS.items(), (False, True))
    return [partial(compute, *pair, resumes) for pair, resumes in trials]


def list_caches(campaign: Campaign) -> list[Callable[[], Trial]]:
    """Compiled programs that are damaged or cut, and a cache that cannot be written."""

    def damage(number: int, act: Callable) -> Trial:
        folder, cache = (campaign.folder / f"{name}{number}" for name in ("c", "cache"))
        shutil.copytree(campaign.folder / "cache", cache)
        for path in cache.glob("*-cache"):
            act(path, random.Random(number))
        return check(act.__name__, begin(folder, cache=cache), folder)

    def block() -> Trial:
        folder, cache = campaign.folder / "blocked", campaign.folder / "file"
        cache.touch()
        return check("a file as cache", begin(folder, cache=cache), folder)

    def check(what: str, process: subprocess.Popen, folder: Path) -> Trial:
        code, _, err = finish(process)
        expected = read_outcome(campaign.whole)
        return Trial(what, judge(code, err, folder, expected))

    acts = enumerate([flip, flip, cut, cut])
    return [*(partial(damage, *each) for each in acts), block]


TRIALS: dict[str, Callable[[Campaign], list[Callable[[], Trial]]]] = {
    "kills": list_kills,
    "flips": list_flips,
    "unsealed": list_unsealed,
    "studies": list_studies,
    "values": list_values,
    "disks": list_disks,
    "signals": list_signals,
    "readers": list_readers,
    "surroundings": list_surroundings,
    "caches": list_caches,
}


def run_trials(campaign: Campaign, name: str) -> list[Trial]:
    """All trials of one kind, a few at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        trials = list(pool.map(lambda act: act(), TRIALS[name](campaign)))
    for trial in trials:
        if trial.verdict in (LOST, SILENT, UGLY):
            print(f"{name}: {trial.what}: {trial.verdict}", flush=True)
    return trials


def make_table(found: dict[str, list[Trial]]) -> str:
    """Counts of verdicts, a row for each kind of trial."""
    rows = []
    for name, trials in found.items():
        counts = collections.Counter(trial.verdict for trial in trials)
        about = TRIALS[name].__doc__ or ""
        rows.append((about.strip(), len(trials), *(counts[v] for v in VERDICTS)))
    return table(("trials", "number", *VERDICTS), rows)


PAGE = """# Reliability

`python -m benchmarks.campaign`
{machine}

Each trial disturbs a small run on the digits, gives its command again and compares
rows, final arrays and numbers with those of an undisturbed run, bit for bit but for
times.

{table}

*As undisturbed*: finished with the same result; a new run under other surroundings
says so and records them. *Named in one line*: exit code 2 and
one line that names the file or field. *Lost*: not finished though it could have been.
*Silent*: exit code 0 with another result. *Many lines*: a traceback.
"""


def main() -> None:
    """Runs the trials and writes the page, or prints the table of some of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", choices=TRIALS, action="append")
    chosen = parser.parse_args().trials
    for name in ENDINGS:  # runs would ignore what this process was started to ignore
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    with prepare() as campaign:
        found = {name: run_trials(campaign, name) for name in chosen or TRIALS}
    text = make_table(found)
    print(text)
    if not chosen:
        page = PAGE.format(machine=describe_machine(), table=text)
        write_atomically(RESULTS / "reliability.md", page)


if __name__ == "__main__":
    main()
