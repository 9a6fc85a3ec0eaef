"""The tables of two sweeps, and their picture: time against the valid share, and against S.

    python -m benchmarks.sweeps docs/measurements/cpu.md docs/cpu.png

draws the picture again from the tables in a page, and measures nothing.
`python -m benchmarks.decode --plot FILE.png` measures, and prints such tables.
"""

import dataclasses
import pathlib
import re
import sys

from benchmarks.measure import OURS, print_table

_TITLE = "Sweeps: "


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The time of a call of each implementation, over cases that differ in one number.

    Attributes:
      label: the meaning of x.
      x: that number in each case.
      ms: for each implementation, the milliseconds of a call in each case.
    """

    label: str
    x: tuple[float, ...]
    ms: dict[str, tuple[float, ...]]

    def print(self) -> None:
        """Prints a Markdown table with a row for each case."""
        rows = [
            (f"{x:.4g}", *(f"{ms[i]:.3g}" for ms in self.ms.values())) for i, x in enumerate(self.x)
        ]
        print()
        print_table((self.label, *self.ms), rows)


def print_sweeps(title: str, sweeps: tuple[Sweep, ...]) -> None:
    """Prints what `read` reads."""
    print(f"\n## {_TITLE}{title}")
    for sweep in sweeps:
        sweep.print()


def read(page: str) -> tuple[str, tuple[Sweep, ...]]:
    """The title and the sweeps below the heading that `print_sweeps` writes.

    Raises:
      ValueError: if the page has no such heading, or no tables of numbers below it.
    """
    title = re.search(rf"^#+ {_TITLE}(.*)$", page, re.MULTILINE)
    if title is None:
        raise ValueError(f"a page with a heading '{_TITLE}...' is needed; this has none.")
    section = re.split(r"^#+ ", page[title.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    sweeps = []
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.strip("| ").split(" |")] for line in table.splitlines()
        )
        columns = [tuple(float(row[i]) for row in rows) for i in range(len(head))]
        sweeps.append(Sweep(head[0], columns[0], dict(zip(head[1:], columns[1:], strict=True))))
    if not sweeps:
        raise ValueError(f"tables are needed below '{_TITLE}{title[1]}'; there are none.")
    return title[1], tuple(sweeps)


def draw(title: str, sweeps: tuple[Sweep, ...], file: str) -> None:
    """Saves the picture: one panel below the other, so that a phone shows it legibly."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt, ticker

    plt.rcParams["font.size"] = 12
    figure, panels = plt.subplots(
        len(sweeps), 1, figsize=(5.6, 3.6 * len(sweeps) + 0.4), layout="constrained"
    )
    for axes, sweep in zip(panels, sweeps, strict=True):
        for name, ms in sweep.ms.items():
            wide = 2.8 if name == OURS else 1.3
            axes.plot(sweep.x, ms, marker="o", markersize=4, linewidth=wide, label=name)
        axes.set(xlabel=sweep.label, ylabel="time of a call, ms", yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        if max(sweep.x) > 1:  # sizes, each twice the one before: a tick for each, at its point
            axes.set_xscale("log")
            axes.set_xticks(sweep.x, labels=[f"{x:g}" for x in sweep.x])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        else:
            axes.set_xlim(left=0)
        axes.grid(visible=True, alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(title, fontsize=9)
    figure.savefig(file, dpi=150)
    print(f"\n{file}")


def main() -> None:
    """Reads the command line and draws."""
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {(__doc__ or '').split('    ')[1].strip()}")
    page, file = sys.argv[1:]
    draw(*read(pathlib.Path(page).read_text()), file)


if __name__ == "__main__":
    main()
