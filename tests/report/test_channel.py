"""The channel in a report, by hand."""

import math

import numpy as np

from fedmoe_jax.report.channel import channel_pictures, channel_section

from .fake_runs import make_row, make_run

WIRELESS = {"kind": "wireless", "csi": 0.95}
LINKED = {"kind": "wireless", "sight": 1.0, "csi": 1.0}


def make_linked(tmp_path, group, found, label="greedy", **more):
    """Two runs of each config of a group, whose rows have some numbers."""
    runs = []
    for config, numbers in found:
        for seed in range(2):
            run = make_run(tmp_path, label, [make_row(1, **numbers, **more)], seed=seed)
            runs.append(run._replace(config=run.config | {group: config}))
    return runs


def make_channel(tmp_path, label="greedy", kind="wireless"):
    """Runs with three kinds of knowledge; accuracy rises, megabytes lost fall."""
    found = [
        (WIRELESS | {"kind": kind, "csi": csi}, numbers)
        for csi, numbers in {
            1.0: {"global_accuracy": 0.6, "wasted_bytes": 1e6},
            0.7: {"global_accuracy": 0.4, "wasted_bytes": 4e6},
            0.95: {"global_accuracy": 0.5, "wasted_bytes": 2e6},
        }.items()
    ]
    return make_linked(tmp_path, "channel", found, label)


def read(sheet, head):
    place = sheet.heads.index(head) - 1
    return {label: cells[place].text for label, cells in sheet.rows.items()}


def test_channel_section_has_a_table_for_each_field_with_several_values(tmp_path):
    section = channel_section(make_channel(tmp_path))
    (sheet,) = section.sheets
    assert section.title == "The channel" and sheet.title == "channel.csi"
    assert read(sheet, "Global %") == {
        "greedy, csi 0.7": "40.0 ± 0.0",
        "greedy, csi 0.95": "+10.0 ± 0.0",
        "greedy, csi 1": "+20.0 ± 0.0",
    }
    lost = [4.0, -2.0, -3.0]
    assert [float(text.split()[0]) for text in read(sheet, "MB lost").values()] == lost


def test_channel_section_of_links_to_experts(tmp_path):
    found = [
        (LINKED | {"sight": sight}, {"linked_global_accuracy": accuracy})
        for sight, accuracy in {0.0: 0.5, 1.0: 0.7}.items()
    ]
    runs = make_linked(tmp_path, "expert_links", found, linked_delay=0.25)
    (sheet,) = channel_section(runs).sheets
    assert sheet.title == "expert_links.sight"
    assert read(sheet, "Global, over links %") == {
        "greedy, sight 0": "50.0 ± 0.0",
        "greedy, sight 1": "+20.0 ± 0.0",
    }
    assert read(sheet, "Wait for links %")["greedy, sight 0"] == "25.0 ± 0.0"
    assert list(channel_pictures(runs)) == []  # two values are no curve


def test_no_section_without_a_channel_or_with_one_value(tmp_path):
    assert channel_section(make_channel(tmp_path, kind="wired")) is None
    alone = make_linked(tmp_path, "channel", [(WIRELESS, {})])
    assert channel_section(alone) is None
    assert channel_section([make_run(tmp_path)]) is None


def test_channel_pictures_draw_each_row_over_the_field(tmp_path):
    runs = make_channel(tmp_path) + make_channel(tmp_path, "random")
    accuracy, lost = channel_pictures(runs)
    names = "channel_csi-final_global_accuracy", "channel_csi-wasted_megabytes"
    assert (accuracy.name, lost.name) == names
    for picture, expected in ((accuracy, [40, 50, 60]), (lost, [4, 2, 1])):
        (axes,) = picture.figure.axes
        x, y = axes.lines[0].get_data()
        np.testing.assert_allclose(x, [0.7, 0.95, 1.0])
        np.testing.assert_allclose(y, expected)
        assert axes.get_xlim() == (0.7, 1.0) and axes.get_xlabel() == "channel.csi"
        assert {text.get_text() for text in axes.texts} == {"greedy", "random"}


def test_channel_pictures_leave_out_a_deadline_that_never_comes(tmp_path):
    found = [
        (WIRELESS, {"global_accuracy": accuracy}) for accuracy in (0.4, 0.5, 0.6, 0.7)
    ]
    deadlines = 40.0, 80.0, 160.0, math.inf
    runs = make_linked(tmp_path, "channel", found)
    pairs = zip(runs, np.repeat(deadlines, 2).tolist(), strict=True)
    runs = [
        run._replace(config=run.config | {"devices": {"deadline": at}})
        for run, at in pairs
    ]
    assert len(channel_section(runs).sheets[0].rows) == 4
    picture, *_ = channel_pictures(runs)
    (axes,) = picture.figure.axes
    np.testing.assert_allclose(axes.lines[0].get_data(), [[40, 80, 160], [40, 50, 60]])
    assert list(channel_pictures(runs[2:])) == []  # of two that are finite
