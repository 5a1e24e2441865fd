"""Every file in configs/ is a valid study; every bad value is refused by its name."""

import importlib
import math
import operator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from fedmoe_jax import api
from fedmoe_jax.config import (
    describe_field,
    list_idle_fields,
    list_options,
    validate,
)
from fedmoe_jax.data.images import label_images
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.export import export
from fedmoe_jax.federation import make_devices, make_federation, make_partition
from fedmoe_jax.options import TRACED, Range, UserError
from fedmoe_jax.program import build_program, make_hyper
from fedmoe_jax.pruning.scores import KINDS as PRUNINGS
from fedmoe_jax.report.baseline import check_baseline
from fedmoe_jax.report.runs import Run, name_runs
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.tasks import TASKS
from fedmoe_jax.train import plan as planning
from fedmoe_jax.train import run as train
from fedmoe_jax.train.compare import list_members

FILES = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "configs").glob("*.py")
    if path.stem != "__init__"
)
ARGUMENTS = {
    "compare": ("", "digits", "smoke", "digits,smoke"),
    "systems": ("", "claims", "digits", "digits,smoke", "smoke"),
    "figure3": ("", "fifty", "digits", "fifty,digits,smoke", "smoke"),
    "causes": ("idle", "gate", "personal", "gate,digits,smoke", "smoke"),
    "weights": ("", "full", "digits,smoke", "full,digits", "smoke"),
    "scores": ("", "full", "digits,smoke", "smoke"),
    "capacity": ("", "full", "digits,smoke", "smoke"),
    "stress": ("", "full", "digits", "full,digits,smoke", "smoke"),
    "channel": ("", "gate", "digits", "gate,digits", "gate,smoke", "smoke"),
    "languages": ("markov", "markov,fitness", "markov,smoke", "fitness,smoke", "smoke"),
    "fairness": ("", "digits", "digits,smoke", "smoke"),
    "lora": ("base,markov", "base,smoke"),
    "limits": ("", "digits", "smoke"),
    "privacy": (
        "",
        "digits",
        "groups,digits",
        "members,digits",
        "digits,smoke",
        "groups,smoke",
        "smoke",
    ),
    "published": ("niid", "flex_moe", "pfedmoe", "pfedmoe,smoke", "smoke"),
    "pruning": ("", "digits", "smoke"),
    "recipe": ("", "skew,digits", "digits,smoke", "smoke"),
    "regimes": ("", "skew", "rotation,digits", "mixed,digits,smoke", "both,smoke"),
    "shakespeare": ("markov", "markov,smoke", "smoke"),
}
STUDIES = [(file, a) for file in FILES for a in ARGUMENTS.get(file, ("", "smoke"))]


def get_config(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def runs_of(config):
    """The configs of every run of a study."""
    if "compare" in config:
        return [member.config for member in list_members(config)]
    return [config]


def fields_of(config):
    return flatten(config.to_dict())


DEFAULTS = fields_of(default.get_config())


def changed(**fields):
    config = default.get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), STUDIES)
def test_every_study_is_valid(name, argument):
    runs = runs_of(get_config(name, argument))
    assert runs
    for config in runs[:: 1 + runs[-1].seed]:  # of seeds 0 to the last one
        validate(config)


def name_rows(config):
    """The labels that a report of a study's runs has."""
    runs = []
    for member in list_members(config):
        idle = [*set().union(*list_idle_fields(member.config))]
        of, fields = member.config.strategy, member.config.to_dict()
        runs.append(Run(fields, [], {"idle": idle}, {}, Path(member.name), of, {}))
    return {run.label for run in name_runs(runs)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), STUDIES)
def test_the_baseline_of_every_study_is_one_of_its_rows(name, argument):
    config = get_config(name, argument)
    if "compare" in config and config.evaluation.baseline:
        assert config.evaluation.baseline in name_rows(config)


def test_links_of_a_device_are_no_part_of_what_a_server_estimates():
    fields = {"profile.kind": "estimated", "profile.links": "device"}
    with pytest.raises(UserError, match="profile.links='device'.*allowed: round"):
        validate(changed(**fields))


