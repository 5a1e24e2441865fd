"""The README and the guides agree with the code, and their links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

from fedmoe_jax.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "strategies.md").read_text()
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
PAGES += sorted((ROOT / "results").glob("*.md"))
PAGES += sorted((ROOT / "results" / "claims").glob("*.md"))


def take_section(page, title):
    """The text between a heading and the next of its level."""
    level = title.split()[0]
    return page.split(f"{title}\n", 1)[1].split(f"\n{level} ", 1)[0]


def test_no_line_of_text_begins_with_a_comment():
    """Markdown shows such a line as it stands: links, code and the paragraph break."""
    for page in PAGES:
        found = re.findall(r"(?m)^ *<!--.*?-->(?=.*[^ ]).+$", page.read_text())
        assert not found, page.name


def make_anchors(text):
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    bare = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in bare}


@pytest.mark.slow
def test_the_lines_of_the_readme_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) < 10
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    run = names["run"]
    assert run.config.strategy == "greedy" and run.config.num_rounds == 4
    losses = run.rows["train_loss"]
    assert losses.shape == (4,) and losses[-1] < losses[0]
    assert capsys.readouterr().out.endswith(f"{np.array(losses)}\n")


@pytest.mark.parametrize(
    "text", [take_section(README, "## Strategies"), GUIDE], ids=["README", "guide"]
)
def test_every_strategy_is_named(text):
    for name in STRATEGIES:
        plain = name.removesuffix("_active").removesuffix("_smallest")
        assert f"`{name}`" in text or f"`{plain}`" in text, name


def test_the_tree_of_the_readme_names_what_is_there():
    tree, named = take_section(README, "## The tree").split("```")[1], []
    for line in tree.strip().splitlines():
        folder = ROOT / "fedmoe_jax" if line.startswith("  ") else ROOT
        names = re.split(r" {2,}", line.strip())[0].split()
        named += [folder / name for name in names]
    assert all(path.exists() for path in named)
    folders = {path.parent for path in (ROOT / "fedmoe_jax").glob("*/__init__.py")}
    assert len(folders) > 8 and folders <= set(named)


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in make_anchors(target.read_text()), link
