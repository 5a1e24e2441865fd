"""Runs in, one self-contained `report.html` out."""

import base64
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from fedmoe_jax.options import UserError
from fedmoe_jax.report import plots, signatures
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.channel import channel_pictures
from fedmoe_jax.report.client_figures import client_pictures
from fedmoe_jax.report.cost_figures import cost_pictures
from fedmoe_jax.report.device_figures import compared_device_pictures, device_pictures
from fedmoe_jax.report.difference_figure import difference_picture
from fedmoe_jax.report.diverged import describe_diverged
from fedmoe_jax.report.figures import (
    Picture,
    curve_pictures,
    final_picture,
    population_pictures,
    run_pictures,
)
from fedmoe_jax.report.floors import floor_picture
from fedmoe_jax.report.origins import describe_origins
from fedmoe_jax.report.regime_map import map_picture
from fedmoe_jax.report.runs import Run, group_runs, limit_of, name_runs
from fedmoe_jax.report.sections import list_sections
from fedmoe_jax.report.sheets import section_html
from fedmoe_jax.report.strata import strata_pictures
from fedmoe_jax.report.tables import (
    EVERYWHERE,
    HEADINGS,
    Column,
    needs_of,
    note_of,
    overwrites_of,
    owners_of,
    privacy_of,
    rates_of,
    table,
)
from fedmoe_jax.runtime.files import flatten, write_atomically, write_bytes
from fedmoe_jax.runtime.names import distinct_name

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto;
  max-width: 1340px; padding: 0 1.5em }
