"""Runs on text: a transformer with two MoE layers learns known languages."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SMALL, train_tokenizer, write_tokenizer

from configs import default
from fedmoe_jax.api import run as run_alone
from fedmoe_jax.data.markov import entropy_rates
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.evaluation.scoring import evaluation_route
from fedmoe_jax.measures import LAYERS, MEASURES
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.state import init_state
from fedmoe_jax.train import run
from fedmoe_jax.train.compare import compare
from fedmoe_jax.train.plan import Member, plan_run, plan_waves
from fedmoe_jax.train.run import build_job

pytestmark = pytest.mark.slow

N, E, G, K, A = 8, 4, 2, 2, 2
LENGTH = 16


def make_config(**changes):
    config = default.get_config("smoke")
    fields = {
        "data.name": "markov",
        "data.length": LENGTH,
        "model.kind": "transformer",
        "model.stem_width": 16,
        "model.expert_width": 16,
        "model.heads": 2,
        "model.kv_heads": 1,
        "gate.input": "prefix",
        "partition.kind": "natural",
        "num_clients": N,
        "cohort_size": N,
        "num_experts": E,
        "max_held": K,
        "num_active": A,
        "local_steps": 8,
        "batch_size": 8,
        "num_rounds": 6,
        "chunk_rounds": 2,
        "eval_every": 2,
        "checkpoint.every": 2,
        "client.optimizer": "adamw",
        "client.learning_rate": 0.01,
        "devices.model_scale": 100.0,
        "devices.deadline": 1e6,
        "run.num_devices": 1,
        "run.tensorboard": False,
    }
    config.update_from_flattened_dict(SMALL | fields | changes)
    return config


def train(config, workdir, stop=lambda: False):
    run.train(config, workdir, stop=stop, label="text", profile=False)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run on one device, and its rows."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(make_config(), folder)


def test_a_transformer_learns_and_no_model_is_better_than_the_limit():
    changes = {"num_rounds": 12, "evaluation.finetune": True, "strategy": "greedy"}
    rows = run_alone(make_config(**changes)).rows
    found = {name: values[-1] for name, values in rows.items()}
    first = next(x for x in rows["personal_bits"] if not math.isnan(x))
    limit = entropy_rates().mean()
    assert found["personal_bits"] < 0.85 * first
    for name in ("global_bits", "personal_bits", "own_test_bits"):
        assert limit < found[name] < math.log2(12) + 0.5
    assert limit < found["personal_finetuned_bits"] < found["personal_bits"]
    assert found["worst_decile_bits"] > found["personal_bits"]
    assert found["own_test_clients"] == N
    assert found["personal_accuracy"] > 2 / 12
    assert np.shape(found["expert_load"]) == (G, E)
    for key, name in LAYERS.items():
        mean = rows[name].mean(axis=1)
        np.testing.assert_allclose(mean, rows[MEASURES[key].field], rtol=1e-5)
    assert np.ptp(found["layer_group_information"]) > 0


def test_runs_that_probe_with_other_shares_are_one_program():
    """Two MoE layers; each run is as it is alone, and the share matters."""
    kind = {"fitness.feedback": "relative_probe", "strategy": "load_balanced"}
    configs = [
        make_config(**kind, **{"fitness.probe_share": share}) for share in (0.0, 0.3)
    ]
    (wave,) = plan_waves([Member(f"run{i}", each) for i, each in enumerate(configs)])
    job = build_job(wave, [None, None])
    state, metrics = job.programs.run_rounds(job.state, *job.inputs)
    fitness = np.asarray(state.align.fitness)
    assert fitness.shape == (2, N, G, E) and np.all((fitness > 0) & (fitness < 1))
    assert np.abs(fitness[0] - fitness[1]).max() > 1e-4
    for i, config in enumerate(configs):
        plan = plan_run(config, build_mesh(1))
        start = init_state(jax.random.key(config.seed), plan.hyper, plan.program)[0]
        inputs = replicate((start, plan.federation, plan.hyper), plan.program.mesh)
        alone, measured = build_run_rounds(plan.program)(*inputs)
        np.testing.assert_allclose(fitness[i], alone.align.fitness, atol=1e-5)
        flops = np.asarray(metrics["client_flops"])[i]
        np.testing.assert_allclose(flops, measured["client_flops"], rtol=1e-5)
        costs = plan.program.costs
        held = np.asarray(alone.align.held).sum(2).mean(1)  # of the last round
        passes = plan.program.sizes.local_steps, G * held / 3
        probed = ((G - 1) * held + 1) / G  # one alone in a layer
        each = 8 * sum(passes) * costs.shared_flops
        each += 8 * (passes[0] * held + passes[1] * probed) * costs.expert_flops
        np.testing.assert_allclose(measured["client_flops"][-1], each.sum(), rtol=1e-5)


def write_languages(folder):
    """Two texts of each of four languages, and a tokenizer that knows one of them."""
    rng = np.random.default_rng(0)
    for language in range(4):
        for writer in range(2):
            words = rng.choice([f"{'aāb日'[language]}{i} " for i in range(9)], 600)
            path = folder / f"language{language}" / f"{writer}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(words), encoding="utf-8")
    tokenizer = train_tokenizer("".join(words))
    return {
        "data.name": "text",
        "data.dir": str(folder),
        "data.tokenizer": write_tokenizer(folder, tokenizer),
        "data.length": 8,
    }


@pytest.mark.parametrize(
    ("gate", "tokens"),
    [("global", "bytes"), ("personal", "bytes"), ("global", "tokenizer")],
)
def test_bits_are_those_of_every_byte(gate, tokens, tmp_path):
    changes = {"gate.mode": gate, "partition.validation_share": 0.1}
    if tokens == "tokenizer":
        changes |= write_languages(tmp_path)
    plan = plan_run(make_config(**changes), build_mesh(1))
    state, frozen = jax.jit(init_state, static_argnums=2)(
        jax.random.key(0), plan.hyper, plan.program
    )
    federation = plan.federation.replace(frozen=frozen)
    order = jax.random.uniform(jax.random.key(1), (N, G, E)).argsort(axis=2)
    held = order < 1 + jnp.arange(N)[:, None, None] % K  # one expert, or two
    counted = state.participation.replace(rounds=jnp.ones(N, jnp.int32))
    align = state.align.replace(held=held)
    state = state.replace(align=align, participation=counted)
    program, mesh = plan.program, plan.program.mesh
    found = build_evaluate(program)(
        *(replicate(tree, mesh) for tree in (state, federation, plan.hyper))
    )
    test = plan.data.test
    batch = program.task.prepare(jax.tree.map(jnp.asarray, test), {})
    weight = np.asarray(batch["weight"])
    size = weight * np.asarray(batch.get("bytes", 1.0))
    assert ("bytes" in batch) == (tokens == "tokenizer")

    def count(client, slot):
        """Bits and hits of every token, with one client's gate and experts."""
        own = jax.tree.map(lambda leaf: leaf[client], state.personal)
        everything = jnp.tile(jnp.arange(E), (G, 1))
        params = take_submodel(state.params, own, everything, 0)
        how = evaluation_route(program)
        logits, _ = program.model.apply(
            params, frozen, batch, everything, slot, how, None
        )
        log_odds = np.asarray(jax.nn.log_softmax(logits), np.float64)
        chosen = np.take_along_axis(log_odds, np.asarray(batch["target"])[..., None], 2)
        right = np.asarray(logits.argmax(-1) == batch["target"])
        return -chosen[..., 0] / np.log(2) * weight, right * weight

    everyone = jnp.ones((G, E), bool)
    clients = range(N) if gate == "personal" else [0]
    bits = np.mean([count(c, everyone)[0].sum() for c in clients]) / size.sum()
    np.testing.assert_allclose(found["global_bits"], bits, rtol=1e-4)
    for client in range(N):
        values = count(client, held[client])
        of = plan.data.test_stratum == client // 2  # its language, of two writers
        totals = size[of].sum(), weight[of].sum()
        means = [v[of].sum() / t for v, t in zip(values, totals, strict=True)]
        own = plan.data.test_owner == client
        np.testing.assert_allclose(found["client_bits"][client], means[0], rtol=1e-4)
        np.testing.assert_allclose(found["client_accuracy"][client], means[1], 1e-4)
        assert own.any()
    own_bits = [
        count(c, held[c])[0][plan.data.test_owner == c].sum()
        / size[plan.data.test_owner == c].sum()
        for c in range(N)
    ]
    np.testing.assert_allclose(found["own_test_bits"], np.mean(own_bits), rtol=1e-4)
    np.testing.assert_allclose(
        found["worst_decile_own_test_bits"], max(own_bits), rtol=1e-4
    )
    assert {"validation_global_bits", "validation_personal_bits"} <= found.keys()


