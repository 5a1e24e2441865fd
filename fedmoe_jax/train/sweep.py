"""Many runs: every wave in turn, each run in a folder as it would have had alone."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

from fedmoe_jax.runtime import multihost
from fedmoe_jax.train.plan import Member, Wave
from fedmoe_jax.train.run import run_wave
from fedmoe_jax.train.workdir import is_finished


def sweep(
    members: list[Member],
    workdir: Path,
    waves: list[Wave],
    *,
    stop: Callable[[], bool],
    profile: bool,
) -> tuple[list[Path], bool]:
    """Runs or resumes every wave in turn.

    Args:
      members: the runs, in the order in which their folders are returned.
      workdir: `runs/NAME` is a run's folder, `checkpoints/WAVE` a wave's.
      waves: from `plan_waves`.
      stop: asked after every chunk of rounds; true saves and ends the sweep early.
      profile: whether to trace a few rounds of the first unfinished wave.

    Returns:
      The folders of the finished members, and whether all are finished.

    Raises:
      UserError: a folder holds another run.
    """
    folders = {member.name: workdir / "runs" / member.name for member in members}
    done = multihost.on_leader(lambda: [wave_finished(wave, folders) for wave in waves])
    left = [wave for wave, whole in zip(waves, done, strict=True) if not whole]
    for number, wave in enumerate(left, start=1):
        print(f"[{number}/{len(left)}] {describe(wave)}", flush=True)
        trace = workdir / "profile" if profile and number == 1 else None
        own = [folders[name] for name in wave.names]
        checkpoints = workdir / "checkpoints" / name_wave(wave)
        whole = run_wave(wave, own, checkpoints, stop=stop, profile=trace)
        if not whole or (stop() and number < len(left)):
            break
    done = multihost.on_leader(
        lambda: [is_finished(folders[name], config) for name, config in members]
    )
    return list(itertools.compress(folders.values(), done)), all(done)


def wave_finished(wave: Wave, folders: dict[str, Path]) -> bool:
    """Whether every run of the wave is finished."""
    return all(
        is_finished(folders[name], plan.config)
        for name, plan in zip(wave.names, wave.plans, strict=True)
    )


def describe(wave: Wave) -> str:
    """A wave on one line."""
    runs = f"{len(wave.names)} runs as one program" if wave.names[1:] else "one run"
    shape = dict(wave.program.mesh.shape)
    return f"{runs} on {shape['runs']} x {shape['clients']} devices (runs x clients)"


def name_wave(wave: Wave) -> str:
    """Names a wave by its members, so that another division starts afresh."""
    digest = hashlib.sha256("\n".join(wave.names).encode()).hexdigest()
    return f"{wave.names[0]}-and-{len(wave.names) - 1}-{digest[:8]}"
