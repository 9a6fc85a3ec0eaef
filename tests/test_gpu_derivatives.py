"""The GPU derivative kernels: lowered on any machine, interpreted on the CPU, run on a GPU.

    python -m pytest tests/test_gpu_derivatives.py -m gpu

runs what a GPU takes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import oracle
from cases import Case, Operands, assert_close, poison, tiered, tolerance
from jax_ragged import Unsupported, ragged_attention
from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals
from jax_ragged.lowering.dispatch import Target
from jax_ragged.lowering.gpu import derivative_blocks, derivatives
from jax_ragged.lowering.params import RaggedAttentionParams
from lowerings import gpus, refusal
from programs import emitted
from test_gpu_forms import CAPPED, FORMS, MANY, QUANTISED, QUERIES, ROWS, Form, Stored
from test_gpu_lowering import FITTED, H200


def _causal(Q: int, window: int, rows: int = 2) -> dict[str, Any]:
    """Q queries whose windows end with them, of at most so many positions."""
    ends = tuple(range(1, Q + 1))
    starts = tuple(max(0, end - window) for end in ends)
    return {"Q": Q, "S": -(-Q // 8) * 8, "lengths": (ends,) * rows, "starts": (starts,) * rows}


def _refused(operation: str, case: Case) -> str | None:
    query, key, value = case.operands()[:3]
    query = query[:, None] if case.Q is None else query
    params = RaggedAttentionParams(**case.params)
    refused = refusal(Target("cuda", H200), operation, query, key, value, params)
    return None if refused is None else f"{refused.reason}. {refused.advice or ''}"


def _types(case: Case) -> tuple[Residuals, ByResult[Any], ByOperand[Any]]:
    """The types of the arguments of jvp and vjp."""
    array: Any = jax.ShapeDtypeStruct
    f32, i32 = jnp.float32, jnp.int32
    dtype, rows = jnp.dtype(case.dtype), (case.B, case.Q or 1)
    query = array((*rows, case.Hq, case.D), dtype)
    key, value = (array((case.B, case.S, case.Hkv, n), dtype) for n in (case.D, case.Dv))
    statistic = array((*rows, case.Hq), f32)
    out = array((*rows, case.Hq, case.Dv), f32)
    windows = array(rows, i32)
    residuals = Residuals(query, key, value, windows, windows, out, statistic, statistic)
    bars = ByResult(array(out.shape, dtype), statistic, statistic)
    return residuals, bars, ByOperand(query, key, value)


def _taken(case: Case) -> bool:
    """Whether the derivative kernels take a case that the forward's takes."""
    try:
        derivatives.plan_of(_types(case)[0], RaggedAttentionParams(**case.params))
    except Unsupported:
        return False
    return True


_SIZES: dict[str, Any] = {"D": 64, "Dv": 64, "dtype": "bfloat16"}


def _sizes(**changes: Any) -> dict[str, Any]:
    return _SIZES | changes


DERIVED = (
    *(case for case in FITTED if _taken(case)),
    # Tiles of one query head each; those of FITTED hold all heads that share a key head.
    Case("causal", **_causal(200, 1000), Hq=4, Hkv=2, **_sizes(D=128, Dv=128)),
    Case("sliding", **_causal(300, 100), Hq=4, **_SIZES, softmax_scale=-0.3, logits_soft_cap=2.0),
    Case("causal_half", **_causal(100, 100), Hkv=4, **_sizes(Dv=128, dtype="float16")),
    # Rows of the cache that begin in the middle of the copy engine's tiles.
    Case("joined", (300, 7, 0, 290), (1, 0, 0, 40), Hq=8, Hkv=2, S=300, **_SIZES),
    Case("joined_causal", **_causal(100, 70) | {"S": 100}, Hq=4, Hkv=2, **_sizes(D=128, Dv=128)),
    Case("causal_wide", **_causal(100, 90), **_sizes(D=256, Dv=256)),
    # One tile of each query head.
    Case("tile_of_each_head", **_causal(64, 104), Hq=8, Hkv=2, **_sizes(Dv=128)),
)


def _bar_dtypes(case: Case, wrt: tuple[bool, bool, bool]) -> ByOperand[Any]:
    return ByOperand(*(jnp.dtype(case.dtype) if asked else None for asked in wrt))


