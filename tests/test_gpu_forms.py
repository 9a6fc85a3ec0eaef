"""The GPU's kernels on caches that are paged, have heads first, or are quantised."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import oracle
from cases import Case, assert_close, tiered, tolerance
from jax_ragged import ragged_attention
from jax_ragged.lowering import contract
from jax_ragged.lowering.gpu import attend, forms, plan as line_plan, team_plan, teams
from jax_ragged.lowering.gpu.launch import most_stages
from jax_ragged.lowering.gpu.line import attend_along_line
from jax_ragged.lowering.gpu.plan import make_plan
from jax_ragged.lowering.params import OPTIONAL, RaggedAttentionParams
from lowerings import gpus
from programs import emitted

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a cache.

    Attributes:
      page: positions of a page, or None for a cache that is not paged.
      layout: the argument cache_layout.
      dtype: of quantised keys and values, or None.
      scale: which positions share a scale: "token" (none), "page" (those of a page or row), "head"
        (all of a head), "tensor" (all), or None for no scale.
      names: of key and value, those that are quantised.
    """

    page: int | None = None
    layout: str = "BSHD"
    dtype: str | None = None
    scale: str | None = "token"
    names: tuple[str, ...] = ("key", "value")

    def __str__(self) -> str:
        parts = [str(self.page or "dense"), self.layout]
        if self.dtype is not None:
            parts += [self.dtype, self.scale or "unscaled", *self.names[:-1]]
        return "-".join(parts)

    def quantised(self, x: Array) -> tuple[Array, Array | None]:
        """The values and the scale of a cache [rows, positions, heads, D]."""
        if self.scale is None:
            return x.astype(self.dtype), None
        assert self.dtype is not None
        axes = {"token": (3,), "page": (1, 3), "head": (0, 1, 3), "tensor": (0, 1, 2, 3)}
        wide = x.astype(np.float32)
        integer = self.dtype == "int8"
        most = 127 if integer else float(jnp.finfo(self.dtype).max)
        scale = np.abs(wide).max(axes[self.scale], keepdims=True) / np.float32(most)
        values = wide / scale
        return (np.round(values) if integer else values).astype(self.dtype), scale[..., 0]


def _poisoned(x: Array, used: Array) -> Array:
    """NaN in the elements [pages, positions, ...] that are not used, if x has them and a NaN."""
    if x.dtype == np.int8 or x.shape[:2] != used.shape:
        return x
    return np.where(used.reshape(*used.shape, *[1] * (x.ndim - 2)), x, np.asarray(np.nan, x.dtype))


