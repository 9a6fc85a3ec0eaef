"""The case table of all tests, and how results are compared with the oracle's."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

import oracle
from jax_ragged import DEFAULT_MASK_VALUE

Array = npt.NDArray[Any]
Windows = tuple[int, ...] | tuple[tuple[int, ...], ...]


class Operands(NamedTuple):
    """Numpy operands of ragged_attention, in its order."""

    query: Any
    key: Any
    value: Any
    lengths: Any
    starts: Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, windows, dtype and static parameters.

    Attributes:
      name: of the case, a test's id.
      lengths: the ends of the windows, by row, or by row and query.
      starts: their first positions, or None.
      Q: queries a row; None is a query without that axis.
      logit_size: about how large the logits are; operands are drawn to give it.
    """

    name: str
    lengths: Windows
    starts: Windows | None = None
    Q: int | None = None
    Hq: int = 4
    Hkv: int = 2
    S: int = 37
    D: int = 16
    Dv: int = 16
    dtype: str = "float32"
    softmax_scale: float = 1.0
    logits_soft_cap: float | None = None
    block_size: int | None = None
    mask_value: float = DEFAULT_MASK_VALUE
    logit_size: float = 1.0

    @property
    def x64(self) -> bool:
        """Whether the case needs jax_enable_x64."""
        return self.dtype == "float64"

    @property
    def B(self) -> int:
        """The rows of the batch."""
        return len(self.lengths)

    @property
    def definition(self) -> dict[str, Any]:
        """The keyword arguments of the oracle and of reference_ragged_attention."""
        return {
            "softmax_scale": self.softmax_scale,
            "logits_soft_cap": self.logits_soft_cap,
            "mask_value": self.mask_value,
        }

    @property
    def params(self) -> dict[str, Any]:
        """The keyword arguments of ragged_attention."""
        return {**self.definition, "block_size": self.block_size}

    def operands(self, seed: int = 0) -> Operands:
        """Reproducible operands: normal, and query such that logits have logit_size."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        rows = (self.B,) if self.Q is None else (self.B, self.Q)
        size = self.logit_size / (abs(self.softmax_scale) * self.D**0.5)
        query = rng.standard_normal((*rows, self.Hq, self.D)) * size
        key = rng.standard_normal((self.B, self.S, self.Hkv, self.D))
        value = rng.standard_normal((self.B, self.S, self.Hkv, self.Dv))
        dtype = jnp.dtype(self.dtype)
        windows = (np.array(x, np.int32) for x in (self.lengths, self.starts) if x is not None)
        lengths, starts = (*windows, None)[:2]
        assert lengths is not None
        return Operands(
            query.astype(dtype), key.astype(dtype), value.astype(dtype), lengths, starts
        )

    def cotangents(self, seed: int = 1) -> tuple[Array, Array, Array]:
        """Normal cotangents (or tangents) of out, max_logits and denominator, in their dtypes."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        rows = (self.B,) if self.Q is None else (self.B, self.Q)
        statistics = np.dtype("float64" if self.x64 else "float32")
        dtype = jnp.dtype(self.dtype)
        return (
            rng.standard_normal((*rows, self.Hq, self.Dv)).astype(dtype),
            rng.standard_normal((*rows, self.Hq)).astype(statistics),
            rng.standard_normal((*rows, self.Hq)).astype(statistics),
        )

    def expected(self, operands: Operands | None = None) -> oracle.Results:
        """The oracle's results."""
        return oracle.attention(*(operands or self.operands()), **self.definition)