def _residuals(case: Case, operands: Operands, results: oracle.Results | None = None) -> Residuals:
    """The folded operands, and the oracle's results, of the case or others, in float32."""
    query, key, value, lengths, starts = operands
    results = case.expected() if results is None else results
    starts = np.zeros_like(lengths) if starts is None else starts
    if case.Q is None:
        query, lengths, starts = query[:, None], lengths[:, None], starts[:, None]
        results = oracle.Results(*(x[:, None] for x in results))
    rows = query.shape[:2]
    windows = (np.broadcast_to(x if x.ndim == 2 else x[:, None], rows) for x in (lengths, starts))
    return Residuals(
        *map(jnp.asarray, (query, key, value, *windows)),
        *(jnp.asarray(np.maximum(x, np.finfo(np.float32).min), jnp.float32) for x in results),
    )


def _lowered(function: Callable[..., Any], *arguments: Any) -> str:
    text: str = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text


def _kernels(text: str) -> int:
    return text.count("@mosaic_gpu_v2")


_PARAMS = RaggedAttentionParams(implementation="kernel")
_ALL = (True, True, True)


def _vjp(case: Case, wrt: tuple[bool, bool, bool]) -> Callable[..., Any]:
    def run(residuals: Residuals, bars: ByResult[Any]) -> Any:
        return Target("cuda", H200).vjp(residuals, bars, _bar_dtypes(case, wrt), _PARAMS)

    return run