@dataclasses.dataclass(frozen=True)
class Stored:
    """A case's operands with the cache in a form, and the dense cache that it stands for.

    Attributes:
      case: it.
      arrays: the arguments that are arrays, by name.
      layout: the argument cache_layout.
      dense: key and value in float64, [B, S, Hkv, D] and [B, S, Hkv, Dv].
    """

    case: Case
    arrays: dict[str, Any]
    layout: str
    dense: tuple[Array, Array]

    @classmethod
    def of(cls, case: Case, form: Form) -> "Stored":
        """Draws a case in a form.

        All positions outside of the windows are NaN, pages that no window touches have garbage in
        the table, and the pool has pages that are in no row.
        """
        rng = np.random.default_rng([len(str(form)), *case.name.encode()])
        query, key, value, lengths, starts = case.operands()
        inside = oracle.inside(query, case.S, lengths, starts)
        # A dense cache is a pool of one page for each row.
        B, T, paged = case.B, form.page or case.S, form.page is not None
        W = -(-case.S // T)
        pages = B * W + (3 if paged else 0)
        order = (rng.permutation(pages)[: B * W] if paged else np.arange(B)).reshape(B, W)
        touched = np.pad(inside, ((0, 0), (0, W * T - case.S))).reshape(B, W, T)
        used = np.zeros((pages, T), bool)
        used[order] = touched
        parts: dict[str, Any] = {}
        dense = []
        for name, x in (("key", key), ("value", value)):
            pool = rng.standard_normal((pages, T, *x.shape[2:])).astype(x.dtype)
            rows = np.resize(pool, (B, W * T, *x.shape[2:]))
            rows[:, : case.S] = x
            pool[order] = rows.reshape(B, W, T, *x.shape[2:])
            stored, scale = pool, None
            if form.dtype is not None and name in form.names:
                stored, scale = form.quantised(pool)
            wide = stored.astype(np.float64)
            if scale is not None:
                wide *= scale[..., None]
                parts[f"{name}_scale"] = _poisoned(scale, used)
            dense.append(wide[order].reshape(B, W * T, *x.shape[2:])[:, : case.S])
            parts[name] = _poisoned(stored, used)
        arrays = {"query": query, "lengths": lengths}
        if starts is not None:
            arrays["starts"] = starts
        if paged:
            garbage = rng.choice([-1, pages, 2**31 - 1, -(2**31), 0], size=(B, W))
            table = np.where(touched.any(axis=2), order, garbage)
            arrays["page_table"] = table.astype(np.int32)
        if form.layout == "BHSD":
            parts = {name: x.swapaxes(1, 2) for name, x in parts.items()}
        return cls(case, arrays | parts, form.layout, (dense[0], dense[1]))

    @property
    def call(self) -> Callable[..., Any]:
        """The call of the kernel, of the arrays by name."""
        params = {**self.case.params, "cache_layout": self.layout, "implementation": "kernel"}

        def call(arrays: dict[str, Any]) -> Any:
            return ragged_attention(**arrays, **params)

        return call

    @property
    def params(self) -> RaggedAttentionParams:
        """The parameters of the primitive."""
        layout: Any = self.layout
        optional = tuple(name for name in OPTIONAL if name in self.arrays)
        return RaggedAttentionParams(
            **self.case.params,
            cache_layout=layout,
            optional=optional,
            implementation="kernel",
        )

    @property
    def cache(self) -> dict[str, Any]:
        """The operands that are the cache, by name, as the primitive folds them."""
        cache = {name: self.arrays[name] for name in ("key", "value", *self.params.optional)}
        if "page_table" in cache:
            cache["page_table"] = np.clip(cache["page_table"], 0, len(cache["key"]) - 1)
        return cache

    def expected(self) -> oracle.Results:
        """The oracle's results."""
        windows = self.arrays["lengths"], self.arrays.get("starts")
        return oracle.attention(self.arrays["query"], *self.dense, *windows, **self.case.definition)

    def assert_results(self, actual: Any) -> None:
        """Asserts the oracle's results, by the tolerances of test_gpu_lowering."""
        expected = self.expected()
        windows = self.arrays["lengths"], self.arrays.get("starts")
        inside = oracle.inside(self.arrays["query"], self.case.S, *windows)
        largest = float(np.abs(self.dense[1][inside]).max(initial=0.0))
        # ex2.approx is good to 2 ** -22, and the tensor cores cut what they add below that.
        statistics = 1e-5 * max(1.0, self.case.logit_size)
        out, *others = actual
        tol = tolerance(self.case) + statistics
        assert_close(out, expected.out, tol, scale=largest, name="out")
        empty = expected.denominator == 0
        for got, want in zip(others, expected[1:], strict=True):
            got = np.where(empty, 0, np.asarray(got, np.float64))
            assert_close(got, np.where(empty, 0, want), statistics)


def _case(name: str, lengths: Any, starts: Any = None, **sizes: Any) -> Case:
    given: dict[str, Any] = {"Hq": 8, "Hkv": 2, "S": 256, "D": 64, "Dv": 64, "dtype": "bfloat16"}
    return Case(name, lengths, starts, **(given | sizes))


def _causal(Q: int, *firsts: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(first, first + Q)) for first in firsts)


