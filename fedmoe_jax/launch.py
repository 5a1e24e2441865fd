"""Runs, resumes or compares federated mixtures of experts.

    python launch.py                                            one run on digits
    python launch.py --config=configs/compare.py:digits --workdir=runs/digits
    python launch.py --workdir=runs/try --config.strategy=greedy --config.seed=3
    python launch.py --report=runs/a,runs/b --workdir=runs/both     joins what is there

`python -m fedmoe_jax` is the same program; `python -m fedmoe_jax.data NAME` prepares a
data set of TFDS for --config.data.name=NAME. A second call with the same arguments
resumes. --only=3/8 runs the third of eight parts of a comparison. --tune gives every
strategy of a comparison the same budget of rates, judged on validation examples, and
--settings reads what it has chosen. --plugins names modules whose strategies, data sets
and so on join the package's, and whose fields join the config. On several hosts the
same call is made on each, with --coordinator_address, --num_processes and --process_id.
Exit code 0: finished; 1: an unforeseen error, or another process died; 2: a mistake in
the flags, config, data or work folder, or a disk without room, in one line; 3: stopped
early, resumable.
"""

import contextlib
import faulthandler
import functools
import gc
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fedmoe_jax.config_file import ConfigFile
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.guard import guard, runs_with_others
from fedmoe_jax.runtime.output import open_missing, secure
from fedmoe_jax.runtime.quiet import quiet_matplotlib, quiet_orbax
from fedmoe_jax.runtime.stop import Stop, listen