class TestLowered:
    """What needs no GPU: the module that JAX makes for one."""

    @pytest.mark.parametrize(
        ("sizes", "vjp", "jvp"),
        [
            ({"D": 128, "Dv": 128}, 1, 1),
            pytest.param(
                {"D": 64, "Dv": 128, "Q": 3, "dtype": "float16"}, 1, 1, marks=pytest.mark.full
            ),
            ({"D": 128, "Dv": 64, "Q": 40, "Hkv": 1}, 2, 1),
            pytest.param({"D": 128, "Dv": 128, "Q": 300}, 2, 1, marks=pytest.mark.full),
            pytest.param({"D": 64, "Dv": 64, "Q": 100, "Hkv": 8}, 2, 1, marks=pytest.mark.full),
            # A kernel for each gradient of the cache: registers do not hold both.
            pytest.param({"D": 256, "Dv": 128}, 2, 1, marks=pytest.mark.full),
            pytest.param({"D": 256, "Dv": 256, "Q": 100}, 3, 1, marks=pytest.mark.full),
            # A row of the cache may begin anywhere, as long as B * S is a multiple of 8.
            ({"D": 128, "Dv": 128, "S": 4100}, 2, 1),
            pytest.param({"D": 64, "Dv": 64, "S": 4100, "Q": 100}, 2, 1, marks=pytest.mark.full),
        ],
    )
    def test_kernels_alone_and_no_copy_of_the_cache(
        self, sizes: dict[str, Any], vjp: int, jvp: int
    ) -> None:
        shared: dict[str, Any] = {"Hq": 8, "Hkv": 2, "S": 4096, "dtype": "bfloat16"}
        case = Case("", (70, 4000), **shared | sizes)
        residuals, bars, dots = _types(case)
        cache = case.B * case.S * case.Hkv * min(case.D, case.Dv)
        programs = [
            (_lowered(_vjp(case, _ALL), residuals, bars._replace(max_logits=None)), vjp + 1),
            (
                _lowered(
                    _vjp(case, _ALL),
                    residuals,
                    bars._replace(max_logits=None, denominator=None),
                ),
                vjp,
            ),
            (
                _lowered(lambda r, t: Target("cuda", H200).jvp(r, t, _PARAMS), residuals, dots),
                jvp,
            ),
        ]
        for text, kernels in programs:
            assert _kernels(text) == kernels
            assert "stablehlo.dot_general" not in text
            moves = ("pad", "concatenate", "convert", "slice", "dynamic_slice", "transpose")
            assert [line for size, line in emitted(text, *moves) if size >= cache // 2] == []

    @pytest.mark.full
    @pytest.mark.parametrize("Q", [1, 100])
    @pytest.mark.parametrize(
        ("D", "Dv"), [(16, 16), (80, 80), (96, 112), (192, 128), (224, 48), (240, 240)]
    )
    def test_head_dimensions(self, Q: int, D: int, Dv: int) -> None:
        """Any multiple of 16, and any S: the cache is padded if B * S is no multiple of 8."""
        case = Case("", (70, 1000), Q=Q, Hq=8, S=1003, D=D, Dv=Dv, dtype="float16")
        residuals, bars, dots = _types(case)
        plan = derivatives.plan_of(residuals, _PARAMS)
        wrt = _bar_dtypes(case, _ALL)
        vjp = functools.partial(derivatives.vjp, plan, wrt=wrt)
        assert _kernels(_lowered(vjp, residuals, bars)) >= 2
        assert _kernels(_lowered(functools.partial(derivatives.jvp, plan), residuals, dots)) == 1
        for got, operand in zip(jax.eval_shape(vjp, residuals, bars)[:3], dots[:3], strict=True):
            assert (got.shape, got.dtype) == (operand.shape, operand.dtype)

    def test_query_alone_makes_nothing_of_the_size_of_the_cache(self) -> None:
        case = Case("", (70, 4000), Hq=8, S=4096, D=128, Dv=128, dtype="bfloat16")
        residuals, bars, _ = _types(case)
        run = _vjp(case, (True, False, False))
        text = _lowered(run, residuals, ByResult(bars.out, None, None))
        assert _kernels(text) == 1
        results = jax.eval_shape(run, residuals, ByResult(bars.out, None, None))
        assert [x.shape for x in jax.tree.leaves(results)] == [residuals.query.shape]
        kernel = next(line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
        result = kernel.rsplit("->", 1)[1]
        assert f"x{case.S}x" not in result

    @pytest.mark.parametrize("wrt", [(False, True, False), (False, False, True)])
    @pytest.mark.parametrize("Q", [1, 100])
    def test_what_is_asked_for_is_made(self, wrt: tuple[bool, bool, bool], Q: int) -> None:
        case = Case("", (70, 4000), Q=Q, Hq=8, S=4096, D=64, Dv=128, dtype="bfloat16")
        residuals, bars, dots = _types(case)
        results = jax.eval_shape(_vjp(case, wrt), residuals, bars)
        for got, operand, asked in zip(results[:3], dots[:3], wrt, strict=True):
            assert (got is not None) == asked
            if asked:
                assert (got.shape, got.dtype) == (operand.shape, operand.dtype)

    def test_gradients_are_as_wide_as_asked(self) -> None:
        for Q in (1, 100):
            case = Case("", (70, 4000), Q=Q, Hq=8, S=4096, D=128, Dv=128, dtype="bfloat16")
            residuals, bars, _ = _types(case)
            wide = ByOperand(*(jnp.dtype("float32"),) * 3)
            run: Any = functools.partial(Target("cuda", H200).vjp, wrt=wide, params=_PARAMS)
            results = jax.eval_shape(run, residuals, bars)
            assert {x.dtype for x in results[:3]} == {jnp.dtype("float32")}
            assert _kernels(_lowered(run, residuals, bars)) == (2 if Q == 1 else 3)

    def test_training_runs_kernels_both_ways(self) -> None:
        case = Case("", (70, 1000), Q=100, Hq=8, S=1000, D=64, Dv=64, dtype="bfloat16")
        operands = case.operands()[:4]

        def loss(*operands: Any) -> Any:
            out = ragged_attention(*operands, implementation="kernel").out
            return out.astype(jnp.float32).sum()

        text = _lowered(jax.grad(loss, (0, 1, 2)), *operands)
        assert _kernels(text) >= 3
        assert "stablehlo.dot_general" not in text

    @pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["rows", "heads"])
    @pytest.mark.parametrize("Q", [1, 100])
    def test_sharded_gradients(self, Q: int, shape: tuple[int, int]) -> None:
        """Each device has the kernels of its rows or heads, and nothing is sent to another."""
        devices = np.array(jax.devices("cpu")[:2]).reshape(shape)
        mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
        case = Case("", (70, 1000), Q=Q, Hq=8, Hkv=2, S=1000, D=64, Dv=64, dtype="bfloat16")
        residuals, bars, _ = _types(case)
        rows, cache, windows = P("data", None, "model"), P("data", None, "model"), P("data")

        def gradients(query: Any, key: Any, value: Any, out_bar: Any, *windows: Any) -> Any:
            op: Any = functools.partial(ragged_attention, implementation="kernel")
            return jax.vjp(lambda *x: op(*x, *windows).out, query, key, value)[1](out_bar)

        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x, spec in zip(
                (*residuals[:3], bars.out, *residuals[3:5]),
                (rows, cache, cache, rows, windows, windows),
                strict=True,
            )
        ]
        with jax.set_mesh(mesh):
            text = _lowered(gradients, *placed)
        kernels = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
        assert len(kernels) >= 3
        # The kernels see shards: arrays of positions have half of the cache's elements.
        shard = case.B * case.S * case.Hkv * case.D // 2
        dims = re.findall(r"tensor<((?:\d+x)+)bf16>", "".join(kernels))
        sizes = [math.prod(int(n) for n in x.split("x") if n) for x in dims]
        assert [size for size in sizes if size >= 2 * shard] == []
        # Forward and backward read both arrays, and the gradients are written.
        assert len([size for size in sizes if size == shard]) >= 6
        assert re.findall(r"all_gather|all_reduce|all_to_all|permute|scatter|reshard", text) == []
        moves = ("pad", "concatenate", "convert", "slice", "dynamic_slice", "transpose")
        assert [line for size, line in emitted(text, *moves) if size >= shard] == []


