"""The GPU's kernels on caches that are paged or have heads first."""

import dataclasses
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
from jax_ragged.lowering.gpu import attend, team_plan, teams
from jax_ragged.lowering.gpu.line import attend_along_line
from jax_ragged.lowering.gpu.plan import make_plan
from jax_ragged.lowering.params import RaggedAttentionParams
from lowerings import gpus
from programs import emitted

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a cache.

    Attributes:
      page: positions of a page, or None for a cache that is not paged.
      layout: the argument cache_layout.
    """

    page: int | None = None
    layout: str = "BSHD"

    def __str__(self) -> str:
        return f"{self.page or 'dense'}-{self.layout}"


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
    def of(cls, case: Case, form: Form, poison: bool = True) -> "Stored":
        """Draws a case in a form.

        All positions outside of the windows are NaN, pages that no window touches have garbage in
        the table, and the pool has pages that are in no row.
        """
        rng = np.random.default_rng([len(str(form)), *case.name.encode()])
        query, key, value, lengths, starts = case.operands()
        inside = oracle.inside(query, case.S, lengths, starts)
        parts: dict[str, Any] = {"key": key, "value": value}
        dense = tuple(np.asarray(x, np.float64) for x in (key, value))
        if poison:
            for name, x in parts.items():
                outside = ~inside.reshape(*inside.shape, *[1] * (x.ndim - 2))
                parts[name] = np.where(outside, np.asarray(np.nan, x.dtype), x)
        arrays = {"query": query, "lengths": lengths}
        if starts is not None:
            arrays["starts"] = starts
        if form.page is not None:
            B, W = case.B, -(-case.S // form.page)
            pages = B * W + 3
            order = rng.permutation(pages)[: B * W].reshape(B, W)
            for name, x in parts.items():
                rows = np.full((B, W * form.page, *x.shape[2:]), np.nan, x.dtype)
                rows[:, : case.S] = x
                pool = np.full((pages, form.page, *x.shape[2:]), np.nan, x.dtype)
                pool[order] = rows.reshape(B, W, form.page, *x.shape[2:])
                parts[name] = pool
            padded = np.pad(inside, ((0, 0), (0, W * form.page - case.S)))
            touched = padded.reshape(B, W, form.page).any(axis=2)
            garbage = rng.choice([-1, pages, 2**31 - 1, -(2**31), 0], size=(B, W))
            arrays["page_table"] = np.where(touched, order, garbage).astype(np.int32)
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

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("case", [ROWS, QUERIES, MANY], ids=lambda case: case.name)
    def test_the_kernels_read_the_form_itself(self, case: Case, form: Form) -> None:
        stored = Stored.of(dataclasses.replace(case, S=1024), form)
        text = _lowered(stored.call, stored.arrays)
        assert text.count("@mosaic_gpu_v2") == (1 if case is MANY else 2)
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
            cache: dict[str, Any] = {
                name: jnp.swapaxes(arrays[name], 1, 2) for name in ("key", "value")
            }
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


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU has no interpreter in jax < 0.11"
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
class TestInterpreted:
    """The kernels as JAX's interpreter runs them, on few CTAs; see test_gpu_lowering."""

    @pytest.fixture(autouse=True)
    def _products_of_registers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces the matrix products of an operand in registers, which the interpreter lacks."""

        def product(p: jax.Array, values_ref: Any) -> jax.Array:
            return jnp.dot(p.astype(jnp.float32), values_ref[...].astype("float32"))

        monkeypatch.setattr(attend, "_product", product)
        monkeypatch.setattr(teams, "_add_product", lambda total, p, ref: total + product(p, ref))
        monkeypatch.setattr(team_plan, "_FEWEST_TEAMS", 1)

    def _run(self, stored: Stored, schedule: Callable[..., Any]) -> None:
        arrays = dict(stored.arrays)
        lengths, starts = (arrays.pop(name, None) for name in ("lengths", "starts"))
        starts = np.zeros_like(lengths) if starts is None else starts
        query, rows = arrays["query"], arrays["query"].shape[:-2]
        if stored.case.Q is None:
            query, lengths, starts = query[:, None], lengths[:, None], starts[:, None]
        arrays["query"] = query
        bounds = {
            "lengths": np.broadcast_to(lengths, query.shape[:2]),
            "starts": np.broadcast_to(starts, query.shape[:2]),
        }
        if "page_table" in arrays:  # as the primitive folds it
            arrays["page_table"] = np.clip(arrays["page_table"], 0, len(arrays["key"]) - 1)
        params = RaggedAttentionParams(
            **stored.case.params,
            cache_layout=stored.layout,  # type: ignore[arg-type]
            optional=tuple(n for n in ("page_table",) if n in arrays),
        )
        # On a machine with a GPU the interpreter's callbacks would wait for one another.
        with jax.default_device(jax.devices("cpu")[0]):
            operands = contract.Operands(**jax.tree.map(jnp.asarray, arrays | bounds))
            interpret: Any = vars(plgpu)["InterpretGPUParams"]()
            results = schedule(operands, params, interpret)
        stored.assert_results([x.reshape(*rows, *x.shape[2:]) for x in results])

    @pytest.mark.parametrize(
        ("case", "form"),
        tiered(
            [(ROWS, Form(16)), (ROWS, Form(48, "BHSD")), (QUERIES, Form(64)),
             (CAPPED, Form(None, "BHSD")), (dataclasses.replace(ROWS, S=261), Form(None, "BHSD"))],
            [(ROWS, Form(48, "BHSD")), (QUERIES, Form(64))],
        ),
        ids=lambda x: getattr(x, "name", str(x)),
    )  # fmt: skip
    def test_line(self, case: Case, form: Form) -> None:
        def schedule(operands: Any, params: Any, interpret: Any) -> Any:
            plan = make_plan(operands, params, operands.query.dtype)
            return attend_along_line(dataclasses.replace(plan, parts=3), operands, interpret)

        self._run(Stored.of(case, form), schedule)

    @pytest.mark.parametrize("form", [Form(16), Form(None, "BHSD")], ids=str)
    def test_teams(self, form: Form) -> None:
        case = _case("few", _causal(24, 100), _causal(24, 5), Q=24, Hq=8, S=128)

        def schedule(operands: Any, params: Any, interpret: Any) -> Any:
            plan = team_plan.make_team_plan(operands, params, operands.query.dtype)
            assert plan is not None
            return teams.attend_in_teams(dataclasses.replace(plan, ctas=1), operands, interpret)

        self._run(Stored.of(case, form), schedule)


@pytest.mark.gpu
@pytest.mark.optimized
class TestGpu:
    """The kernels on a GPU."""

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize(
        "case", [ROWS, QUERIES, CAPPED, MANY, SLIDING], ids=lambda case: case.name
    )
    def test_values(self, case: Case, form: Form) -> None:
        stored = Stored.of(case, form)
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
