"""Recomputes every claim of `results/claims.toml`: `python -m benchmarks.claims`.

It writes the pages of `results/claims`, the numbers between the markers of the pages
that quote claims, and the pictures of maps; `--check` writes nothing and fails where
one has another number.
"""

import argparse
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims_forest import draw_claims
from benchmarks.claims_list import list_claims
from benchmarks.claims_map import draw_places, read_map, tabulate_map
from benchmarks.claims_numbers import compute, tabulate, tabulate_differences
from benchmarks.claims_page import (
    FOLDER,
    Computed,
    first_change,
    list_pages,
    list_standing,
    rewrite,
)
from benchmarks.claims_pictures import Drawing, is_drawn, save_drawing
from benchmarks.page import RESULTS
from benchmarks.studies import (
    Study,
    add_change,
    find_disagreements,
    join_studies,
    read_csv,
    read_study,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import write_atomically

LIST = RESULTS / "claims.toml"
PAGES = ("results/README.md", "README.md", "docs/results.md", "docs/strategies.md")


def read_studies(
    names: Iterable[str], listed: Mapping[str, Any], results: Path
) -> dict[str, Study]:
    """The studies that claims are taken from.

    Args:
      names: of them.
      listed: those of `claims.toml`, by name; one with `parts` has the rows of these,
        each with the `change` of its part.
      results: the folder of the stored studies.

    Raises:
      UserError: one is not stored, or its `paired.csv` is of other runs; or see
        `join_studies`.
    """
    parts = {name: listed.get(name, {}).get("parts", [name]) for name in names}
    stored = dict.fromkeys(part for several in parts.values() for part in several)
    studies = {name: read_study(results / name) for name in stored}
    for name, study in studies.items():
        path = results / name / "paired.csv"
        for fault in find_disagreements(study, read_csv(path) if path.exists() else []):
            raise UserError(f"{fault}; allowed: files of the same runs")
    return {
        name: join_studies(
            name,
            [
                add_change(studies[part], listed[part].get("change", ""))
                for part in several
            ],
        )
        if "parts" in listed.get(name, {})
        else studies[name]
        for name, several in parts.items()
    }


def compute_all(listed: Mapping[str, Any], results: Path) -> Computed:
    """The claims and tables of a list.

    Args:
      listed: the content of `claims.toml`.
      results: the folder of the stored studies.

    Raises:
      UserError: see `list_claims`, `read_studies`, `compute`, `tabulate`,
        `tabulate_differences` and `read_map`.
    """
    claims, means = list_claims(listed), listed["tables"]
    apart, tables = listed["differences"], listed.get("maps", {})
    numbered = {name: claim for name, claim in claims.items() if claim.a}
    used = [claim.study for claim in numbered.values()]
    used += [table["study"] for table in (*means.values(), *apart.values())]
    used += [study for table in tables.values() for study, _ in table["rows"]]
    studies = read_studies(used, listed["studies"], results)
    maps = {name: read_map(table, studies) for name, table in tables.items()}
    return Computed(
        claims,
        {
            name: compute(claim, studies[claim.study])
            for name, claim in numbered.items()
        },
        {
            name: make(table, studies[table["study"]])
            for make, tables in ((tabulate, means), (tabulate_differences, apart))
            for name, table in tables.items()
        }
        | {name: tabulate_map(found) for name, found in maps.items()},
        maps,
    )


def list_texts(
    listed: Mapping[str, Any], computed: Computed, results: Path
) -> dict[Path, str]:
    """Every page as it should be, by its path; empty, one that should not be there."""
    folder = results / FOLDER
    pages = list_pages(listed, computed, results)
    quoting = [results.parent / name for name in PAGES]
    return (
        {path: rewrite(path.read_text(), listed, computed, results) for path in quoting}
        | dict.fromkeys(folder.glob("*.md"), "")
        | {folder / f"{name}.md": text for name, text in pages.items()}
    )


def list_pictures(
    listed: Mapping[str, Any], computed: Computed, results: Path
) -> dict[Path, Drawing | None]:
    """The pictures of maps and of sections, by their paths.

    None, one that should not be there.
    """
    maps = {
        results / table["picture"]: draw_places(computed.maps[name])
        for name, table in listed.get("maps", {}).items()
        if "picture" in table
    }
    sections = [section for section in listed["sections"] if section.get("picture")]
    standing = [list_standing(section, computed) for section in sections]
    folder = results / FOLDER
    drawn = {
        folder / f"{claims[0].study}.png": draw_claims(claims, computed.numbers)
        for claims in standing
        if claims
    }
    return dict.fromkeys(folder.glob("*.png")) | maps | drawn


def main(arguments: list[str] | None = None) -> int:
    """Rewrites the pages, or checks them; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims")
    told = "write nothing, and fail where a page or a picture has another number"
    parser.add_argument("--check", action="store_true", help=told)
    flags = parser.parse_args(arguments)
    status = 0
    try:
        listed = tomllib.loads(LIST.read_text())
        computed = compute_all(listed, RESULTS)
        for path, new in list_texts(listed, computed, RESULTS).items():
            old = path.read_text() if path.exists() else ""
            if new == old:
                continue
            if flags.check:
                status = 1
                name = os.path.relpath(path, RESULTS.parent)
                print(f"{name}: {first_change(old, new)}", file=sys.stderr)
            elif new:
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, new)
            else:
                path.unlink()
        for path, drawing in list_pictures(listed, computed, RESULTS).items():
            if is_drawn(path, drawing):
                continue
            if flags.check:
                status = 1
                print(f"{path.name}: other numbers", file=sys.stderr)
            elif drawing:
                save_drawing(path, drawing)
            else:
                path.unlink()
    except (UserError, tomllib.TOMLDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.check and not status:
        print(f"{len(computed.numbers)} claims agree with what is stored")
    return status


if __name__ == "__main__":
    sys.exit(main())