def _stored_call(stored: Stored) -> tuple[Residuals, RaggedAttentionParams]:
    """The folded operands with the cache in a form, with the oracle's results; the parameters."""
    residuals = _residuals(stored.case, stored.case.operands(), stored.expected())
    return residuals._replace(**jax.tree.map(jnp.asarray, stored.cache)), stored.params


def _turned(x: Any) -> Any:
    """A tangent of x, exact in every dtype; NaN where x is."""
    return -x[..., ::-1] / 2


class TestLoweredForms:
    """Derivatives that read caches in other forms than the dense one."""

    @pytest.mark.parametrize("case", [ROWS, MANY], ids=lambda case: case.name)
    @pytest.mark.parametrize(
        "form",
        tiered([*FORMS[:4], *QUANTISED], [Form(16), Form(None, "BHSD"), *QUANTISED[1:3]]),
        ids=str,
    )
    def test_the_kernels_read_the_form_itself(self, case: Case, form: Form) -> None:
        # The cache is larger than the queries.
        case = dataclasses.replace(case, S=8192 if case is MANY else 1024)
        stored = Stored.of(case, form)
        residuals, params = _stored_call(stored)
        target = Target("cuda", H200)
        bars = ByResult(residuals.out.astype(case.dtype), None, None)
        dots = ByOperand(*map(_turned, residuals[:3]))
        programs = {
            2: _lowered(
                lambda r, t: target.vjp(r, t, _bar_dtypes(case, (True, False, False)), params),
                residuals,
                bars._replace(max_logits=residuals.max_logits),
            ),
        }
        if form.dtype is None:
            programs[1] = _lowered(lambda r, t: target.jvp(r, t, params), residuals, dots)
        least = min(residuals.key.size, residuals.value.size)
        moves = ("gather", "pad", "concatenate", "convert", "slice", "transpose", "select")
        for kernels, text in programs.items():
            assert _kernels(text) == kernels
            # The tangents of the cache are made in the test.
            assert [x for size, x in emitted(text, *moves) if size >= least // 2] == []

    def test_a_gradient_of_the_cache_would_be_seen_to_gather(self) -> None:
        """The twin: the gradient of the pool, which goes through the dense cache."""
        case = dataclasses.replace(ROWS, S=1024)
        residuals, params = _stored_call(Stored.of(case, Form(16)))
        bars = ByResult(residuals.out.astype(case.dtype), None, None)
        wrt = _bar_dtypes(case, (True, True, False))
        text = _lowered(lambda r, t: Target("cuda", H200).vjp(r, t, wrt, params), residuals, bars)
        least = residuals.key.size
        assert any("gather" in x for size, x in emitted(text, "gather") if size >= least // 2)


class TestUnsupported:
    """Why a call is left to the reference."""

    @pytest.mark.parametrize("operation", ["jvp", "vjp"])
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({}, None),
            ({"D": 256, "Dv": 256, "dtype": "float16"}, None),
            ({"dtype": "float32"}, "float32"),
            ({"D": 72}, "72"),
            ({"Dv": 264}, "264"),
            ({"block_size": 128}, "Pass block_size=64"),
        ],
    )
    def test_reason(self, operation: str, changes: dict[str, Any], says: str | None) -> None:
        case = Case("", (70, 104), S=104, D=64, Dv=64, dtype="bfloat16")
        reason = _refused(operation, dataclasses.replace(case, **changes))
        assert (reason is None) if says is None else (reason is not None and says in reason)

    @pytest.mark.parametrize(
        ("dtype", "wrt", "says"),
        [
            ("bfloat16", (True, True, False), "the gradient of query alone.*key is float8_e5m2"),
            ("float16", (True, False, False), "keys with scales .* and this is float16"),
        ],
    )
    def test_quantised(self, dtype: str, wrt: tuple[bool, bool, bool], says: str) -> None:
        case = dataclasses.replace(ROWS, dtype=dtype)
        residuals, params = _stored_call(Stored.of(case, Form(None, "BSHD", "float8_e5m2")))
        bars = ByResult(residuals.out.astype(dtype), None, None)
        vjp = functools.partial(Target("cuda", H200).vjp, wrt=_bar_dtypes(case, wrt), params=params)
        with pytest.raises(NotImplementedError, match=says):
            jax.eval_shape(vjp, residuals, bars)

    def test_tangents_of_a_quantised_cache(self) -> None:
        residuals, params = _stored_call(Stored.of(ROWS, Form(None, "BSHD", "int8")))
        dots = ByOperand(residuals.query, None, None)
        with pytest.raises(NotImplementedError, match=r"the gradient of query alone.*key is int8"):
            jax.eval_shape(lambda r, t: Target("cuda", H200).jvp(r, t, params), residuals, dots)


