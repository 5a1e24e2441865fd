"""Links of batches against closed forms, and whole rounds with and without them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import save_checkpoint
from factories import assert_same, make_config, make_hyper, plan_run, start_run

from fedmoe_jax import broadcast as broadcast_file
from fedmoe_jax import links
from fedmoe_jax.base import Links, Routing
from fedmoe_jax.config import validate
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.loss import expect_latency
from fedmoe_jax.options import UserError, replace
from fedmoe_jax.program import configure
from fedmoe_jax.round import build_round
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.types import ExpertLinks

KEY, COUNT = jax.random.key(3), 20_000
KEYS = jax.random.split(KEY, COUNT)
WIRELESS = {"expert_links.kind": "wireless"}
MEAN = jnp.array([0.5, 4.0])


def draw(hyper=None, **fields):
    return links.draw_links(KEYS, MEAN, hyper or make_hyper(expert_links=fields))


def about(samples, expected):
    """Whether the samples' mean is within four standard errors of what it should be."""
    samples = np.asarray(samples, np.float64)
    error = samples.std() / np.sqrt(samples.size)
    assert abs(samples.mean() - expected) < 4 * error


def test_see_share_by_hand():
    found = links.see_share(jnp.array([jnp.inf, 1.0, 3.0, 1e-6]))
    expected = [0, -np.log(2), -np.log(4 / 3), np.log(1e-6)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_take_time_by_hand():
    found = links.take_time(jnp.array([1.0, 3.0, jnp.inf, 1e-9]), jnp.float32(0.2))
    np.testing.assert_allclose(found, [0.2, 0.1, 0, 1], rtol=1e-6)


def test_draw_links_fades_every_link_of_every_example():
    found = draw()
    for expert, mean in enumerate(MEAN):
        about(found.snr[:, expert] / mean, 1)  # exponential of mean one
        about(found.snr[:, expert] > 2 * mean, np.exp(-2))
    about((found.snr[:, 0] / MEAN[0] - 1) * (found.snr[:, 1] / MEAN[1] - 1), 0)
    assert len(np.unique(jax.random.key_data(found.key), axis=0)) == COUNT


def test_draw_links_shows_the_gate_what_is_known():
    seen = lambda snr: np.asarray(links.see_share(snr))
    known = draw(csi=1.0, sight=1.0, price=2.0, airtime=0.3)
    np.testing.assert_array_equal(known.seen, seen(known.snr))
    np.testing.assert_allclose(known.charge, 2 * known.time, rtol=1e-6)
    # The truth stays as it is where less of it is known.
    guessed = draw(csi=0.6, sight=1.0, price=2.0, airtime=0.3)
    assert_same((guessed.snr, guessed.time), (known.snr, known.time))
    share = lambda snr: np.asarray(snr) / np.asarray(MEAN)[None]
    power = share(np.exp(guessed.seen) / (1 - np.exp(guessed.seen)))
    about(power, 1)
    about((power - 1) * (share(guessed.snr) - 1), 0.6**2)
    blind = draw(csi=1.0, sight=0.0, price=0.0)
    assert not blind.seen.any() and not blind.charge.any()


@pytest.mark.slow
def test_draw_training_has_perfect_links_in_the_first_stage():
    hyper, own = make_hyper(expert_links={"price": 1.0}), jnp.array(True)
    simulated = links.draw_training(KEY, ExpertLinks(MEAN, own), 9, hyper)
    perfect = links.draw_training(KEY, ExpertLinks(MEAN, ~own), 9, hyper)
    assert simulated.snr.shape == (9, 2) and simulated.charge.min() > 0
    assert jnp.isinf(perfect.snr).all()
    assert not any(getattr(perfect, n).any() for n in ("seen", "charge", "time"))


@pytest.mark.slow
def test_draw_testing_depends_on_the_run_and_the_place_alone():
    hyper, state = make_hyper(), ExpertLinks(MEAN, jnp.array(False))
    whole = links.draw_testing(KEY, state, jnp.arange(6), hyper)
    part = links.draw_testing(KEY, state, jnp.array([4, 1]), hyper)
    assert_same(part, jax.tree.map(lambda leaf: leaf[jnp.array([4, 1])], whole))
    assert jnp.isfinite(whole.snr).all()  # also before clients train with links
    other = links.draw_testing(jax.random.key(4), state, jnp.arange(6), hyper)
    assert (other.snr != whole.snr).all()


# ---- whole rounds

CLEAR = {"expert_links.snr": 100.0, "expert_links.spread": 0.0}
FAR = {"expert_links.start": 99, "expert_links.price": 1.0}


def prepare(**changes):
    plan = plan_run(**changes)
    return start_run(plan, plan.program)


def trace(run):
    one = spread(build_round(run.program), run.program.mesh)
    return jax.make_jaxpr(one)(run.state, run.federation, run.hyper)


def run_round(run):
    one = spread(build_round(run.program), run.program.mesh)
    return jax.jit(one)(run.state, run.federation, run.hyper)


def take_snr(state):
    """The params without what gates have learnt of links, and that."""
    gate = dict(state.params["gate"]["moe"])
    snr = gate.pop("snr", None)
    return state.params | {"gate": gate}, snr


@pytest.mark.slow
def test_a_round_with_perfect_links_is_one_without():
    plain, _ = take_snr(run_round(prepare())[0])
    for fields, near in ((FAR, 1e-7), (CLEAR, 1e-4)):
        run = prepare(**WIRELESS, **fields, **{"loss.latency": 1.0})
        params, snr = take_snr(run_round(run)[0])
        assert_same(params, plain, atol=near)
        np.testing.assert_allclose(snr, 0, atol=near)
    noisy = prepare(**WIRELESS, **{"expert_links.snr": -5.0})
    params, snr, plain = jax.device_get((*take_snr(run_round(noisy)[0]), plain))
    far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, plain)
    assert min(jax.tree.leaves(far)) > 1e-5
    assert (np.abs(snr) > 1e-6).all()  # rows that nobody holds, too: calibration


