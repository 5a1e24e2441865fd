"""Every default of the tests: configs, hyperparameters, sizes, evidence, whole runs.

What a test leaves out has its value from here, and nothing else has defaults.
"""

import functools
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from configs import compare as study
from configs import default
from fedmoe_jax import program as program_file
from fedmoe_jax.base import PARTS, Data, Model, Parts
from fedmoe_jax.broadcast import broadcast, gather_evidence
from fedmoe_jax.capacity import Belief, Capacity
from fedmoe_jax.client import build_client_update
from fedmoe_jax.data.images import label_images
from fedmoe_jax.models.flops import shape_params, trace_model
from fedmoe_jax.models.image_moe import apply_parts, build_model
from fedmoe_jax.options import replace
from fedmoe_jax.program import Program, build_program, configure, take_frozen
from fedmoe_jax.reply import Reply
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.report.summary import SPENT
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.state import init_state, run_stage
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.tasks import find_task
from fedmoe_jax.tasks.batches import BatchShapes
from fedmoe_jax.train import plan as planning
from fedmoe_jax.train.run import build_job, train
from fedmoe_jax.types import (
    AlignState,
    Assignment,
    ClientInput,
    ClientUpdate,
    Devices,
    Evidence,
    Federation,
    Feedback,
    Hyper,
    SimState,
    Sizes,
    Times,
)
from fedmoe_jax.world import PROCESSES
from fedmoe_jax.world.costs import Costs, count_costs
from fedmoe_jax.world.outcome import BROKEN, MERGED, Outcome
from fedmoe_jax.world.step import observe

N, C, E, K, A, T, B, R = 10, 4, 4, 2, 2, 2, 4, 2
NO_CLASS = 999
TINY = {
    "data.name": "synthetic",
    "partition.kind": "iid",
    "num_clients": N,
    "cohort_size": C,
    "num_experts": E,
    "max_held": K,
    "num_active": A,
    "local_steps": T,
    "batch_size": B,
    "chunk_rounds": R,
    "model.stem_width": 8,
    "model.expert_width": 4,
    "model.feature_width": 4,
    "devices.model_scale": 1e5,  # some clients can hold one expert, some two
    "data.public": 8,
    "fedjets.steps": 2,
    "run.num_devices": 1,
}

# Whole runs on the digits.
SMALL = {
    "num_rounds": 4,
    "eval_every": 2,
    "chunk_rounds": 1,
    "num_clients": 4,
    "cohort_size": 3,
    "num_experts": 3,
    "max_held": 2,
    "local_steps": 2,
    "batch_size": 4,
    "partition.alpha": 1.0,
    "model.stem_width": 4,
    "model.expert_width": 4,
    "model.feature_width": 4,
    "checkpoint.every": 2,
    "run.num_devices": 1,
}

# A world in which everything happens.
STORM = {
    "devices.overload": "lose",
    "devices.free_memory": 0.1,
    "devices.deadline": 600.0,
    "late.kind": "stale",
    "profile.kind": "estimated",
    "pressure.share": 0.3,
    "background.most": 0.5,
    "bandwidth.spread": 0.5,
    "availability.share": 0.8,
    "availability.persistence": 0.5,
    "availability.swing": 0.2,
    "availability.capacity_bias": 0.2,
    "availability.dropout": 0.2,
    "channel.kind": "wireless",
    "channel.csi": 0.9,
    "channel.backoff": 0.7,
    "drift.labels": 0.5,
    "drift.images": "rotate",
    "drift.start": 0,
    "drift.rounds": 2,
    "reaction.kind": "hasten",
}

# Compiles as without the flags of conftest, under which sums may be rounded otherwise.
USERS_OPTIONS = {"xla_backend_optimization_level": 3}
if version("jaxlib").startswith("0.10."):
    USERS_OPTIONS["xla_cpu_use_fusion_emitters"] = True


