"""The map of a report: who leads in every regime."""

import pytest

from fedmoe_jax.report.regime_map import find_duels, judge, map_picture, map_section

from .fake_runs import make_row, make_run

SKEWED = {"greedy": (0.4, 0.42), "fedavg": (0.6, 0.61), "oracle": (0.9, 0.9)}
ROTATED = {"greedy": (0.8, 0.81), "fedavg": (0.6, 0.62), "oracle": (0.9, 0.91)}


def make_runs(tmp_path, **regimes):
    """Runs of a mixture, a dense control and a reference, by kind of partition."""
    runs = []
    for kind, rows in regimes.items():
        for label, values in rows.items():
            for seed, value in enumerate(values):
                load = [1.0] if label == "fedavg" else [1.0, 1.0]
                row = make_row(1, global_accuracy=value, expert_load=load)
                run = make_run(tmp_path, label, [row], seed=seed)
                summary = {"reference": label == "oracle"}
                config = run.config | {"partition": {"kind": kind}}
                runs.append(run._replace(config=config, summary=summary))
    return runs


def test_the_best_mixture_meets_the_best_control_in_every_regime(tmp_path):
    section = map_section(make_runs(tmp_path, skewed=SKEWED, rotated=ROTATED))
    (sheet,) = section.sheets
    assert sheet.heads == ("Regime", "Global %")
    cells = {regime: row[0] for regime, row in sheet.rows.items()}
    # The differences are -20 and -19, and 20 and 19: t(1) = 12.706 halves their span.
    assert cells["partition.kind=skewed"].text == "fedavg 19.5 ± 6.4 over greedy"
    assert cells["partition.kind=rotated"].text == "greedy 19.5 ± 6.4 over fedavg"
    assert all(cell.bold for cell in cells.values())


def test_a_reference_takes_no_part(tmp_path):
    regimes = find_duels(make_runs(tmp_path, skewed=SKEWED, rotated=ROTATED))
    mixtures = {duel.mixture for duels in regimes.values() for duel in duels.values()}
    assert mixtures == {"greedy"}


def test_a_map_needs_two_regimes_with_both_kinds(tmp_path):
    alone = {"greedy": (0.4, 0.5)}
    assert map_section(make_runs(tmp_path, skewed=SKEWED)) is None
    assert map_section(make_runs(tmp_path, skewed=SKEWED, rotated=alone)) is None
    assert list(map_picture(make_runs(tmp_path, skewed=SKEWED))) == []


def test_the_picture_names_the_leader_first(tmp_path):
    runs = make_runs(tmp_path, skewed=SKEWED, rotated=ROTATED)
    (duel,) = find_duels(runs)["partition.kind=skewed"].values()
    verdict = judge(duel, 1)
    assert verdict.lead == -1 and verdict.margin == pytest.approx(19.5)
    assert verdict.lines == ("fedavg", "19.5 ± 6.4 over greedy")
    (picture,) = map_picture(runs)
    (axes,) = picture.figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "partition.kind=skewed",
        "partition.kind=rotated",
    ]
    assert [text.get_text() for text in axes.texts][:2] == list(verdict.lines)


def test_a_lead_within_its_interval_is_none(tmp_path):
    level = {"greedy": (0.4, 0.6), "fedavg": (0.5, 0.49)}
    runs = make_runs(tmp_path, skewed=SKEWED, rotated=level)
    (duel,) = find_duels(runs)["partition.kind=rotated"].values()
    assert judge(duel, 1).lines == ("greedy", "+0.5 ± 133.4 against fedavg")
