"""Claims are computed from stored runs, and pages say no more than the numbers."""

import re

import pytest

from benchmarks import claims
from benchmarks.claims_page import deepen_links, list_pages
from benchmarks.claims_page import rewrite as rewrite_page
from fedmoe_jax.options import UserError

# Less `random`, `greedy` has 10, 12 and 14 points: mean 12, standard deviation 2, of
# which 4.302653 / sqrt(3) are the half-width, 4.968. `steady` has 1, -1 and 3: mean 1.
RUNS = """strategy,seed,final_global_accuracy,mean_load_cv,rounds_to.0.40,folder
random,0,0.40,1.0,,r0
random,1,0.42,1.0,,r1
random,2,0.44,1.0,30,r2
greedy,0,0.50,0.5,10,g0
greedy,1,0.54,0.6,20,g1
greedy,2,0.58,0.4,,g2
steady,0,0.41,1.0,10,s0
steady,1,0.41,1.0,10,s1
steady,2,0.47,1.0,10,s2
"""
TABLE = """| Strategy | Rates |
| --- | --- |
| `random` | untuned |
| `greedy` | tuned |
| `steady` | untuned |
"""
MEANS = {
    "study": "tiny",
    "measures": ["global", "mean_load_cv", "personal"],
    "rows": ["random", ["greedy", "by fitness"]],
}
APART = {
    "study": "tiny",
    "measures": ["global", "mean_load_cv"],
    "pairs": [["greedy", "random"]],
    "rows": [["", "as it is"]],
}
LEAD = {"id": "lead", "a": "greedy", "b": "random", "overturn": "more seeds"}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "runs.csv").write_text(RUNS)
    (tmp_path / "tiny" / "table.md").write_text(TABLE)
    return tmp_path


def list_claims(*entries):
    section = {"title": "All", "study": "tiny", "measure": "global"}
    return {
        "studies": {"tiny": {"command": "python tiny.py", "short": {"g": "greedy"}}},
        "tables": {"means": MEANS},
        "differences": {"apart": APART},
        "headline": {"heads": ["A"], "rows": [["{lead.bold} of {lead.a}"]]},
        "sections": [section | {"claims": list(entries)}],
    }


def compute(results, **changes):
    listed = list_claims(LEAD | changes)
    return claims.compute_all(listed, results).numbers["lead"]


def test_a_difference_by_hand(results):
    number = compute(results)
    assert number.paired.mean == pytest.approx(12)
    assert number.paired.half == pytest.approx(4.968, abs=1e-3)
    assert (number.paired.wins, number.paired.losses) == (3, 0)
    assert number.paired.p == pytest.approx(2 / 2**3)
    assert number.cell.text == "+12.0 ± 5.0" and number.cell.bold
    assert (number.gain, number.seeds) == (1, 3)
    assert (number.ours.text, number.others.text) == ("54.0 ± 9.9", "42.0 ± 5.0")
    assert number.rates == "tuned / untuned"


def test_a_difference_within_its_interval_cannot_be_told(results):
    number = compute(results, a="steady")
    assert number.cell.text == "+1.0 ± 5.0" and not number.cell.bold
    assert number.gain == 0 and number.rates == "untuned"
    assert (number.paired.wins, number.paired.p) == (2, 1.0)


def test_less_is_better_where_the_measure_says_so(results):
    assert compute(results, measure="mean_load_cv").gain == 1
    assert compute(results, measure="mean_load_cv").paired.mean < 0


def test_the_difference_of_differences(results):
    # 10, 12 and 14 less 1, -1 and 3.
    number = compute(results, less=["steady", "random"])
    assert number.paired.mean == pytest.approx((9 + 13 + 11) / 3)


def test_rounds_to_a_target_show_the_seeds_that_never_got_there(results):
    number = compute(results, measure="rounds_to.0.40", b="")
    assert number.cell.text == "20 (2/3)" and number.paired is None
    assert compute(results, measure="rounds_to.0.40", a="random", b="").cell.text == (
        "– (1/3)"
    )


