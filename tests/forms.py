"""The case table of forms of caches, what they hold, and the dense caches that they stand for.

A form is drawn as it is stored: rows or pages, scales and a page table. The oracle gets the dense
cache in float64 that these stand for, gathered and multiplied here, apart from all other code.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import oracle
from cases import Case, Operands, covering, tolerance

Array = npt.NDArray[Any]
# The operands of a call, by name.
Arrays = dict[str, Any]

NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")
SCALES = ("tensor", "head", "token", "page", "position")
PAGES = (None, 1, 7, 16, 64, 128, 256)
LAYOUTS = ("BSHD", "BHSD")
# Page tables: every row with pages of its own; pages that rows share and repeat; such a table with
# entries in windows that are no pages.
TABLES = ("own", "shared", "clamped")
_NO_PAGES = (-1, -(2**31), 2**31 - 1)
# What a dtype may round a gradient by: half a unit in the last place, relative to it, and half of
# the least number besides. Scales have float32 beside a query in float64, too.
_ROUNDING = {
    "float8_e4m3fn": (2.0**-4, 2.0**-10),
    "float8_e5m2": (2.0**-3, 2.0**-17),
    "float32": (2.0**-24, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a cache.

    Attributes:
      page: positions of a page, or None for a cache that is not paged.
      layout: the argument cache_layout.
      dtype: of key and value, None for the dtype of query; "mixed" has int8 keys alone.
      scale: which elements of a narrow cache share a scale, of `SCALES`; or None for no scale.
        "page" is a scale for each page (or row) and head, "position" one for all heads.
      table: the kind of page table, of `TABLES`.
    """

    page: int | None = None
    layout: str = "BSHD"
    dtype: str | None = None
    scale: str | None = None
    table: str = "own"

    def __str__(self) -> str:
        parts = [str(self.page or "dense"), self.table if self.page else None, self.layout]
        return "-".join(filter(None, [*parts, self.dtype, self.scale]))

    @property
    def dtypes(self) -> dict[str, str | None]:
        """The dtypes of key and value; None is the dtype of query."""
        if self.dtype == "mixed":
            return {"key": "int8", "value": None}
        return {"key": self.dtype, "value": self.dtype}


