"""`results/performance.md`: every benchmark rewrites its own section and no other."""

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
from pathlib import Path

from fedmoe_jax.runtime.files import write_atomically
from fedmoe_jax.runtime.origin import PACKAGE, find_commit

RESULTS = Path(__file__).parent.parent / "results"
HEAD = """# Performance

Every section is written by its command, on the machine and date that it names. Only
ratios within one run carry over to other machines.
"""
PACKAGES = ("jax", "flax", "optax", "numpy")


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family)\s*:\s*(.*)$", text, re.M))
    return f"{found.get('model name')} family {found.get('cpu family')}"


def describe_machine() -> str:
    """Processor, cores, load, versions, commit and date on one line."""
    commit, dirty = find_commit(PACKAGE)
    changed = ", changed" if dirty else ""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    load = os.getloadavg()[0]
    return (
        f"{processor()}, {os.cpu_count()} cores, load {load:.1f} at the end; "
        f"Python {platform.python_version()}, {versions}; "
        f"commit {(commit or 'unknown')[:9]}{changed}; {datetime.date.today()}"
    )


def write_section(name: str, title: str, command: str, body: str) -> None:
    """Replaces or appends one section of `results/performance.md`.

    Args:
      name: the section's marker, one word.
      title: its heading.
      command: what makes it again.
      body: Markdown, ratios first.
    """
    path = RESULTS / "performance.md"
    page = path.read_text() if path.exists() else HEAD
    text = f"## {title}\n\n`{command}`  \n{describe_machine()}\n\n{body.strip()}"
    section = f"<!-- {name} -->\n{text}\n<!-- /{name} -->\n"
    pattern = re.compile(f"<!-- {name} -->.*<!-- /{name} -->\n", re.S)
    if pattern.search(page):
        page = pattern.sub(lambda _: section, page)
    else:
        page = f"{page}\n{section}"
    write_atomically(path, page)


def spread(values: list[float]) -> str:
    """Median and range, three significant digits: `2.49 (2.41 to 2.6)`."""
    middle = statistics.median(values)
    return f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})"


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table; floats get three significant digits."""

    def cell(value) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