def test_short_names_are_rows(results):
    assert compute(results, a="{g}") == compute(results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "beauty"}, "measure 'beauty' is unknown"),
        ({"a": "nobody"}, "tiny has no row 'nobody'; allowed: random, greedy, steady"),
        ({"measure": "rounds_to.0.40"}, "hides seeds that never got there"),
        ({"measure": "personal"}, "no seed with final_personal_accuracy"),
        ({"colour": "red"}, "'colour' is not allowed"),
        ({"overturn": ""}, "claim lead: overturn is empty"),
        ({"struck": "2026-01-01"}, "claim lead: reason is empty"),
        ({"struck": "2026-01-01", "reason": "old"}, "claim lead: text is empty"),
        ({"study": "absent"}, "study 'absent' is not listed; allowed: tiny"),
        ({"less": ["random"]}, "less=['random']; allowed: two"),
        ({"rounds": [1, 2]}, "evaluations.csv has no global_accuracy"),
    ],
)
def test_a_claim_that_cannot_be_computed_is_refused(results, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compute(results, **changes)


def test_an_id_is_there_once(results):
    with pytest.raises(UserError, match="claim lead is there twice"):
        claims.compute_all(list_claims(LEAD, LEAD), results)


def test_differences_of_other_runs_are_refused(results):
    head = "strategy,baseline,measure,difference"
    row = "greedy,random,final_global_accuracy,13"
    (results / "tiny" / "paired.csv").write_text(f"{head}\n{row}\n")
    with pytest.raises(UserError, match="is 13, runs.csv gives 12"):
        compute(results)


def rewrite(results, page, *entries):
    listed = list_claims(LEAD, *entries)
    computed = claims.compute_all(listed, results)
    return rewrite_page(page, listed, computed, results)


def test_numbers_within_sentences_are_those_of_the_claims(results):
    page = "by <!-- lead.size -->3<!-- / -->, <!-- lead.wins -->?<!-- / --> seeds"
    expected = "by <!-- lead.size -->12.0 ± 5.0<!-- / -->, <!-- lead.wins -->3 of 3<!--"
    assert rewrite(results, page) == f"{expected} / --> seeds"
    assert rewrite(results, rewrite(results, page)) == rewrite(results, page)


@pytest.mark.parametrize("quoted", ["nothing", "lead.colour"])
def test_what_no_claim_has_is_not_quoted(results, quoted):
    with pytest.raises(UserError, match="allowed"):
        rewrite(results, f"<!-- {quoted} -->1<!-- / -->")


def test_the_tables_of_a_page(results):
    close = {"id": "close", "a": "steady", "b": "random", "overturn": "not {lead}"}
    plain = close | {"id": "plain", "text": "steady less random"}
    gone = {"id": "gone", "text": "All is well", "struck": "2026-01-02"}
    page = "a\n<!-- claims -->\nold\n<!-- /claims -->\n<!-- headline -->\n"
    page += "<!-- /headline -->\nb\n"
    gone |= {"reason": "only {lead.size}"}
    text = rewrite(results, page, close, plain, gone)
    assert text.startswith("a\n<!-- claims -->\n\n## All\n\n* `tiny`: `python tiny.py`")
    assert "([table](tiny/table.md), [runs](tiny/runs.csv))" in text
    assert "\n\n[3 claims](claims/tiny.md)\n\n" in text
    assert "| ~~All is well~~ | only 12.0 ± 5.0 | 2026-01-02 |" in text
    assert "| A |\n| --- |\n| **12.0 ± 5.0** of 54.0 ± 9.9 |" in text
    assert text.endswith("<!-- /headline -->\nb\n")


def test_a_page_of_claims(results):
    close = {"id": "close", "a": "steady", "b": "random", "overturn": "not {lead}"}
    plain = close | {"id": "plain", "text": "steady less random"}
    listed = list_claims(LEAD, close, plain)
    pages = list_pages(listed, claims.compute_all(listed, results), results)
    assert list(pages) == ["tiny"]
    text, study = pages["tiny"], "[tiny](../tiny/table.md)"
    assert text.startswith("# All\n\n* `tiny`: `python tiny.py` ([table](../tiny/")
    assert (
        "| Global %: `greedy` leads `random` | **+12.0 ± 5.0** | 3 of 3, p 0.25 | 3 "
        f"| tuned / untuned | {study} | more seeds |\n"
    ) in text
    assert (
        "| Global %: `steady` cannot be told from `random` | +1.0 ± 5.0 | 2 of 3, p 1 "
        f"| 3 | untuned | {study} | not 12.0 ± 5.0 |\n"
    ) in text
    assert "| Global %: steady less random: cannot be told |" in text
    assert text.endswith("[results](../README.md).\n")


def test_two_sections_of_one_study_have_no_page(results):
    listed = list_claims(LEAD)
    listed["sections"].append(listed["sections"][0] | {"title": "More"})
    computed = claims.compute_all(list_claims(LEAD), results)
    with pytest.raises(UserError, match="two sections begin with study 'tiny'"):
        list_pages(listed, computed, results)


def test_links_lead_up_from_a_folder_below():
    text = "[a](b.md#c) [d](#e) [f](../g.md) [h](https://i.org)"
    assert deepen_links(text) == (
        "[a](../b.md#c) [d](../README.md#e) [f](../../g.md) [h](https://i.org)"
    )


def test_pages_of_no_section_are_deleted_and_lost_ones_written(
    results, monkeypatch, capsys
):
    listed = list_claims(LEAD)
    page, old = results / "claims" / "tiny.md", results / "claims" / "old.md"
    old.parent.mkdir()
    old.write_text("old")
    monkeypatch.setattr(claims, "PAGES", ())
    monkeypatch.setattr(claims, "RESULTS", results)
    monkeypatch.setattr(claims.tomllib, "loads", lambda text: listed)
    monkeypatch.setattr(claims, "LIST", results / "tiny" / "table.md")
    assert claims.main(["--check"]) == 1 and old.exists() and not page.exists()
    said = capsys.readouterr().err
    assert "old.md: " in said and "tiny.md: " in said
    assert claims.main([]) == 0
    assert page.exists() and not old.exists() and claims.main(["--check"]) == 0


def test_pictures_of_sections_are_drawn_and_old_ones_deleted(
    results, monkeypatch, capsys
):
    listed = list_claims(LEAD, LEAD | {"id": "more", "a": "steady"})
    listed["sections"][0]["picture"] = True
    drawn, old = results / "claims" / "tiny.png", results / "claims" / "old.png"
    old.parent.mkdir()
    old.write_bytes(b"old")
    monkeypatch.setattr(claims, "PAGES", ())
    monkeypatch.setattr(claims, "RESULTS", results)
    monkeypatch.setattr(claims.tomllib, "loads", lambda text: listed)
    monkeypatch.setattr(claims, "LIST", results / "tiny" / "table.md")
    assert claims.main(["--check"]) == 1 and old.exists() and not drawn.exists()
    assert "tiny.png: other numbers" in capsys.readouterr().err
    assert claims.main([]) == 0
    assert drawn.exists() and not old.exists() and claims.main(["--check"]) == 0
    page = (results / "claims" / "tiny.md").read_text()
    assert "](../claims/tiny.png)" in page


def test_a_table_of_means(results):
    page = "<!-- means -->\n<!-- /means -->\n"
    text = rewrite(results, page)
    assert "|  | Global % | Load CV | Personal % |" in text
    assert "| `random` | 42.0 ± 5.0 | 1.00 ± 0.00 | – |" in text
    assert "| by fitness | **54.0 ± 9.9** | **0.50 ± 0.25** | – |" in text


def test_a_table_of_differences(results):
    text = rewrite(results, "<!-- apart -->\n<!-- /apart -->\n")
    heads = "|  | Global %: `greedy` less `random` | Load CV: `greedy` less `random` |"
    assert heads in text
    assert "| as it is | **+12.0 ± 5.0** | **-0.50 ± 0.25** |" in text


def test_a_table_of_differences_of_an_unknown_row(results):
    listed = list_claims(LEAD)
    listed["differences"]["apart"] = APART | {"rows": [["seed=1", "?"]]}
    with pytest.raises(UserError, match="tiny has no row 'greedy seed=1'"):
        claims.compute_all(listed, results)


@pytest.mark.slow
def test_the_committed_pages_have_the_numbers_of_the_committed_runs(capsys):
    code = claims.main(["--check"])
    assert (code, capsys.readouterr().err) == (0, "")


@pytest.mark.slow
def test_a_page_with_another_number_fails_the_check(monkeypatch, tmp_path, capsys):
    stale = tmp_path / "page.md"
    monkeypatch.setattr(claims, "PAGES", (str(stale),))
    stale.write_text("in <!-- cifar-random-global -->9.9 ± 1.0<!-- / -->\n")
    assert claims.main(["--check"]) == 1
    assert "3.5 ± 2.9" in capsys.readouterr().err and "9.9" in stale.read_text()
    assert claims.main([]) == 0
    assert "3.5 ± 2.9" in stale.read_text()