@dataclasses.dataclass(frozen=True)
class FormCase(Case):
    """A case whose cache has a form. S is a multiple of the size of a page.

    Attributes:
      form: of the cache.
    """

    form: Form = Form()

    @property
    def params(self) -> dict[str, Any]:
        """The keyword arguments of ragged_attention."""
        return {**super().params, "cache_layout": self.form.layout}

    def stored(self, seed: int = 0) -> "Stored":
        """What the form holds: reproducible, finite everywhere."""
        return Stored.draw(self, seed)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A cache in a form, and the queries and windows that read it.

    Key, value and scales are kept with positions before heads, whatever the layout. Their first
    dimension has the rows of the cache, or the pages.

    Attributes:
      case: that it was drawn for.
      operands: the queries and windows, and key and value as stored.
      scales: of key and value where they have one, as passed but for the layout.
      table: [B, W], or None.
    """

    case: FormCase
    operands: Operands
    scales: Mapping[str, Array]
    table: Array | None

    @classmethod
    def draw(cls, case: FormCase, seed: int) -> "Stored":
        """See `FormCase.stored`."""
        form = case.form
        rng = np.random.default_rng([seed, *case.name.encode()])
        query, _, _, lengths, starts = case.operands(seed)
        table, rows, T = None, case.B, case.S
        if form.page is not None:
            T = form.page
            table, rows = _page_table(rng, form, case.B, case.S // T)
        parts, scales = {}, {}
        for name, dim in (("key", case.D), ("value", case.Dv)):
            x = rng.standard_normal((rows, T, case.Hkv, dim))
            dtype = form.dtypes[name]
            parts[name] = x.astype(jnp.dtype(case.dtype if dtype is None else dtype))
            if dtype is not None and form.scale is not None:
                parts[name], scales[f"{name}_scale"] = _quantised(x, dtype, form.scale)
        operands = Operands(query, parts["key"], parts["value"], lengths, starts)
        return cls(case, operands, scales, table)

    def beside(self, other: "Stored") -> "Stored":
        """The queries, windows and page table of another one, last row first, on this cache."""
        own, rows = self.operands, other.operands
        query, lengths, starts = (
            None if x is None else x[::-1] for x in (rows.query, rows.lengths, rows.starts)
        )
        operands = Operands(query, own.key, own.value, lengths, starts)
        table = None if other.table is None else other.table[::-1]
        return dataclasses.replace(self, operands=operands, table=table)

    @property
    def arrays(self) -> Arrays:
        """The arguments of ragged_attention that are arrays."""
        arrays: Arrays = self.operands._asdict() | dict(self.scales)
        if self.table is not None:
            arrays["page_table"] = self.table
        return {name: self.laid(x, name) for name, x in arrays.items() if x is not None}

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the arrays that have derivatives."""
        names = ("query", "key", "value", "key_scale", "value_scale")
        arrays = self.arrays
        return tuple(n for n in names if n in arrays and arrays[n].dtype != np.int8)

    def laid(self, x: Any, name: str) -> Any:
        """An array as it is passed, in the layout; also the reverse."""
        cache = name in ("key", "value") or name.endswith("_scale")
        swapped = self.case.form.layout == "BHSD" and cache and x.ndim >= 3
        return x.swapaxes(1, 2) if swapped else x

    def gathered(self, x: Array) -> Array:
        """[P, T, ...] to the rows that the table makes of it, [B, S, ...]."""
        if self.table is None:
            return x
        pages: Array = x[np.clip(self.table, 0, len(x) - 1)]
        return pages.reshape(self.case.B, self.case.S, *x.shape[2:])

    def scattered(self, x: Array, rows: int) -> Array:
        """The transpose of gathered: sums over what shares a page."""
        if self.table is None:
            return x
        pages = x.reshape(*self.table.shape, -1, *x.shape[2:])
        pool = np.zeros((rows, *pages.shape[2:]), x.dtype)
        np.add.at(pool, np.clip(self.table, 0, rows - 1), pages)
        return pool

    def factors(self, name: str) -> tuple[Array, Array]:
        """Values and scale of key or value in float64, which broadcast against each other."""
        x = getattr(self.operands, name).astype(np.float64)
        scale = self.scales.get(f"{name}_scale", np.ones(()))
        return x, scale.astype(np.float64)[..., None]

    @functools.cached_property
    def dense(self) -> Operands:
        """The operands with the dense cache in float64."""
        key, value = (self.gathered(np.multiply(*self.factors(n))) for n in ("key", "value"))
        return self.operands._replace(key=key, value=value)

    def tangents(self, seed: int = 1) -> Arrays:
        """Normal tangents of all that is differentiable, as they are passed."""
        rng = np.random.default_rng([seed, *self.case.name.encode()])
        arrays = self.arrays
        return {
            name: rng.standard_normal(arrays[name].shape).astype(arrays[name].dtype)
            for name in self.differentiable
        }

    def expected_jvp(self, tangents: Arrays) -> oracle.Results:
        """The tangents of the results."""
        dots = [tangents["query"].astype(np.float64)]
        for name in ("key", "value"):
            x, scale = self.factors(name)
            total = np.zeros_like(x)
            if name in tangents:
                total += scale * self.laid(tangents[name], name).astype(np.float64)
            if (of_scale := tangents.get(f"{name}_scale")) is not None:
                total += x * self.laid(of_scale, f"{name}_scale").astype(np.float64)[..., None]
            dots.append(self.gathered(total))
        return oracle.jvp(*self.dense, tuple(dots), **self.case.definition)

    def expected_vjp(self, cotangents: Sequence[Array]) -> Iterator[tuple[str, Array, float]]:
        """For all that is differentiable: its name, its cotangent as passed, and a tolerance.

        The tolerance comes from the largest sum of the absolute values of a cotangent's
        terms, which is what its rounding is relative to: the terms of a scale's cotangent, one
        for each element that shares the scale, cancel.
        """
        bars = oracle.vjp(*self.dense, cotangents, **self.case.definition)
        for name in self.differentiable:
            part = name.removesuffix("_scale")
            bar = getattr(bars, part)
            if part != "query":
                x, scale = self.factors(part)
                bar = self.scattered(bar, len(x)) * (scale if name == part else x)
                shape = self.scales[name].shape if name != part else bar.shape
                bar, size = (
                    _summed(y, shape if name == part else (*shape, 1)).reshape(shape)
                    for y in (bar, np.abs(bar))
                )
            else:
                size = np.abs(bar)
            relative, least = _ROUNDING.get(str(self.arrays[name].dtype), (0.0, 0.0))
            # Twice the error of a result, as all derivatives: see test_conformance.
            relative += 2 * tolerance(self.case)
            yield name, self.laid(bar, name), relative * float(size.max(initial=1e-30)) + least

    @functools.cached_property
    def used(self) -> npt.NDArray[np.bool_]:
        """Which positions of each row or page lie in a window, [B, S] or [P, T]."""
        query, key, _, lengths, starts = self.operands
        inside = oracle.inside(query, self.case.S, lengths, starts)
        return self.scattered(inside.astype(int), len(key)) > 0

    def poisoned(self, arrays: Arrays | None = None) -> Arrays:
        """The arrays with what no window uses replaced by the worst that may stand there.

        That is NaN and infinities in keys, values and scales, where the dtype has them; and
        numbers of no pages in the page table. Tangents are poisoned likewise.
        """
        arrays = dict(self.arrays if arrays is None else arrays)
        for name, x in arrays.items():
            if name in ("key", "value") or (name.endswith("_scale") and x.ndim == 3):
                x = self.laid(x, name)
                used = self.used if x.shape[1] > 1 else self.used.any(axis=1, keepdims=True)
                used = used.reshape(*used.shape, *[1] * (x.ndim - 2))
                arrays[name] = self.laid(np.where(used, x, _worst(x)), name)
        if self.table is not None and "page_table" in arrays:
            query, _, _, lengths, starts = self.operands
            inside = oracle.inside(query, self.case.S, lengths, starts)
            needed = inside.reshape(*self.table.shape, -1).any(axis=2)
            garbage = np.resize(_NO_PAGES, self.table.shape).astype(np.int32)
            arrays["page_table"] = np.where(needed, self.table, garbage)
        return arrays


