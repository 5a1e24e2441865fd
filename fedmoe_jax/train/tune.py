"""Tuning: every strategy gets the same budget of settings, judged on validation.

Successive halving on one seed: all settings of a strategy for a third of the rounds,
then the better half of them for all rounds. The best of these is the strategy's
setting; test examples play no part.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import UserError, is_number, show
from fedmoe_jax.program import configure
from fedmoe_jax.report.tuning import Trial, split_rate
from fedmoe_jax.runtime import multihost
from fedmoe_jax.runtime.files import flatten, plain, read_json, write_json
from fedmoe_jax.runtime.folders import resolve_folder
from fedmoe_jax.train.compare import compare, make_member, split_strategy

VALIDATION = "validation_"  # measures of examples that clients set aside
MOST = 8  # settings of a strategy
FIRST = 3  # the first round of halving has a third of the rounds
Changes = Mapping[str, list[str]]  # by strategy
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rates": (is_number, "numbers, as (0.02, 0.05)"),
    "servers": (lambda x: isinstance(x, str), "changes, as ('', 'server.clip=1.0')"),
}


def check_tune(config: ConfigDict) -> None:
    """Raises UserError unless the config says what is to be tried."""
    allowed = ("rates", "servers", "measure")
    if "tune" not in config or set(config.tune) != set(allowed):
        raise UserError(
            "--tune is not allowed; allowed: with a comparison whose config has "
            f"{', '.join(f'tune.{name}' for name in allowed)}, as "
            "configs/compare.py"
        )
    for name, (fits, text) in FIELDS.items():
        values = config.tune[name]
        if not isinstance(values, tuple) or not values or not all(map(fits, values)):
            raise UserError(
                f"tune.{name}={show(values)} is not allowed; allowed: {text}, at least "
                "one"
            )
    measure = config.tune.measure
    if str(measure).startswith(VALIDATION) and not config.partition.validation_share:
        raise UserError(
            f"tune.measure={show(measure)} is not allowed with partition."
            "validation_share=0.0; allowed: with a share above 0, such as 0.2"
        )


def list_settings(config: ConfigDict) -> dict[str, list[str]]:
    """The settings that are tried for each strategy: client rates x servers.

    Of settings that a strategy's own `configure` makes alike the first counts.

    Raises:
      UserError: a change that is not allowed, or more than `MOST` settings.
    """
    found = {}
    for strategy in config.compare.strategies:
        known: dict[str, str] = {}
        for rate, server in itertools.product(config.tune.rates, config.tune.servers):
            own, change = split_strategy(server)
            if own not in ("", strategy):
                continue
            text = ",".join(filter(None, (f"client.learning_rate={rate:g}", change)))
            used = configure(make_member(config, strategy, text, 0))
            key = json.dumps(plain(used.to_dict()), sort_keys=True)
            known.setdefault(key, text)
        if len(known) > MOST:
            raise UserError(
                f"tune.rates={config.tune.rates} and tune.servers="
                f"{config.tune.servers} are {len(known)} settings of {strategy}; "
                f"allowed: at most {MOST}"
            )
        found[strategy] = list(known.values())
    return found


def plan_rounds(config: ConfigDict) -> tuple[int, int]:
    """Rounds of the first and of the second half of the budget."""
    step = config.eval_every
    return math.ceil(config.num_rounds / FIRST / step) * step, config.num_rounds


def plan_trials(config: ConfigDict, changes: Changes, rounds: int) -> ConfigDict:
    """The comparison of these changes of each strategy, on the first seed."""
    trial = ConfigDict(config.to_dict())
    del trial.tune
    trial.num_rounds = rounds
    trial.compare.seeds = tuple(config.compare.seeds)[:1]
    trial.compare.changes = tuple(
        f"{strategy}: {change}" for strategy in changes for change in changes[strategy]
    )
    return trial


def read_trials(
    folders: Iterable[Path], changes: Changes, rounds: int, measure: str
) -> list[Trial]:
    """The values of finished trials, whose folders are in the order of the changes.

    Raises:
      UserError: the runs do not have the measure.
    """
    pairs = [(strategy, change) for strategy in changes for change in changes[strategy]]
    trials = []
    for folder, (strategy, change) in zip(folders, pairs, strict=True):
        summary = read_json(folder / "summary.json")
        value = summary.get(f"final_{measure}")
        if value is None:
            raise UserError(
                f"tune.measure={show(measure)} is in no row of {folder}; allowed: a "
                "measure of an evaluation, those of validation examples with "
                "partition.validation_share > 0"
            )
        value = math.nan if summary.get("diverged") else float(value)
        made_by = flatten(summary.get("made_by", {}))
        trials.append(Trial(strategy, change, rounds, value, made_by))
    return trials


def rank(trials: Iterable[Trial], strategy: str, measure: str) -> list[Trial]:
    """The trials of a strategy, the best first; one that diverged is the last.

    Less of a measure may be better, as of bits.
    """
    own = [trial for trial in trials if trial.strategy == strategy]
    known = MEASURES.get(f"final_{measure}")
    sign = -1 if known and known.better < 0 else 1
    worth = lambda trial: -math.inf if math.isnan(trial.value) else sign * trial.value
    return sorted(own, key=worth, reverse=True)


def keep_half(
    trials: Iterable[Trial], strategies: Iterable[str], measure: str
) -> dict[str, list]:
    """The changes of the better half of each strategy's trials, rounded up."""
    trials, kept = list(trials), {}
    for strategy in strategies:
        ranked = rank(trials, strategy, measure)
        kept[strategy] = [t.change for t in ranked[: math.ceil(len(ranked) / 2)]]
    return kept


