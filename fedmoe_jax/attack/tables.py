"""Attacks as tables: a row per label with means over seeds, a record per run."""

import functools
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from fedmoe_jax.attack.membership import NAN
from fedmoe_jax.attack.plots import (
    Point,
    average_rows,
    draw_attacks,
    draw_epsilons,
)
from fedmoe_jax.report.cells import mean_cell
from fedmoe_jax.report.figures import Picture
from fedmoe_jax.report.page import figure_html, make_page
from fedmoe_jax.report.records import write_records
from fedmoe_jax.report.runs import Run, join_measures, name_runs, numbers
from fedmoe_jax.report.sheets import Section, Sheet, section_html, section_markdown
from fedmoe_jax.report.tables import privacy_of
from fedmoe_jax.runtime.files import write_atomically, write_bytes


class Column(NamedTuple):
    """One column of a table of attacks.

    Attributes:
      key: of the numbers of a run.
      title: above it.
      scale: by which it multiplies the number, 100 for percent.
      digits: after the point.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 3


def percent(key: str, title: str) -> Column:
    """A column in percent."""
    return Column(key, title, 100.0, 1)


UTILITY = (
    Column("epsilon", "Epsilon", digits=1),
    percent("final_global_accuracy", "Global %"),
    percent("final_personal_accuracy", "Personal %"),
    percent("final_personal_prior_accuracy", "Personal, prior %"),
    Column("mean_load_cv", "Load CV", digits=2),
    Column("labels_known", "Expert-label NMI"),
    Column("megabytes_up", "MB up a round", digits=2),
    Column("megabytes_down", "MB down a round", digits=2),
)
HISTORIES = (
    Column("mix_distance_mean", "TV, mean"),
    Column("mix_distance_link_ridge", "TV, link, ridge"),
    Column("mix_distance_link_mlp", "TV, link, MLP"),
    Column("mix_distance_server_ridge", "TV, server, ridge"),
    Column("mix_distance_server_mlp", "TV, server, MLP"),
    percent("mix_majority_mean", "Majority %, mean"),
    percent("mix_majority_link_ridge", "Majority %, link, ridge"),
    percent("mix_majority_link_mlp", "Majority %, link, MLP"),
    percent("mix_majority_server_ridge", "Majority %, server, ridge"),
    percent("mix_majority_server_mlp", "Majority %, server, MLP"),
    Column("pairs_auc", "Pairs, AUC"),
    Column("pairs_spearman", "Pairs, Spearman"),
)
GROUPS = (
    percent("groups_mean", "Group %, mean"),
    percent("groups_link_ridge", "Group %, link, ridge"),
    percent("groups_link_mlp", "Group %, link, MLP"),
    percent("groups_server_ridge", "Group %, server, ridge"),
    percent("groups_server_mlp", "Group %, server, MLP"),
    Column("groups_auc", "Pairs of a group, AUC"),
)
MEMBERS = tuple(
    column
    for name, title in (("loss", "Loss"), ("lira", "LiRA"))
    for column in (
        Column(f"members_{name}_auc", f"{title}, AUC"),
        percent(f"members_{name}_sure", f"{title}, TPR % at 1 % FPR"),
        Column(f"members_{name}_advantage", f"{title}, advantage"),
        Column(f"members_{name}_auc_rare", f"{title}, AUC, rare experts"),
        Column(f"members_{name}_auc_common", f"{title}, AUC, common experts"),
        Column(f"members_{name}_auc_by_holders", f"{title}, AUC by holders", digits=2),
        Column(f"members_{name}_cases", f"{title}, cases", digits=0),
    )
)
EXPERT_FIELDS = (*("attack", "expert", "holders", "auc", "sure", "advantage", "cases"),)
SECTIONS = (
    (
        "Utility",
        "Epsilon is of the mechanisms that are on, together; it is of what these cover "
        "(below). Expert-label NMI: normalised mutual information of the experts that "
        "answer test examples and their labels.",
        UTILITY,
    ),
    (
        "Label mixes and similar clients",
        "TV: mean total variation, 0 to 1, between a client's label mix and what is "
        "found from its history, by one who knows the mixes of the other clients; mean "
        "knows no history. Link sees held sets, server the feedback, too. Majority: "
        "clients whose most frequent label is found. Pairs: whether clients with "
        "similar held sets have the same most frequent label (AUC, 0.5 is chance), and "
        "the rank correlation of both similarities.",
        HISTORIES,
    ),
    (
        "Groups",
        "Clients whose group (`groups.kind`) is found from their history, by one who "
        "knows the groups of the other clients, and whether clients with similar held "
        "sets are of the same group (AUC, 0.5 is chance). Mean knows no history: the "
        "group of which fewest are among the others, which it never guesses, is often "
        "the right one, so that it finds less than a guess at random.",
        GROUPS,
    ),
    (
        "Members",
        "Whether an example was trained on by a client, from the client's update: by "
        "its loss, and by LiRA with the other seeds as shadows. AUC 0.5 and TPR 1 % "
        "are chance; with less than 99 others there is no TPR. Rare experts: those "
        "with the fewest holders, which answer half of the examples. By holders: rank "
        "correlation, over the experts of a run, of their AUC with their number of "
        "holders. Cases: examples on which it is measured.",
        MEMBERS,
    ),
)

CAPTION = (
    "What attacks find over the clients' personal accuracy, a mark for each row, mean "
    "over seeds; dashed: what is found without a history."
)
EPSILONS = (
    "What attacks find, and what defences cost, over the epsilon of each row that has "
    "one above 0, mean over seeds; dashed: the strategy without a defence."
)

Numbers = Mapping[str, float]


def add_utility(runs: Sequence[Run], found: Sequence[Numbers]) -> list[Numbers]:
    """The numbers of attacks with those of the runs themselves."""
    measures = join_measures(runs)
    pairs = zip(runs, found, strict=True)
    return [{**numbers(run, measures, {}), **own} for run, own in pairs]


def make_section(
    title: str,
    about: str,
    columns: Sequence[Column],
    groups: Mapping[str, Sequence[Numbers]],
) -> Section:
    """A table with the columns that any run has, and a row for every label."""
    every = [one for each in groups.values() for one in each]
    is_known = lambda column: any(
        math.isfinite(one.get(column.key, NAN)) for one in every
    )
    known = [column for column in columns if is_known(column)]
    rows = {
        label: [
            mean_cell([one.get(c.key, NAN) for one in each], c.scale, c.digits)
            for c in known
        ]
        for label, each in groups.items()
    }
    heads = ["Strategy", *(column.title for column in known)]
    return Section(title, about, [Sheet("", heads, rows)])


def draw_pictures(points: Sequence[Point]) -> list[Picture]:
    """The pictures of the rows, those that there is something for."""
    attacks, over = draw_attacks(points), draw_epsilons(points)
    drawn = ("attacks", CAPTION, attacks), ("epsilons", EPSILONS, over)
    return [Picture(name, text, figure) for name, text, figure in drawn if figure]


def save_png(folder: Path, name: str, png: bytes) -> str:
    """Writes a picture into a folder, and returns its name."""
    write_bytes(folder / f"{name}.png", png)
    return name


def write_attacks(
    workdir: Path,
    runs: Sequence[Run],
    found: Sequence[Numbers],
    experts: Sequence[Sequence[dict]],
) -> Path:
    """Writes `attacks.html`, which needs no other file, and what it is made of.

    That is `attacks.md`, its pictures, `attacks.csv` and `attack_experts.csv`.

    Args:
      workdir: of the tables; it exists.
      runs: that were attacked.
      found: the numbers of each, see `attacks.attack_runs`.
      experts: the records of each, likewise.

    Returns:
      The path of `attacks.md`.
    """
    joined, places = add_utility(runs, found), {id(r): i for i, r in enumerate(runs)}
    groups: dict[str, list[Numbers]] = {}
    notes: dict[str, str] = {}
    named = name_runs(runs)
    for run, one in zip(named, joined, strict=True):
        groups.setdefault(run.label, []).append(one)
        notes.setdefault(run.label, privacy_of([run]))
    sections = [make_section(*each, groups) for each in SECTIONS]
    sections = [each for each in sections if each.sheets[0].heads[1:]]
    parts, page = [], ["<h1>Attacks</h1>"]
    for picture in draw_pictures(average_rows(named, joined)):
        name, caption, _ = picture
        parts.append(f"![{caption}]({name}.png)\n\n{caption}\n")
        page.append(figure_html(picture, "", functools.partial(save_png, workdir)))
    parts += map(section_markdown, sections)
    page += map(section_html, sections)
    private = {label: text for label, text in notes.items() if text}
    if private:
        lines = [f"* `{label}`: {text}\n" for label, text in private.items()]
        parts.append("## What is private\n\n" + "".join(lines))
        items = [
            f"<li><code>{escape(label)}</code>: {escape(text)}</li>"
            for label, text in private.items()
        ]
        page.append(f"<h2>What is private</h2><ul>{''.join(items)}</ul>")
    write_atomically(workdir / "attacks.html", make_page("Attacks", page))
    path = workdir / "attacks.md"
    write_atomically(path, "# Attacks\n\n" + "\n".join(parts))
    keys = [column.key for _, _, columns in SECTIONS for column in columns]
    show = lambda value: f"{value:.6g}" if math.isfinite(value) else ""

    def list_numbers(run: Run) -> list[dict]:
        one = joined[places[id(run)]]
        return [{key: show(one.get(key, NAN)) for key in keys}]

    write_records(workdir / "attacks.csv", runs, keys, list_numbers)
    of_experts = lambda run: experts[places[id(run)]]
    write_records(workdir / "attack_experts.csv", runs, EXPERT_FIELDS, of_experts)
    return path
