"""The page and the picture of the GPU tables: docs/measurements/gpu.md and docs/gpu.png."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_table import Table
from benchmarks.measure import table_lines

_DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = _DOCS / "measurements" / "gpu.md"
PICTURE = _DOCS / "gpu.png"
_COLOURS = {"ours": "tab:blue", "cuDNN": "tab:green", "FlashInfer": "tab:orange"}


def text(table: Table) -> str:
    """The section of the page that a table has."""
    note = textwrap.fill(table.note, 100)
    return "\n".join((f"### {table.title}", "", note, "", *table_lines(table.header, table.rows)))


def save(table: Table, made_with: str) -> None:
    """Replaces a table's section of the page; a line says what the figures were measured with."""
    page = PAGE.read_text()
    section = text(table) + "\n\n" + textwrap.fill(made_with, 100) + "\n\n"
    changed, found = _section(table.title).subn(lambda _: section, page)
    if found != 1:
        raise ValueError(f"{PAGE} has {found} sections {table.title!r}, and needs one.")
    PAGE.write_text(changed)


def _section(title: str) -> re.Pattern[str]:
    return re.compile(rf"^### {re.escape(title)}\n.*?(?=^#)", re.MULTILINE | re.DOTALL)


class _Columns:
    """A table as the page has it."""

    def __init__(self, title: str) -> None:
        match = _section(title).search(PAGE.read_text())
        if match is None:
            raise ValueError(f"{PAGE} has no section {title!r}.")
        lines = [line for line in match[0].splitlines() if line.startswith("|")]
        header, _, *rows = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
        self._columns = dict(zip(header, zip(*rows, strict=True), strict=True))

    def names(self, column: str) -> tuple[str, ...]:
        """The cells of a column."""
        return self._columns[column]

    def numbers(self, column: str) -> list[float]:
        """The first number of each cell of a column; NaN in an empty one."""
        return [float(x.split()[0]) if x else float("nan") for x in self._columns[column]]


def plot() -> None:
    """Draws the tables of the page."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    decode = _Columns("Decode")
    floor = decode.numbers("floor")
    shares = {
        name: [a / b for a, b in zip(floor, decode.numbers(column), strict=True)]
        for name, column in (("ours", "ours alone"), ("cuDNN", "cuDNN alone"))
    }
    shares["FlashInfer"] = [a / b for a, b in zip(floor, decode.numbers("FlashInfer"), strict=True)]
    _bars(axes[0, 0], decode.names("case"), shares)
    axes[0, 0].axvline(1, color="black", linewidth=0.8)
    axes[0, 0].set(title="Decode: speed, of the floor's (kernels alone)")
    for place, title, head in (
        (axes[0, 1], "Causal forward", "Causal forward: TFLOP/s (kernels alone)"),
        (axes[1, 0], "Causal gradient", "Causal gradient with its forward: TFLOP/s"),
    ):
        table = _Columns(title)
        rates = {"ours": "TFLOP/s", "cuDNN": "cuDNN TFLOP/s"}
        series = {name: table.numbers(column) for name, column in rates.items()}
        _bars(place, table.names("case"), series)
        place.set(title=head)
    derivatives, place = _Columns("Decode derivatives"), axes[1, 1]
    shown = slice(1, None)
    multiples, most = (derivatives.numbers(x)[shown] for x in ("multiple", "at most"))
    words = [
        f"{name}, in {limit.split()[1]}"
        for name, limit in zip(
            derivatives.names("derivative")[shown], derivatives.names("at most")[shown], strict=True
        )
    ]
    _bars(place, words, {"ours": multiples})
    for i, limit in enumerate(most):
        place.plot(
            [limit, limit], [i - 0.4, i + 0.4], color="black", label="goal" if i == 0 else ""
        )
    place.set(title="Decode derivatives beside their goals")
    for each in axes.flat:
        each.margins(x=0.12)
        each.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)
    figure.savefig(PICTURE, dpi=130)
    print(f"\n{PICTURE}")


def _bars(axes: Any, names: Sequence[str], series: dict[str, list[float]]) -> None:
    """Horizontal bars, a group for each name from the top down, each with its number."""
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [n + (i - (len(series) - 1) / 2) * height for n in range(len(names))]
        bars = axes.barh(places, values, height, label=name, color=_COLOURS[name])
        labels = ["" if x != x else f"{x:.3g}" for x in values]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", alpha=0.3)
