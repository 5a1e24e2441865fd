"""The results of a comparison of peers: a CSV file, a picture and a page section."""

import csv
import datetime
import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import page
from benchmarks.works import WORKS
from fedmoe_jax.runtime.files import write_atomically
from fedmoe_jax.runtime.origin import PACKAGE, find_commit

COLUMNS = {  # CSV name: heading of the page's tables
    "seconds": "s/round",
    "seconds_min": "min",
    "seconds_max": "max",
    "updates_per_s": "client updates/s",
    "examples_per_s": "examples/s",
    "tokens_per_s": "tokens/s",
    "cpu_seconds": "CPU s/round",
    "peak_mb": "peak MB",
    "startup_s": "start-up s",
    "dense_share": "share of dense limit",
    "loss": "loss at the end",
}
RATIOS = {"ratio": "ours / peer", "cpu_ratio": "in CPU seconds"}
NUMBERS = (
    *COLUMNS,
    *(f"{name}{end}" for name in RATIOS for end in ("", "_min", "_max")),
    *("rounds", "pairs"),
)
TEXTS = ("work", "peer", "kind", "note", "measured", "commit")
FIELDS = ("work", "peer", "kind", *NUMBERS, "note", "measured", "commit")
ABOUT = """Works A, B, C and P are dense FedAvg: one expert (E = 1) that every client
holds. M is `configs/cifar10.py`: 8 experts, of which a client holds 1 to 4 and each
example meets at most 2, unclipped and at rate 0.01, on images of few classes a client
that can be learnt; the loss of each model at the end, on 500 images of all clients,
shows that it learns (initial weights and draws differ, and so do these losses).
L is `configs/languages.py` with held sets that stay: a transformer of two blocks, in
each of which a client holds 1 to 4 of 8 experts and a byte meets at most 2, on windows
of 128 bytes of eight languages that can be learnt; an example is a window.
Ratios are ranges over pairs of launches that ran one after the other, the
examples per second of ours divided by the peer's; in CPU seconds they compare the work
of all cores. JAX peers have the XLA flags that fedmoe_jax sets for itself. Times are
medians over all timed rounds; min and max are over the launches' medians. The share of
the dense limit is the model's operations (forward and backward) over those of a 4096 x
4096 float32 matrix product on all cores (best of five before and after the work's
launches; it varies by a third on a shared machine). Start-up lasts from the launch of
the process to the end of its first round, so it includes imports, data and compilation.
Peak memory is the sum over a peer's processes of each one's peak resident size. In C
the clients share a pool of 50,000 images, elsewhere each has examples of its own. No
peer evaluates inside a timed round."""


def read_rows(text: str) -> list[dict]:
    """Rows of a CSV file that `format_rows` wrote; older ones lack their commit."""
    rows = []
    for line in csv.DictReader(io.StringIO(text)):
        row = {name: line.get(name) or "" for name in TEXTS}
        numbers = {n: float(line[n]) for n in NUMBERS if line.get(n)}
        rows.append(row | numbers)
    return rows


def format_rows(rows: list[dict]) -> str:
    """Rows as CSV; a number that is missing is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        digits = {k: f"{v:.6g}" for k, v in row.items() if isinstance(v, (int, float))}
        writer.writerow(row | digits)
    return text.getvalue()


def fastest(rows: list[dict], work: str, kind: str) -> dict | None:
    """The row of a kind with the shortest rounds."""
    timed = [
        r for r in rows if (r["work"], r["kind"]) == (work, kind) and "seconds" in r
    ]
    return min(timed, key=lambda row: row["seconds"], default=None)


def ratio_table(rows: list[dict], names: list[str]) -> str:
    """Ours against the fastest PyTorch peer and the fastest JAX peer."""
    lines = []
    for name in names:
        line = [f"{name}: {WORKS[name].title}"]
        for kind in ("pytorch", "jax"):
            best = fastest(rows, name, kind) or {"peer": "none"}
            wall, cpu = format_range(best, "ratio"), format_range(best, "cpu_ratio")
            line += [best["peer"], f"**{wall}**", cpu]
        lines.append(tuple(line))
    ratios = "ours / it", "in CPU seconds"
    kinds = ("fastest PyTorch peer", *ratios, "fastest JAX peer", *ratios)
    return page.table(("work", *kinds), lines)


def format_range(row: dict, name: str) -> str:
    """The range of a ratio over its pairs; the medians alone say too much."""
    if f"{name}_min" not in row:
        return "unknown"
    return f"{row[f'{name}_min']:.2g} to {row[f'{name}_max']:.2g}"


def say_rates(row: dict) -> str:
    """What a work's row says, in short, or why it says nothing."""
    if "seconds" not in row:
        return row["note"]
    said = [f"{1 / row['seconds']:.3g} rounds/s"]
    if "tokens_per_s" in row:
        said.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    said.append(f"{row['dense_share']:.0%} of the dense limit")
    names = {"ratio": "ours / it", "cpu_ratio": "in CPU seconds"}
    said += [f"{name} {format_range(row, field)}" for field, name in names.items()]
    return ", ".join(said)


