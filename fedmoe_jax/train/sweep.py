"""Many runs: every wave in turn, each run in a folder as it would have had alone."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmoe_jax.runtime import multihost
from fedmoe_jax.train.loop import ignore_row
from fedmoe_jax.train.plan import Member, Wave
from fedmoe_jax.train.run import claim_runs, drive_wave
from fedmoe_jax.train.waves import begin_wave
from fedmoe_jax.train.workdir import is_finished


def sweep(
    members: Sequence[Member],
    workdir: Path,
    waves: Sequence[Wave],
    *,
    stop: Callable[[], bool],
    profile: bool,
) -> tuple[list[Path], bool]:
    """Runs or resumes every wave in turn.

    Args:
      members: the runs, in the order in which their folders are returned; the waves may
        have others, too.
      workdir: `runs/NAME` is a run's folder, `checkpoints/WAVE` a wave's.
      waves: those that are left to run, from `plan_waves`.
      stop: asked after every chunk of rounds; true saves and ends the sweep early.
      profile: whether to trace a few rounds of the first wave.

    Returns:
      The folders of the finished members, and whether all are finished.

    Raises:
      UserError: a folder holds another run.
    """
    for number, wave in enumerate(waves, start=1):
        print(f"[{number}/{len(waves)}] {describe(wave)}", flush=True)
        trace = workdir / "profile" if profile and number == 1 else None
        whole = run_wave_in(workdir, wave, stop, trace)
        if not whole or (stop() and number < len(waves)):
            break
    folders = [name_folder(workdir, name) for name, _ in members]
    done = multihost.on_leader(
        lambda: [
            is_finished(folder, member.config)
            for folder, member in zip(folders, members, strict=True)
        ]
    )
    return list(itertools.compress(folders, done)), all(done)


def run_wave_in(
    workdir: Path, wave: Wave, stop: Callable[[], bool], profile: Path | None
) -> bool:
    """Runs or resumes one wave of a comparison; returns whether it is finished."""
    folders = [name_folder(workdir, name) for name in wave.names]
    checkpoints = workdir / "checkpoints" / name_wave(wave)
    configs = [plan.config for plan in wave.plans]
    if multihost.on_leader(lambda: all(map(is_finished, folders, configs))):
        return True  # another part has been faster
    with claim_runs(wave.plans, folders):
        multihost.on_leader(begin_wave, checkpoints, wave.names)
        return drive_wave(wave, folders, checkpoints, stop, profile, ignore_row)


def name_folder(workdir: Path, name: str) -> Path:
    """The folder of a comparison's run."""
    return workdir / "runs" / name


def describe(wave: Wave) -> str:
    """A wave on one line."""
    runs = f"{len(wave.names)} runs as one program" if wave.names[1:] else "one run"
    shape = dict(wave.program.mesh.shape)
    return f"{runs} on {shape['runs']} x {shape['clients']} devices (runs x clients)"


def name_wave(wave: Wave) -> str:
    """Names a wave by its members; another division has other checkpoints."""
    digest = hashlib.sha256("\n".join(wave.names).encode()).hexdigest()
    return f"{wave.names[0]}-and-{len(wave.names) - 1}-{digest[:8]}"