ROWS = _case("rows", (200, 1, 0, 256), (0, 0, 0, 63))
QUERIES = _case("queries", ((20, 37, 250), (8, 9, 0)), ((3, 0, 200), (0, 4, 0)), Q=3)
CAPPED = _case("capped", (200, 77), Hq=4, D=128, Dv=96, logits_soft_cap=2.0, dtype="float16")
MANY = _case("many", _causal(128, 1, 120), Q=128, Hq=64, Hkv=4, D=128, Dv=128)
# Scales are copied for 8 heads at a time.
TWELVE = _case("twelve_heads", (200, 77), Hq=12, Hkv=12)
SLIDING = _case(
    "sliding", _causal(200, 30, 2), _causal(200, -40, -8), Q=200, Hq=32, Hkv=8, logits_soft_cap=3.0
)
FORMS = (
    Form(16),
    Form(64),
    Form(48, "BHSD"),
    Form(None, "BHSD"),
    Form(256),
    Form(32, "BHSD"),
    Form(512),
)
QUANTISED = (
    Form(None, "BSHD", "int8"),
    Form(16, "BSHD", "int8"),
    Form(64, "BHSD", "float8_e4m3fn"),
    Form(None, "BSHD", "float8_e5m2", None),
    Form(32, "BSHD", "int8", "head"),
    Form(16, "BSHD", "float8_e4m3fn", "tensor"),
    Form(16, "BHSD", "int8", "page"),
    Form(None, "BSHD", "int8", "token", ("value",)),
    Form(None, "BHSD", "int8", "token", ("key",)),
    Form(None, "BSHD", "int8", "head"),
    Form(None, "BHSD", "float8_e4m3fn", "page"),
)


def _lowered(function: Callable[..., Any], *operands: Any) -> str:
    text: str = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return text


