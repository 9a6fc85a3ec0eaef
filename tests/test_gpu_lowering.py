"""The GPU kernel: lowered on any machine, interpreted on the CPU, and run where there is a GPU.

    python -m pytest tests/test_gpu_lowering.py tests/test_conformance.py -k "gpu or Gpu"

runs everything that a GPU takes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

import cases
import oracle
from cases import CASES, Case, Operands, assert_close, poison, tiered, tolerance
from jax_ragged import ragged_attention
from jax_ragged.lowering import contract, gpu
from jax_ragged.lowering.dispatch import Target
from jax_ragged.lowering.gpu import plan as line_plan, team_plan, teams
from jax_ragged.lowering.gpu.line import attend_along_line
from jax_ragged.lowering.gpu.plan import make_plan
from jax_ragged.lowering.params import RaggedAttentionParams
from lowerings import gpus, refusal
from programs import emitted

H200 = "NVIDIA H200"


def _fit(case: Case, **changes: Any) -> Case:
    """The case at head dimensions and dtypes that the kernel takes."""
    sizes = {"D": 64, "Dv": 64, "block_size": None}
    dtype = case.dtype if case.dtype == "float16" else "bfloat16"
    return dataclasses.replace(case, **(sizes | {"dtype": dtype} | changes))


# The case table, but for calls with nothing to compute; then what it is too small for.
FITTED = (
    *(_fit(c) for c in CASES if c.B and c.S and c.Q != 0),
    _fit(cases.BY_NAME["windows"], name="wide", D=128, Dv=128),
    _fit(cases.BY_NAME["queries"], name="wide_queries", D=256, Dv=128),
    _fit(cases.BY_NAME["windows"], name="widest", D=128, Dv=256, dtype="float16"),
    Case("segments", (1000, 1, 0, 900, 64, 65), (0, 0, 0, 63, 0, 8), Hq=8, S=1000, D=128, Dv=128),
    Case("row_tiles", ((9, 500, 512), (0, 70, 64)), Q=3, Hq=64, Hkv=1, S=512, D=64, Dv=64),
    Case("gap", ((10, 500), (8, 512)), ((0, 490), (0, 500)), Q=2, S=512, D=64, Dv=64),
    Case("many_rows", tuple(range(0, 600, 2)), Hq=16, Hkv=16, S=600, D=64, Dv=64),
    Case("odd_rows", (513, 700, 2), (1, 511, 1), S=713, D=64, Dv=64, logits_soft_cap=3.0),
    Case("seven_heads", (500, 0, 1, 77, 300), Hq=28, Hkv=4, S=501, D=128, Dv=128),
    Case("narrow", (500, 0, 70), Hq=8, Hkv=2, S=504, D=80, Dv=96),
    Case("uneven", (500, 0, 70), Hq=8, Hkv=2, S=504, D=192, Dv=144),
    Case("narrowest", (500, 0, 70), Hq=8, Hkv=2, S=504, D=16, Dv=48),
)


def _windows(Q: int, *rows: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """For each (first, step, every) row: query q has first + step * q, or 0 if every divides q."""
    return tuple(
        tuple(0 if every and q % every == 0 else first + step * q for q in range(Q))
        for first, step, every in rows
    )


# Cases with many queries, which the other schedule computes.
MANY: tuple[Case, ...] = (
    Case("causal", _windows(384, (1, 1, 0), (1, 1, 0)), Q=384, Hq=32, Hkv=8, S=384, D=128, Dv=128),
    Case(
        "causal_heads_of_their_own", _windows(320, *[(1, 1, 0)] * 4), Q=320, Hq=16, Hkv=16,
        S=320, D=64, Dv=64, logits_soft_cap=4.0,
    ),
    Case(
        "sliding", _windows(256, (1, 2, 0), (40, 1, 0)), _windows(256, (-60, 2, 0), (3, 1, 0)),
        Q=256, Hq=32, Hkv=8, S=520, D=128, Dv=128, dtype="float16",
    ),
    Case(
        "gaps_and_empty", _windows(77, (300, 3, 5), (0, 0, 0), (9, 1, 2)),
        _windows(77, (0, 3, 0), (0, 0, 0), (0, 0, 0)),
        Q=77, Hq=40, Hkv=8, S=397, D=64, Dv=64,
    ),
    Case(
        "negative_scale", _windows(100, (201, -2, 0), (100, 1, 0)), Q=100, Hq=64, Hkv=8, S=201,
        D=96, Dv=80, softmax_scale=-0.3,
    ),
    Case(
        "widest_queries", _windows(256, *[(9, 1, 0)] * 3), Q=256, Hq=16, Hkv=8, S=265, D=256, Dv=256
    ),
    Case("wide_keys", _windows(128, *[(1, 1, 0)] * 3), Q=128, Hq=32, Hkv=32, S=128, D=192, Dv=128),
    Case("one_window", (300, 0, 128), (7, 0, 64), Q=128, Hq=64, Hkv=8, S=300, D=128, Dv=128),
    Case("small_blocks", _windows(256, (1, 1, 0), (1, 1, 0)), Q=256, Hq=32, Hkv=8, S=256, D=128,
         Dv=128, block_size=64),
)  # fmt: skip
MANY = tuple(c if c.dtype == "float16" else dataclasses.replace(c, dtype="bfloat16") for c in MANY)
# Enough for teams; but a tile would hold all queries, and the next none.
EIGHT = Case(
    "eight_queries", _windows(8, *((100 + i, 1, 0) for i in range(12))), Q=8, Hq=64, Hkv=4, S=128,
    D=64, Dv=64, dtype="bfloat16",
)  # fmt: skip
FITTED += (*MANY, EIGHT)
FITTED = tuple(
    c if c.dtype == "float16" else _fit(c, D=c.D, Dv=c.Dv, block_size=c.block_size) for c in FITTED
)


def _assert_results(actual: Any, case: Case, operands: Operands) -> None:
    out, max_logits, denominator = actual
    expected = case.expected(operands)
    inside = oracle.inside(operands.query, case.S, operands.lengths, operands.starts)
    largest = float(np.abs(operands.value.astype(np.float64)[inside]).max(initial=0.0))
    # ex2.approx is good to 2 ** -22, and the tensor cores cut what they add below 2 ** -22 of it.
    statistics = 1e-5 * max(1.0, case.logit_size)
    assert_close(out, expected.out, tolerance(case) + statistics, scale=largest, name="out")
    empty = expected.denominator == 0
    assert (np.asarray(max_logits)[empty] == np.float32(case.mask_value)).all()
    for name, got, want in (
        ("max_logits", max_logits, expected.max_logits),
        ("denominator", denominator, expected.denominator),
    ):
        assert got.dtype == jnp.float32
        got, want = (np.where(empty, 0, np.asarray(x, np.float64)) for x in (got, want))
        assert_close(got, want, statistics, name=name)


def _kernel(case: Case) -> Callable[..., Any]:
    return jax.jit(functools.partial(ragged_attention, **case.params, implementation="kernel"))


def _lowered(function: Callable[..., Any], *operands: Any) -> str:
    text: str = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return text


class TestLowered:
    """What needs no GPU: the module that jax makes for one."""

    @pytest.mark.parametrize(
        ("Q", "Hq", "Hkv", "D", "Dv", "dtype"),
        [
            (None, 8, 8, 128, 128, "bfloat16"),
            (None, 8, 2, 64, 128, "float16"),
            (3, 8, 1, 128, 64, "bfloat16"),
            (None, 4, 2, 256, 256, "bfloat16"),
            (9, 16, 2, 128, 256, "bfloat16"),
            (None, 28, 4, 80, 192, "bfloat16"),
        ],
    )
    def test_two_kernels_and_no_copy_of_the_cache(
        self, Q: int | None, Hq: int, Hkv: int, D: int, Dv: int, dtype: str
    ) -> None:
        case = Case("", (70, 1000), Q=Q, Hq=Hq, Hkv=Hkv, S=1000, D=D, Dv=Dv, dtype=dtype)
        text = _lowered(_kernel(case), *case.operands()[:4])
        assert text.count("@mosaic_gpu_v2") == 2
        moves = ("pad", "concatenate", "convert", "slice", "dynamic_slice", "transpose")
        cache = case.B * case.S * Hkv * min(D, Dv)
        assert [line for size, line in emitted(text, *moves) if size >= cache // 2] == []

    @pytest.mark.parametrize("case", MANY, ids=lambda case: case.name)
    def test_one_kernel_for_many_queries(self, case: Case) -> None:
        text = _lowered(_kernel(case), *case.operands())
        assert text.count("@mosaic_gpu_v2") == 1

    def test_a_team_has_queries_for_two_tiles(self) -> None:
        text = _lowered(_kernel(EIGHT), *EIGHT.operands())
        assert text.count("@mosaic_gpu_v2") == 2
        assert "ragged_attention_teams" not in text

    @pytest.mark.parametrize("Q", [None, 256])
    def test_out_dtype(self, Q: int | None) -> None:
        case = Case("", (70, 256), Q=Q, Hq=32, Hkv=8, S=256, D=64, Dv=64, dtype="bfloat16")
        query, key, value, lengths, _ = case.operands()
        params = RaggedAttentionParams(implementation="kernel", out_dtype="float32")
        query = query[:, None] if Q is None else query
        ends = np.broadcast_to(lengths[:, None], query.shape[:2])
        operands = contract.Operands(
            *map(jnp.asarray, (query, key, value, ends, np.zeros_like(ends)))
        )
        results = jax.eval_shape(lambda x: gpu.LOWERING.forward(x, params, None), operands)
        assert results.out.dtype == jnp.float32

    def test_shared_cache_is_not_copied_under_vmap(self) -> None:
        case = Case("", (70, 1000), Hq=8, Hkv=2, S=1000, D=64, Dv=64, dtype="bfloat16")
        query, key, value, lengths, _ = case.operands()
        queries = np.stack([query] * 5)
        mapped = jax.vmap(_kernel(case), in_axes=(0, None, None, None))
        text = _lowered(mapped, queries, key, value, lengths)
        assert text.count("@mosaic_gpu_v2") == 2
        assert "5x2x1000x" not in text
        many = (np.stack([x] * 5) for x in (key, value))
        text = _lowered(jax.vmap(_kernel(case), in_axes=(0, 0, 0, None)), queries, *many, lengths)
        assert "5x2x1000x" in text

    def test_in_shard_map(self) -> None:
        case = Case("", (70, 1000), Hq=8, Hkv=2, S=1000, D=64, Dv=64, dtype="bfloat16")
        axis_types = (jax.sharding.AxisType.Auto,)
        devices = jax.devices("cpu")[:2]
        mesh = jax.make_mesh((2,), ("x",), axis_types=axis_types, devices=devices)
        x = PartitionSpec("x")
        sharded = jax.shard_map(_kernel(case), mesh=mesh, in_specs=x, out_specs=x)
        text = _lowered(sharded, *case.operands()[:4])
        assert text.count("@mosaic_gpu_v2") == 2

    @pytest.mark.skipif(bool(gpus()), reason="here the device is known")
    def test_none_means_the_reference_where_no_device_is_known(self) -> None:
        case = Case("", (70, 1000), S=1000, D=64, Dv=64, dtype="bfloat16")
        text = _lowered(ragged_attention, *case.operands()[:4])
        assert "mosaic_gpu" not in text


def _reason(device_kind: str | None = H200, **changes: Any) -> str | None:
    case = dataclasses.replace(Case("", (70, 100), S=100, D=64, Dv=64, dtype="bfloat16"), **changes)
    query, key, value = case.operands()[:3]
    params = RaggedAttentionParams(block_size=case.block_size)
    refused = refusal(Target("cuda", device_kind), "forward", query[:, None], key, value, params)
    return None if refused is None else f"{refused.reason}. {refused.advice or ''}"


class TestUnsupported:
    """Why a call is left to the reference."""

    @pytest.mark.parametrize("kind", [H200, "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
    def test_none_on_hopper(self, kind: str) -> None:
        assert _reason(kind) is None
        assert _reason(kind, block_size=64, dtype="float16", D=256, Dv=128) is None
        assert _reason(kind, S=101, D=80, Dv=176) is None

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
            ({"device_kind": "NVIDIA B200"}, "Hopper"),
            ({"device_kind": None}, "not known"),
            ({"dtype": "float32"}, "float32"),
            ({"D": 72}, "query and key is 72"),
            ({"Dv": 272}, "value is 272"),
            ({"S": 0}, "nothing"),
        ],
    )
    def test_reason(self, changes: dict[str, Any], says: str) -> None:
        reason = _reason(**changes)
        assert reason is not None
        assert says in reason

    def test_block_size(self) -> None:
        """The refusal says which one works."""
        reason = _reason(block_size=128)
        assert reason is not None
        assert "128" in reason
        assert "block_size=64" in reason
        reason = _reason(block_size=128, dtype="float32")
        assert reason is not None
        assert "float32" in reason

    def test_forced_kernel_is_refused_with_the_reason(self) -> None:
        case = Case("", (70, 100), S=100, D=72, Dv=64, dtype="bfloat16")
        with pytest.raises(NotImplementedError, match=r"72.*implementation='reference'"):
            _lowered(_kernel(case), *case.operands()[:4])

    def test_symbolic_shapes(self) -> None:
        (b,) = jax.export.symbolic_shape("b")
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        operands = shape((b, 1, 4, 64)), shape((b, 64, 2, 64)), shape((b, 64, 2, 64))
        params = RaggedAttentionParams()
        refused = refusal(Target("cuda", H200), "forward", *operands, params)
        assert refused is not None
        assert "sizes known while tracing" in refused.reason


_INTERPRETED = ("queries", "scale_negative", "all_empty", "past_the_end", "before_the_start")
_LINE = [
    *(c for c in FITTED if c.name in _INTERPRETED),
    Case("parts", (200, 1, 0, 150), (0, 0, 0, 63), Hq=4, S=200, D=64, Dv=64),
    Case("gap", ((10, 200), (8, 64)), ((0, 190), (0, 60)), Q=2, S=208, D=64, Dv=64),
    Case("cap", (190, 3), Hq=2, S=192, D=128, Dv=128, logits_soft_cap=2.0),
    Case("seven", (190, 0, 65), Hq=7, Hkv=1, S=193, D=80, Dv=96),
]


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU has no interpreter in jax < 0.11"
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.usefixtures("products_of_registers")
class TestInterpreted:
    """The kernels as JAX's interpreter runs them, on few CTAs.

    It multiplies with numpy, which warns of the NaN outside of the windows.
    """

    @pytest.fixture(autouse=True)
    def _two_streams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Allows two streams for calls as small as these."""
        monkeypatch.setattr(line_plan, "_BLOCKS_OF_TWO_STREAMS", 0)

    def _run(self, case: Case, schedule: Callable[..., Any], races: bool = True) -> None:
        """Runs a schedule, given the plan's arguments and then the kernel's, on a case.

        With `races`, it fails if threads and the copy engine do not wait for one another.
        """
        case = dataclasses.replace(case, dtype="bfloat16")
        operands = case.operands()
        query, key, value, lengths, starts = poison(operands)
        starts = np.zeros_like(lengths) if starts is None else starts
        rows = query.shape[:-2]
        if case.Q is None:
            query, lengths, starts = query[:, None], lengths[:, None], starts[:, None]
        bounds = [np.broadcast_to(x, query.shape[:2]) for x in (lengths, starts)]
        params = RaggedAttentionParams(**case.params)
        # On a machine with a GPU the interpreter's callbacks would wait for one another.
        with jax.default_device(jax.devices("cpu")[0]):
            arrays = contract.Operands(*map(jnp.asarray, (query, key, value, *bounds)))
            interpret: Any = vars(plgpu)["InterpretGPUParams"](detect_races=races)
            results = schedule((arrays, params), (arrays, interpret))
        _assert_results([x.reshape(*rows, *x.shape[2:]) for x in results], case, operands)

    @pytest.mark.parametrize(
        "case",
        tiered(_LINE, [case for case in _LINE if case.name in ("gap", "seven")]),
        ids=lambda case: case.name,
    )
    @pytest.mark.parametrize("out_dtype", tiered(["bfloat16", "float32"], ["bfloat16"]))
    def test_line(self, case: Case, out_dtype: str) -> None:
        def schedule(plan_of: tuple[Any, Any], arguments: Any) -> Any:
            plan = dataclasses.replace(make_plan(*plan_of, jnp.dtype(out_dtype)), parts=3)
            results = attend_along_line(plan, *arguments)
            assert results[0].dtype == out_dtype
            return results

        self._run(case, schedule)

    @pytest.mark.parametrize(
        ("case", "out_dtype"),
        [
            pytest.param(
                Case("causal", _windows(40, (1, 3, 0)), Q=40, S=136, D=64, Dv=64),
                "float32",
                marks=pytest.mark.full,
            ),
            (
                Case(
                    "gaps", _windows(24, (20, 5, 3)), _windows(24, (0, 5, 0)),
                    Q=24, Hq=8, S=168, D=64, Dv=64, logits_soft_cap=2.0, block_size=64,
                ),
                "bfloat16",
            ),
            (
                Case(
                    "sliding", _windows(32, (60, 1, 0), (0, 0, 0)),
                    _windows(32, (0, 1, 0), (0, 0, 0)),
                    Q=32, Hkv=1, S=128, D=64, Dv=128, softmax_scale=-0.5,
                ),
                "bfloat16",
            ),
        ],
        ids=lambda x: getattr(x, "name", x),
    )  # fmt: skip
    def test_teams(self, case: Case, out_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(team_plan, "_FEWEST_TEAMS", 1)

        def schedule(plan_of: tuple[Any, Any], arguments: Any) -> Any:
            plan = team_plan.make_team_plan(*plan_of, jnp.dtype(out_dtype))
            assert plan is not None
            # One CTA, so that it takes several teams.
            results = teams.attend_in_teams(dataclasses.replace(plan, ctas=1), *arguments)
            assert results[0].dtype == out_dtype
            return results

        # Both warpgroups of a team write the same zeros, which the detector cannot know.
        self._run(case, schedule, races=False)


@pytest.mark.gpu
@pytest.mark.optimized
class TestGpu:
    """The kernel on a GPU, on the case table and on what needs more than one block."""

    @pytest.mark.parametrize("case", FITTED, ids=lambda case: case.name)
    def test_values(self, case: Case) -> None:
        operands = case.operands()
        with jax.default_device(gpus()[0]):
            run = _kernel(case)
            results = run(*operands)
            poisoned = run(*poison(operands))
        _assert_results(results, case, operands)
        # NaN outside of the windows changes nothing, and the same inputs give the same bits.
        jax.tree.map(np.testing.assert_array_equal, results, poisoned)

    def test_none_means_the_kernel(self) -> None:
        case = next(c for c in FITTED if c.name == "segments")
        with jax.default_device(gpus()[0]):
            text = jax.jit(ragged_attention).lower(*case.operands()[:4]).as_text()
        assert text.count("@mosaic_gpu_v2") == 2

    def test_gradient(self) -> None:
        case = next(c for c in FITTED if c.name == "segments")
        operands, cotangents = case.operands(), case.cotangents()
        with jax.default_device(gpus()[0]):
            results, pull = jax.vjp(
                lambda q, k, v: ragged_attention(q, k, v, *operands[3:]), *operands[:3]
            )
            grads = pull(type(results)(*map(jnp.asarray, cotangents)))
        expected = oracle.vjp(*operands, cotangents, **case.definition)
        for got, want in zip(grads, expected, strict=True):
            assert_close(got, want, 4 * tolerance(case), name="gradient")

    def test_vmap_over_a_shared_cache(self) -> None:
        case = next(c for c in FITTED if c.name == "segments")
        query, key, value, lengths, starts = case.operands()
        queries = np.stack([query, -query, 2 * query])
        with jax.default_device(gpus()[0]):
            run = _kernel(case)
            mapped = jax.vmap(run, in_axes=(0, None, None, None, None))
            results = mapped(queries, key, value, lengths, starts)
            for i, q in enumerate(queries):
                single = run(q, key, value, lengths, starts)
                for got, want in zip(results, single, strict=True):
                    assert_close(got[i], np.asarray(want, np.float64), 2 * tolerance(case))