def format_number(value: float) -> str:
    """Three digits, or whole thousands apart."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def work_table(rows: list[dict], name: str) -> str:
    """All peers of a work, the fastest first, failures last."""
    mine = [row for row in rows if row["work"] == name]
    mine.sort(key=lambda row: row.get("seconds", float("inf")))
    lines = [
        (
            r["peer"],
            *(format_number(r[c]) if c in r else "" for c in COLUMNS),
            *(format_range(r, name) for name in RATIOS),
            r["note"],
        )
        for r in mine
    ]
    return page.table(("peer", *COLUMNS.values(), *RATIOS.values(), "note"), lines)


def render(rows: list[dict]) -> str:
    """The section: ratios first, then one table per work."""
    names = [name for name in WORKS if any(row["work"] == name for row in rows)]
    parts = ["Examples per second, ours divided by the peer's:"]
    parts += [ratio_table(rows, names), ABOUT, "![Peers](peers.png)"]
    for name in names:
        measured = next(row["measured"] for row in rows if row["work"] == name)
        title = f"**{name}: {WORKS[name].title}** ({measured})"
        parts += [title, work_table(rows, name)]
    return "\n\n".join(parts)


def draw(rows: list[dict]) -> Figure:
    """Examples per second, a panel for each work, ours in colour."""
    names = [name for name in WORKS if any(row["work"] == name for row in rows)]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(8, 0.8 + 2.6 * len(names)), squeeze=False
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        mine = [row for row in rows if row["work"] == name and "seconds" in row]
        mine.sort(key=lambda row: -row["seconds"])
        rates = [row["examples_per_s"] for row in mine]
        colours = ["tab:orange" if r["kind"] == "ours" else "silver" for r in mine]
        bars = axis.barh([row["peer"] for row in mine], rates, color=colours)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        axis.set_title(f"{name}: {WORKS[name].title}", loc="left", fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("examples per second")
    figure.tight_layout()
    return figure


def name_commit() -> str:
    """The commit of the sources, with `-dirty` where they differ; empty without one."""
    commit, dirty = find_commit(PACKAGE)
    return f"{commit or ''}{'-dirty' if dirty else ''}"


def write(rows: list[dict], arguments: str) -> None:
    """Writes all three; works that `rows` lacks keep what the CSV file has of them."""
    command = f"python -m benchmarks.peers {arguments}".strip()
    measured = f"`{command}`, {datetime.date.today().isoformat()}"
    rows = [row | {"measured": measured, "commit": name_commit()} for row in rows]
    path = page.RESULTS / "peers.csv"
    done = {row["work"] for row in rows}
    kept = read_rows(path.read_text()) if path.exists() else []
    rows = [row for row in kept if row["work"] not in done] + rows
    rows.sort(key=lambda row: row["work"])
    write_atomically(path, format_rows(rows))
    figure = draw(rows)
    figure.savefig(page.RESULTS / "peers.png", dpi=120)
    plt.close(figure)
    page.write_section("peers", "Peers on CPU", command, render(rows))