# Few values make ties, the free ones find signs and magnitudes. XLA on CPU reads
# subnormal numbers as zero, so they are ties there and not in NumPy.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf])
FREE = st.floats(width=32, allow_subnormal=False)


@functools.cache
def find_importable():
    """The checkout as PYTHONPATH takes it: a link where its folder has a colon."""
    root = Path(__file__).parents[1]
    if os.pathsep not in str(root):
        return str(root)
    link = Path(tempfile.mkdtemp(prefix="fedmoe_jax-")) / "checkout"
    link.symlink_to(root)
    return str(link)


def any_scores(*shape):
    """A Hypothesis strategy of float32 arrays, all ties or all free."""
    draw = lambda elements: hnp.arrays(np.float32, shape, elements=elements)
    return st.one_of(draw(TIED), draw(FREE))


# The sizes that functions of one layer are tested with.
SIZES = Sizes(
    num_clients=10,
    cohort_size=6,
    num_layers=1,
    num_experts=5,
    max_held=3,
    num_active=2,
    local_steps=2,
    batch_size=8,
    num_strata=4,
    num_groups=1,
    max_capacity=3,
    gate_width=3,
)

# 500 bytes beside the experts, 1,000 of each; 10 FLOPs beside them, 20 of each.
COSTS = Costs(
    stem_bytes=300.0,
    head_bytes=100.0,
    gate_bytes=100.0,
    expert_bytes=1000.0,
    frozen_bytes=0.0,
    shared_flops=10.0,
    expert_flops=20.0,
    frozen_flops=0.0,
    fixed_flops=0.0,
    fixed_expert_flops=0.0,
    dense_flops=27.0,
    travel_bytes=500.0,
    copies=1,
    num_layers=1,
)


def make_config(**changes):
    """The default config with some fields, named with dots, changed."""
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    return config


def make_lora(base, **changes):
    """A config of low-rank experts on a base, for text of four languages."""
    fields = {
        "data.name": "markov",
        "data.length": 12,
        "model.kind": "lora",
        "model.base": str(base),
        "model.lora_rank": 3,
        "model.lora_attention": 2,
        "partition.kind": "natural",
        "num_clients": 8,
        "cohort_size": 4,
        "num_rounds": 4,
        "chunk_rounds": 1,
        "eval_every": 2,
        "checkpoint.every": 1,
        "client.optimizer": "adamw",
        "client.learning_rate": 0.01,
        "run.tensorboard": False,
        "run.num_devices": 1,
    }
    return make_config(**fields | changes)


def make_options(**changes):
    """The default config's group `data` with some fields changed."""
    options = default.get_config().data
    options.update(changes)
    return options


def train_tokenizer(text, size=300):
    """Byte pairs of a text, which encode every text without loss."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def write_tokenizer(folder, tokenizer):
    """The path of a tokenizer's file."""
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def tiny_config(**changes):
    config = default.get_config("smoke")
    config.update_from_flattened_dict(TINY | changes)
    return config


def make_hyper(**changes) -> Hyper:
    """The default config's numbers, some changed: `fitness={"rate": 0.5}`."""
    hyper = program_file.make_hyper(make_config())
    cast = lambda old, new: jnp.asarray(new, old.dtype)
    for name, change in changes.items():
        old = getattr(hyper, name)
        if isinstance(change, dict):
            change = {
                field: cast(getattr(old, field), change[field]) for field in change
            }
        else:
            change = cast(old, change)
        hyper = replace(hyper, **{name: change})
    return hyper


def make_data(num_classes=10, shape=(8, 8, 1)):
    """One blank image of each class."""
    x = np.zeros((num_classes, *shape), np.uint8)
    y = np.arange(num_classes, dtype=np.int32)
    return label_images(x, y, x, y, tuple(map(str, y)))


def make_windows(tokens, vocabulary):
    """Windows [X, P + 1] of text, none of them padded."""
    length = np.full(len(tokens), tokens.shape[1])
    rows, stratum = {"tokens": tokens, "length": length}, np.zeros(len(tokens), int)
    names = dict(stratum_names=("all",), task="text", vocabulary=vocabulary)
    return Data(rows, rows, stratum, stratum, **names)


