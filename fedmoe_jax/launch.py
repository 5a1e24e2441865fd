"""Runs, resumes or compares federated mixtures of experts.

    python launch.py                                            one run on digits
    python launch.py --config=configs/compare.py:digits --workdir=runs/digits
    python launch.py --workdir=runs/try --config.strategy=greedy --config.seed=3

`python -m fedmoe_jax` is the same program. A second call with the same arguments
resumes. --plugins names modules whose strategies, data sets and so on join the
package's, and whose fields join the config. On several hosts the same call is made
on each, with --coordinator_address, --num_processes and --process_id. Exit code 0:
finished; 1: an unforeseen error, or another process died; 2: a mistake in the flags,
config, data or work folder, in one line; 3: stopped early, resumable.
"""

import functools
import gc
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.streams import spell_output

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several run together."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes that JAX finds (TPU pods, Slurm, ...)."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes run together."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0; process 0 writes and prints."
)
_PLUGINS = flags.DEFINE_list(
    "plugins", [], "Modules whose records join the tables, read before the config."
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Trace a few rounds into WORKDIR/profile for TensorBoard."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/default", "Folder of the run; an existing run there is resumed."
)


def refuse(message: str) -> int:
    """Prints one line about a mistake; returns the exit code that goes with it."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def describe_fields() -> str:
    """Every config field with its default, its meaning and what it allows."""
    from fedmoe_jax.config import list_fields

    return "\n".join(
        f"  --config.{field.name}={field.default!r}\n    {field.about}"
        + (f"; allowed: {field.allowed}" if field.allowed else "")
        for field in list_fields()
    )


def prepare_help() -> None:
    """Makes absl's help that of this module, whichever file was started."""
    fields = f"\nconfig fields, their defaults and meanings:\n\n{describe_fields()}\n"
    sys.modules["__main__"].__doc__ = f"{__doc__}{fields}"
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def join_plugins(argv: list[str]) -> None:
    """Joins the modules that --plugins names, before the other flags are parsed."""
    early = flags.FlagValues()
    early.set_gnu_getopt(True)
    flags.DEFINE_list("plugins", [], "", flag_values=early)
    early(argv, known_only=True)
    if early.plugins:
        from fedmoe_jax.plugins import load_plugins  # imports JAX

        sys.path.append(os.getcwd())  # where `python -m` looks, and a script does not
        load_plugins(*early.plugins)


def put_config_first(argv: list[str]) -> list[str]:
    """The flags with the config's file before those that change its fields."""
    for i, word in enumerate(argv):
        if is_config(word):
            end = i + 1 if "=" in word else i + 2
            if end > len(argv):
                return argv  # absl misses the file
            return [argv[0], *argv[i:end], *argv[1:i], *argv[end:]]
    return argv