@pytest.mark.parametrize("argument", ["", "amounts"])
def test_studies_of_text_from_folders_are_valid(argument):
    runs = runs_of(get_config("languages", argument))
    kilobytes = {config.data.kilobytes for config in runs}
    assert kilobytes == ({80, 200, 800} if argument else {80})
    for config in runs:
        validate(config)


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory):
    """The base of `configs/lora.py`, trained for a few rounds."""
    folder = tmp_path_factory.mktemp("lora")
    run = api.run(get_config("lora", "base,smoke"))
    export(run, folder / "base")
    return folder / "base"


def get_smoke(name, request):
    """A short study, with a base where it asks for one."""
    config = get_config(name, "smoke")
    if name == "lora":
        config.model.base = str(request.getfixturevalue("trained_base"))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["markov", "full,markov", "smoke", "full,smoke"])
def test_studies_of_low_rank_experts_build_on_the_base_that_they_train(
    argument, trained_base
):
    study = get_config("lora", argument)
    study.model.base = str(trained_base)
    assert study.model.kind == ("finetune" if "full" in argument else "lora")
    for config in runs_of(study):
        program = planning.plan_run(config, build_mesh(1)).program
        assert program.costs.frozen_bytes > 0


@pytest.mark.parametrize("argument", ["", "full", "base"])
def test_studies_of_low_rank_experts_on_folders_are_valid(argument):
    for config in runs_of(get_config("lora", argument)):
        validate(config)


def test_a_study_is_of_a_base_or_of_full_fine_tuning():
    with pytest.raises(ValueError, match="'base,full' has both; allowed: base or full"):
        get_config("lora", "base,full")


def test_all_regimes_are_a_comparison_of_their_kinds():
    config = get_config("regimes", "digits")
    runs, kinds = runs_of(config), importlib.import_module("configs.regimes").KINDS
    assert len(config.compare.changes) == len(kinds) and "tune" not in config
    for kind in kinds:
        alone = fields_of(get_config("regimes", f"{kind},digits"))
        of = [fields_of(run) for run in runs]
        fields = ("partition.kind", "partition.alpha", "groups.kind", "upcycle.rounds")
        same = [run for run in of if all(run[f] == alone[f] for f in fields)]
        assert len(same) == len(runs) / len(kinds)


def test_limits_are_those_of_permuted_labels():
    with pytest.raises(ValueError, match="'skew' is unknown; allowed: digits or"):
        get_config("limits", "skew")
    with pytest.raises(ValueError, match="'digits' is unknown; allowed: digits or"):
        get_config("limits", "classes,digits")
    for argument in ("", "digits", "classes"):
        study = get_config("limits", argument)
        assert {run.groups.kind for run in runs_of(study)} == {"permuted"}
    assert {run.data.name for run in runs_of(study)} == {"digit_pairs"}
    assert {run.groups.count for run in runs_of(study)} == {4, 16}


def test_pruning_is_compared_with_whole_experts_at_equal_room():
    runs = list(runs_of(get_config("pruning", "digits")))
    kinds = {run.pruning.kind for run in runs if run.strategy == "load_balanced"}
    assert kinds == set(PRUNINGS)
    whole = {run.devices.model_scale for run in runs if run.pruning.kind == "none"}
    pruned = {run.devices.model_scale for run in runs if run.pruning.kind != "none"}
    assert len(pruned) == 1 and pruned < whole
    assert {run.max_held == run.num_experts for run in runs} == {True}


def test_the_recipe_is_taken_apart_one_field_at_a_time():
    study = get_config("recipe", "skew,digits")
    assert {run.partition.kind for run in runs_of(study)} == {"dirichlet"}
    fields = ("upcycle.rounds", "gate.bias", "loss.calibration")
    rows = {
        tuple(fields_of(run)[f] for f in fields)
        for run in runs_of(study)
        if run.strategy == "prototypes"
    }
    recipe, plain = (10, 5.0, 1.0), (0, 0.0, 0.2)
    alone = {(10, 0.0, 0.2), (0, 5.0, 0.2), (0, 0.0, 1.0)}
    assert rows == {
        recipe,
        plain,
        *alone,
        (0, 5.0, 1.0),
        (10, 0.0, 1.0),
        (10, 5.0, 0.2),
    }