h1 { font-size: 1.6em; margin-bottom: .2em } h2 { font-size: 1.2em; margin-top: 2em }
h3 { font-size: 1em; margin: .5em 0 0 }
table { border-collapse: collapse; font-size: 12px; margin: 1em 0 }
th, td { padding: .3em .4em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top } th { font-weight: 600; border-bottom-color: #888 }
td.number { text-align: right; white-space: nowrap }
.wide { overflow-x: auto } .note { color: #666; max-width: 18em }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start }
figure { margin: 0 } figure img { display: block }
figcaption { font-size: 13px; color: #444; margin-top: .3em }
details { border-top: 1px solid #ddd; padding: .6em 0 }
summary { cursor: pointer; font-weight: 600 }
pre { background: #f6f6f6; padding: .7em; white-space: pre-wrap; font-size: 12px }
.origin { color: #666; font-size: 12px; overflow-wrap: anywhere }
.yes { color: #b03a00; font-weight: 600 }
"""


Save = Callable[[str, bytes], str]  # (name, PNG) -> its name in the folder

LIMIT = "limit of any model on the whole test text, but for chance: {:.3f} bits"
LONGEST_LABEL = 60  # characters of a label in the name of a figure

BANDS = "<p>Curves: mean over seeds; the band is the lowest to the highest seed.</p>"
SEEDS = (
    "<p>A thin line is a seed, a thick one their mean as far as all of them reach: "
    "seeds need more or less for the same rounds.</p>"
)


def name_picture(picture: Picture) -> str:
    """What a picture shows: its caption up to the first full stop or colon."""
    return picture.caption.partition(". ")[0].partition(":")[0].rstrip(".")


def figure_html(picture: Picture, prefix: str, save: Save) -> str:
    """Saves the PNG and returns it inline, at 105 pixels per inch of paper."""
    buffer = io.BytesIO()
    plots.save_png(picture.figure, buffer)
    save(prefix + picture.name, buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(105 * picture.figure.get_figwidth())
    caption, about = escape(picture.caption), escape(name_picture(picture))
    return (
        f'<figure style="max-width: {width}px"><img width="{width}" alt="{about}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table_html(
    columns: Sequence[Column],
    rows: Mapping[str, Sequence[Cell]],
    groups: Mapping[str, Sequence[Run]],
    noted: bool,
) -> str:
    """One table; `noted` where its labels say what they need beyond the rules."""
    titles = ["Strategy", "Seeds", "Rates", *(column.title for column in columns)]
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = ""
    for label, cells in rows.items():
        needs = escape(needs_of(groups[label])) if noted else ""
        note = f'<div class="note">{needs}</div>' if needs else ""
        body += f"<tr><td><b>{escape(label)}</b>{note}</td>"
        body += f'<td class="number">{len(groups[label])}</td>'
        body += f"<td>{rates_of(groups[label])}</td>"
        for cell in cells:
            text = f"<b>{escape(cell.text)}</b>" if cell.bold else escape(cell.text)
            body += f'<td class="number">{text}</td>'
        body += "</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _numbers_html(runs: Sequence[Run]) -> str:
    """A table under each heading, and what their columns say."""
    columns, rows = table(runs)
    groups = group_runs(name_runs(runs))
    tables = ""
    for heading in HEADINGS:
        places = [
            at
            for at, column in enumerate(columns)
            if column.heading == heading or column.key in EVERYWHERE
        ]
        chosen = {label: [cells[at] for at in places] for label, cells in rows.items()}
        tables += f"<h3>{heading}</h3>"
        titles = [columns[at] for at in places]
        tables += _table_html(titles, chosen, groups, heading == HEADINGS[0])
    return (
        tables + "<p>Accuracies are means over the evaluations of the last ten rounds, "
        "in shorter runs than 40 of the last quarter. A changed field is not "
        "written where most rows have the same value. Mean ± "
        "half-width of the 95 % t-interval over seeds; (1 seed): there is no interval. "
        "No data: not measured, or not yet. Does not apply: load and starved experts "
        "to a model of one expert, which leaves nothing to assign; devices and "
        "deadlines to a run that simulates none. Rounds to a target: median over seeds "
        "(never counts as later than any round; – where that is the median), then how "
        "many of the seeds reached it. "
        "Bold: best of its column. MB: 10<sup>6</sup> bytes over all clients. Grey: "
        "data or room that a strategy needs beyond the shared rules. "
        f"{escape(describe_diverged(runs))}</p>"
        + _definitions_html(columns)
        + _notes_html(groups)
    )


def _definitions_html(columns: Sequence[Column]) -> str:
    """The definitions of a table's columns."""
    defined = "".join(
        f"<li><b>{escape(column.title)}</b>: {escape(column.about)}.</li>"
        for column in columns
        if column.about
    )
    title = "<summary>What the columns say</summary>"
    return f"<details>{title}<ul>{defined}</ul></details>" if defined else ""


def _notes_html(groups: Mapping[str, Sequence[Run]]) -> str:
    """Every strategy's decisions, and the config fields that it overwrites."""
    items = ""
    for label, group in groups.items():
        sentences = note_of(group), owners_of(group), overwrites_of(group)
        sentences = *sentences, privacy_of(group)
        text = " ".join(filter(None, sentences))
        items += f"<li><b>{escape(label)}</b> {escape(text)}</li>"
    return f"<details><summary>What each decides</summary><ul>{items}</ul></details>"


def _check(run: Run) -> list[signatures.Signature]:
    reads = run.summary.get("reads")
    return signatures.check(run.rows, run.arrays, run.config, reads)


def _signatures_html(run: Run) -> str:
    rows = ""
    for name, present, evidence, knob, condition in _check(run):
        shown = '<span class="yes">present</span>' if present else "not seen"
        shown = "too early" if evidence.startswith(signatures.TOO_EARLY) else shown
        texts = (condition, evidence, knob or "–")
        cells = [escape(name), shown, *map(escape, texts)]
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = ("Failure signature", "This run", "Present where", "Evidence")
    heads = (*heads, "What to turn")
    head = "".join(f"<th>{title}</th>" for title in heads)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _overview_html(groups: Mapping[str, Sequence[Run]]) -> str:
    """In how many of its seeds each strategy shows each failure signature."""
    rows = ""
    for label, group in groups.items():
        rows += f"<tr><td>{escape(label)}</td>"
        for each in zip(*map(_check, group), strict=True):
            judged = [
                f for f in each if not f.evidence.startswith(signatures.TOO_EARLY)
            ]
            count = sum(found.present for found in judged)
            look = ' class="yes"' if count else ""
            rows += (
                f"<td{look}>{count}/{len(judged)}</td>"
                if judged
                else "<td>too early</td>"
            )
        rows += "</tr>"
    first = _check(next(iter(groups.values()))[0])
    heads = ["Strategy", *(found.name for found in first)]
    head = "".join(f"<th>{escape(title)}</th>" for title in heads)
    conditions = " ".join(
        f"<b>{escape(found.name)}</b>: {escape(found.condition)}." for found in first
    )
    return (
        f"<table><tr>{head}</tr>{rows}</table><p>Seeds that show a failure, of those "
        f"that can be judged. 0 says that its condition is not met, not that all is "
        f"well. {conditions}</p>"
    )


def _section_html(label: str, run: Run, figures: str, opened: bool) -> str:
    """Signatures, pictures and config of one run, as a collapsible part."""
    config = "\n".join(
        f"{name} = {value}" for name, value in flatten(run.config).items()
    )
    title = f"{label}, seed {run.config.get('seed')}"
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>"
        f'{_signatures_html(run)}<div class="pictures">{figures}</div>'
        f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
        "</details>"
    )


def _origin_html(runs: Sequence[Run]) -> str:
    """The code, versions and devices that made the runs, and where they differ."""
    alike, different = describe_origins(runs)
    lines = [f"Made by: {escape(alike)}"] if alike else []
    if different:
        lines.append(f"<b>Made by different</b>: {escape(different)}")
    return f'<p class="origin">{"<br>".join(lines)}</p>' if lines else ""


def _list_values(runs: Sequence[Run], field: str) -> str:
    """The values of a config field of all runs, each once."""
    values = dict.fromkeys(str(flatten(run.config)[field]) for run in runs)
    return " or ".join(values)


def _header_html(runs: Sequence[Run], command: str) -> str:
    flat = flatten(runs[0].config)
    show = functools.partial(_list_values, runs)
    seconds = [sum(row.get("seconds") or 0.0 for row in run.rows) for run in runs]
    seconds = [
        r.summary.get("wall_seconds", s) for r, s in zip(runs, seconds, strict=True)
    ]
    running = sum(not run.summary for run in runs)
    public, limit = flat.get("data.public", 0), limit_of(runs)
    facts = [
        f"Data: {show('data.name')}, {show('partition.kind')} partition",
        f"{show('num_clients')} clients, {show('cohort_size')} a round",
        f"{show('num_experts')} experts",
        *([f"{public} examples set aside for the server"] if public else []),
        *([] if limit is None else [LIMIT.format(limit)]),
        f"{max(len(run.rows) for run in runs)} rounds",
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
        f"wall time {np.sum(seconds):.0f} s" + (" in all" if len(runs) > 1 else ""),
    ]
    if running:
        facts.append(f"{running} still in progress")
    labels = group_runs(name_runs(runs))
    title = " against ".join(labels) if len(labels) < 3 else "Comparison"
    return (
        f"<h1>{escape(title)} on {escape(show('data.name'))}</h1>"
        f"<p>{escape(' · '.join(facts))}</p><pre>{escape(command)}</pre>"
        + _origin_html(runs)
    )


def make_page(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML."""
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    )
    return f"{head}<style>{STYLE}</style><body>{''.join(parts)}</body></html>"


def _keep_figures(folder: Path) -> tuple[Save, list[OSError]]:
    """A function that saves figures under names of their own, and what goes wrong."""
    taken: set[str] = set()
    faults: list[OSError] = []

    def save(name: str, png: bytes) -> str:
        name = distinct_name(name, taken)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / f"{name}.png", png)
        except OSError as error:
            faults.append(error)
        return name

    return save, faults


def write_report(
    folder: str | Path, runs: Sequence[Run], command: str, baseline: str = ""
) -> Path:
    """Writes `report.html`, which needs no other file, and `figures/*.png`.

    Args:
      folder: where to write; created if absent.
      runs: one run, or many: runs of the same strategy and config are its seeds.
      command: the command line that made the runs, printed as it is.
      baseline: the label from which differences are taken; empty: the best control.
    Returns:
      The path of the report.
    """
    if not runs:
        raise UserError("report: there is no run; allowed: one or more")
    groups = group_runs(name_runs(runs))
    Path(folder).mkdir(parents=True, exist_ok=True)
    labels: set[str] = set()
    save, faults = _keep_figures(Path(folder) / "figures")
    show = lambda found, prefix="": "".join(
        figure_html(picture, prefix, save) for picture in found
    )
    first = show(final_picture(groups)) if len(groups) > 1 else ""
    first += show(difference_picture(runs, baseline))
    parts = [_header_html(runs, command), f'<div class="pictures">{first}</div>']
    parts += ["<h2>Final numbers</h2>", _numbers_html(runs)]
    parts.append(f'<div class="wide">{show(map_picture(runs))}</div>')
    parts += map(section_html, list_sections(runs, baseline))
    gallery = show(floor_picture(runs)) + show(channel_pictures(runs))
    if gallery:
        parts.append(f'<h2>By config</h2><div class="pictures">{gallery}</div>')
    gallery = show(strata_pictures(groups)) + show(curve_pictures(groups))
    bands = "" if len(runs) == len(groups) else BANDS
    parts.append(f'<h2>Over rounds</h2>{bands}<div class="pictures">{gallery}</div>')
    gallery, bands = show(cost_pictures(groups)), SEEDS if bands else ""
    if len(groups) > 1:
        gallery += show(compared_device_pictures(groups))
    if gallery:
        parts += ["<h2>Against time and traffic</h2>", bands]
        parts.append(f'<div class="pictures">{gallery}</div>')
    if len(groups) > 1:
        parts += ["<h2>Failure signatures by seeds</h2>", _overview_html(groups)]
    # A run with all data in one place has one device, others one for each client.
    most = max(runs, key=lambda run: len(run.arrays.get("capacity", ())))
    if most.arrays:
        clients = show(client_pictures(groups)) + show(population_pictures(most))
        seed = f"{most.label}, seed {most.config.get('seed')}"
        of = f"<p>Examples and capacity are those of {escape(seed)}.</p>"
        parts += ["<h2>The clients</h2>", of if len(runs) > 1 else ""]
        parts.append(f'<div class="pictures">{clients}</div>')
    parts.append("<h2>Inside the runs</h2>")
    for label, group in groups.items():
        prefix = distinct_name(label.replace(" ", "_"), labels, LONGEST_LABEL)
        prefix = f"{prefix}-" if len(groups) > 1 else ""
        figures = show(run_pictures(group[0]), prefix)
        figures += show(device_pictures(group[0], alone=len(groups) == 1), prefix)
        parts.append(_section_html(label, group[0], figures, len(groups) == 1))
    path = Path(folder) / "report.html"
    write_atomically(path, make_page("Report", parts))
    if faults:  # the page has them all the same
        print(f"warning: pictures are not kept ({faults[0]})", file=sys.stderr)
    return path
