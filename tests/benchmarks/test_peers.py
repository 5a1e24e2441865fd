"""The comparison with peers, without any peer and without the network."""

import json
import os
import sys

import matplotlib
import numpy as np
import pytest

from benchmarks import launches, page, peers, peers_page, works
from fedmoe_jax.runtime import xla


def say(**fields) -> str:
    return f"print({json.dumps(fields)!r}, flush=True)"


def run_script(*lines: str, timeout: float = 60) -> launches.Launch:
    command = [sys.executable, "-c", "\n".join(lines)]
    return launches.launch(command, launches.child_variables(""), timeout)


ROUNDS = [say(event="round", seconds=s, cpu_seconds=2 * s) for s in (9, 8, 1, 3)]
CHECK = say(event="check", before=2.5, value=2.0)
DONE = say(event="done", peak_mb=7)


def test_flops_by_hand():
    # 3 x 3 x 3 -> 32 on 30 x 30, 3 x 3 x 32 -> 64 on 28 x 28, 12544 -> 128 -> 10.
    macs = [777_600, 14_450_688, 1_605_632, 1_280]
    assert works.layer_macs("cnn") == macs
    assert works.flops_per_example("cnn") == 6 * sum(macs) - 2 * 777_600
    assert works.flops_per_example("mlp") == 4 * 196_608 + 6 * 640


def test_mixture_by_hand():
    work = works.WORKS["M"]
    assert works.examples_per_round(work) == 20 * 30 * 32
    # 46 and 22 taps a row of 16 and 8 pixels; a gate of 8; experts 1024 -> 128 -> 64,
    # two of them where a client holds two, which 12 of 20 do; 64 -> 10.
    macs = [46**2 * 12 * 32, 22**2 * 32 * 64, 512, 1.6 * 139_264, 640]
    assert works.layer_macs("mixture") == pytest.approx(macs)
    assert np.mean(works.HELD) == 2.7 and max(works.HELD) == 4
    assert works.mixture_parameters()["experts"] == 8 * (139_264 + 192)


def test_language_by_hand():
    work = works.WORKS["L"]
    assert works.examples_per_round(work) == 16 * 10 * 8
    assert works.tokens_per_round(work) == 16 * 10 * 8 * 128
    assert works.tokens_per_round(works.WORKS["M"]) == 0
    # Of a byte in each of two blocks: query, key, value and out; on average 64.5 scores
    # and as many values; a gate of 8; three products of an expert, of two where a
    # client holds two, which 10 of 16 do. Then the head, 64 -> 256.
    block = 4 * 64 * 64 + 2 * 64 * 64.5 + 64 * 8 + 1.625 * 3 * 64 * 64
    macs = 128 * (2 * block + 64 * 256)
    assert sum(works.layer_macs("language")) == pytest.approx(macs)
    assert works.flops_per_example("language") == pytest.approx(6 * macs)


