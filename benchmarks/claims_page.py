"""Pages of claims, and pages that quote them: lists, tables, numbers in sentences."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.claims_list import Claim
from benchmarks.claims_map import Map
from benchmarks.claims_numbers import Number
from fedmoe_jax.options import UserError
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.forest import KEY
from fedmoe_jax.report.sheets import Sheet, markdown_rows

HEADS = (
    "claim",
    "number ± 95 % interval",
    "sign test",
    "seeds",
    "rates",
    "study",
    "what would overturn it",
)
STRUCK = ("struck out", "reason", "date")
FOLDER = "claims"  # of `results/`, with a page for each section
PICTURE = (
    "Differences of two rows with their 95 % intervals, in measures of several pairs. "
    f"{KEY}"
)
READING = "How to read this is under [results](README.md)."
UNKNOWN = "cannot be told"
VERBS = {  # of a gain, a loss, and what cannot be told
    "leads": ("leads", "trails", f"{UNKNOWN} from"),
    "gains": ("gains", "loses", f"{UNKNOWN} to gain or lose"),
}
DEFAULT = "`{a}` {{leads}} `{b}`"


class Computed(NamedTuple):
    """All that pages quote.

    Attributes:
      claims: by id.
      numbers: by the id of the claim; a struck one may have none.
      tables: of means, of differences and of maps, by name.
      maps: by name.
    """

    claims: Mapping[str, Claim]
    numbers: Mapping[str, Number]
    tables: Mapping[str, Sheet]
    maps: Mapping[str, Map]


def show(cell: Cell) -> str:
    """The text of a cell, bold where it is."""
    return f"**{cell.text}**" if cell.bold else cell.text


def view(number: Number, name: str) -> str:
    """A number as a sentence or a table quotes it.

    Args:
      number: of a claim.
      name: empty: with its sign where it is negative; `size`: without; `bold`: bold
        where it exceeds its interval; `a`, `b`: the mean of that row; `p`, `wins`: of
        the sign test.

    Raises:
      UserError: the number has no such view.
    """
    cell, paired = number.cell, number.paired
    views = {
        "": cell.text.lstrip("+"),
        "size": cell.text.lstrip("+-"),
        "bold": show(cell._replace(text=cell.text.lstrip("+"))),
        "a": number.ours.text,
        "b": number.others.text,
    }
    if paired:
        views |= {"p": f"{paired.p:.3g}", "wins": f"{paired.wins} of {paired.pairs}"}
    if name not in views:
        raise UserError(f"claims: view {name!r}; allowed: {', '.join(views)}")
    return views[name]


def quote(key: str, numbers: Mapping[str, Number]) -> str:
    """The number of `id` or `id.view`.

    Raises:
      UserError: no claim with a number has the id.
    """
    name, _, how = key.partition(".")
    if name not in numbers:
        raise UserError(
            f"claims: {name!r} is quoted; allowed: the id of a claim with a number"
        )
    return view(numbers[name], how)


def fill(text: str, numbers: Mapping[str, Number], gain: int | None = None) -> str:
    """The text with a number in place of each {id}, and verbs that fit a gain."""

    def put(found: re.Match[str]) -> str:
        if gain is not None and found[1] in VERBS:
            return VERBS[found[1]][{1: 0, -1: 1, 0: 2}[gain]]
        return quote(found[1], numbers)

    return re.sub(r"\{([\w.-]+)\}", put, text)


def say(claim: Claim, numbers: Mapping[str, Number]) -> str:
    """The sentence of a claim with a number, as far as the number carries it."""
    number = numbers[claim.id]
    default = DEFAULT.format(a=claim.a, b=claim.b) if claim.b else f"`{claim.a}`"
    text = fill(claim.text or default, numbers, number.gain)
    if number.gain == 0 and UNKNOWN not in text:
        text += f": {UNKNOWN}"
    return f"{number.title}: {text}"


def link_tables(name: str, studies: Mapping[str, Any]) -> str:
    """Links to the table of a study, or to those of its parts."""
    parts = studies[name].get("parts", [name])
    return ", ".join(f"[{part}]({part}/table.md)" for part in parts)


def row(
    claim: Claim, numbers: Mapping[str, Number], studies: Mapping[str, Any]
) -> list[str]:
    """The line of a claim in the table, `HEADS`."""
    number = numbers[claim.id]
    paired, test = number.paired, "–"
    if paired:
        test = f"{paired.wins} of {paired.pairs}, p {paired.p:.3g}"
    return [
        say(claim, numbers),
        show(number.cell),
        test,
        str(number.seeds),
        number.rates,
        link_tables(claim.study, studies),
        fill(claim.overturn, numbers),
    ]


def describe_study(name: str, studies: Mapping[str, Any], results: Path) -> str:
    """A study's command, what it costs, and links to its files and its log.

    Of a study of several parts, what they have in common, and those of each.
    """
    study = studies[name]
    if "parts" in study:
        parts = [describe_study(part, studies, results) for part in study["parts"]]
        return "\n".join([f"* `{name}`: {study['about']}", *parts])
    files = [results / name / "table.md", *sorted((results / name).glob("*.csv"))]
    links = [f"[{path.stem}]({name}/{path.name})" for path in files]
    links += [f"[log](LOG.md#{study['log']})"] if "log" in study else []
    about = f"{study['about']}; " if "about" in study else ""
    return f"* `{name}`: `{study['command']}` ({about}{', '.join(links)})"


def list_standing(section: Mapping[str, Any], computed: Computed) -> list[Claim]:
    """The claims of a section that stand."""
    claims = (computed.claims[entry["id"]] for entry in section["claims"])
    return [claim for claim in claims if not claim.struck]


def introduce(
    section: Mapping[str, Any],
    listed: Mapping[str, Any],
    computed: Computed,
    results: Path,
) -> list[str]:
    """The paragraphs before the claims of a section: its studies, what to know."""
    studies = dict.fromkeys(claim.study for claim in list_standing(section, computed))
    lines = [describe_study(name, listed["studies"], results) for name in studies]
    about = fill(section.get("about", ""), computed.numbers).strip()
    return list(filter(None, ["\n".join(lines), about]))


def section_text(
    section: Mapping[str, Any],
    listed: Mapping[str, Any],
    computed: Computed,
    results: Path,
) -> str:
    """A section of the list of studies, with a link to its claims; empty without."""
    standing = list_standing(section, computed)
    if not standing:
        return ""
    count = f"{len(standing)} claims" if standing[1:] else "1 claim"
    link = f"[{count}]({FOLDER}/{standing[0].study}.md)"
    parts = introduce(section, listed, computed, results)
    return "\n\n".join([f"## {section['title']}", *parts, link])


def deepen_links(text: str) -> str:
    """A text of `results/` with the links that it has in a folder of it."""

    def put(found: re.Match[str]) -> str:
        return "](../README.md#" if found[1] else "](../"

    return re.sub(r"\]\((?!\w+://)(#?)", put, text)


def list_pages(
    listed: Mapping[str, Any], computed: Computed, results: Path
) -> dict[str, str]:
    """The page of every section with claims that stand, by the study of its first.

    Raises:
      UserError: two sections have the same first study.
    """
    pages: dict[str, str] = {}
    for section in listed["sections"]:
        standing = list_standing(section, computed)
        if not standing:
            continue
        name, numbers, known = standing[0].study, computed.numbers, listed["studies"]
        if name in pages:
            raise UserError(
                f"claims: two sections begin with study {name!r}; allowed: one"
            )
        rows = (row(claim, numbers, known) for claim in standing)
        parts = introduce(section, listed, computed, results)
        if section.get("picture"):
            parts.append(f"![Differences]({FOLDER}/{name}.png)\n\n{PICTURE}")
        parts += [markdown_rows([HEADS, *rows]).strip(), READING]
        pages[name] = deepen_links(
            "\n\n".join([f"# {section['title']}", *parts]) + "\n"
        )
    return pages


def struck_text(computed: Computed) -> str:
    """The claims that no longer stand, the newest last, each with its reason."""
    gone = [claim for claim in computed.claims.values() if claim.struck]
    lines = [
        (f"~~{fill(c.text, computed.numbers)}~~", fill(c.reason, computed.numbers), at)
        for at, c in sorted(((c.struck, c) for c in gone), key=lambda pair: pair[0])
    ]
    return f"## Struck out\n\n{markdown_rows([STRUCK, *lines]).strip()}" if gone else ""


def headline_text(
    headline: Mapping[str, Sequence[Any]], numbers: Mapping[str, Number]
) -> str:
    """The short table: its heads, and rows of texts that quote claims."""
    lines = [[fill(text, numbers) for text in line] for line in headline["rows"]]
    return markdown_rows([headline["heads"], *lines]).strip()


def replace_block(page: str, name: str, text: str) -> str:
    """The page with a text between the lines `<!-- NAME -->` and `<!-- /NAME -->`."""
    pattern = re.compile(f"(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)", re.S)
    return pattern.sub(lambda _: f"\n{text}\n\n", page)


def rewrite(
    page: str, listed: Mapping[str, Any], computed: Computed, results: Path
) -> str:
    """A page with the numbers of today.

    They stand between `<!-- claims -->` and `<!-- /claims -->` (the studies), the
    same with `headline` (the short one) and with the name of another table, and
    between `<!-- ID -->` and `<!-- / -->` within a sentence.

    Args:
      page: its text.
      listed: the content of `claims.toml`.
      computed: of that list.
      results: the folder of the stored studies.

    Raises:
      UserError: it quotes what is no claim.
    """
    parts = [
        section_text(each, listed, computed, results) for each in listed["sections"]
    ]
    blocks = {
        "claims": "\n\n".join(filter(None, [*parts, struck_text(computed)])),
        "headline": headline_text(listed["headline"], computed.numbers),
    }
    for name, sheet in computed.tables.items():
        rows = [[text, *map(show, cells)] for text, cells in sheet.rows.items()]
        blocks[name] = markdown_rows([sheet.heads, *rows]).strip()
    for name, text in blocks.items():
        page = replace_block(page, name, text)
    put = lambda found: f"{found[1]}{quote(found[2], computed.numbers)}{found[3]}"
    return re.sub(r"(<!-- ([\w.-]+) -->)[^<]*(<!-- / -->)", put, page)


def first_change(old: str, new: str) -> str:
    """The first line that would change, and what it would become."""
    lines = zip([*old.splitlines(), ""], [*new.splitlines(), ""], strict=False)
    before, after = next(((a, b) for a, b in lines if a != b), ("", ""))
    return f"has {before!r}, the stored numbers give {after!r}"