KINDS = {  # of flags that are no text
    "num_processes": "whole numbers >= 1",
    "process_id": "whole numbers >= 0",
    "distributed": "true, false",
    "tune": "true, false",
    "profile": "true, false",
}
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default.py"
COMPARED = {"strategy": ["compare.strategies"], "seed": ["compare.seeds"]}
STUDIES = Path(__file__).parents[1] / "configs"  # of a checkout


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon."
)
flags.FLAGS["config"].parser = ConfigFile()
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
_ONLY = flags.DEFINE_string(
    "only", None, "PART/PARTS, as 3/8: only the third eighth of a comparison's runs."
)
_REPORT = flags.DEFINE_list(
    "report", None, "Folders of runs and studies to report together in --workdir."
)
_TUNE = flags.DEFINE_bool(
    "tune", False, "Tune every strategy of a comparison, instead of comparing them."
)
_SETTINGS = flags.DEFINE_string(
    "settings", None, "settings.json of --tune, for the strategies of this comparison."
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


def describe_studies() -> str:
    """The first docstring line of each file of configs/; empty without a checkout."""
    lines = ""
    for path in sorted(STUDIES.glob("*.py")):
        text = path.read_text(errors="replace")
        title = re.match(r'"""(.+?)(?:"""|\n)', text)
        if title and "get_config" in text:
            lines += f"  {f'configs/{path.name}':24} {title[1]}\n"
    short = "each with a short form, as --config=configs/compare.py:smoke"
    return lines and f"\nstudies, {short}:\n\n{lines}"


def describe_plugins() -> str:
    """The records that each plug-in has joined, by table; empty without plug-ins."""
    from fedmoe_jax.tables import PLUGINS

    lines = "".join(
        f"  {module}: {table} {', '.join(names)}\n"
        for module, plugin in PLUGINS.items()
        for table, names in plugin.records.items()
    )
    return lines and f"\nrecords of --plugins:\n\n{lines}"


def prepare_help() -> None:
    """Makes absl's help that of this module, whichever file was started."""
    fields = f"\nconfig fields, their defaults and meanings:\n\n{describe_fields()}\n"
    parts = __doc__, describe_studies(), describe_plugins(), fields
    sys.modules["__main__"].__doc__ = "".join(map(str, parts))
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


def explain(error: Exception) -> str:
    """A mistake in the flags on one line, with the values of a config field."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    field = re.match(r"flag --config\.([\w.]+)=(.*?): ", lines[-1])
    if field:
        from fedmoe_jax.config import describe_field
        from fedmoe_jax.options import show

        name, text = field.groups()
        allowed = describe_field(name) or "as in the config's file"
        return f"{name}={show(text)} is not allowed; allowed: {allowed}"
    flag = re.match(r"flag --(\w+)=(.*?): ", lines[-1])
    if flag and flag[1] in KINDS:
        return f"--{flag[1]}={flag[2]} is not allowed; allowed: {KINDS[flag[1]]}"
    return f"{lines[-1]}; allowed: the flags that --help lists"


def find_unknown(text: str, argv: Sequence[str], known: Collection[str]) -> str:
    """The unknown config field of an error, with its group.

    Args:
      text: of the error, which has one part of the field's name, or none.
      argv: the command line.
      known: the config fields.
    """
    given = (re.match(r"--?config\.([\w.]+)", word) for word in argv)
    unknown = [flag[1] for flag in given if flag and flag[1] not in known]
    fitting = [name for name in unknown if text in name.split(".")]
    if not fitting and re.fullmatch(r"\w+", text):
        return text  # as a comparison lacks the strategy of a run
    return next(iter(fitting or unknown), text)


def explain_unknown(error: Exception, argv: Sequence[str]) -> str:
    """An unknown config field and the fields that are near it, on one line.

    Args:
      error: of ml_collections.
      argv: the command line.
    """
    from fedmoe_jax.config import list_options

    text, *rest = str(getattr(error.args[0], "args", error.args)[0]).strip().split("\n")
    text, known = text.strip("'\""), list_options()
    name = find_unknown(text, argv, known)
    group, _, _ = name.rpartition(".")
    parts = name.split(".")
    above = "".join(f"{each}." for each in parts[: (*parts, text).index(text)])
    near = [f"{above}{each}" for each in re.findall(r'mean "([^"]+)"', " ".join(rest))]
    near = near or [each for each in known if each.startswith(f"{group}.")]
    near = near or [each for each in known if each == group]
    near = COMPARED.get(name, near)  # a comparison has lists of what a run has one of
    hint = f", such as {', '.join(near)}" if near else ""
    return f"unknown config field {name}; allowed: the fields that --help lists{hint}"


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl flags; a mistake ends the program with one line and code 2."""
    try:
        join_plugins(argv)
    except UserError as error:
        sys.exit(refuse(str(error)))
    except flags.Error as error:
        sys.exit(refuse(explain(error)))
    if {"--help", "-help", "--helpfull"} & set(argv):
        prepare_help()
    try:
        sys.argv = put_config_first(argv)  # where ml_collections finds its fields
        given = any(map(is_config, sys.argv))
        default = [] if given else [f"--config={DEFAULT_CONFIG}"]
        return flags.FLAGS([sys.argv[0], *default, *sys.argv[1:]])
    except UserError as error:
        sys.exit(refuse(str(error)))
    except (AttributeError, KeyError, TypeError) as error:  # an unknown field
        sys.exit(refuse(explain_unknown(error, sys.argv)))
    except (OSError, flags.Error) as error:
        sys.exit(refuse(explain(error)))


def run(
    config: ConfigDict,
    workdir: Path,
    command: str,
    stop: Stop,
    profile: bool,
    only: str | None = None,
    tuned: bool = False,
) -> bool:
    """Runs or tunes the config and reports it, also when it was stopped early.

    Returns:
      Whether it is finished.
    """
    from fedmoe_jax.report.folders import add_finished
    from fedmoe_jax.report.outputs import write_all
    from fedmoe_jax.runtime.lock import take_turn
    from fedmoe_jax.runtime.multihost import any_process, is_leader
    from fedmoe_jax.runtime.settings import tell_settings
    from fedmoe_jax.train.compare import compare
    from fedmoe_jax.train.parts import WHOLE, parse_part
    from fedmoe_jax.train.run import train

    part = WHOLE if only is None else parse_part(only)
    if only is not None and tuned:
        raise UserError("--only is not allowed with --tune; allowed: one of them")
    if only is not None and "compare" not in config:
        raise UserError(
            f"--only={only} is not allowed; allowed: with a comparison, as of "
            "--config=configs/compare.py"
        )

    tell_settings()
    gc.freeze()  # what is imported stays
    gc.enable()
    start = time.monotonic()
    wished = lambda: any_process(stop())
    profile = profile and is_leader()
    if tuned:
        return tune(config, workdir, wished, profile)
    if "compare" in config:
        folders, finished = compare(
            config, workdir, stop=wished, profile=profile, part=part
        )
    else:
        name = config.strategy
        finished = train(config, workdir, stop=wished, label=name, profile=profile)
        folders = [workdir]
    if folders and is_leader():
        with take_turn(workdir) if part != WHOLE else contextlib.nullcontext():
            if "compare" in config:
                folders = add_finished(folders, workdir)
            page = write_all(folders, workdir, command, config.evaluation.baseline)
        print(f"report: {page}  ({time.monotonic() - start:.0f} s from the start)")
        if finished and config.privacy.observe:
            folder = shlex.quote(str(workdir))
            print(f"to attack it: python -m fedmoe_jax.attack {folder} --workdir=DIR")
    return finished


def tune(
    config: ConfigDict, workdir: Path, stop: Callable[[], bool], profile: bool
) -> bool:
    """Tunes a comparison's strategies, and says what was found; whether it is done."""
    from fedmoe_jax.report.tuning import write_tuning
    from fedmoe_jax.runtime.multihost import is_leader
    from fedmoe_jax.train import tune as tuning

    trials, whole = tuning.tune(config, workdir, stop=stop, profile=profile)
    if trials and is_leader():
        write_tuning(workdir, trials, config.tune.measure)
    if whole and is_leader():
        last = [trial for trial in trials if trial.rounds == config.num_rounds]
        strategies = list(config.compare.strategies)
        print(*tuning.describe_choice(last, strategies, config), sep="\n")
        print(f"trials: {workdir / 'tuning.csv'}, drawn in tuning.png")
        print(f"settings: {workdir / 'settings.json'}, for --settings")
    return whole


def refuse_beside_report() -> None:
    """Refuses flags that say how to run, where runs are only reported.

    Raises:
      UserError: naming the first of them.
    """
    for flag in (_ONLY, _TUNE, _SETTINGS, _PROFILE):
        if flag.value not in (None, False):
            raise UserError(
                f"--{flag.name} is not allowed with --report, which runs nothing; "
                "allowed: one of them"
            )


def join_reports(sources: list[str], command: str, baseline: str) -> int:
    """Reports finished runs of several folders in the work folder; the exit code.

    Needs neither data nor JAX.

    Args:
      sources: folders of runs and studies.
      command: see `write_report`.
      baseline: likewise; where it is empty, that of the first folder's config.

    Raises:
      UserError: a folder that is not allowed, no finished run, or none of the baseline.
    """
    from fedmoe_jax.report.baseline import check_baseline
    from fedmoe_jax.report.folders import join
    from fedmoe_jax.report.outputs import write_all
    from fedmoe_jax.report.runs import load_run
    from fedmoe_jax.runtime.files import read_json
    from fedmoe_jax.runtime.folders import resolve_folder

    if not flags.FLAGS["workdir"].present:
        raise UserError(
            "--workdir is missing; allowed: with --report, the folder for the report"
        )
    workdir = resolve_folder("workdir", _WORKDIR.value)
    for name in ("config.json", "metrics.jsonl", "runs"):
        if (workdir / name).exists():
            raise UserError(
                f"workdir={workdir} is not allowed with --report, as it holds {name}; "
                "allowed: a folder without runs"
            )
    studies = [resolve_folder("report", source) for source in sources]
    folders = join(studies)
    first = read_json(studies[0] / "config.json").get("evaluation", {})
    if baseline:
        check_baseline([load_run(folder) for folder in folders], baseline)
    workdir.mkdir(parents=True, exist_ok=True)
    page = write_all(folders, workdir, command, baseline or first.get("baseline", ""))
    print(f"report: {page}")
    return 0


def join_hosts(config: ConfigDict, request: Mapping[str, Any]) -> None:
    """Joins the other processes, if there are any, and sets JAX up.

    Args:
      config: for `run.num_devices`.
      request: what this process was asked to do, in parts by name, to be the same on
        all.

    Raises:
      UserError: a mistake in the flags, or processes that do not fit together.
    """
    from fedmoe_jax.runtime import multihost
    from fedmoe_jax.runtime.origin import find_origin
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
    multihost.handshake(request, find_origin())


def name_command() -> str:
    """The command that started this process, to be given again."""
    python = os.path.relpath(sys.executable)  # where packages are, maybe a venv
    if python.startswith(os.pardir):
        python = "python"
    script, *words = sys.argv
    as_module = Path(script) == Path(__file__).with_name("__main__.py")
    program = ["-m", "fedmoe_jax"] if as_module else [script]
    return shlex.join([python, *program, *words])


def describe_loss(error: OSError, workdir: str) -> str:
    """A file that could not be read or written, and what that means for the run."""
    file = error.filename or f"a file in {workdir}"
    return (
        f"{file} cannot be used ({error.strerror or error}); allowed: a disk with room "
        "that can be read and written, then the same call goes on"
    )


def main(argv: list[str], stop: Stop) -> int:
    """Parses nothing more: flags are absl's. Returns the exit code."""
    if len(argv) > 1:
        return refuse(
            f"unexpected argument {argv[1]!r}; allowed: the flags that --help lists"
        )
    quiet_orbax()
    quiet_matplotlib()
    faulthandler.enable(2)  # absl's would write past `guard`
    command = name_command()
    if _REPORT.value is not None:
        from fedmoe_jax.runtime.files import flatten

        try:
            refuse_beside_report()
            fields = flatten(_CONFIG.value.to_dict())
            baseline = fields.get("evaluation.baseline", "")
            return join_reports(_REPORT.value, command, baseline)
        except UserError as error:
            return refuse(str(error))
        except OSError as error:
            return refuse(describe_loss(error, _WORKDIR.value))
    from fedmoe_jax.runtime import multihost
    from fedmoe_jax.runtime.files import flatten
    from fedmoe_jax.runtime.folders import resolve_folder
    from fedmoe_jax.train.workdir import check_free, check_plugins

    config, profile, only = _CONFIG.value, _PROFILE.value, _ONLY.value
    try:
        workdir = resolve_folder("workdir", _WORKDIR.value)
        if _SETTINGS.value is not None:
            from fedmoe_jax.train.tune import take_settings

            take_settings(config, _SETTINGS.value)
        if not _TUNE.value:
            from fedmoe_jax.train.compare import check_given

            check_given(config, config_flags.get_override_values(flags.FLAGS["config"]))
        request = {f"config.{k}": v for k, v in flatten(config.to_dict()).items()}
        request |= {"--workdir": str(workdir), "--profile": profile, "--only": only}
        join_hosts(config, request | {"--tune": _TUNE.value})
        multihost.on_leader(check_plugins, workdir)
        multihost.on_leader(check_free, workdir, _ONLY.value is not None)
        if run(config, workdir, command, stop, profile, only, _TUNE.value):
            return 0
    except UserError as error:
        return multihost.exit_all(refuse(str(error)))
    except OSError as error:
        return multihost.exit_all(refuse(describe_loss(error, _WORKDIR.value)))
    except Exception:
        multihost.await_news()
        traceback.print_exc()
        return multihost.exit_all(1)
    print(f"stopped, with what is done saved; to resume: {command}")
    return 3


def start() -> None:
    """Runs the program and exits."""
    gc.disable()  # until all is imported: walking the modules takes a second
    open_missing()
    heard = guard() if runs_with_others(sys.argv) else None
    stop = Stop()
    listen(stop, heard)  # before JAX is imported, which an interrupt would break off
    secure(on_reader_gone=stop.wish)
    app.run(functools.partial(main, stop=stop), flags_parser=parse_flags)
