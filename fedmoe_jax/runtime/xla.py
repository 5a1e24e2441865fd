"""Settings of JAX that must be made before it looks at its devices."""

import hashlib
import importlib.metadata
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import jax

# XLA's flags are its own affair: another release may not know one, and then aborts.
FLAGS_KNOWN_TO = "0.10."
CPU_FLAGS = (
    # YNNPACK's valid convolutions are half as fast as Eigen's in training.
    "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
    # LLVM's last level takes longer to compile, of draws twice as long, for no speed.
    "--xla_backend_optimization_level=2",
    # Devices wait for each other once a round, and a client's round may be long.
    "--xla_cpu_collective_call_terminate_timeout_seconds=86400",
    "--xla_cpu_collective_timeout_seconds=86400",
)
# Where every core is a device, threads inside operators would only get in the way.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_cpu_devices(num_devices: int, local_processes: int = 1) -> None:
    """Makes the CPU as many devices as it has cores, or `num_devices`, if fewer.

    Clients on several devices are faster than cores inside each operator.

    Args:
      num_devices: of this process, 0 for all cores.
      local_processes: processes that share the cores of this machine.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        return
    cores = max(count_cores() // local_processes, 1)
    jax.config.update("jax_num_cpu_devices", min(cores, num_devices or cores))
    known = importlib.metadata.version("jaxlib").startswith(FLAGS_KNOWN_TO)
    if known and not flags:
        every_core = cores > 1 and num_devices in (0, cores)
        chosen = (*CPU_FLAGS, ONE_THREAD) if every_core else CPU_FLAGS
        os.environ["XLA_FLAGS"] = " ".join(chosen)


def keep_host() -> None:
    """Keeps the CPU within reach where `JAX_PLATFORMS` names accelerators alone.

    FLOPs are counted there.
    """
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] JAX adds its flags at run time
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def find_caches() -> Path | None:
    """The user's folder for what can be made again; None without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return home / "fedmoe_jax"


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has one already.

    Each kind of processor has its own, as homes are shared and machine code is not. A
    folder that cannot be written, or a damaged program in it, is no reason to stop.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue] likewise
        return
    caches = find_caches()
    if caches is None:
        return
    folder = caches / f"programs-{name_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(
            f"warning: compiled programs are not kept, as {folder} cannot be written "
            f"({error.strerror})",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def name_processor() -> str:
    """A short name of what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    known = f"{platform.machine()} {platform.processor()} {features}"
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