def test_regimes_are_of_one_kind():
    with pytest.raises(ValueError, match="'skew,both' has several kinds; allowed"):
        get_config("regimes", "skew,both")


def test_amounts_are_of_text_from_folders():
    with pytest.raises(ValueError, match="'amounts' is not allowed with"):
        get_config("languages", "markov,amounts")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), STUDIES)
def test_every_study_builds(name, argument):
    study = get_config(name, argument)
    first = study.compare.strategies[0] if "compare" in study else study.strategy
    done = set()
    for config in runs_of(study):
        new = config.strategy == first or config.strategy not in done
        done.add(config.strategy)
        if config.seed == 0 and new:
            cifar = config.data.name == "cifar10"
            load = draw_images if cifar else load_dataset
            data = load(config.data)
            if cifar:
                with config.unlocked():
                    config.data.public = min(config.data.public, 50)
                    config.partition.min_size = 1
            federation = make_federation(config, data, make_partition(config, data))
            program = build_program(config, data, federation, build_mesh(1))
            assert program.costs.expert_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), STUDIES)
def test_the_baseline_of_a_study_is_one_of_its_rows(name, argument):
    study = get_config(name, argument)
    if "compare" not in study or "smoke" in argument:
        return  # short studies leave rows out
    runs = [
        Run(each.to_dict(), [], {}, {}, Path(), each.strategy, {})
        for each in runs_of(study)
    ]
    if study.evaluation.baseline:
        check_baseline(runs, study.evaluation.baseline)