def make_program(data=None, steps=None, **changes) -> Program:
    """The program of a tiny config on one device.

    `steps` are of the clients, the same of all unless given.
    """
    config, data = tiny_config(**changes), data or make_data()
    steps = np.array([config.local_steps]) if steps is None else steps
    statistics = find_task(data.task).statistics(data)
    federation = make_federation(statistics=statistics, steps=steps)
    return build_program(config, data, federation, build_mesh(1))


def use_model(program, model, **flops):
    """The program with another model; each part costs one FLOP where not given."""
    params, frozen = shape_params(model)
    sizes = program.sizes._replace(
        num_layers=len(params["gate"]),
        gate_width=program_file.measure_gate(params["gate"]),
    )
    traced = trace_model(model, program.task, program.batch, sizes)
    trained, frozen = take_frozen(params, frozen, model, program.strategy)
    forward = dict.fromkeys(PARTS, 1.0) | flops
    costs = count_costs(trained, frozen, forward, program.strategy)
    outputs, scores, routing = traced
    return program._replace(
        **dict(model=model, sizes=sizes, costs=costs),
        **dict(outputs=outputs, scores=scores, routing=routing),
    )


def use_linear_model(program, **flops):
    """The program with the linear model, which compiles faster."""
    parts = program.model.parts
    shared = parts is not None and parts.shared is not None
    linked = program.static.expert_links.kind != "none"
    model = make_linear_model(program.sizes.num_experts, shared, linked)
    return use_model(program, model, **flops)


def make_evidence(sizes=SIZES, **changes):
    """Evidence of ONE layer on the last C of N clients, of capacities 1, 2, ... K."""
    rng = np.random.default_rng(0)
    count, experts = sizes.cohort_size, sizes.num_experts
    fields = dict(
        round=jnp.int32(0),
        client=jnp.arange(count, dtype=jnp.int32) + sizes.num_clients - count,
        fitness=rng.random((count, experts)),
        usage=100 * rng.random(experts),
        capacity=jnp.arange(count, dtype=jnp.int32) % sizes.max_held + 1,
        size=10 * jnp.arange(1, count + 1, dtype=jnp.int32),
        load=jnp.full(count, 16.0),
        held=jnp.zeros((count, experts), bool),
        times_held=jnp.zeros((count, experts), jnp.int32),
    )
    fields |= changes
    floats = {
        name: jnp.asarray(fields[name], jnp.float32) for name in ("fitness", "usage")
    }
    return Evidence(**fields | floats)


def make_times(sizes=SIZES, expert=0.0, room=1.0):
    """Times of a cohort, in deadlines: of experts [] or [C, E], and the room [] or [C].

    As they are, experts take no time.
    """
    fill = lambda value, *shape: jnp.broadcast_to(jnp.float32(value), shape)
    count = sizes.cohort_size
    return Times(fill(expert, count, sizes.num_experts), fill(room, count))


def prepare_strategy(name, **evidence):
    """A strategy's compiled `assign(evidence, hyper, key=)`, and evidence of SIZES."""
    strategy, sizes = find_strategy(name), sizes_of(name)
    evidence = {"state": strategy.init(sizes)} | evidence
    if strategy.timed:  # all that fits into memory fits into the deadline
        evidence = {"times": make_times(sizes)} | evidence
    return compile_assign(name), make_evidence(sizes, **evidence)


@functools.cache
def compile_assign(name):
    assign = functools.partial(find_strategy(name).assign, sizes=sizes_of(name))
    return jax.jit(assign, static_argnames="sizes")


def sizes_of(name, sizes=SIZES):
    """The sizes of a program, as the strategy configures it."""
    fields = "num_experts", "max_held", "num_active"
    config = make_config(strategy=name, **{n: getattr(sizes, n) for n in fields})
    used = configure(config)
    return sizes._replace(**{name: used[name] for name in fields})


