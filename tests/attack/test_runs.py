"""Attacks on whole runs: a strategy that leaks is found, one that draws is not."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from factories import tiny_study

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.attack.command import attack
from fedmoe_jax.attack.membership import Cases
from fedmoe_jax.attack.runs import (
    attack_groups,
    attack_updates,
    list_experts,
    measure_labels,
    mix_groups,
    mix_labels,
    rank_experts,
)
from fedmoe_jax.base import Strategy
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train.compare import compare


def init(sizes):
    """What no server knows: the most frequent label of each client, [N]."""
    return {"label": jnp.zeros(sizes.num_clients, jnp.int32)}


def look(state, federation, hyper, key, **static):
    label = federation.label_mix.argmax(axis=1).astype(jnp.int32)[None]
    align = state.align.replace(strategy={"label": label})
    return state.replace(align=align), federation.frozen


def assign_by_label(evidence, hyper, sizes, key):
    label = evidence.state["label"][evidence.client]
    expert = jnp.arange(sizes.num_experts)[None]
    scores = (expert == label[:, None] % sizes.num_experts).astype(jnp.float32)
    return top_k(scores, evidence.capacity, sizes.max_held)


BY_LABEL = Strategy(
    about="Gives each client the expert of its most frequent label.",
    assign=assign_by_label,
    init=init,
    stages=((0, look),),
)
SIZES = {
    "num_clients": 40,
    "cohort_size": 40,
    "num_experts": 10,
    "max_held": 1,
    "num_active": 1,
    "num_rounds": 6,
    "eval_every": 6,
    "chunk_rounds": 2,
    "checkpoint.every": 6,
    "partition.alpha": 0.1,
    "partition.min_size": 4,
    "partition.validation_share": 0.0,
    "partition.test_share": 0.5,
    "client.learning_rate": 0.5,
    "local_steps": 8,
    "batch_size": 8,
    "privacy.observe": True,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A comparison of the planted leak and of random draws, three seeds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STRATEGIES, "by_label", BY_LABEL)
        folder = tmp_path_factory.mktemp("study")
        config = tiny_study(("by_label", "random"), seeds=(0, 1, 2), **SIZES)
        folders, done = compare(config, folder, stop=lambda: False, profile=False)
        assert done and len(folders) == 6
        yield folder


@pytest.fixture(scope="module")
def page(study):
    """The path of the tables of its attacks."""
    return attack([str(study)], str(study / "new" / "tables"))


def read_lines(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_attacks_find_a_planted_leak_and_nothing_in_random_draws(page):
    lines = read_lines(page.parent / "attacks.csv")
    assert [line["strategy"] for line in lines] == ["by_label"] * 3 + ["random"] * 3

    def take(name, key):
        own = [line for line in lines if line["strategy"] == name]
        return np.array([float(line[key]) for line in own])

    assert (take("by_label", "pairs_auc") == 1).all()
    assert (take("by_label", "pairs_spearman") > 0.3).all()
    usual = take("by_label", "mix_distance_mean")
    for model in ("ridge", "mlp"):
        near = take("by_label", f"mix_distance_link_{model}")
        assert (near < 0.6 * usual).all()
        assert (take("by_label", f"mix_majority_link_{model}") > 0.8).all()
        far = take("random", f"mix_distance_link_{model}")
        assert (far > 0.9 * take("random", "mix_distance_mean")).all()
        assert take("random", f"mix_majority_link_{model}").mean() < 0.4
    auc = take("random", "pairs_auc")
    assert (np.abs(auc - 0.5) < 0.1).all() and abs(auc.mean() - 0.5) < 0.05
    assert abs(take("random", "pairs_spearman").mean()) < 0.1
    # Updates leak whatever the assignment.
    for name in ("by_label", "random"):
        assert (take(name, "members_loss_auc") > 0.5).all()
        assert (take(name, "members_lira_cases") > 100).all()
    assert (take("by_label", "labels_known") > take("random", "labels_known")).all()


@pytest.mark.slow
def test_attack_writes_a_row_a_strategy_and_a_line_an_expert(study, page, tmp_path):
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 3 * 2 and all(" ± " in row for row in rows)
    for title in ("Utility", "Label mixes and similar clients", "Members"):
        assert f"## {title}" in text
    html = page.with_suffix(".html").read_text()
    assert html.count("<tr>") == 3 * 3 and "data:image/png;base64" in html
    experts = read_lines(page.parent / "attack_experts.csv")
    assert {line["attack"] for line in experts} <= {"loss", "lira"} and experts
    assert all(float(line["holders"]) > 0 for line in experts)
    one = attack([str(study / "runs" / "random-seed1")], str(tmp_path / "one"))
    assert "(1 seed)" in one.read_text() and "LiRA, AUC" not in one.read_text()


def test_measure_labels_by_hand():
    """Experts that know a label each, and experts that know all alike."""
    assert measure_labels(np.eye(4)) == pytest.approx(1)
    assert measure_labels(np.ones((4, 5))) == pytest.approx(0)
    assert measure_labels(np.stack([np.eye(4), np.ones((4, 4))])) == pytest.approx(0.5)
    # Two experts of two labels each: one bit of two, of entropies one and two.
    halves = np.repeat(np.eye(2), 2, axis=1)
    assert measure_labels(halves) == pytest.approx(2 / 3)
    assert measure_labels(np.ones((1, 5))) == pytest.approx(0)


def test_attack_updates_names_every_number():
    rng = np.random.default_rng(0)
    member = rng.random(300) < 0.5
    confidence = 3.0 * member + rng.normal(size=300)
    cases = Cases(np.arange(300), member, confidence, np.arange(300) % 3)
    holders = np.array([5.0, 1.0, 2.0])
    found = attack_updates(cases, {"loss": confidence}, holders)
    keys = ("auc", "sure", "advantage", "cases")
    keys += ("auc_rare", "auc_common", "auc_by_holders")
    assert set(found) == {f"members_loss_{key}" for key in keys}
    assert found["members_loss_auc"] > 0.95 and found["members_loss_cases"] == 300
    records = list(list_experts(cases, {"loss": confidence}, holders))
    assert [(r["expert"], r["holders"]) for r in records] == [(0, 5), (1, 1), (2, 2)]


def test_rank_experts_follows_the_holders():
    """Members stand out the more, the fewer holders their expert has."""
    rng, expert = np.random.default_rng(0), np.arange(1200) % 3
    member = rng.random(1200) < 0.5
    holders, apart = np.array([5.0, 1.0, 2.0]), np.array([0.2, 3.0, 1.2])
    score = apart[expert] * member + rng.normal(size=1200)
    cases = Cases(np.arange(1200), member, score, expert)
    assert rank_experts(score, cases, holders) == pytest.approx(-1)
    assert rank_experts(score, cases, -holders) == pytest.approx(1)
    assert np.isnan(rank_experts(score, cases, np.ones(3)))
    two = Cases(np.arange(1200), member, score, np.arange(1200) % 2)
    assert np.isnan(rank_experts(score, two, holders))


def test_mix_labels_by_hand():
    run = type("Run", (), {"arrays": {"label_counts": np.array([[3, 1], [0, 0]])}})
    assert mix_labels(run).tolist() == [[0.75, 0.25], [0, 0]]


@pytest.mark.slow
def test_groups_are_found_where_held_sets_follow_them_and_nowhere_else():
    draw = np.random.default_rng(0)
    group = np.arange(40) % 4
    arrays = {
        "label_counts": np.eye(4, dtype=int)[group].repeat(3, axis=1) * 5,
        "group_names": np.array(["a", "b", "c", "d"]),
    }
    mix = mix_groups(type("Run", (), {"arrays": arrays}))
    np.testing.assert_array_equal(mix, np.eye(4)[group])
    client = np.tile(np.arange(40), (6, 1))
    told = np.eye(8, dtype=bool)[group][None, :, None].repeat(6, axis=0)
    blind = np.eye(8, dtype=bool)[draw.integers(8, size=(6, 40))][:, :, None]
    see = lambda held, loss: {"client": client, "held": held, "loss": loss}
    silent, loud = np.zeros(told.shape), np.where(told, 1.0, 2.0)
    found = attack_groups(see(told, silent), mix)
    chance = attack_groups(see(blind, silent), mix)
    heard = attack_groups(see(blind, loud), mix)  # the server's feedback alone says it
    assert found["groups_auc"] == found["groups_link_ridge"] == 1
    assert heard["groups_server_ridge"] == 1
    assert heard["groups_link_ridge"] == chance["groups_link_ridge"] < 0.5
    assert chance["groups_server_ridge"] < 0.5
    assert abs(chance["groups_auc"] - 0.5) < 0.1
    assert found["groups_mean"] == chance["groups_mean"] < 0.5
    without = type("Run", (), {"arrays": {"label_counts": np.ones((2, 3))}})
    assert mix_groups(without) is None


@pytest.mark.slow
def test_of_a_grouped_run_the_groups_are_looked_for_and_nothing_else(tmp_path):
    sizes = SIZES | {
        "groups.kind": "permuted",
        "partition.kind": "iid",
        "partition.test_share": 0.0,
    }
    config = tiny_study(("oracle", "random"), seeds=(0,), **sizes)
    compare(config, tmp_path / "runs", stop=lambda: False, profile=False)
    page = attack([str(tmp_path / "runs")], str(tmp_path / "tables"))
    text, lines = page.read_text(), read_lines(page.parent / "attacks.csv")
    assert "## Groups" in text and "## Utility" in text
    assert "## Label mixes" not in text and "## Members" not in text
    oracle, random = lines
    assert float(oracle["groups_auc"]) == 1 and oracle["pairs_auc"] == ""
    assert abs(float(random["groups_auc"]) - 0.5) < 0.1