@pytest.mark.parametrize("name", FILES)
def test_smoke_is_the_same_study_but_shorter(name):
    first = ARGUMENTS.get(name, ("",))[0]
    smoke = ",".join(filter(None, (first, "smoke")))
    long, short = (fields_of(get_config(name, a)) for a in (first, smoke))
    assert short.keys() == long.keys()
    counts = {"num_rounds", "eval_every", "chunk_rounds", "local_steps"}
    differing = {field for field in long if long[field] != short[field]}
    counts |= {"fedmoe.warm_up", "fedmoe.period", "fedjets.steps"}
    counts |= {"drift.start", "drift.rounds", "evaluation.finetune"}
    counts |= {"upcycle.rounds", "local_epochs"}
    rows = {"compare.strategies", "compare.changes", "compare.seeds"}
    rows |= {"evaluation.baseline"}
    assert differing <= counts | rows | {"checkpoint.every"}
    assert short["num_rounds"] < long["num_rounds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_smoke_has_few_programs(name, monkeypatch, request):
    """Compiling one takes 8 to 20 s on 2 cores, and the study less than a minute."""
    config = get_smoke(name, request)
    if "compare" not in config:
        return
    if config.data.name == "cifar10":
        monkeypatch.setitem(planning.DATASETS, "cifar10", draw_images)
    config.data.public = min(config.data.public, 50)
    waves = planning.plan_waves(list_members(config))
    programs = {wave.program for wave in waves}  # which are kept for other waves
    assert len(programs) <= 3
    assert sum(program.sizes.num_experts > 1 for program in programs) <= 2


@pytest.mark.parametrize("name", FILES)
def test_unknown_argument_is_refused(name):
    with pytest.raises(ValueError, match="'smok' is unknown; allowed: ") as caught:
        get_config(name, "smok")
    words = ",".join(ARGUMENTS.get(name, ("smoke",))).split(",")
    assert all(word in str(caught.value).partition("allowed: ")[2] for word in words)


@pytest.mark.parametrize(
    ("strategy", "fields", "text"),
    [
        ("fedmoe", {"fedmoe.warm_up": 41, "num_rounds": 40}, "fedmoe.warm_up=41"),
        ("fedjets", {"data.public": 9, "num_clients": 4}, "num_experts=8"),
        ("fedjets_no_anchors", {"data.public": 0}, "data.public=0"),
        ("scaffold", {"client.optimizer": "adam"}, "client.optimizer='adam'"),
        ("fednova_active", {"client.optimizer": "adam"}, "client.optimizer='adam'"),
        ("fedmoe_da", {"num_active": 1}, "num_active=1"),
        (
            "fedjets",
            {"data.public": 9, "gate.mode": "personal"},
            "gate.mode='personal'",
        ),
        ("hfedmoe", {"gate.mode": "holder_rows"}, "gate.mode='holder_rows'"),
        ("fedmoe", {"gate.mode": "personal"}, "gate.mode='personal'"),
        ("random", {"flex_moe.low": 1.2}, "flex_moe.low=1.2"),
    ],
)
def test_a_strategy_refuses_what_it_cannot_work_with(strategy, fields, text):
    fields = {"cohort_size": 4} | fields
    if strategy != "random":  # some values no strategy can work with
        validate(changed(**{"strategy": "random", **fields}))
    with pytest.raises(UserError, match=f"{text} is not allowed.*; allowed: "):
        validate(changed(**{"strategy": strategy, **fields}))


def outside(allowed):
    """Values just outside of what a field allows."""
    if allowed is None:  # checked elsewhere
        return []
    if not isinstance(allowed, Range):
        return ["", "bogus"]
    low = allowed.low if allowed.open_low else allowed.low - 1
    if allowed.high == math.inf:
        return [low]
    return [low, allowed.high if allowed.open_high else allowed.high + 1]


BAD = [(n, v) for n, o in list_options().items() for v in outside(o.allowed)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_value_out_of_range_is_refused_by_name(name, value):
    value = type(DEFAULTS[name])(value)
    with pytest.raises(UserError) as caught:
        validate(changed(**{name: value}))
    text = str(caught.value)
    assert text.startswith(f"{name}={value!r} is not allowed; allowed: ")
    assert "\n" not in text


WRONG_KINDS = {
    bool: (1, 0.0, "True", None),
    int: (1.5, 32.0, True, "1", None, [1], (1,), 2**31, -(2**40), 10**25, 10**5000),
    float: (True, "0.5", None, [0.5], (0.5,), math.nan, math.inf, 1e39),
    str: (1, None, True, ("digits",)),
    tuple: ("phone", None, 1, (None,), (True,), ((),)),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_value_of_another_kind_is_refused_by_name(name):
    fields = default.get_config().to_dict()
    group, _, field = name.rpartition(".")
    for value in WRONG_KINDS[type(DEFAULTS[name])]:
        (fields[group] if group else fields)[field] = value
        config = ConfigDict(fields, type_safe=False)
        with pytest.raises(UserError) as caught:
            validate(config)
        text = str(caught.value)
        plugged = name == "plugins" and text.startswith("the run has --plugins=")
        assert plugged or text.startswith(f"{name}="), text
        assert "; allowed: " in text and "\n" not in text and len(text) < 700


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_clients", 20.5, "whole numbers >= 1, at most 2147483647"),
        ("seed", 10**20, "whole numbers [0, 2147483647]"),
        ("client.prox", None, "numbers >= 0"),
        ("usage.decay", "much", "numbers [0, 1]"),
        ("run.tensorboard", 1, "True, False"),
        ("data.name", 3, "text"),
        ("data.dir", 3, "text"),
        ("devices.shares", (1, None), "tuples such as (0.4, 0.4, 0.2)"),
    ],
)
def test_a_refusal_says_what_kind_is_allowed(name, value, told):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value) == f"{name}={value!r} is not allowed; allowed: {told}"
    assert describe_field(name) == told


def test_a_baseline_begins_with_a_strategy():
    for label in ("", "greedy", "greedy weights.usage=0.3"):
        validate(changed(**{"evaluation.baseline": label}))
    told = r"evaluation.baseline='greedily' is not allowed; allowed: '', or the name"
    with pytest.raises(UserError, match=told):
        validate(changed(**{"evaluation.baseline": "greedily"}))