def _page_table(rng: np.random.Generator, form: Form, B: int, W: int) -> tuple[Array, int]:
    """A page table [B, W], and the number of pages: two more than it names at most."""
    if form.table == "own":
        pages = B * W + 2
        return rng.permutation(pages)[: B * W].reshape(B, W).astype(np.int32), pages
    pages = max(B * W // 2, 2) + 2
    table = rng.integers(0, pages - 2, (B, W))
    table[:, : W // 2] = table[0, : W // 2]  # a common prefix
    if form.table == "clamped":
        missing = rng.choice([*_NO_PAGES, pages], (B, W))
        table = np.where(rng.random((B, W)) < 0.4, missing, table)
    return table.astype(np.int32), pages


def _quantised(x: Array, dtype: str, shared: str) -> tuple[Array, Array]:
    """Values in dtype and their scale in float32, for x [rows, T, Hkv, D]."""
    narrow = jnp.dtype(dtype)
    most = 127.0 if dtype == "int8" else float(jnp.finfo(narrow).max)
    of: dict[str, Any] = {"tensor": None, "head": (0, 1, 3), "token": 3, "page": (1, 3)}
    axes = of.get(shared, (2, 3))
    kept = np.asarray(np.abs(x).max(axis=axes, keepdims=True) / most, np.float32)
    scaled = x / kept
    values = (np.rint(scaled) if dtype == "int8" else scaled).astype(narrow)
    shape = {"tensor": (), "head": (x.shape[2],)}.get(shared, kept.shape[:3])
    return values, kept.reshape(shape)


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of x over the dimensions that shape broadcasts, in that shape."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(i for i, (n, m) in enumerate(zip(padded, x.shape, strict=True)) if n < m)
    total: Array = x.sum(axis=axes, keepdims=True)
    return total


def _worst(x: Array) -> Array:
    """What may stand where no window reads, along the first axis of x in turn."""
    if x.dtype == np.int8:
        fill = np.resize(np.array([127, -128], np.int8), x.shape[0])
    else:
        fill = np.resize([np.nan, np.inf, -np.inf], x.shape[0]).astype(x.dtype)
    return fill.reshape(-1, *[1] * (x.ndim - 1))


def _case(base: str, form: Form) -> FormCase:
    """A base case whose S suits the pages of a form."""
    page = form.page or 40
    # Some 40 positions, but two pages at least.
    S = page * max(2, -(-37 // page)) if form.page else page
    quarter, half = S // 4, S // 2
    row = {"lengths": (S, quarter, 0, S - 3), "starts": (0, quarter - 3, 3, half)}
    three = ((S, S - 1, 0), (4, 5, half + 2))
    queries = {"Q": 3, "lengths": three, "starts": ((0, half, 7), (4, 3, half - 1))}
    wide: dict[str, Any] = {"Hq": 8, "Hkv": 2, "D": 128, "Dv": 128, "softmax_scale": 0.09}
    sizes: dict[str, Any] = {
        "gqa": row | {"Dv": 24, "block_size": 8},
        "queries": queries | {"logits_soft_cap": 2.0, "softmax_scale": 0.5, "block_size": 8},
        "mqa": row | {"Hq": 3, "Hkv": 1, "dtype": "bfloat16", "starts": None, "block_size": 16},
        "mha": row | {"Hq": 3, "Hkv": 3, "D": 24, "dtype": "float16", "block_size": 8},
        "float64": row | {"dtype": "float64", "logits_soft_cap": 3.0, "block_size": 8},
        "wide": row | wide | {"dtype": "bfloat16"},
        "wide_queries": queries | wide | {"logits_soft_cap": 2.0, "dtype": "bfloat16"},
        "wide_float32": row | wide,
    }
    return FormCase(f"{base}-{form}", S=S, form=form, **sizes[base])


def _table(bases: Sequence[str], pages: Any, dtypes: Any) -> tuple[FormCase, ...]:
    """Every combination of page, layout and dtype; bases and page tables take turns."""
    rows = [
        row
        for row in itertools.product(pages, LAYOUTS, dtypes)
        if (row[0], row[1], row[2][0]) != (None, "BSHD", None)
    ]
    n, cases = len(bases), []
    for i, (page, layout, (dtype, scale)) in enumerate(rows):
        table = TABLES[(i + i // n) % len(TABLES)] if page else "own"
        cases.append(_case(bases[i % n], Form(page, layout, dtype, scale, table)))
    return tuple(cases)


_DTYPES = (
    (None, None),
    *itertools.product(NARROW, SCALES),
    ("float8_e4m3fn", None),
    ("float8_e5m2", None),
    ("mixed", "token"),
)
_WIDE_DTYPES = (
    (None, None),
    ("int8", "token"),
    ("int8", "head"),
    ("float8_e4m3fn", "token"),
    ("float8_e5m2", None),
)
# Every combination, in sizes that a CPU is fast at.
FORMS = _table(("gqa", "queries", "mqa", "mha", "float64"), PAGES, _DTYPES)
# Sizes that suit the tiles of an accelerator.
WIDE_FORMS = _table(
    ("wide", "wide_queries", "wide_float32"), (None, 16, 64, 128, 256), _WIDE_DTYPES
)


def random_forms(count: int) -> tuple[FormCase, ...]:
    """Reproducible cases of sizes, windows and forms as callers may have them, for accelerators.

    The tables have the edges that we know of; these look for others.
    """
    rng = np.random.default_rng(0)
    cases: list[FormCase] = []
    while len(cases) < count:
        case = _random_form(rng, f"random{len(cases)}")
        rows = case.B * (case.Q or 1) * case.Hq * case.S
        small = max(rows, case.B * case.S * case.Hkv * max(case.D, case.Dv)) <= 2**22
        starts = np.maximum(0 if case.starts is None else case.starts, 0)
        # Of windows of one position all derivatives but those of value are 0, and rounding errors.
        if small and (np.minimum(case.lengths, case.S) - starts).max() >= 8:
            cases.append(case)
    return tuple(cases)


def _random_form(rng: np.random.Generator, name: str) -> FormCase:
    def one(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    page = one(None, None, 16, 32, 48, 80, 128, 144, 256)
    dtype, scale = one(*_DTYPES[:1] * 8, *_DTYPES[1:])
    form = Form(page, one(*LAYOUTS), dtype, scale, one(*TABLES) if page else "own")
    S = page * one(1, 2, 5) if page else one(8, 63, 128, 500, 1000)
    Q = one(None, 1, 2, 3, 5, 8, 16, 33, 63, 64, 65, 100, 128)
    head_dims = (32, 64, 96, 128, 192, 256) if dtype else (16, 64, 80, 112, 128, 192, 256)
    D, Hkv = one(*head_dims), one(1, 2, 3, 4, 8, 9, 12, 16)
    B = one(1, 2, 3, 7, 16, 31, 64, 257, 300)
    shape = (B,) if Q is None or one(True, False) else (B, Q)
    if one(True, False):
        ends = rng.integers(-3, S + 4, shape)
    else:  # causal
        ends = rng.integers(0, S + 1, (B, 1)) + np.arange(shape[-1] if len(shape) == 2 else 1)
        ends = np.minimum(ends, S).reshape(shape)
    starts = one(None, ends - rng.integers(0, S + 9, shape), ends - one(2, 20, 64))

    def windows(x: Any) -> Any:
        return tuple(map(tuple, x.tolist())) if x.ndim == 2 else tuple(x.tolist())

    return FormCase(
        f"{name}-{form}", windows(ends), None if starts is None else windows(starts), Q=Q,
        Hq=Hkv * one(1, 2, 3, 4, 7, 8, 16), Hkv=Hkv, S=S, D=D, Dv=one(D, D, *head_dims),
        dtype=one("bfloat16", "bfloat16", "float16"), softmax_scale=one(D**-0.5, -0.3),
        logits_soft_cap=one(None, None, 3.0), form=form,
    )  # fmt: skip


def columns(case: FormCase) -> tuple[Any, ...]:
    """The properties of a case that a choice of cases covers."""
    form = case.form
    return (form.page, form.layout, form.dtype, form.scale, form.table, case.name.split("-")[0])


def chosen(table: Sequence[FormCase], together: int, of: int = 6) -> tuple[str, ...]:
    """The names of a few cases.

    In them occur all combinations of so many of the first `of` columns' values that occur in the
    table.
    """
    by_columns = {columns(case)[:of]: case.name for case in reversed(table)}
    return tuple(by_columns[row] for row in covering(list(by_columns), together))