@pytest.mark.slow
def test_a_gate_without_sight_learns_nothing_of_its_links():
    run = prepare(**WIRELESS, **{"expert_links.sight": 0.0})
    _, snr = take_snr(run_round(run)[0])
    assert (snr == 0).all()


@pytest.mark.slow
def test_a_latency_loss_teaches_the_gate_to_prefer_fast_links():
    """Two runs whose only difference is the weight of the loss, on links of one law."""
    run = prepare(**WIRELESS, **{"loss.calibration": 0.0, "expert_links.spread": 0.0})
    weighted = replace(run.hyper, loss={"latency": jnp.float32(50.0)})
    _, before = take_snr(run_round(run)[0])
    _, after = take_snr(run_round(run._replace(hyper=weighted))[0])
    assert (after > before + 1e-3).all()


@pytest.mark.slow
def test_rounds_without_links_have_nothing_of_them(monkeypatch):
    plain = prepare()
    text, linked = str(trace(plain)), len(str(trace(prepare(**WIRELESS))))
    assert linked > len(text)
    assert "expert_links" not in plain.state.world
    numbers = {f: 0.7 for f in ("csi", "sight", "price", "airtime", "spread")}
    changed = {f"expert_links.{f}": value for f, value in numbers.items()}
    assert str(trace(prepare(**changed))) == text
    monkeypatch.setattr(broadcast_file, "send_links", lambda *_: None)
    assert str(trace(plain)) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"evaluation.dense_experts": 2}, {"gate.mode": "personal"}]
)
def test_evaluation_scores_the_model_with_and_without_its_links(fields):
    run = prepare(**WIRELESS, **fields)
    evaluate = build_evaluate(run.program)
    state, _ = run_round(run)

    def score(**numbers):
        cast = {name: jnp.float32(value) for name, value in numbers.items()}
        hyper = replace(run.hyper, expert_links=cast)
        return evaluate(state, run.federation, hyper)

    clear, noisy = score(snr=100.0), score(snr=-20.0)
    names = "global_accuracy", "personal_accuracy", "personal_prior_accuracy"
    for name in names:
        np.testing.assert_allclose(clear[f"linked_{name}"], clear[name], atol=1e-6)
        np.testing.assert_array_equal(clear[name], noisy[name])
    assert noisy["linked_global_accuracy"] != noisy["global_accuracy"]
    assert 0 < clear["linked_delay"] < 0.02 and noisy["linked_delay"] > 0.9
    assert_same(score(snr=-20.0), noisy)
    # A gate that pays for time waits less.
    cheap, dear = (score(snr=0.0, price=price) for price in (0.0, 20.0))
    assert dear["linked_delay"] < 0.9 * cheap["linked_delay"]