class TestLowered:
    """The module that JAX makes for a GPU."""

    # What would make a dense cache, or another one.
    MOVES = ("gather", "dynamic_slice", "slice", "transpose", "pad", "concatenate", "convert",
             "select", "multiply")  # fmt: skip

    def _moved(self, function: Callable[..., Any], stored: Stored) -> list[str]:
        text = _lowered(function, stored.arrays)
        least = min(stored.arrays[name].size for name in ("key", "value"))
        return [line for size, line in emitted(text, *self.MOVES) if size >= least // 2]

    @pytest.mark.parametrize(
        ("case", "form"),
        tiered(
            [(case, form) for case in (ROWS, QUERIES, MANY) for form in FORMS + QUANTISED],
            [(ROWS, Form(16)), (ROWS, Form(None, "BHSD")), (ROWS, QUANTISED[1]),
             (QUERIES, QUANTISED[2]), (MANY, Form(48, "BHSD")), (MANY, QUANTISED[4])],
        ),
        ids=lambda x: getattr(x, "name", str(x)),
    )  # fmt: skip
    def test_the_kernels_read_the_form_itself(self, case: Case, form: Form) -> None:
        # The cache is larger than the queries, which tiles reorder.
        S = 8192 if case is MANY else 1024
        stored = Stored.of(dataclasses.replace(case, S=S), form)
        text = _lowered(stored.call, stored.arrays)
        teams = case is MANY and form.dtype is None
        assert text.count("@mosaic_gpu_v2") == (1 if teams else 2)
        assert self._moved(stored.call, stored) == []

    def test_a_gather_or_transpose_in_front_would_be_seen(self) -> None:
        """The twin: the call in a form whose copy is what the kernels save."""
        stored = Stored.of(dataclasses.replace(ROWS, S=1024), Form(16))

        def gathered(arrays: dict[str, Any]) -> Any:
            arrays = dict(arrays)
            table = arrays.pop("page_table")
            for name in ("key", "value"):
                x = arrays[name][table]
                arrays[name] = x.reshape(len(table), -1, *x.shape[3:])
            return stored.call(arrays)

        assert any("gather" in line for line in self._moved(gathered, stored))
        first = Stored.of(dataclasses.replace(ROWS, S=1024), Form(None, "BHSD"))

        def swapped(arrays: dict[str, Any]) -> Any:
            cache: Any = {name: jnp.swapaxes(arrays[name], 1, 2) for name in ("key", "value")}
            return ragged_attention(**(arrays | cache), implementation="kernel")

        assert any("transpose" in line for line in self._moved(swapped, first))

    def test_gradients_go_through_the_dense_cache(self) -> None:
        stored = Stored.of(ROWS, Form(16))

        def loss(key: Any, arrays: dict[str, Any]) -> Any:
            return stored.call(arrays | {"key": key}).out.astype("float32").sum()

        text = _lowered(jax.grad(loss), stored.arrays["key"], stored.arrays)
        # Beside the forward's two kernels.
        assert text.count("@mosaic_gpu_v2") > 2

    @pytest.mark.parametrize("page", [8, 24, 1])
    def test_pages_that_no_copy_fits(self, page: int) -> None:
        stored = Stored.of(ROWS, Form(page))
        with pytest.raises(NotImplementedError, match=f"multiples of 16 positions.*{page}"):
            _lowered(stored.call, stored.arrays)


def _plan(
    B: int, S: int, dtype: str, D: int, Dv: int, *, scaled_positions: bool = False
) -> line_plan.Plan:
    """The plan of a query of 32 heads for each row; an int8 cache of 8 heads has scales."""

    def shape(*sizes: int, of: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, of)

    windows = shape(B, 1, of=jnp.int32)
    scale = None
    if dtype == "int8":
        scale = shape(*((B, S, 8) if scaled_positions else (1, 1, 8)), of=jnp.float32)
    operands = contract.Operands(
        shape(B, 1, 32, D, of=jnp.bfloat16),
        shape(B, S, 8, D),
        shape(B, S, 8, Dv),
        lengths=windows,
        starts=windows,
        key_scale=scale,
        value_scale=scale,
    )
    return make_plan(operands, RaggedAttentionParams(), jnp.dtype(jnp.bfloat16))


class TestPlan:
    """The plan of the schedule for few queries."""

    @pytest.mark.parametrize(
        ("B", "S", "dtype", "D", "streams"),
        [(8, 1024, "int8", 128, 1), (16, 8192, "int8", 128, 2), (1, 4096, "bfloat16", 64, 1),
         (32, 8192, "bfloat16", 64, 2), (128, 2048, "bfloat16", 128, 2),
         (16, 8192, "bfloat16", 128, 1)],
    )  # fmt: skip
    def test_two_streams_share_many_blocks(
        self, B: int, S: int, dtype: str, D: int, streams: int
    ) -> None:
        assert _plan(B, S, dtype, D, D).streams == streams

    @pytest.mark.parametrize(
        ("page", "T", "span"),
        [(None, 64, 64), (16, 128, 16), (64, 128, 64), (192, 128, 64), (256, 128, 128),
         (80, 64, 64), (80, 128, 16), (1008, 128, 128)],
    )  # fmt: skip
    def test_positions_copied_together(self, page: int | None, T: int, span: int) -> None:
        form = forms.Form(forms.Stored(), forms.Stored(), 4032, 4032, page, paged=page is not None)
        assert form.span(T, line_plan.COPIED) == span

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    @pytest.mark.parametrize("B", [4, 200])
    def test_a_block_at_least_fits_beside_the_rest(self, B: int, dtype: str) -> None:
        """Over head dimensions: blocks in flight, and all shared memory."""
        head_dims = range(32, 257, 32)
        for D, Dv, scaled in itertools.product(head_dims, head_dims, (False, True)):
            plan = _plan(B, 512, dtype, D, Dv, scaled_positions=scaled)
            assert plan.stages >= 1
            scratch = attend.scratch_types(plan)
            assert most_stages({1: scratch}.__getitem__, 1) == 1


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU has no interpreter in jax < 0.11"
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.usefixtures("products_of_registers")
class TestInterpreted:
    """The kernels as JAX's interpreter runs them, on few CTAs; see test_gpu_lowering."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Allows teams and two streams for calls as small as these."""
        monkeypatch.setattr(team_plan, "_FEWEST_TEAMS", 1)
        monkeypatch.setattr(line_plan, "_BLOCKS_OF_TWO_STREAMS", 0)

    def _run(self, stored: Stored, schedule: Callable[..., Any], races: bool = True) -> None:
        query, lengths = (stored.arrays[name] for name in ("query", "lengths"))
        starts = stored.arrays.get("starts", np.zeros_like(lengths))
        rows = query.shape[:-2]
        if stored.case.Q is None:
            query, lengths, starts = query[:, None], lengths[:, None], starts[:, None]
        arrays = {
            "query": query,
            "lengths": np.broadcast_to(lengths, query.shape[:2]),
            "starts": np.broadcast_to(starts, query.shape[:2]),
            **stored.cache,
        }
        # On a machine with a GPU the interpreter's callbacks would wait for one another.
        with jax.default_device(jax.devices("cpu")[0]):
            operands = contract.Operands(**jax.tree.map(jnp.asarray, arrays))
            interpret: Any = vars(plgpu)["InterpretGPUParams"](detect_races=races)
            results = schedule(operands, stored.params, interpret)
        stored.assert_results([x.reshape(*rows, *x.shape[2:]) for x in results])

    def _along_line(self, operands: Any, params: Any, interpret: Any) -> Any:
        plan = make_plan(operands, params, operands.query.dtype)
        return attend_along_line(dataclasses.replace(plan, parts=3), operands, interpret)

    @pytest.mark.parametrize(
        ("case", "form"),
        tiered(
            [(ROWS, Form(16)), (ROWS, Form(48, "BHSD")), (QUERIES, Form(64)),
             (CAPPED, Form(None, "BHSD")), (dataclasses.replace(ROWS, S=261), Form(None, "BHSD")),
             *((TWELVE, form) for form in QUANTISED[:2]),
             *((case, form) for case in (ROWS, QUERIES, CAPPED) for form in QUANTISED)],
            [(QUERIES, Form(64)), (ROWS, QUANTISED[1]),
             (QUERIES, QUANTISED[2]), (ROWS, QUANTISED[4])],
        ),
        ids=lambda x: getattr(x, "name", str(x)),
    )  # fmt: skip
    def test_line(self, case: Case, form: Form) -> None:
        self._run(Stored.of(case, form), self._along_line)

    @pytest.mark.parametrize("form", tiered(QUANTISED[:3], QUANTISED[1:2]), ids=str)
    def test_line_of_one_stream(self, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(line_plan, "_BLOCKS_OF_TWO_STREAMS", math.inf)
        self._run(Stored.of(ROWS, form), self._along_line)

    @pytest.mark.filterwarnings("ignore")  # of threads that the failure ends
    def test_a_missing_fence_would_be_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The twin of all tests that run without a race."""
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
            self._run(Stored.of(ROWS, QUANTISED[2]), self._along_line)

    @pytest.mark.parametrize("power", [-100, 100])
    def test_queries_of_any_size(self, power: int) -> None:
        """Queries for int8 keys are split by a power of two, of any size; one is zero."""
        stored = Stored.of(_case("sizes", (130, 70)), QUANTISED[0])
        key, value = stored.dense
        query = stored.arrays["query"].astype(np.float32) * np.float32(2.0**power)
        query[0, 0] = 0
        changed = {
            "query": query.astype(stored.arrays["query"].dtype),
            "key_scale": stored.arrays["key_scale"] * np.float32(2.0**-power),
        }
        stored = dataclasses.replace(
            stored, arrays=stored.arrays | changed, dense=(key * 2.0**-power, value)
        )
        self._run(stored, self._along_line)

    def test_scales_too_small_for_float16(self) -> None:
        """Weights times scales are smaller than its numbers."""
        stored = Stored.of(_case("small", (256, 200), dtype="float16"), QUANTISED[0])
        scale = stored.arrays["value_scale"] * np.float32(1e-4)
        key, value = stored.dense
        stored = dataclasses.replace(
            stored, arrays=stored.arrays | {"value_scale": scale}, dense=(key, value * 1e-4)
        )
        self._run(stored, self._along_line)

    @pytest.mark.parametrize("form", tiered([Form(16), Form(None, "BHSD")], [Form(16)]), ids=str)
    def test_teams(self, form: Form) -> None:
        case = _case("few", _causal(24, 100), _causal(24, 5), Q=24, Hq=8, S=128)

        def schedule(operands: Any, params: Any, interpret: Any) -> Any:
            plan = team_plan.make_team_plan(operands, params, operands.query.dtype)
            assert plan is not None
            return teams.attend_in_teams(dataclasses.replace(plan, ctas=1), operands, interpret)

        # Both warpgroups of a team write the same zeros, which the detector cannot know.
        self._run(Stored.of(case, form), schedule, races=False)


@pytest.mark.gpu
@pytest.mark.optimized
class TestGpu:
    """The kernels on a GPU."""

    @pytest.mark.parametrize("form", FORMS + QUANTISED, ids=str)
    @pytest.mark.parametrize(
        "case", [ROWS, QUERIES, CAPPED, MANY, SLIDING, TWELVE], ids=lambda case: case.name
    )
    def test_values(self, case: Case, form: Form) -> None:
        stored = Stored.of(case, form)
        with jax.default_device(gpus()[0]):
            stored.assert_results(jax.jit(stored.call)(stored.arrays))

    @pytest.mark.parametrize("form", [Form(64), *QUANTISED], ids=str)
    def test_many_rows(self, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
        """CTAs of two streams, with several segments each."""
        monkeypatch.setattr(line_plan, "_BLOCKS_OF_TWO_STREAMS", 0)
        lengths = tuple(np.random.default_rng(0).integers(0, 257, 300))
        stored = Stored.of(_case("many_rows", lengths), form)
        with jax.default_device(gpus()[0]):
            stored.assert_results(jax.jit(stored.call)(stored.arrays))

    @pytest.mark.parametrize("S", [1000, 997])
    def test_heads_first_of_any_length(self, S: int) -> None:
        case = dataclasses.replace(ROWS, S=S, lengths=(S, 3, 0, 700))
        stored = Stored.of(case, Form(None, "BHSD"))
        with jax.default_device(gpus()[0]):
            stored.assert_results(jax.jit(stored.call)(stored.arrays))

    def test_shared_pages(self) -> None:
        """Rows with the same pages have the same results as one row."""
        stored = Stored.of(_case("shared", (200, 200, 77)), Form(16))
        table = stored.arrays["page_table"]
        arrays = stored.arrays | {"page_table": np.stack([table[0]] * 3)}
        arrays["query"] = np.stack([arrays["query"][0]] * 3)
        arrays["lengths"] = np.full(3, 200, np.int32)
        with jax.default_device(gpus()[0]):
            out = np.asarray(jax.jit(stored.call)(arrays).out, np.float32)
        assert_close(out[0], stored.expected().out[0], tolerance(stored.case) + 1e-5)
        # Where a row is cut into parts differs between rows, and so does the order of sums.
        assert_close(out[1], out[0], 2 * tolerance(stored.case))
        assert_close(out[2], out[0], 2 * tolerance(stored.case))

    @pytest.mark.parametrize("form", [Form(16), Form(None, "BHSD")], ids=str)
    def test_gradients(self, form: Form) -> None:
        stored = Stored.of(ROWS, form)
        names = ("query", "key", "value")

        def loss(moving: dict[str, Any], arrays: dict[str, Any]) -> Any:
            return jnp.sin(stored.call(arrays | moving).out.astype("float32")).sum()

        moving = {name: stored.arrays[name] for name in names}
        with jax.default_device(gpus()[0]):
            bars = jax.jit(jax.grad(loss))(moving, stored.arrays)
        windows = stored.arrays["lengths"], stored.arrays["starts"]
        cotangents = (np.cos(stored.expected().out), None, None)
        expected = oracle.vjp(
            stored.arrays["query"], *stored.dense, *windows, cotangents, **stored.case.definition
        )
        # The output is rounded before its sine, which the cotangent feels; see test_gpu_lowering.
        tol = 4 * tolerance(stored.case)
        assert_close(bars["query"], expected.query, tol)
        for name, want in (("key", expected.key), ("value", expected.value)):
            got = np.asarray(bars[name], np.float32)
            assert np.isfinite(got).all()
            if form.layout == "BHSD":
                got = got.swapaxes(1, 2)
            if form.page is not None:
                table = np.clip(stored.arrays["page_table"], 0, len(got) - 1)
                inside = oracle.inside(stored.arrays["query"], stored.case.S, *windows)
                got = got[table].reshape(want.shape)
                got = np.where(inside[:, :, None, None], got, 0)
            assert_close(got, want, tol, name=name)