# Cases that differ in their windows alone have the same shapes, so that they share a program.
CASES: tuple[Case, ...] = (
    # Windows: any alignment, empty, out of range.
    Case("gqa", (37, 5, 20, 1)),
    Case("windows", (37, 8, 33, 37), (0, 7, 15, 36)),
    Case("empty_windows", (0, 5, 20, 9), (0, 5, 33, 4)),
    Case("all_empty", (0, 3, -1, 37), (0, 4, -1, 37)),
    Case("past_the_end", (1000, 38, 2**31 - 1, 37), (0, 30, 36, 37)),
    Case("before_the_start", (10, -5, 3, -(2**31)), (-3, -7, -(2**31), 2)),
    Case("starts_past_the_end", (1000, 37, 2**31 - 1, 38), (38, 2**31 - 1, 37, 36)),
    # Heads.
    Case("mha", (37, 5), Hq=3, Hkv=3),
    Case("mqa", (37, 5), (0, 2), Hq=3, Hkv=1),
    # The query axis, with a window for each query and with one for each row.
    Case("queries", ((37, 36, 35), (4, 5, 0)), ((0, 30, 7), (4, 3, 0)), Q=3, Hq=6, Hkv=2),
    Case("queries_one_window", (37, 5), (3, 0), Q=3, Hq=2, Hkv=1),
    Case("queries_mixed", ((37, 36, 35), (4, 5, 6)), (2, 3), Q=3, Hq=2, Hkv=2),
    # Positions between the windows of a row's queries lie in none.
    Case("queries_gap", ((5, 30), (37, 9)), ((0, 20), (33, 2)), Q=2),
    Case("one_query", ((11,), (37,)), Q=1, Hq=1, Hkv=1),
    # Sizes.
    Case("value_head_dim", (37, 5), D=16, Dv=24),
    Case("head_dim_odd", (37, 5), Q=2, D=5, Dv=3),
    Case("one_position", (1, 0), S=1),
    Case("no_positions", (0, 3), S=0),
    Case("no_rows", ()),
    Case("no_queries", (3, 4), Q=0),
    # Blocks: S a multiple of the block and not; larger than S; of one position.
    Case("block_divides", (32, 8, 9), (0, 0, 8), S=32, block_size=8),
    Case("block_leaves_rest", (33, 8, 9), (0, 0, 8), S=33, block_size=16),
    Case("block_larger", (37, 5), block_size=64),
    Case("block_odd", (37, 5), (13, 2), block_size=13),
    Case("block_one", (9, 5), (3, 0), S=9, block_size=1),
    # Static parameters.
    Case("scale", (37, 5), softmax_scale=-0.25),
    Case("soft_cap", (37, 5, 0), logits_soft_cap=1.5),
    Case("soft_cap_scale", (37, 5), (5, 0), Q=2, softmax_scale=0.5, logits_soft_cap=2.0),
    Case("mask_value", (37, 0), mask_value=-1e4),
    Case("large_logits", (37, 5, 20, 1), (30, 0, 3, 0), logit_size=64.0),
    Case("large_logits_soft_cap", (37, 5), logit_size=64.0, logits_soft_cap=8.0),
    # Dtypes.
    Case("bfloat16", (37, 5, 0), (0, 2, 0), dtype="bfloat16"),
    Case("bfloat16_queries", (37, 5), (0, 2), Q=2, dtype="bfloat16", logits_soft_cap=2.0),
    Case("float16", (37, 5, 0), (0, 2, 0), dtype="float16"),
    Case("float64", (37, 5, 0), (0, 2, 0), dtype="float64"),
    Case("float64_queries", (37, 5), (0, 2), Q=2, dtype="float64", logits_soft_cap=2.0),
    # Sizes that suit the tiles of an accelerator.
    Case("tiles_mha", (300, 129, 0), (0, 127, 0), Hq=2, Hkv=2, S=300, D=128, Dv=128),
    Case("tiles_gqa", (300, 129), (17, 127), Hq=8, Hkv=2, S=300, D=128, Dv=128, block_size=128),
    Case(
        "tiles_queries", (256, 130), (17, 0), Q=2, Hq=4, Hkv=1, S=256, D=128, Dv=128, block_size=128
    ),
    Case("tiles_bfloat16", (300, 129), Hq=8, Hkv=2, S=300, D=128, Dv=128, dtype="bfloat16"),
)

# For what does not depend on the sizes: with an empty window, and one for each query.
SMALL = Case("small", (5, 3, 2), (0, 1, 2), Hq=2, Hkv=1, S=6, D=4, Dv=3, softmax_scale=0.7)
SMALL_QUERIES = Case(
    "small_queries",
    ((6, 3), (2, 5)),
    ((2, 3), (0, 1)),
    Q=2,
    Hq=4,
    Hkv=2,
    S=6,
    D=3,
    Dv=2,
    softmax_scale=1.2,
    logits_soft_cap=1.5,
)

BY_NAME = {case.name: case for case in CASES}


def ids(cases: Iterable[Case]) -> list[str]:
    """The names of cases, for pytest's ids."""
    return [case.name for case in cases]