def list_held(assignment):
    """The experts in the valid slots of every client, in their order."""
    rows = zip(assignment.held, assignment.slot, strict=True)
    return [ids[valid].tolist() for ids, valid in rows]


def make_align(num_clients, num_experts, **changes):
    """The scores of ONE layer before the first round, all fitness a half."""
    shape = num_clients, num_experts
    fields = dict(
        fitness=jnp.full(shape, 0.5),
        usage=jnp.zeros(num_experts),
        held=jnp.zeros(shape, bool),
        times_held=jnp.zeros(shape, jnp.int32),
    )
    return AlignState(**fields | changes)


def make_feedback(load, **changes):
    """Feedback whose leaves are all `load`, but for the named ones."""
    return Feedback(*[jnp.asarray(load)] * 6).replace(**changes)


def make_inputs(held, slot, **changes):
    """Inputs of clients 0, 1, ... that take one step, from `held` [C, G, K]."""
    count, layers, _ = held.shape
    fields = dict(
        client=np.arange(count, dtype=np.int32),
        steps=np.ones(count, np.int32),
        budget=slot.sum((1, 2), dtype=np.int32),
        scale=np.ones(count, np.float32),
        held=held,
        slot=slot,
        calibration=np.ones((count, layers), np.float32),
        correction={},
        personal={},
    )
    return jax.tree.map(jnp.asarray, ClientInput(**fields | changes))


def make_update(delta, feedback, **changes):
    """A finite update without loss; `feedback` has leaves [..., G, K]."""
    none = jnp.zeros(feedback.load.shape[:-2])
    fields = dict(report=None, loss=none, accuracy=none, finite=none == 0)
    update = ClientUpdate(delta=delta, feedback=feedback, **fields | changes)
    return jax.tree.map(jnp.asarray, update)


def make_replies(feedback, arrived, **changes):
    """Replies of a cohort [C]; of clients that did not arrive the update was broken."""
    none, phases = jnp.zeros(len(arrived)), jnp.ones((len(arrived), 3))
    code = jnp.where(jnp.asarray(arrived), MERGED, BROKEN).astype(jnp.int32)
    fields = dict(report=None, loss=none, accuracy=none, sent=none)
    fields |= dict(outcome=Outcome(code, phases, phases), personal={}, variate={})
    return Reply(feedback=feedback, **fields | changes)


def make_devices(count, *, rate=1e9, **changes):
    """Equal devices without limits; `rate` is of both links, fields are [] or [N]."""
    numbers = dict(memory=1e9, flops=1e9, upload=rate, download=rate)
    numbers |= dict(latency=0.0, power=1.0, radio=1.0) | changes
    row = lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (count,))
    leaves = {name: row(value) for name, value in numbers.items()}
    return Devices(**leaves, tier=jnp.zeros(count, jnp.int32))


def make_federation(**fields):
    """A federation of which only some fields are there."""
    absent = dict.fromkeys(Federation.__dataclass_fields__) | {"base": {}}
    return Federation(**absent | fields)


def breakable(program):
    """The real client update, all NaN where the client's labels are no classes."""
    update = build_client_update(program)

    def client_update(params, inputs, federation, hyper, key):
        result = update(params, inputs, federation, hyper, key)
        first = federation.index[inputs.client, 0]
        broken = federation.train["y"][first] >= NO_CLASS
        spoil = lambda leaf: jnp.where(broken, jnp.nan, leaf)
        names = ("delta", "feedback", "report", "loss", "accuracy", "first_loss")
        spoilt = jax.tree.map(spoil, {name: getattr(result, name) for name in names})
        return result.replace(finite=result.finite & ~broken, **spoilt)

    return client_update


def prepare_state(state, federation, hyper, program):
    """State and `frozen` of ONE run after the stages of round 0."""
    frozen = federation.frozen
    for number, (when, _) in enumerate(program.strategy.stages):
        if when == 0:
            federation = federation.replace(frozen=frozen)
            state, frozen = run_stage(state, federation, hyper, program, number)
    return state, frozen