def test_a_tokenizer_gives_bits_of_a_byte_after_one_more_local_round(tmp_path, capsys):
    fields = {"num_rounds": 2, "evaluation.finetune": True, "data.kilobytes": 2}
    fields |= {"evaluation.finetune_rate": 1e-9}  # which changes nothing
    changes = write_languages(tmp_path / "text")
    row = train(make_config(**changes, **fields), tmp_path / "run")[-1]
    assert capsys.readouterr().err.splitlines() == [  # 9/10 of 600 words of 3 bytes
        "4 of 8 clients have less text to train on than data.kilobytes=2, "
        "'language0/0.txt' the least with 1,620 bytes"
    ]
    for name in ("personal", "worst_decile"):
        tuned = row[f"{name}_finetuned_bits"]
        np.testing.assert_allclose(tuned, row[f"{name}_bits"], rtol=1e-4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    tokens = row["global_bits"] * summary["bytes_per_token"]
    assert 1 < summary["bytes_per_token"] < 2 and 3 < tokens < math.log2(300) + 0.5


def test_mixing_probabilities_is_refused():
    with pytest.raises(UserError, match="strategy='fedmix_all' .* mixed probabilities"):
        plan_run(make_config(strategy="fedmix_all"), build_mesh(1))


def test_runs_with_and_without_own_tests_are_planned_together(tmp_path):
    config = make_config(num_rounds=2)
    with config.unlocked():
        config.compare = {
            "strategies": (config.strategy,),
            "changes": ("", "partition.kind=iid"),
            "seeds": (0,),
        }
    folders, whole = compare(config, tmp_path, stop=lambda: False, profile=False)
    rows = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for folder in folders
    ]
    assert whole and "own_test_bits" in rows[0] and "own_test_bits" not in rows[1]


