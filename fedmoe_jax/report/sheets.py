"""Further tables of a report, as HTML and as Markdown."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.text import escape_markdown, quote_markdown


class Sheet(NamedTuple):
    """One table.

    Attributes:
      title: above it; empty where the section's says it all.
      heads: of the columns, that of the labels first.
      rows: a cell for each further column, by label.
    """

    title: str
    heads: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]


class Section(NamedTuple):
    """Tables that belong together.

    Attributes:
      title: above them.
      about: their definitions, sentences.
      sheets: the tables, maybe none.
    """

    title: str
    about: str
    sheets: Sequence[Sheet]


def _sheet_html(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in sheet.heads)
    body = ""
    for label, cells in sheet.rows.items():
        body += f"<tr><td>{escape(label)}</td>"
        for cell in cells:
            text = f"<b>{escape(cell.text)}</b>" if cell.bold else escape(cell.text)
            body += f'<td class="number">{text}</td>'
        body += "</tr>"
    title = f"<h3>{escape(sheet.title)}</h3>" if sheet.title else ""
    return f"<div>{title}<table><tr>{head}</tr>{body}</table></div>"


def section_html(section: Section) -> str:
    """A section of a page; its tables side by side where there is room."""
    tables = "".join(map(_sheet_html, section.sheets))
    shown = f'<div class="pictures wide">{tables}</div>' if tables else ""
    return f"<h2>{escape(section.title)}</h2>{shown}<p>{escape(section.about)}</p>"


def markdown_rows(lines: Sequence[Sequence[str]]) -> str:
    """Lines of texts as a Markdown table, the first one its head."""
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def _sheet_markdown(sheet: Sheet) -> str:
    lines = [[escape_markdown(title) for title in sheet.heads]]
    for label, cells in sheet.rows.items():
        texts = [f"**{cell.text}**" if cell.bold else cell.text for cell in cells]
        lines.append([quote_markdown(label), *texts])
    title = f"### {escape_markdown(sheet.title)}\n\n" if sheet.title else ""
    return title + markdown_rows(lines)


def section_markdown(section: Section) -> str:
    """A section below a heading of the second level."""
    title, about = escape_markdown(section.title), escape_markdown(section.about)
    tables = map(_sheet_markdown, section.sheets)
    return "\n".join([f"## {title}\n", *tables, about, ""])