prepare_compiled = jax.jit(prepare_state, static_argnums=3)


class Run(NamedTuple):
    """A run on the devices, before its first round."""

    program: Program
    state: SimState
    federation: Federation
    hyper: Hyper


def choose(*names):
    """These processes of the world, in the order of the table."""
    return tuple(row for row in PROCESSES.items() if row[0] in names)


def plan_run(**changes):
    config = tiny_config(**changes)
    return planning.plan_run(config, build_mesh(config.run.num_devices))


def start(plan, program, seed=None) -> Run:
    """The run of a plan, from the plan's seed or another, before any stage."""
    key = jax.random.key(plan.config.seed if seed is None else seed)
    state, frozen = init_state(key, plan.hyper, program)
    inputs = state, plan.federation.replace(frozen=frozen), plan.hyper
    return Run(program, *replicate(inputs, program.mesh))


def start_run(plan, program, seed=None) -> Run:
    """As `start`, after the stages of round 0."""
    run = start(plan, program, seed)
    state, frozen = prepare_compiled(run.state, run.federation, run.hyper, program)
    federation = run.federation.replace(frozen=frozen)
    return run._replace(state=state, federation=federation)


def see_calm(run):
    """The view of a round in a world without events."""
    return observe({}, run.federation, run.hyper, ())


def send_inputs(run, state, cohort, held, slot, view=None):
    """The inputs of a cohort that holds `held` [C, K] in one layer, without events."""
    program, view = run.program, view or see_calm(run)
    capacity = jnp.full(state.align.held.shape[0], program.sizes.max_held)
    capacity = Capacity(Belief(capacity, {}), capacity, capacity)
    belief = capacity.belief
    evidence = gather_evidence(state, view, cohort, belief, run.hyper, program)
    assignment = Assignment(held[:, None].astype(jnp.int32), slot[:, None])
    return broadcast(state, view, evidence, assignment, None, program)


def assert_same(left, right, atol=0.0, rtol=0.0):
    """Equal leaves, keys by their data; bitwise unless a tolerance is given."""
    data = lambda leaf: (
        jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(data(a), data(b), rtol=rtol, atol=atol),
        left,
        right,
    )


def all_finite(tree):
    leaves = jax.tree.leaves(tree)
    numbers = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(bool(jnp.isfinite(x).all()) for x in numbers)


def join_parts(init, parts, num_experts) -> Model:
    """A model with one MoE layer from its parts."""
    apply = functools.partial(apply_parts, parts=parts, num_experts=num_experts)
    return Model(init, apply, parts)


@functools.cache
def make_linear_model(num_experts, shared=False, linked=False):
    """Linear stem, experts and head: the least model in which every part learns."""
    product = lambda params, x, key=None: x @ params["kernel"]

    def init(key):
        stem, gate, expert, head = jax.random.split(key, 4)
        experts = num_experts, 4, 4
        gates = {
            "kernel": 0.1 * jax.random.normal(gate, (num_experts, 4)),
            "bias": jnp.zeros(num_experts),
        }
        if linked:
            gates["snr"] = jnp.zeros(num_experts)
        params = {
            "stem": {"kernel": jax.random.normal(stem, (64, 4)) / 8},
            "gate": {"moe": gates},
            "experts": {"moe": {"kernel": jax.random.normal(expert, experts) / 2}},
            "head": {"kernel": jax.random.normal(head, (4, 16)) / 2},
        }
        if shared:
            own = jax.random.normal(jax.random.fold_in(key, 4), (4, 4)) / 2
            params["stem"]["shared"] = {"kernel": own}
        return params, {}

    flat = lambda batch: batch["x"].reshape(batch["x"].shape[0], -1)
    stem = lambda params, batch, key: product(params, flat(batch))
    parts = Parts(stem, product, product, "cpu", product if shared else None)
    return join_parts(init, parts, num_experts)