TEXT = {"data.name": "markov", "data.length": 8, "model.kind": "transformer"}
TEXT |= {"partition.kind": "natural", "num_clients": 8}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"gate.mode": "personal"}])
def test_a_transformer_learns_over_its_links_and_is_scored_with_and_without(fields):
    """Waits of its two layers add up; at 100 dB links are as good as none."""
    run = prepare(**WIRELESS, **TEXT, **fields)
    evaluate = build_evaluate(run.program)
    state, _ = run_round(run)
    gates = state.personal.get("gate", state.params["gate"])
    for gate in gates.values():
        assert np.abs(gate["snr"]).max() > 0

    def score(**numbers):
        cast = {name: jnp.float32(value) for name, value in numbers.items()}
        hyper = replace(run.hyper, expert_links=cast)
        return evaluate(state, run.federation, hyper)

    clear, noisy = score(snr=100.0), score(snr=-20.0)
    for name in ("global_bits", "personal_bits"):
        np.testing.assert_allclose(clear[f"linked_{name}"], clear[name], atol=1e-4)
        np.testing.assert_array_equal(clear[name], noisy[name])
        assert np.abs(noisy[f"linked_{name}"] - noisy[name]) > 1e-3
    assert 0 < clear["linked_delay"] < 0.04 and 1.8 < noisy["linked_delay"] <= 2


def test_the_latency_of_layers_adds_up_by_hand():
    """Two layers, three windows of two positions; p is over the held experts alone."""
    rng = np.random.default_rng(0)
    logits, time = rng.normal(size=(2, 6, 4)), rng.random((3, 4))
    held = np.array([[0, 2], [3, 1]])
    slot = np.array([[True, True], [True, False]])
    expected = 0.0
    for layer, chosen in enumerate(([0, 2], [3])):
        for position in range(6):
            mass = np.exp(logits[layer, position, chosen])
            expected += mass @ time[position // 2, chosen] / mass.sum() / 6
    inputs = SimpleNamespace(held=jnp.asarray(held), slot=jnp.asarray(slot))
    routing = Routing(jnp.asarray(logits, jnp.float32), jnp.zeros((2, 6, 2)))
    found = expect_latency(routing, draw_none(time), inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def draw_none(time):
    """Links of which nothing but the time is read."""
    return Links(None, None, None, jnp.asarray(time, jnp.float32), None)


# ---- what is not allowed


def test_links_of_models_whose_gates_see_none_are_refused(tmp_path):
    base = save_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match="expert_links.kind='wireless'.*allowed: none"):
        plan_run(**WIRELESS, **TEXT | {"model.kind": "lora", "model.base": str(base)})


def test_a_latency_loss_without_links_is_refused():
    with pytest.raises(UserError, match="loss.latency=0.5 .*allowed: 0"):
        validate(make_config(**{"loss.latency": 0.5}))
    with pytest.raises(UserError, match="loss.latency=-1.*allowed: >= 0"):
        validate(make_config(**WIRELESS, **{"loss.latency": -1.0}))


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "greedy"])
def test_configure_takes_the_links_from_models_without_a_gate(strategy):
    fields = WIRELESS | {"strategy": strategy, "loss.latency": 1.0}
    used = configure(make_config(**fields))
    kept = strategy == "greedy"
    assert used.expert_links.kind == ("wireless" if kept else "none")
    assert used.loss.latency == kept
