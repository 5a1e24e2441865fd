"""Systems in parts, by hand."""

from fedmoe_jax.report import parts

from .fake_runs import IN_PARTS, make_labels

BASE = IN_PARTS["random"]


def test_parts_section_parts_assignment_from_the_rest(tmp_path):
    section = parts.parts_section(make_labels(tmp_path, **IN_PARTS))
    assert section.title == "Assignment, and what else the system does"
    (sheet,) = section.sheets
    assert sheet.heads[:3] == ("System", "Pairs", "Global %")
    texts = {
        label: [cell.text for cell in row[:2]] for label, row in sheet.rows.items()
    }
    # -10, -5 and -10 points: -8.3 ± 4.30265 * 2.88675 / sqrt(3).
    assert texts == {
        "flex_moe: assignment (flex_moe_shared_gate less random)": ["3", "+10.0 ± 0.0"],
        "flex_moe: the rest (flex_moe less flex_moe_shared_gate)": ["3", "-8.3 ± 7.2"],
    }


def test_parts_are_of_rows_with_the_same_changes(tmp_path):
    def parts_of(*labels):
        made = make_labels(tmp_path, **dict.fromkeys(labels, BASE))
        return [(part.name, part.pair) for part in parts.list_parts(made)]

    changed, shared = "flex_moe x=1", "flex_moe_shared_gate x=1"
    assert parts_of("random", "flex_moe", shared) == []
    rest = ("the rest", (changed, shared))
    assert parts_of(changed, shared) == [rest]
    assert parts_of("random", changed, shared) == [
        ("assignment", (shared, "random")),
        rest,
    ]
    assert parts_of("random", "random x=1", changed, shared) == [
        ("assignment", (shared, "random x=1")),
        rest,
    ]


def test_no_section_of_parts_without_a_row_of_the_shared_gate(tmp_path):
    made = make_labels(tmp_path, random=BASE, flex_moe=BASE)
    assert parts.parts_section(made) is None
