"""Several processes, on several hosts as a rule, that run one program together.

Every process runs the same lines on equal values, and the compiled programs hold all
their devices. Process 0, the leader, alone writes and prints. What only one process
can know (a signal, a folder that cannot be written) is sent to all before any acts on
it, so that none waits for one that has left. A single process is the case of one.
"""

import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime.files import plain
from fedmoe_jax.types import PyTree

# A process that was not heard of for so many seconds is dead, and so are the others.
HEARTBEAT_SECONDS = 30
NEWS_SECONDS = 15  # until a death that was noticed is known to all
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
TEXT_STEP = 1024  # texts are padded to its multiples, so that few programs move them


def check_flags(
    address: str | None, num_processes: int | None, process_id: int | None, find: bool
) -> None:
    """Checks the flags by which a process finds the others.

    Raises:
      UserError: flags that are incomplete or contradict each other.
    """
    flags = {
        "--coordinator_address": address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) < len(flags) and (missing or find):
        wrong = f"{missing[0]} is missing" if missing else "--distributed is given too"
        raise UserError(f"{wrong}; allowed: all of {', '.join(flags)}, or none of them")
    if address is None or num_processes is None or process_id is None:
        return
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(
            f"--coordinator_address={address} is not allowed; allowed: HOST:PORT"
        )
    if num_processes < 1:
        raise UserError(
            f"--num_processes={num_processes} is not allowed; allowed: >= 1"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not allowed; "
            f"allowed: 0 to {num_processes - 1}, below --num_processes={num_processes}"
        )


def join(
    address: str | None, num_processes: int | None, process_id: int | None, find: bool
) -> int:
    """Joins the other processes, if there are any; before JAX looks at its devices.

    Args:
      address: HOST:PORT of process 0; None without other processes or with `find`.
      num_processes: how many they are; None like `address`.
      process_id: which one this is, 0 for the leader; None like `address`.
      find: whether JAX finds the others by itself (TPU pods, Slurm, Open MPI).

    Returns:
      How many processes are known to share this machine; 1 unless `address` is local.

    Raises:
      UserError: flags that are not allowed, or the others cannot be found.
    """
    check_flags(address, num_processes, process_id, find)
    if not find and address is None:
        return 1
    # Its handler would take SIGTERM away from `launch.Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot be joined ({str(error).splitlines()[0]}); "
            "allowed: processes that reach the same --coordinator_address, or "
            "--distributed where JAX finds them"
        ) from None
    local = address is not None and address.rpartition(":")[0] in LOOPBACK
    return num_processes if local and num_processes else 1


def handshake(request: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """The first meeting of all processes; silences all but the leader.

    Args:
      request: what this process was asked to do, in parts by name.
      origin: what it would compute with, likewise, see `find_origin`.

    Raises:
      UserError: they have different numbers of devices, requests or origins.
    """
    if not is_leader():
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        _end_all(
            f"the processes have {sorted(counts.values())} devices; allowed: equally "
            "many on each, see run.num_devices and XLA_FLAGS"
        )
    check_same(dict(request) | dict(origin))


def is_leader() -> bool:
    """Whether this is the one process that writes and prints."""
    return jax.process_index() == 0


def any_process(wish: bool) -> bool:
    """Whether any process has the wish; every process calls it at the same point."""
    return bool(multihost_utils.process_allgather(np.int32(wish)).any())


def allgather_text(text: str) -> list[str]:
    """The texts of all processes, in their order, on every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    room = np.zeros(-(-longest // TEXT_STEP) * TEXT_STEP, np.uint8)
    room[: len(data)] = data
    texts = multihost_utils.process_allgather(room)
    return [row.tobytes().rstrip(b"\0").decode() for row in texts]


def check_equal(what: str, tree: PyTree) -> None:
    """Checks that all processes have equal values.

    Raises:
      UserError: they do not; names `what`.
    """
    if jax.process_count() == 1:
        return
    sums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]
    if len(set(allgather_text(str(sums)))) > 1:
        _end_all(f"{what} differ between the processes; allowed: the same on all")


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values, by name.

    Raises:
      UserError: they do not; names the first that differs, and how.
    """
    texts = allgather_text(json.dumps(plain(values)))
    of_all = [json.loads(text) for text in texts]
    for name in values:
        first, *others = (each.get(name) for each in of_all)
        if other := [value for value in others if value != first]:
            _end_all(
                f"{name} differs between the processes ({show(first)} and "
                f"{show(other[0])}); allowed: the same on all"
            )


def run_on_all(function: Callable, *arguments: Any) -> Any:
    """Calls the function on every process and returns its result.

    Args:
      function: moves nothing between processes after a UserError of one of them.
      *arguments: of the function.

    Raises:
      UserError: on any process; then all end.
    """
    try:
        result, fault = function(*arguments), ""
    except UserError as error:
        result, fault = None, str(error)
    for message in filter(None, allgather_text(fault)):
        _end_all(message)
    return result


def on_leader(function: Callable, *arguments: Any) -> Any:
    """Calls the function on the leader; every process returns its result.

    Args:
      function: returns what JSON can hold.
      *arguments: of the function.

    Raises:
      UserError: the leader's; then all end.
    """
    call = lambda: json.dumps(function(*arguments)) if is_leader() else ""
    return json.loads(allgather_text(run_on_all(call))[0])


def await_news() -> None:
    """Waits after an error until JAX would have aborted this process, too.

    Where another process has died, a collective fails here at once, and JAX notices the
    cause later. `guard` then tells it; the error of the collective says nothing.
    """
    if jax.distributed.is_initialized():
        time.sleep(HEARTBEAT_SECONDS + NEWS_SECONDS)


def exit_all(code: int) -> int:
    """Returns an exit code, or ends at once with it where others are still there.

    A process that fails by itself must not say goodbye, which waits for the others.
    They notice by the next collective, or after `HEARTBEAT_SECONDS`.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _end_all(message: str) -> NoReturn:
    """Ends all processes, each of which calls it; the leader says why."""
    jax.distributed.shutdown()
    if is_leader():
        raise UserError(message)
    raise SystemExit(2)