def test_describe_field_lists_the_fields_of_a_group():
    assert describe_field("usage") == "usage.decay"
    assert describe_field("nothing") == ""


@pytest.mark.parametrize("value", [1, 0, np.float32(0.5), np.float64(0.25)])
def test_a_whole_number_or_one_of_numpy_is_a_number(value):
    config = default.get_config()
    with config.ignore_type():
        config.client.prox = value
        config.seed = np.int64(3)
    validate(config)


FLOATS = [n for n, v in DEFAULTS.items() if isinstance(v, float)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_must_be_finite(name, value):
    with pytest.raises(UserError, match=f"^{name}={value} is not allowed"):
        validate(changed(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channel.backoff", 1e-60),  # 0 as a float32
        ("devices.buffer", 1 - 1e-12),  # 1
        ("channel.bandwidth", 1e300),  # infinite
        ("num_rounds", 10**400),
    ],
)
def test_numbers_must_be_allowed_as_the_float32_that_a_run_reads(name, value):
    with pytest.raises(UserError) as caught:
        validate(changed(**{name: value}))
    told = str(caught.value)
    assert told.startswith(f"{name}={value!r} is not allowed; allowed: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition.alpha", 1e-6),
        ("usage.decay", 0.0),
        ("usage.decay", 1.0),
        ("fitness.rate", 1.0),
        ("client.momentum", 0.0),
        ("local_epochs", 0.0),
        ("local_epochs", 0.5),
        ("model.stem_dropout", 0.0),
        ("model.expert_dropout", 0.99),
        ("devices.buffer", 0.0),
        ("seed", 2**31 - 1),
    ],
)
def test_ends_of_ranges_are_allowed(name, value):
    validate(changed(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("cohort_size", 21, "1 to num_clients=20"),
        ("max_held", 9, "1 to num_experts=8"),
        ("num_active", 5, "1 to max_held=4"),
        (
            "num_rounds",
            41,
            "multiples of eval_every=2, or all with eval_every=1 and chunk_rounds=1",
        ),
        ("chunk_rounds", 4, "multiples of chunk_rounds=4, or all with chunk_rounds=2"),
        (
            "checkpoint.every",
            3,
            "multiples of chunk_rounds=2, or all with chunk_rounds=1",
        ),
    ],
)
def test_fields_that_contradict_each_other(name, value, told):
    with pytest.raises(UserError) as caught:
        validate(changed(**{name: value}))
    assert str(caught.value).endswith(f"allowed: {told}")


def test_a_drift_is_one_of_a_task(monkeypatch):
    with pytest.raises(UserError, match="^drift.images='typos' .* none, rotate, blur"):
        validate(changed(**{"drift.images": "typos"}))
    typing = TASKS["images"]._replace(drifts=(("typos", lambda rows, amount: rows),))
    monkeypatch.setitem(TASKS, "texts", typing)
    validate(changed(**{"drift.images": "typos"}))


def test_a_drift_must_end_within_the_run():
    fields = {"drift.labels": 0.5, "drift.rounds": 10, "num_rounds": 40}
    validate(changed(**fields, **{"drift.start": 30}))
    validate(changed(**{"drift.start": 400}))  # nothing drifts
    with pytest.raises(UserError, match=r"^drift.start=31 is not allowed; .*= 30"):
        validate(changed(**fields, **{"drift.start": 31}))
    with pytest.raises(UserError, match="^drift.rounds=41 is not allowed; .*=40"):
        validate(changed(**fields | {"drift.rounds": 41, "drift.start": 0}))
    with pytest.raises(UserError, match="^drift.start=31 is not allowed"):
        images = {"drift.labels": 0.0, "drift.images": "blur", "drift.start": 31}
        validate(changed(**fields | images))


def test_no_more_than_all_contrast_can_be_lost():
    fields = {"drift.images": "contrast", "drift.strength": 1.5}
    with pytest.raises(UserError, match="^drift.strength=1.5 is not allowed with"):
        validate(changed(**fields))


