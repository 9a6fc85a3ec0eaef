"""A table of docs/measurements/gpu.md, and the cells that such tables have.

Every table times ours and its peers in one process. "Alone" is the time of kernels in JAX's
profiler: of the attention kernels in forward tables, of all kernels of the program in derivative
tables. The other times have the gaps between kernels too.
"""

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.measure import Case

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it is printed; a cell is text or one number, so that it can be drawn."""

    title: str
    note: str
    header: Row
    rows: list[Row]


def us(seconds: float) -> str:
    """A cell of a time."""
    return f"{seconds * 1e6:.1f}"


def met(goals_are_met: bool) -> str:
    """The cell of the goals of a row."""
    return "met" if goals_are_met else "missed"


def name(case: Case) -> str:
    """The cell of a case: its sizes; T are positions that have a query each."""
    heads = f"{case.Hq}/{case.Hkv}/{case.D}"
    if case.Q is not None:
        return f"B{case.B} T{case.S} {heads}"
    return f"B{case.B} S{case.S} {heads} {case.windows}"


def shown(rows: Iterable[Row]) -> list[Row]:
    """The rows, each printed as soon as it is measured: a run may be cut short."""
    kept = []
    for row in rows:
        print(*row, sep=" | ", file=sys.stderr, flush=True)
        kept.append(row)
    return kept


def check_close(case: Case, got: Any, want: Any, tol: float) -> None:
    """Raises if a row b differs from another by more than a share of its largest value."""
    got, want = (np.asarray(x, np.float32).reshape(case.B, -1) for x in (got, want))
    error = float((np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)).max())
    if not error <= tol:
        raise RuntimeError(f"two results differ by {error:.2g} on {name(case)}.")
