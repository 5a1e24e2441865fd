"""Settings of every test: eight CPU devices, strict shapes, repeatable examples."""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

# JAX reads these once, when it is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the suite's time is spent compiling programs that run once, and the
        # old emitters compile in half the time, as one part in a fifth less. A flag
        # that XLA does not know is fatal.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith("0.10.")
        else "",
    ]
)

# Compiled programs are shared by the files and runs of the suite, not with the user.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build/programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

# Tracing makes objects by the million and hardly a cycle; looking for cycles as often
# as Python does takes a fifth of its time.
gc.set_threshold(200_000, 20, 20)

# [N] + [N, E] is an error in tests: a silent broadcast hides a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "fedmoe", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("fedmoe")

# Linux gives a process 65,530 memory maps; a compiled round takes a thousand of them,
# and LLVM dies without a word where there are none left.
MAPS, MANY_MAPS = Path("/proc/self/maps"), 20_000
OFTEN = 20  # tests of a file, after which its maps are counted: it takes milliseconds
since_count = 0


def pytest_runtest_teardown(item, nextitem):
    """Between files and in long ones, forgets programs before there are too many."""
    global since_count
    since_count += 1
    ends = nextitem and nextitem.path != item.path
    if not MAPS.exists() or not (ends or since_count >= OFTEN):
        return
    since_count, most = 0, MANY_MAPS if ends else 2 * MANY_MAPS
    if MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs launch.py in this process; returns exit code, stdout and stderr."""
    from absl import flags

    from fedmoe_jax import launch
    from fedmoe_jax.runtime.stop import Stop

    def run(*words, stop=None):
        workdir = [] if "--workdir" in str(words) else [f"--workdir={tmp_path / 'new'}"]
        # The config's own flags are found in sys.argv and stay defined for good.
        argv = ["launch.py", *workdir, *words]
        monkeypatch.setattr(sys, "argv", argv)
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        capsys.readouterr()
        try:
            code = launch.main(launch.parse_flags(list(argv)), stop or Stop())
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
