"""What a report compares beyond its table of final numbers."""

from collections.abc import Sequence

from fedmoe_jax.report.baseline import paired_section
from fedmoe_jax.report.budgets import budget_section
from fedmoe_jax.report.channel import channel_section
from fedmoe_jax.report.diverged import describe_diverged
from fedmoe_jax.report.floors import floor_section
from fedmoe_jax.report.layers import layers_section
from fedmoe_jax.report.parts import parts_section
from fedmoe_jax.report.pruned import pruned_section
from fedmoe_jax.report.regime_map import map_section
from fedmoe_jax.report.runs import Run
from fedmoe_jax.report.sheets import Section, section_markdown
from fedmoe_jax.report.tables import markdown_table
from fedmoe_jax.report.target_costs import target_section
from fedmoe_jax.report.text import escape_markdown
from fedmoe_jax.report.tiers import tiers_section


def list_sections(runs: Sequence[Run], baseline: str) -> list[Section]:
    """The sections that have something to say.

    Args:
      runs: of one label or several.
      baseline: `evaluation.baseline`, see `baseline.find_baseline`.
    """
    found = [map_section(runs), paired_section(runs, baseline)]
    found += [floor_section(runs), tiers_section(runs), channel_section(runs)]
    found += [parts_section(runs), budget_section(runs), target_section(runs)]
    found += [layers_section(runs), pruned_section(runs)]
    note = describe_diverged(runs)
    return [
        section._replace(about=f"{section.about} {note}".strip())
        for section in found
        if section
    ]


def markdown_tables(runs: Sequence[Run], baseline: str) -> str:
    """The content of `table.md`: final numbers, then every section."""
    note = escape_markdown(describe_diverged(runs))
    notes = [f"{note}\n"] if note else []
    sections = map(section_markdown, list_sections(runs, baseline))
    return "\n".join([markdown_table(runs), *notes, *sections])