def tiered(rows: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Rows of a parametrised test, of which those that are not in default are in the full tier.

    A row is a tuple of arguments, or a single argument that is no tuple.
    """
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)),
            marks=[] if row in default else [pytest.mark.full],
        )
        for row in rows
    ]


def covering(rows: Sequence[tuple[Any, ...]], together: int = 2) -> list[tuple[Any, ...]]:
    """A few of the rows, in which every combination of some columns' values occurs.

    Of so many columns that are looked at together, every combination of values is covered that
    occurs in all the rows.
    """

    def combinations(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), together))

    missing = set().union(*map(combinations, rows))
    taken = []
    while missing:
        # The first of those with the most new ones: the same rows in every run.
        taken.append(max(rows, key=lambda row: len(missing & combinations(row))))
        missing -= combinations(taken[-1])
    return taken


def poison(operands: Operands) -> Operands:
    """The operands with NaN, Inf and -Inf in turn in key and value outside every window."""
    query, key, value, lengths, starts = operands
    fill = np.resize([np.nan, np.inf, -np.inf], key.shape[1]).astype(key.dtype)[None, :, None, None]
    outside = ~oracle.inside(query, key.shape[1], lengths, starts)[:, :, None, None]
    key, value = (np.where(outside, fill, x) for x in (key, value))
    return Operands(query, key, value, lengths, starts)


# Tolerances of assert_close, for operands of unit scale and the sizes of this table.
# A result in float32: some tens of products, sums and exponentials, each rounded by 6e-8 of its
# size.
FLOAT32 = 1e-6
# A derivative in float32: it has products of the logits' derivatives with differences of values,
# and so twice the error of a result.
FLOAT32_DERIVATIVE = 2 * FLOAT32
# Two results in float32 that were summed in different orders (over shards, over parts, by another
# program), or a result whose terms were summed over a mesh: both have errors, which add up.
FLOAT32_SUMMED = 1e-5
# A result or derivative in float64: rounded by 1e-16 where float32 is by 6e-8, with room for the
# terms of a derivative that cancel.
FLOAT64 = 1e-13
# A derivative of a derivative in float64, whose terms have three more factors and cancel again.
FLOAT64_SECOND = 1e-12
# An inner product of such derivatives, relative to itself: its terms cancel too.
FLOAT64_INNER = 1e-11

# What rounding to a narrow dtype may add, relative to the largest value: half a unit in the last
# place for the probabilities, and once more for the result.
_ROUNDING = {"bfloat16": 2 * 2.0**-8, "float16": 2 * 2.0**-11, "float32": 0.0, "float64": 0.0}
_ARITHMETIC = {"bfloat16": FLOAT32, "float16": FLOAT32, "float32": FLOAT32, "float64": 2e-15}


def tolerance(case: Case, narrow: bool = True) -> float:
    """The tolerance of assert_close: of a result in the case's dtype, or of a statistic.

    An error of a logit is relative to its size and an absolute error of the exponent: so the
    tolerance of what follows the exponential is that of unit-scale logits times logit_size. A logit
    is a sum of D products, whose rounding errors add up.
    """
    arithmetic = _ARITHMETIC[case.dtype] * max(1.0, case.logit_size) * max(1.0, case.D / 64)
    return arithmetic + (_ROUNDING[case.dtype] if narrow else 0.0)


def assert_close(
    actual: Any, expected: npt.ArrayLike, tol: float, *, scale: float | None = None, name: str = ""
) -> None:
    """Asserts that no element differs by more than tol times scale.

    `scale` defaults to the largest absolute value expected: an element that is small because
    larger ones cancel in it has their error. A value beyond the range of actual's dtype, which is
    infinite there, counts as the largest of that range.
    """
    narrow = np.asarray(actual)
    got, want = narrow.astype(np.float64), np.asarray(expected).astype(np.float64)
    if jnp.issubdtype(narrow.dtype, jnp.floating):
        most = float(jnp.finfo(narrow.dtype).max)
        got, want = (np.clip(x, -most, most) for x in (got, want))
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    if scale is None:
        scale = float(np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * scale, err_msg=name)


def assert_results(
    actual: Any, case: Case, operands: Operands | None = None, *, tol: float | None = None
) -> None:
    """Asserts dtypes, shapes and values of (out, max_logits, denominator) for a case."""
    operands = case.operands() if operands is None else operands
    expected = case.expected(operands)
    out, max_logits, denominator = actual
    statistics = jnp.dtype("float64" if case.x64 else "float32")
    assert out.dtype == jnp.dtype(case.dtype)
    assert max_logits.dtype == statistics
    assert denominator.dtype == statistics
    inside = oracle.inside(operands.query, case.S, operands.lengths, operands.starts)
    values = np.abs(operands.value.astype(np.float64)[inside])
    narrow, wide = (tolerance(case, n) if tol is None else tol for n in (True, False))
    # The rounding of a probability is relative to the values that it weights.
    assert_close(out, expected.out, narrow, scale=float(values.max(initial=0.0)), name="out")
    empty = expected.denominator == 0
    np.testing.assert_array_equal(
        np.asarray(max_logits)[empty], np.asarray(case.mask_value, statistics)
    )
    assert_close(
        np.where(empty, 0, np.asarray(max_logits, np.float64)),
        np.where(empty, 0, expected.max_logits),
        wide,
        name="max_logits",
    )
    assert_close(denominator, expected.denominator, wide, name="denominator")


def double(case: Case) -> Case:
    """The case in float64, which needs x64."""
    return dataclasses.replace(case, dtype="float64")


def x64(case: Case) -> Any:
    """The context in which a case runs: x64 for float64 and only for it."""
    return jax.enable_x64(case.x64)
