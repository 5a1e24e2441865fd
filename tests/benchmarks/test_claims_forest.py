"""The picture of a section's claims: which pairs, under which names."""

import pytest

from benchmarks.claims_forest import draw_claims, join_names, name_difference, name_pair
from benchmarks.claims_list import Claim
from benchmarks.claims_numbers import compute
from benchmarks.studies import Study
from fedmoe_jax.options import UserError

ROWS = {  # global accuracy, load CV
    "random": [(0.40, 1.0), (0.42, 1.0), (0.44, 1.0)],
    "greedy": [(0.50, 0.5), (0.54, 0.6), (0.58, 0.4)],
    "greedy x=1": [(0.50, 0.5), (0.55, 0.6), (0.57, 0.4)],
}
STUDY = Study(
    "tiny",
    {
        label: {
            seed: {"final_global_accuracy": first, "mean_load_cv": second}
            for seed, (first, second) in enumerate(values)
        }
        for label, values in ROWS.items()
    },
    dict.fromkeys(ROWS, "tuned"),
    {},
    [],
)


def make_claim(name, a="greedy", b="random", measure="global", **values):
    return Claim(name, study="tiny", measure=measure, a=a, b=b, **values)


def draw(*claims):
    return draw_claims(claims, {claim.id: compute(claim, STUDY) for claim in claims})


def test_rows_are_named_by_what_sets_them_apart():
    assert name_difference("greedy", "random") == "greedy less random"
    assert name_difference("greedy x=1", "greedy") == "greedy: x=1 less none"
    assert (
        name_difference("greedy x=1 y=2", "random x=1") == "x=1: greedy y=2 less random"
    )


def test_a_sentence_names_its_pair():
    text = "`greedy`, with noise {leads} none: labels that are found"
    assert name_pair(make_claim("a", text=text)) == "greedy, with noise less none"
    assert name_pair(make_claim("a", text="noise {gains}")) == "greedy less random"
    twice = make_claim("a", less=("greedy x=1", "random x=1"))
    name = "greedy less random, less the same of x=1: greedy less random"
    assert name_pair(twice) == name


def test_what_differs_before_a_colon_is_left_out():
    names = ["weak clients: greedy less random", "all clients: greedy less random"]
    assert join_names(names) == "greedy less random"
    assert join_names(["greedy: x less y"] * 2) == "greedy: x less y"
    assert join_names(["greedy pruned less whole", "short"]) == "short"


def test_a_picture_has_a_row_for_each_pair_and_knows_its_numbers():
    drawing = draw(
        make_claim("lead"),
        make_claim("load", measure="mean_load_cv"),
        make_claim("more", a="greedy x=1", b="greedy"),
        make_claim("more_load", a="greedy x=1", b="greedy", measure="mean_load_cv"),
        make_claim("mean", b=""),
    )
    assert drawing.note.splitlines() == [
        "Global % (+1)",
        "greedy less random: +12 ± 4.968 (+1)",
        "greedy: x=1 less none: +0 ± 2.484 (+0)",
        "Load CV (-1)",
        "greedy less random: -0.5 ± 0.2484 (+1)",
        "greedy: x=1 less none: +0 ± 0 (+0)",
    ]
    assert [axes.get_xlabel() for axes in drawing.draw().axes] == [
        "Global, points\xa0→",
        "Load CV\xa0←",
    ]


def test_a_measure_of_one_pair_has_no_panel():
    drawing = draw(
        make_claim("lead"),
        make_claim("more", a="greedy x=1", b="greedy"),
        make_claim("load", measure="mean_load_cv"),
    )
    assert "Load CV" not in drawing.note


def test_a_section_without_a_measure_of_several_pairs_has_no_picture():
    with pytest.raises(UserError, match="tiny has picture = true; allowed: where a"):
        draw(make_claim("lead"), make_claim("mean", b=""))