@functools.cache
def make_logit_model(num_experts, num_classes):
    """A model without a stem and a head whose experts are bare class logits.

    Cross-entropy then has a closed minimum: the logarithm of the label frequencies.
    """

    def init(key):
        gates = {"kernel": jnp.zeros((num_experts, 1)), "bias": jnp.zeros(num_experts)}
        logits = jax.random.normal(key, (num_experts, num_classes))
        experts = {"moe": {"logits": logits}}
        return {"stem": {}, "gate": {"moe": gates}, "experts": experts, "head": {}}, {}

    def answer(params, x, key):
        return jnp.broadcast_to(params["logits"][None], (x.shape[0], num_classes))

    parts = Parts(
        stem=lambda params, batch, key: jnp.zeros((batch["x"].shape[0], 1)),
        expert=answer,
        head=lambda params, outputs: outputs,
        platform="cpu",
    )
    return join_parts(init, parts, num_experts)


IMAGE_MODEL = dict(
    stem_width=8,
    expert_width=8,
    feature_width=6,
    shared_width=0,
    stem_dropout=0.0,
    expert_dropout=0.0,
    linked=False,
    num_experts=5,
    num_classes=4,
)


def make_image_model(
    stem="mlp", expert="mlp", image_shape=(8, 8, 1), **changes
) -> Model:
    parts = dict(stem=stem, expert=expert, image_shape=image_shape, platform="cpu")
    return build_model(**IMAGE_MODEL | parts | changes)


def shape_rows(row):
    """The `BatchShapes` of batches whose rows have these shapes, [1, ...]."""
    leaves, tree = jax.tree.flatten(row)
    return BatchShapes(tuple(leaves), tree)


def fill(shapes, seed=0):
    """Random float32 arrays of such shapes; of params without compiling `init`."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, shapes)


def draw(*shape, seed=0):
    """Standard normal float32 numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def draw_params(model):
    """Random params without compiling `init`."""
    return jax.tree.map(jnp.asarray, fill(shape_params(model)[0]))


def stems(one, other):
    """Pairs of leaves of two states' stems."""
    leaves = [jax.tree.leaves(state.params["stem"]) for state in (one, other)]
    return zip(*leaves, strict=True)


def tiny_study(strategies, changes=("",), seeds=(0, 1), **fields):
    """The config of a small comparison."""
    config = study.get_config("digits,smoke")
    named = {"strategies": strategies, "changes": changes, "seeds": seeds}
    small = SMALL | {"chunk_rounds": 2, "run.tensorboard": False}
    config.update_from_flattened_dict(
        small | fields | {f"compare.{k}": v for k, v in named.items()}
    )
    return config


def never():
    """A run's `stop` that never ends it early."""
    return False


def run_alone(config, folder, stop=never):
    """Runs or resumes one run in its folder; whether it is finished."""
    return train(config, folder, stop=stop, label="tiny", profile=False)


def restart(config):
    """The job of a run alone before its first round, as a resumed run builds it."""
    (wave,) = planning.plan_waves([planning.Member("tiny", config)])
    return build_job(wave, [None])


def rows_of(folder, *left_out):
    """The rows of a run without what depends on the clock, and these fields."""
    rows = read_metrics(folder / "metrics.jsonl")
    left_out = {*SPENT, *left_out}
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def arrays_of(folder):
    """The arrays of `final.npz`."""
    with np.load(folder / "final.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_same_results(folder, other, *left_out):
    """Bitwise the same arrays, and the same rows but for the clock and such fields."""
    assert rows_of(folder, *left_out) == rows_of(other, *left_out)
    found, expected = arrays_of(folder), arrays_of(other)
    assert found.keys() == expected.keys()
    differing = [n for n in found if found[n].tobytes() != expected[n].tobytes()]
    assert not differing


def stop_at(folder, done):
    """Ends a run early, once `done` rounds have rows."""
    return lambda: len(read_metrics(folder / "metrics.jsonl")) >= done