def describe_choice(
    trials: Sequence[Trial], strategies: Sequence[str], config: ConfigDict
) -> Iterator[str]:
    """A line for each strategy: its setting, and whether a better rate may lie beyond.

    Args:
      trials: of all rounds.
      strategies: names.
      config: with `tune`.
    """
    rates = sorted(config.tune.rates)
    for strategy in strategies:
        best = rank(trials, strategy, config.tune.measure)[0]
        rate, _ = split_rate(best.change)
        text = f"{strategy}: {best.change}, {config.tune.measure} {best.value:.3f}"
        ends = {rates[0]: "lowest", rates[-1]: "highest"}
        if len(rates) > 1 and rate in ends:
            text += f"; the {ends[rate]} of tune.rates, a better one may lie beyond"
        yield text


def tune(
    config: ConfigDict,
    workdir: Path,
    *,
    stop: Callable[[], bool],
    profile: bool,
) -> tuple[list[Trial], bool]:
    """Tunes every strategy of a comparison, or goes on with it.

    `workdir` gets the two comparisons, and with the second `settings.json`, which
    `--settings` reads: `compare.settings` of the study that is tuned so.

    Args:
      config: with the groups `compare` and `tune`.
      workdir: its folder.
      stop: see `compare`.
      profile: see `compare`.

    Returns:
      The trials so far, and whether all are done.

    Raises:
      UserError: what is tried, or a run of it, is not allowed.
    """
    check_tune(config)
    changes, trials = multihost.run_on_all(list_settings, config), []
    measure, strategies = config.tune.measure, list(config.compare.strategies)
    names = ("third", "whole")
    for name, rounds in zip(names, plan_rounds(config), strict=True):
        trial = plan_trials(config, changes, rounds)
        folders, whole = compare(trial, workdir / name, stop=stop, profile=profile)
        if not whole:
            return trials, False
        found = multihost.on_leader(read_trials, folders, changes, rounds, measure)
        found = [Trial(*values) for values in found]
        trials += found
        changes = keep_half(found, strategies, measure)
    best = {strategy: rank(found, strategy, measure)[0] for strategy in strategies}
    settings = [f"{s}: {t.change},tuned={measure}" for s, t in best.items()]
    if multihost.is_leader():
        write_json(workdir / "settings.json", {"settings": settings})
    return trials, True


def take_settings(config: ConfigDict, path: str) -> None:
    """Puts the settings that `--tune` has written into a comparison, in place.

    Those of strategies that it lacks are left out.

    Raises:
      UserError: this is no comparison, or the file holds no settings.
    """
    if "compare" not in config:
        raise UserError(
            f"--settings={path} is not allowed; allowed: with a comparison, as of "
            "--config=configs/compare.py"
        )
    file = resolve_folder("settings", path)
    if not file.is_file():
        raise UserError(
            f"--settings={path} is not allowed; allowed: settings.json of --tune"
        )
    settings = read_json(file).get("settings")
    listed = isinstance(settings, list)
    if not listed or not all(isinstance(text, str) for text in settings):
        raise UserError(f"{file} holds no settings; allowed: what --tune has written")
    known = config.compare.strategies
    chosen = (text for text in settings if split_strategy(text)[0] in known)
    with config.unlocked():
        config.compare.settings = tuple(chosen)