def is_config(word: str) -> bool:
    """Whether a word of the command line is the flag of the config's file."""
    return re.fullmatch(r"--?config(=.*)?", word) is not None


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl flags; a mistake ends the program with one line and code 2."""
    try:
        join_plugins(argv)
    except UserError as error:
        sys.exit(refuse(str(error)))
    except flags.Error as error:
        sys.exit(refuse(f"{error}; see --help"))
    if {"--help", "-help", "--helpfull"} & set(argv):
        prepare_help()
    try:
        sys.argv = put_config_first(argv)  # where ml_collections finds its fields
        given = any(map(is_config, sys.argv))
        default = [] if given else [f"--config={DEFAULT_CONFIG}"]
        rest = flags.FLAGS([sys.argv[0], *default, *sys.argv[1:]])
        _CONFIG.value.to_dict()  # a config that could not be loaded fails here
        return rest
    except AttributeError as error:  # how ml_collections tells an unknown field
        text = str(getattr(error.args[0], "args", error.args)[0])
        text = text.strip().replace("\n", "; ")
        sys.exit(refuse(f"unknown config field {text}; --help lists all fields"))
    except (OSError, flags.Error) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        fault = lines[-1].removeprefix("ValueError: ")  # as config files raise it
        sys.exit(refuse(f"{fault}; see --help"))


class Stop:
    """Turns the first SIGINT or SIGTERM into a wish to stop after these rounds."""

    def __init__(self) -> None:
        self.wished = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._wish)

    def _wish(self, number: int, _frame) -> None:
        self.wished = True
        # Not print, which fails where the signal has interrupted another print.
        os.write(1, b"stopping after the current rounds; again to stop at once\n")
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self.wished


def run(
    config: ConfigDict, workdir: Path, command: str, stop: Stop, profile: bool
) -> bool:
    """Runs the config and reports it, also when it was stopped early.

    Returns:
      Whether it is finished.
    """
    from fedmoe_jax.runtime.multihost import any_process, is_leader
    from fedmoe_jax.train.compare import compare
    from fedmoe_jax.train.run import train

    gc.freeze()  # what is imported stays
    gc.enable()
    start = time.monotonic()
    wished = lambda: any_process(stop())
    profile = profile and is_leader()
    if "compare" in config:
        folders, finished = compare(config, workdir, stop=wished, profile=profile)
    else:
        name = config.strategy
        finished = train(config, workdir, stop=wished, label=name, profile=profile)
        folders = [workdir]
    if folders and is_leader():
        page = report(folders, workdir, command)
        print(f"report: {page}  ({time.monotonic() - start:.0f} s from the start)")
    return finished


def report(folders: list[Path], workdir: Path, command: str) -> Path:
    """Writes the report of these runs and its tables, then prints; returns the page."""
    from fedmoe_jax.report.clients import write_clients_csv
    from fedmoe_jax.report.page import write_report
    from fedmoe_jax.report.runs import load_run
    from fedmoe_jax.report.tables import markdown_table, print_table, write_runs_csv
    from fedmoe_jax.runtime.files import write_atomically

    gc.freeze()  # drawing makes garbage in plenty; what training has left stays
    runs = [load_run(folder) for folder in folders]
    write_runs_csv(workdir / "runs.csv", runs)
    write_clients_csv(workdir / "clients.csv", runs)
    write_atomically(workdir / "table.md", markdown_table(runs))
    page = write_report(workdir, runs, command)
    print_table(runs, sys.stdout)
    return page


def join_hosts(config: ConfigDict, request: str) -> None:
    """Joins the other processes, if there are any, and sets JAX up.

    Args:
      config: for `run.num_devices`.
      request: what this process was asked to do, to be the same on all.

    Raises:
      UserError: a mistake in the flags, or processes that do not fit together.
    """
    from fedmoe_jax.runtime import multihost
    from fedmoe_jax.runtime.xla import keep_host, keep_programs, set_cpu_devices

    local_processes = multihost.join(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
    )
    per_process = -(-config.run.num_devices // (_NUM_PROCESSES.value or 1))
    try:
        set_cpu_devices(per_process, local_processes)
    except RuntimeError:
        raise UserError(
            f"--plugins={','.join(_PLUGINS.value)} computes with JAX while it is "
            "imported; allowed: arrays made inside functions"
        ) from None
    keep_host()
    keep_programs()
    multihost.handshake(request)


def name_command() -> str:
    """The command that started this process, to be given again."""
    python = os.path.relpath(sys.executable)  # where packages are, maybe a venv
    if python.startswith(os.pardir):
        python = "python"
    script, *words = sys.argv
    as_module = Path(script) == Path(__file__).with_name("__main__.py")
    program = ["-m", "fedmoe_jax"] if as_module else [script]
    return shlex.join([python, *program, *words])


def main(argv: list[str], stop: Stop) -> int:
    """Parses nothing more: flags are absl's. Returns the exit code."""
    if len(argv) > 1:
        return refuse(f"unexpected argument {argv[1]!r}; see --help")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
    command = name_command()
    from fedmoe_jax.runtime import multihost
    from fedmoe_jax.train.workdir import check_plugins, resolve_folder

    config, profile = _CONFIG.value, _PROFILE.value
    try:
        workdir = resolve_folder("workdir", _WORKDIR.value)
        join_hosts(config, f"{config} {workdir} {profile}")
        multihost.on_leader(check_plugins, workdir)
        if run(config, workdir, command, stop, profile):
            return 0
    except UserError as error:
        return multihost.exit_all(refuse(str(error)))
    except Exception:
        traceback.print_exc()
        return multihost.exit_all(1)
    print(f"stopped and saved; to resume: {command}")
    return 3


def start() -> None:
    """Runs the program and exits."""
    spell_output()
    gc.disable()  # until all is imported: walking the modules takes a second
    stop = Stop()  # before JAX is imported, which an interrupt would break off
    app.run(functools.partial(main, stop=stop), flags_parser=parse_flags)