def test_a_run_that_was_stopped_goes_on_bitwise(plain, tmp_path):
    folder, whole = plain
    calls = iter([False, True])
    train(make_config(), tmp_path / "parts", stop=lambda: next(calls, True))
    parts = train(make_config(), tmp_path / "parts")
    clocks = ("seconds", "_seconds")
    for one, other in zip(whole, parts, strict=True):
        for name in one.keys() - {n for n in one if n.endswith(clocks)}:
            assert one[name] == other[name], name
    with (
        np.load(folder / "final.npz") as a,
        np.load(tmp_path / "parts" / "final.npz") as b,
    ):
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_runs_on_eight_devices_and_in_a_comparison_are_those_alone(plain, tmp_path):
    alone = plain[1]
    many = train(make_config(**{"run.num_devices": 8}), tmp_path / "many")
    config = make_config()
    with config.unlocked():
        config.compare = {
            "strategies": ("greedy", config.strategy),
            "changes": ("",),
            "seeds": (0,),
        }
    folders, whole = compare(
        config, tmp_path / "two", stop=lambda: False, profile=False
    )
    assert whole
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines()
    for one, other, line in zip(alone, many, lines, strict=True):
        together = json.loads(line)
        for name in ("train_loss", "expert_load", "global_bits", "own_test_bits"):
            if one.get(name) is not None:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-3)
                np.testing.assert_allclose(one[name], together[name], rtol=1e-3)


def test_tied_layers_agree_with_others_where_all_is_held():
    """All experts held by all: nothing is left to assign, but for sums of gates."""
    changes = {"max_held": E, "devices.model_scale": 1.0, "num_rounds": 2}
    changes |= {"strategy": "round_robin", "loss.calibration": 0.0, "client.clip": 0.0}
    rows = [
        run_alone(make_config(**changes | {"model.tied": tied})).rows
        for tied in (False, True)
    ]
    for name in ("train_loss", "global_bits", "personal_bits"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], rtol=1e-4)
    assert rows[1]["expert_load"].shape[1:] == (E,)


@pytest.mark.parametrize("tied", [False, True])
def test_ifca_chooses_an_expert_a_layer_or_of_tied_layers_one_for_all(tied):
    changes = {"strategy": "ifca", "num_rounds": 8, "model.tied": tied}
    found = run_alone(make_config(**changes, **{"max_held": 1, "num_active": 1}))
    held = np.asarray(found.state.align.held)
    assert held.shape == (N, 1 if tied else G, E) and (held.sum(2) == 1).all()
    chosen = held.argmax(2)
    assert len({tuple(row) for row in chosen.tolist()}) > 1
    bits = [x for x in found.rows["personal_bits"] if not math.isnan(x)]
    assert entropy_rates().mean() < bits[-1] < 0.9 * bits[0]


@pytest.mark.parametrize("strategy", ["flex_moe", "hfedmoe", "fedavg_active", "local"])
def test_systems_train_a_transformer(strategy, tmp_path):
    scan = strategy == "hfedmoe"  # which trains some experts, in a loop over blocks
    changes = {"strategy": strategy, "num_rounds": 4, "model.scan": scan}
    rows = train(make_config(**changes), tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert entropy_rates().mean() < rows[-1]["personal_bits"] < 4.5