def test_devices_of_ones_own_are_read_and_checked(tmp_path):
    path = tmp_path / "devices.csv"
    head = "memory,flops,upload,download,latency,power,radio,tier\n"
    rows = [f"{c + 1}e9,1e12,1e7,2e7,0.01,5,1,mine\n" for c in range(20)]
    path.write_text(head + "".join(rows))
    config = changed(**{"devices.csv": str(path), "devices.free_memory": 0.5})
    devices, names = make_devices(config)
    assert names == ("mine",) and devices.memory.shape == (20,)
    np.testing.assert_allclose(devices.memory, 0.5e9 * np.arange(1, 21), rtol=1e-6)
    path.write_text(head + rows[0].replace("1e7", "-1"))
    with pytest.raises(UserError, match="devices.csv.*upload") as caught:
        make_devices(config)
    assert "\n" not in str(caught.value)


def test_numbers_of_the_world_are_traced_by_group_and_field():
    config = changed(**{"pressure.left": 0.25, "profile.refresh": 7})
    hyper = make_hyper(config)
    pressure = {"share": 0, "persistence": 0.5, "left": 0.25}
    assert hyper.pressure._asdict() == pressure
    assert hyper.profile.refresh == 7 and not hasattr(hyper.profile, "kind")
    assert all(x.dtype == np.float32 for x in hyper.pressure)


def test_hyperparameters_are_read_from_their_fields():
    """Every traced field, as float32 or int32, by its own dotted name."""
    traced = [n for n, o in list_options().items() if o.scope == TRACED]
    fields = {
        "client.learning_rate": 0.125,
        "server.learning_rate": 0.5,
        "loss.load": 2.0,
        "fitness.rate": 0.75,
        "weights.usage": 6.0,
        "devices.buffer": 0.3125,
        "profile.refresh": 7,
        "pressure.left": 0.25,
    }
    assert set(fields) < set(traced)
    config = changed(**fields)
    values, hyper = fields_of(config), make_hyper(config)
    assert hyper.strategy == 0
    assert len(jax.tree.leaves(hyper)) == 1 + len(traced)
    for name in traced:
        found = operator.attrgetter(name)(hyper)
        assert found == np.float32(fields.get(name, values[name])), name
        whole = isinstance(values[name], int)
        assert found.dtype == (np.int32 if whole else np.float32), name


def draw_images(options):
    """As many random images of CIFAR-10's shape as 20 clients need."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (400, 32, 32, 3), np.uint8)
    y = np.arange(400, dtype=np.int32) % 10
    names = tuple(str(label) for label in range(10))
    return label_images(x[:300], y[:300], x[300:], y[300:], names)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_study_can_be_traced(file, monkeypatch, request):
    """The first run of every study: a chunk of rounds and an evaluation, by shape."""
    config = runs_of(get_smoke(file, request))[0]
    if config.data.name == "cifar10":
        monkeypatch.setitem(planning.DATASETS, "cifar10", draw_images)
    with config.unlocked():
        config.data.public = min(config.data.public, 50)
    (wave,) = planning.plan_waves([planning.Member(file, config)])
    job = train.build_job(wave, [None])
    _, metrics = jax.eval_shape(job.programs.run_rounds, job.state, *job.inputs)
    scores = jax.eval_shape(job.programs.evaluate, job.state, *job.inputs)
    assert metrics["train_loss"].shape == (1, config.chunk_rounds)
    assert scores["global_accuracy"].shape == (1,)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "rotation", "count": 5}, "groups.count=5 .* allowed: 2 to 4$"),
        ({"kind": "rotation_permuted", "count": 5}, "groups.count=5 .* 2 to 4$"),
        ({"kind": "inversion"}, "groups.count=4 .*'inversion'; allowed: 2$"),
        ({"kind": "permuted", "count": 21}, "with num_clients=20; allowed: at most"),
    ],
)
def test_groups_that_would_not_differ_are_refused(fields, told):
    fields = {f"groups.{name}": value for name, value in fields.items()}
    with pytest.raises(UserError, match=told):
        validate(changed(**fields))
    validate(changed(**fields | {"groups.kind": "none"}))
    validate(changed(**fields | {"groups.count": 2}))