def test_windows_have_the_language_of_their_client():
    work = works.WORKS["L"]._replace(examples=100)
    windows, language = works.load_windows(work)
    assert windows.shape == (1600, 129) and windows.dtype == np.uint8
    assert (language[works.load_ids(work)] == np.arange(16)[:, None] % 8).all()
    pairs = np.stack([windows[:, :-1], windows[:, 1:]], axis=-1)
    for number in range(works.LANGUAGES):
        seen = np.zeros((256, 256), int)
        np.add.at(seen, tuple(pairs[language == number].reshape(-1, 2).T), 1)
        # A certain byte follows in half of the cases, and by chance in one of 512.
        share = seen.max(axis=1) / seen.sum(axis=1)
        np.testing.assert_allclose(share.mean(), 0.5 + 0.5 / 256, atol=0.02)
    checked = works.checked_windows(work)
    assert (np.bincount(checked // 100) == works.CHECKED_WINDOWS).all()


def test_a_client_of_the_mixture_owns_four_classes():
    work = works.WORKS["M"]._replace(examples=100)
    ids, (_, labels) = works.load_ids(work), works.load_images(work)
    assert {len(set(labels[own])) for own in ids} == {works.OWN_CLASSES}
    # Any part of the images shows all of the clients, and so all of the classes.
    assert set(labels[: work.clients * 5]) == set(range(works.CLASSES))


def test_only_those_that_can_do_a_work_are_asked():
    able = lambda name: {
        key
        for key, peer in peers.PEERS.items()
        if works.WORKS[name].model in peer.models
    }
    assert able("M") == {"fedmoe", "torch-mixture"}
    assert able("L") == {"fedmoe", "torch-language"}
    assert able("A") == set(peers.PEERS) - {"torch-mixture", "torch-language"}


@pytest.mark.parametrize("name", works.WORKS)
def test_clients_own_images_that_exist(name):
    work = works.WORKS[name]
    ids = works.load_ids(work)
    assert ids.shape == (work.clients, work.examples)
    assert ids.min() >= 0 and ids.max() < works.num_images(work)
    if work.pool is None:
        assert len(np.unique(ids)) == ids.size
    cohort = works.sample_cohort(work, 3)
    assert len(np.unique(cohort)) == work.cohort
    assert not np.array_equal(cohort, works.sample_cohort(work, 4))


@pytest.mark.parametrize("name", ["P", "M"])
def test_normalised_images_have_unit_variance(name):
    work = works.WORKS[name]._replace(clients=20, examples=100)
    images, labels = works.load_images(work)
    values = works.normalise(images)
    assert images.dtype == np.uint8 and values.dtype == np.float32
    np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=0.01)
    assert set(labels) == set(range(works.CLASSES))


@pytest.mark.parametrize("line", ["", "Metrics at iteration 3", "7", '{"a": 1}', "{"])
def test_other_lines_are_no_events(line):
    assert launches.parse_event(line) is None


def test_launch_drops_warm_up_and_other_lines():
    found = run_script("print('hello')", *ROUNDS, CHECK, DONE)
    assert found[:3] == ([1, 3], [2, 6], 7)
    assert found.startup > 0 and found.loss == 2.0


@pytest.mark.parametrize(
    "lines, reason",
    [
        (["raise ValueError('no such thing')"], "ValueError: no such thing"),
        ([*ROUNDS, "raise SystemExit(3)"], "exit status 3"),
        (ROUNDS, "before its last round"),
        ([*ROUNDS[:2], CHECK, DONE], "before its last round"),
        ([*ROUNDS, CHECK.replace("2.0", "NaN"), DONE], "did not train"),
        ([*ROUNDS, CHECK.replace("2.0", "2.5"), DONE], "did not train"),
    ],
)
def test_failures_have_a_reason(lines, reason):
    with pytest.raises(launches.PeerError, match=reason):
        run_script(*lines)


def test_a_launch_that_hangs_is_ended():
    with pytest.raises(launches.PeerError, match="longer than"):
        run_script("import time; time.sleep(600)", timeout=0.5)


def fake_rows() -> list[dict]:
    cpu = lambda seconds: [2 * s for s in seconds]
    launch = lambda seconds: launches.Launch(seconds, cpu(seconds), 5.0, 3.0, 2.5)
    torch = iter([6.0, 10.0, 7.0])

    def run(name: str) -> launches.Launch:
        if name == "fedjax":
            raise launches.PeerError("does not install: no wheel")
        return launch({"fedmoe": [1.0, 2.0], "pfl": [4.0]}.get(name) or [next(torch)])

    found, failures = peers.repeat(["fedmoe", "pfl", "fedjax", "torch"], 3, run)
    return peers.build_rows("A", found, failures, 100.0, 2)


def test_rows_by_hand():
    ours, pfl, fedjax, torch = fake_rows()
    assert (ours["seconds"], ours["seconds_min"], ours["rounds"]) == (1.5, 1.5, 6)
    assert [torch[f"seconds{end}"] for end in ("", "_min", "_max")] == [7, 6, 10]
    assert ours["ratio"] == 1 and pfl["ratio"] == pytest.approx(4 / 1.5)
    # Three pairs, each of a launch of 6, 10 or 7 s and one of ours of 1.5 s.
    for name in ("ratio", "cpu_ratio"):
        ends = [torch[f"{name}{end}"] for end in ("", "_min", "_max")]
        np.testing.assert_allclose(ends, [7 / 1.5, 6 / 1.5, 10 / 1.5])
    assert torch["loss"] == 2.5
    assert torch["pairs"] == 3 and "pairs" not in fedjax
    assert pfl["updates_per_s"] == 5 and pfl["examples_per_s"] == 1250
    share = 1250 * works.flops_per_example("cnn") / 100e9
    assert pfl["dense_share"] == pytest.approx(share)
    assert "no wheel" in fedjax["note"] and "seconds" not in fedjax


def test_rates_in_short():
    ours, _, fedjax, _ = fake_rows()
    said = peers_page.say_rates(ours)
    assert said.startswith("0.667 rounds/s, ") and "ours / it 1 to 1" in said
    assert "tokens" not in said and "no wheel" in peers_page.say_rates(fedjax)
    launch = launches.Launch([2.0], [3.0], 5.0, 3.0, 2.5)
    (row,) = peers.build_rows("L", {"fedmoe": [launch]}, {}, 100.0, 2)
    assert row["tokens_per_s"] == 16 * 10 * 8 * 128 / 2
    assert "0.5 rounds/s, 81,920 tokens/s" in peers_page.say_rates(row)


def test_page_and_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    rows = fake_rows()
    monkeypatch.setattr(peers_page, "find_commit", lambda folder: ("a1b2", True))
    peers_page.write([row | {"work": "B"} for row in rows], "--works=B")
    monkeypatch.setattr(peers_page, "find_commit", lambda folder: (None, None))
    peers_page.write(rows, "--works=A")
    text = (tmp_path / "performance.md").read_text()
    assert "| pfl-research, 2 processes | **2.7 to 2.7** | 2.7 to 2.7 |" in text
    assert "none | **unknown** | unknown" in text and "no wheel" in text
    assert "dense FedAvg: one expert (E = 1)" in text
    assert "peers --works=A`, 20" in text and "peers --works=B`, 20" in text
    kept = peers_page.read_rows((tmp_path / "peers.csv").read_text())
    assert [row["work"] for row in kept] == ["A"] * 4 + ["B"] * 4
    assert [row["commit"] for row in kept] == [""] * 4 + ["a1b2-dirty"] * 4
    assert kept[1]["ratio"] == pytest.approx(4 / 1.5, rel=1e-5)
    assert (tmp_path / "peers.png").stat().st_size > 1000
    assert matplotlib.get_backend().lower() == "agg"


def test_older_rows_have_no_commit():
    text = peers_page.format_rows([row | {"measured": ""} for row in fake_rows()])
    older = text.replace(",commit\n", "\n").replace(",\n", "\n")
    assert {row["commit"] for row in peers_page.read_rows(older)} == {""}


def test_a_peer_without_ours_is_not_compared():
    alone = launches.Launch([2.0], [3.0], 5.0, 3.0, 2.5)
    assert peers.compare([alone], []) == {}


@pytest.mark.parametrize(
    ("name", "processes", "threads"),
    [
        ("drjax", 2, False),  # every core is a device, as with ours
        ("drjax", 1, True),
        ("fedjax", 2, True),  # one device on all cores
    ],
)
def test_jax_peers_have_our_flags(monkeypatch, name, processes, threads):
    """Ours chooses them in a process of its own, for as many devices."""
    monkeypatch.setattr(peers, "count_cores", lambda: 2)
    monkeypatch.setattr(xla, "count_cores", lambda: 2)
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(xla.jax.config, "update", lambda name, value: None)
    flags = peers.choose_flags(peers.PEERS[name], 20, processes)
    xla.set_cpu_devices(1 if threads else 2)
    assert flags == {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
    assert ("multi_thread_eigen=false" in flags["XLA_FLAGS"]) != threads


def test_other_peers_have_no_flags():
    assert peers.choose_flags(peers.PEERS["torch"], 20, 2) == {}


def test_a_range_needs_five_pairs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--repetitions=4"])
    with pytest.raises(SystemExit):
        peers.parse_flags()
    assert "--repetitions=4; allowed: >= 5" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["peers", "--repetitions=1", "--quick"])
    assert peers.parse_flags().repetitions == 1