def _assert_derivatives(actual: Any, expected: Any, case: Case) -> None:
    # Twice the error of a result: a derivative is a sum of products of rounded probabilities and
    # logits' derivatives with differences of values. ex2.approx is good to 2 ** -22, and an error
    # of a logit, relative to its size, is one of the exponent.
    tol = 2 * tolerance(case) + 1e-5 * max(1.0, case.logit_size)
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert_close(got, want, tol, scale=max(1e-30, np.abs(want).max(initial=0)), name=f"{i}")


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU has no interpreter in jax < 0.11"
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
class TestInterpreted:
    """The kernels as JAX's interpreter runs them.

    It multiplies with numpy, which warns of the NaN outside of the windows.
    """

    @pytest.mark.parametrize(
        "case",
        [
            # One tile, several stretches, empty windows.
            Case("few", (190, 3, 0), (0, 1, 0), S=192, **_SIZES, logits_soft_cap=2.0),
            # Positions between the windows of a tile lie in none.
            pytest.param(
                Case("gap", ((10, 130), (8, 64)), ((0, 120), (0, 60)), Q=2, Hq=2, S=136, **_SIZES),
                marks=pytest.mark.full,
            ),
            # One weight is nearly all: what is left of a tangent must not be a rounding error.
            pytest.param(
                Case("large", (37, 20, 5), (30, 3, 0), S=40, **_SIZES, logit_size=64.0),
                marks=pytest.mark.full,
            ),
            # Rows of the cache that begin in the middle of a block and of the copy engine's tiles.
            pytest.param(
                Case("joined", (52, 3, 0, 51), (1, 0, 0, 40), S=52, **_SIZES),
                marks=pytest.mark.full,
            ),
            # One tile of each head, of which two share a key head.
            Case("tile_of_each_head", **_causal(64, 40, rows=1), Hq=2, Hkv=1, **_SIZES),
            # Tiles of one head each.
            pytest.param(
                Case("tiles", **_causal(72, 40, rows=1), Hq=2, Hkv=1, **_SIZES, softmax_scale=-0.5),
                marks=pytest.mark.full,
            ),
        ],
        ids=lambda case: case.name,
    )
    def test_derivatives(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(derivative_blocks, "accumulate", _accumulate)
        tangents, cotangents = case.operands(seed=1)[:3], case.cotangents()

        def rows(x: Any) -> Any:
            return x[:, None] if case.Q is None else x

        # On a machine with a GPU the interpreter's callbacks would wait for one another.
        with jax.default_device(jax.devices("cpu")[0]):
            residuals = _residuals(case, poison(case.operands()))
            params = RaggedAttentionParams(**case.params)
            plan = derivatives.plan_of(residuals, params)
            if not plan.tiles_apart:
                plan = dataclasses.replace(plan, stretch=2, stretches=3)
            interpret: Any = vars(plgpu)["InterpretGPUParams"]()
            bars: Any = ByResult(*(rows(jnp.asarray(x)) for x in cotangents))
            wrt = _bar_dtypes(case, _ALL)
            grads = derivatives.vjp(plan, residuals, bars, wrt, interpret)
            moved = poison(Operands(*tangents, *case.operands()[3:]))
            dots: Any = ByOperand(rows(moved.query), moved.key, moved.value)
            results = derivatives.jvp(plan, residuals, dots, interpret)
        operands = case.operands()
        expected = oracle.vjp(*operands, cotangents, **case.definition)
        _assert_derivatives(grads[:3], expected._replace(query=rows(expected.query)), case)
        want = oracle.jvp(*operands, tangents, **case.definition)
        _assert_derivatives(results, map(rows, want), case)

    @pytest.mark.parametrize(
        ("case", "form"),
        tiered(
            [
                (ROWS, Form(48, "BHSD")),
                (QUERIES, Form(64)),
                (CAPPED, Form(48, "BHSD")),
                *((dataclasses.replace(ROWS, S=S), Form(None, "BHSD")) for S in (40, 261)),
                # Blocks of 64 positions lie in one page, or in two.
                (ROWS, Form(80)),
                (ROWS, Form(80, "BHSD", "float8_e4m3fn")),
                (dataclasses.replace(ROWS, dtype="float16"), QUANTISED[7]),
                (Case("tiles", **_causal(72, 40, rows=1), Hq=2, Hkv=1, **_SIZES), Form(16)),
                *((ROWS, form) for form in QUANTISED),
                (dataclasses.replace(QUERIES, logits_soft_cap=2.0), QUANTISED[2]),
                (Case("tiles", **_causal(72, 40, rows=1), Hq=2, **_SIZES), QUANTISED[0]),
            ],
            [(ROWS, Form(48, "BHSD")), (ROWS, QUANTISED[2])],
        ),
        ids=lambda x: getattr(x, "name", str(x)),
    )
    def test_forms(self, case: Case, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gradient of query, and tangents, which read the cache in place."""
        monkeypatch.setattr(derivative_blocks, "accumulate", _accumulate)
        stored = Stored.of(case, form)
        query, *_, lengths, starts = case.operands()
        operands = query, *stored.dense, lengths, starts
        cotangents = case.cotangents()

        def rows(x: Any) -> Any:
            return x[:, None] if case.Q is None else x

        # On a machine with a GPU the interpreter's callbacks would wait for one another.
        with jax.default_device(jax.devices("cpu")[0]):
            residuals, params = _stored_call(stored)
            plan = derivatives.plan_of(residuals, params)
            if not plan.tiles_apart:
                plan = dataclasses.replace(plan, stretch=2, stretches=3)
            # Warpgroups with tiles of their own zero the same block with the same bytes.
            interpret: Any = vars(plgpu)["InterpretGPUParams"](detect_races=not plan.tiles_apart)
            bars: Any = ByResult(*(rows(jnp.asarray(x)) for x in cotangents))
            wrt = _bar_dtypes(case, (True, False, False))
            grads = derivatives.vjp(plan, residuals, bars, wrt, interpret)
            results: Any = None
            if form.dtype is None:  # the tangents of quantised caches have no kernel
                dots: Any = ByOperand(*map(_turned, residuals[:3]))
                results = derivatives.jvp(plan, residuals, dots, interpret)
        expected = oracle.vjp(*operands, cotangents, **case.definition)
        _assert_derivatives(grads[:1], [rows(expected.query)], case)
        if results is not None:
            tangents = tuple(map(_turned, operands[:3]))
            want = oracle.jvp(*operands, tangents, **case.definition)
            _assert_derivatives(results, map(rows, want), case)


def _accumulate(*terms: tuple[tuple[jax.Array, ...], Any, Any]) -> list[tuple[Any, ...]]:
    """As `derivative_blocks.accumulate`: the interpreter has no accumulators with a value."""
    sums = []
    for chunks, x, y_ref in terms:
        x, y = (a[...].astype(jnp.float32) for a in (x, y_ref))
        plgpu.commit_smem()  # The hardware's product reads as the copy engine writes.
        columns = chunks[0].shape[1]
        parts = (y[:, i * columns : (i + 1) * columns] for i in range(len(chunks)))
        sums.append(tuple(a + jnp.dot(x, part) for a, part in zip(chunks, parts, strict=True)))
    return sums


@pytest.mark.gpu
@pytest.mark.optimized
class TestGpu:
    """The kernels on a GPU, forced, against the oracle."""

    @pytest.mark.parametrize("case", DERIVED, ids=lambda case: case.name)
    def test_vjp(self, case: Case) -> None:
        def run(operands: Operands, cotangents: Any) -> Any:
            op: Any = functools.partial(ragged_attention, **case.params, implementation="kernel")
            results, pull = jax.vjp(lambda *x: op(*x, *operands[3:]), *operands[:3])
            return pull(type(results)(*cotangents))

        operands, cotangents = case.operands(), case.cotangents()
        with jax.default_device(gpus()[0]):
            program = jax.jit(run)
            grads = program(operands, cotangents)
            poisoned = program(poison(operands), cotangents)
        _assert_derivatives(grads, oracle.vjp(*operands, cotangents, **case.definition), case)
        outside = ~oracle.inside(operands.query, case.S, operands.lengths, operands.starts)
        for grad in grads[1:]:
            assert not np.asarray(grad)[outside].any()
        # NaN outside of the windows changes nothing, and the same inputs give the same bits.
        jax.tree.map(np.testing.assert_array_equal, grads, poisoned)

    @pytest.mark.parametrize("case", DERIVED, ids=lambda case: case.name)
    def test_jvp(self, case: Case) -> None:
        def run(operands: Operands, tangents: Any) -> Any:
            op: Any = functools.partial(ragged_attention, **case.params, implementation="kernel")
            return jax.jvp(lambda *x: op(*x, *operands[3:]), operands[:3], tangents)[1]

        operands, tangents = case.operands(), case.operands(seed=1)[:3]
        moved = poison(Operands(*tangents, *operands[3:]))[:3]
        with jax.default_device(gpus()[0]):
            program = jax.jit(run)
            dots = program(operands, tangents)
            poisoned = program(poison(operands), moved)
        _assert_derivatives(dots, oracle.jvp(*operands, tangents, **case.definition), case)
        jax.tree.map(np.testing.assert_array_equal, dots, poisoned)

    @pytest.mark.parametrize(
        "form", [*FORMS, Form(80), *QUANTISED, Form(80, "BHSD", "float8_e4m3fn")], ids=str
    )
    @pytest.mark.parametrize("case", [ROWS, QUERIES, CAPPED, MANY], ids=lambda case: case.name)
    def test_query_gradients_of_forms(self, case: Case, form: Form) -> None:
        if form.dtype is not None and form.scale is not None and "key" in form.names:
            case = dataclasses.replace(case, dtype="bfloat16")
        stored = Stored.of(case, form)
        query, *_, lengths, starts = case.operands()
        cotangents = case.cotangents()

        def pulled(query: Any, cotangents: Any) -> Any:
            results, pull = jax.vjp(lambda x: stored.call(stored.arrays | {"query": x}), query)
            return pull(type(results)(*cotangents))

        with jax.default_device(gpus()[0]):
            grads = jax.jit(pulled)(query, cotangents)
        expected = oracle.vjp(query, *stored.dense, lengths, starts, cotangents, **case.definition)
        _assert_derivatives(grads, [expected.query], case)

    @pytest.mark.parametrize("form", [*FORMS, Form(80)], ids=str)
    @pytest.mark.parametrize("case", [ROWS, QUERIES, CAPPED, MANY], ids=lambda case: case.name)
    def test_tangents_of_forms(self, case: Case, form: Form) -> None:
        stored = Stored.of(case, form)
        names = ("query", "key", "value")

        def moved(*dots: Any) -> Any:
            def call(*moving: Any) -> Any:
                return stored.call(stored.arrays | dict(zip(names, moving, strict=True)))

            return jax.jvp(call, tuple(stored.arrays[name] for name in names), dots)[1]

        with jax.default_device(gpus()[0]):
            dots = jax.jit(moved)(*(_turned(stored.arrays[name]) for name in names))
        operands = case.operands()
        tangents = tuple(map(_turned, operands[:3]))
        _assert_derivatives(dots, oracle.jvp(*operands, tangents, **case.definition), case)

    @pytest.mark.parametrize("wrt", [(0,), (1,), (2,), (0, 2)], ids=str)
    @pytest.mark.parametrize("name", ["segments", "causal"])
    def test_subsets(self, name: str, wrt: tuple[int, ...]) -> None:
        """Each gradient alone, of out alone, which needs no search for the maximum."""
        case = next(c for c in DERIVED if c.name == name)
        operands, cotangents = case.operands(), case.cotangents()

        def run(moving: Any, out_bar: Any) -> Any:
            def out(*moving: Any) -> Any:
                full = list(operands)
                for i, x in zip(wrt, moving, strict=True):
                    full[i] = x
                return ragged_attention(*full, **case.params, implementation="kernel").out

            return jax.vjp(out, *moving)[1](out_bar)

        with jax.default_device(gpus()[0]):
            grads = jax.jit(run)(tuple(operands[i] for i in wrt), cotangents[0])
        expected = oracle.vjp(*operands, (cotangents[0], None, None), **case.definition)
        _assert_derivatives(grads, [expected[i] for i in wrt], case)

    @pytest.mark.parametrize("name", ["segments", "causal"])
    def test_wide_gradients(self, name: str) -> None:
        """Gradients in float32, for callers that sum them."""
        case = next(c for c in DERIVED if c.name == name)
        operands, cotangents = case.operands(), case.cotangents()
        wide = ByOperand(*(jnp.dtype("float32"),) * 3)
        params = RaggedAttentionParams(**case.params, implementation="kernel")
        with jax.default_device(gpus()[0]):
            residuals = _residuals(case, operands)
            bars: Any = ByResult(
                *(jnp.reshape(x, (*residuals.query.shape[:3], -1)) for x in cotangents)
            )
            bars = ByResult(bars.out, bars.max_logits[..., 0], bars.denominator[..., 0])
            grads = Target("cuda", H200).vjp(residuals, bars, wide, params)
        expected = oracle.vjp(*operands, cotangents, **case.definition)
        for got, want in zip(grads[:3], expected, strict=True):
            assert got is not None
            assert got.dtype == jnp.float32
            assert_close(got.reshape(want.shape), want, 2 * tolerance(case))

    def test_gradient_of_a_shared_cache(self) -> None:
        case = next(c for c in DERIVED if c.name == "segments")
        query, key, value, lengths, starts = case.operands()
        out_bar = case.cotangents()[0]
        queries = np.stack([query, -query, 2 * query])

        def loss(key: Any, value: Any) -> Any:
            op: Any = functools.partial(ragged_attention, **case.params, implementation="kernel")
            outs = jax.vmap(op, in_axes=(0, None, None, None, None))(
                queries, key, value, lengths, starts
            ).out
            return (outs.astype(jnp.float32) * out_bar).sum()

        with jax.default_device(gpus()[0]):
            grads = jax.jit(jax.grad(loss, (0, 1)))(key, value)
        bars = (out_bar, None, None)
        singles = [
            oracle.vjp(q, key, value, lengths, starts, bars, **case.definition) for q in queries
        ]
        expected = [sum(x.key for x in singles), sum(x.value for x in singles)]
        _assert_derivatives(grads, expected, case)
