"""The forward TPU kernel, interpreted on the CPU through the primitive, against the oracle."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public reader of races
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cases import Case, Operands, assert_results, ids, poison, tiered
from jax_ragged import RaggedAttention, Unsupported, ragged_attention
from jax_ragged.lowering import contract
from jax_ragged.lowering.dispatch import Target
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu import choice, chunks, forward
from jax_ragged.lowering.tpu.chips import chip_of
from jax_ragged.lowering.tpu.cost import Blocks
from jax_ragged.lowering.tpu.grid import WorkList
from jax_ragged.lowering.tpu.layout import CacheForm
from lowerings import refusal

# One for each way that the kernel reads a cache and brings heads together, with two blocks or
# more; rows end and start at every kind of edge.
CASES = (
    Case(
        "compact",
        (300, 128, 0, 65),
        (0, 64, 0, 63),
        Hq=8,
        Hkv=2,
        S=300,
        D=128,
        Dv=128,
        block_size=128,
    ),
    Case(
        "eight_rows_a_head", (200, 129), (0, 128), Hq=16, Hkv=2, S=200, D=128, Dv=128, block_size=64
    ),
    Case("mha", (130, 33), (1, 31), Hq=8, Hkv=8, S=130, D=128, Dv=128, block_size=32),
    Case("mha_scaled", (130, 33), (1, 31), Hq=8, Hkv=8, S=130, D=128, Dv=128, softmax_scale=-0.3),
    Case("tiles_of_lanes", (200, 97), (64, 96), Hq=4, Hkv=2, S=200, D=256, Dv=256, block_size=32),
    Case("one_head", (300, 255), (0, 254), Hq=5, Hkv=1, S=300, D=128, Dv=128, block_size=128),
    Case("odd_heads", (260, 130), (0, 127), Hq=6, Hkv=3, S=260, D=128, Dv=128, block_size=128),
    Case("sequence", (300, 129), (128, 127), Hq=4, Hkv=2, S=300, D=64, Dv=80, block_size=128),
    Case("heads_by_eight", (140, 60), (0, 59), Hq=8, Hkv=8, S=140, D=256, Dv=128),
    Case("not_dividing_the_lanes", (70, 33), (2, 0), Hq=24, Hkv=24, S=70, D=128, Dv=128),
    Case("tokens_to_sequence", (300, 129), (128, 0), Hq=4, Hkv=2, S=300, D=128, Dv=64),
    Case("sequence_to_tokens", (300, 129), (128, 0), Hq=4, Hkv=2, S=300, D=64, Dv=128),
    Case("tiles_to_tokens", (200, 129), (64, 0), Hq=4, Hkv=2, S=200, D=256, Dv=128),
    Case(
        "queries",
        ((300, 128, 9), (5, 0, 2**30)),
        ((130, 0, -3), (3, 0, 129)),
        Q=3,
        Hq=8,
        Hkv=2,
        S=300,
        D=128,
        Dv=128,
        block_size=64,
    ),
    Case(
        "queries_sequence",
        ((300, 128), (5, 257)),
        ((130, 0), (3, 200)),
        Q=2,
        Hq=4,
        Hkv=2,
        S=300,
        D=64,
        Dv=64,
        block_size=128,
    ),
    Case(
        "queries_mixed",
        ((300, 128), (5, 257)),
        ((130, 0), (3, 200)),
        Q=2,
        Hq=4,
        Hkv=2,
        S=300,
        D=64,
        Dv=128,
        block_size=128,
    ),
    Case(
        "soft_cap",
        (200, 129),
        (0, 128),
        Hq=4,
        Hkv=2,
        S=200,
        D=128,
        Dv=128,
        softmax_scale=0.5,
        logits_soft_cap=2.0,
    ),
    Case("bfloat16", (300, 128), (0, 64), Hq=8, Hkv=8, S=300, D=128, Dv=128, dtype="bfloat16"),
    Case(
        "bfloat16_tiles", (300, 129), (0, 64), Hq=4, Hkv=2, S=300, D=256, Dv=256, dtype="bfloat16"
    ),
    Case(
        "bfloat16_sequence", (300, 129), (0, 64), Hq=4, Hkv=2, S=300, D=64, Dv=64, dtype="bfloat16"
    ),
    Case("short_cache", (3, 0), None, Hq=2, Hkv=2, S=5, D=16, Dv=8),
    Case("all_empty", (0, 3), (0, 4), Hq=4, Hkv=2, S=40, D=128, Dv=128, mask_value=-1e4),
    Case("large_logits", (300, 129), None, Hq=4, Hkv=2, S=300, D=128, Dv=128, logit_size=30.0),
)
MODES = ("on_wait", "eager")


def _run(case: Case, operands: Operands, mode: Any = "on_wait") -> RaggedAttention:
    """The kernel with race detection and NaN in all memory that nothing has written."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode
    )
    with pltpu.force_tpu_interpret_mode(params):
        q, k, v, lengths, starts = operands
        results: RaggedAttention = jax.block_until_ready(
            ragged_attention(q, k, v, lengths, starts, **case.params, implementation="kernel")
        )
        return results


def _no_race() -> bool:
    races = interpret_pallas_call.races
    return races is not None and not races.races_found


DEFAULT = (
    "compact",
    "mha_scaled",
    "tiles_of_lanes",
    "tiles_to_tokens",
    "queries_mixed",
    "soft_cap",
    "bfloat16_tiles",
    "short_cache",
    "all_empty",
)


@pytest.mark.parametrize(
    "case", tiered(CASES, [c for c in CASES if c.name in DEFAULT]), ids=ids(CASES)
)
def test_values(case: Case) -> None:
    """Values, with NaN in the cache outside of the windows, and no race."""
    operands = case.operands()
    # Sums of 256 products in float32 err by more than 1e-6 of a logit of 1.
    tol = 3e-6 if case.D == 256 and case.dtype == "float32" else None
    assert_results(_run(case, poison(operands)), case, operands, tol=tol)
    assert _no_race()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiered(["compact", "queries", "sequence"], ["queries"]))
def test_same_bits(name: str, mode: str) -> None:
    """The same bits from run to run, whenever the DMAs happen, whatever is outside."""
    case = next(c for c in CASES if c.name == name)
    operands = case.operands()
    first = _run(case, operands)
    again = _run(case, poison(operands), mode)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert _no_race()


@pytest.mark.parametrize("block_size", tiered([64, 128, 192, 4096], [192]))
def test_block_sizes(block_size: int) -> None:
    """Any block size that the layout allows gives the answer."""
    case = dataclasses.replace(CASES[0], block_size=block_size)
    assert_results(_run(case, case.operands()), case, case.operands())


# A static parameter of the programs that read by head alone: no cache of JAX gives them to another
# test, or another's to them.
BY_HEAD: dict[str, Any] = {"mask_value": -1.5e30, "block_size": 128}


@pytest.fixture
def by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head of the cache is read by itself, whatever the model of its cost says."""

    def sizes(*call: Any, **_: Any) -> list[Any]:
        return [choice.Sizes(*call, by_head=True)]

    monkeypatch.setattr(forward, "readings", sizes)


@pytest.mark.parametrize(
    "name",
    tiered(
        [
            "compact",
            "mha",
            "tiles_of_lanes",
            "heads_by_eight",
            "not_dividing_the_lanes",
            "one_head",
            "queries",
            "bfloat16",
            "bfloat16_tiles",
        ],
        ["heads_by_eight"],
    ),
)
def test_by_head(name: str, by_head: None) -> None:
    """The heads of a token, read by strided loads, in blocks of 128."""
    case = dataclasses.replace(next(c for c in CASES if c.name == name), **BY_HEAD)
    operands = case.operands()
    tol = 3e-6 if case.D == 256 and case.dtype == "float32" else None
    assert_results(_run(case, poison(operands)), case, operands, tol=tol)
    assert _no_race()


# Without its optimisations XLA takes subnormal numbers of bfloat16 for 0.
@pytest.mark.optimized
@pytest.mark.parametrize(("H", "D"), [(2, 128), (8, 128), (2, 256), (16, 256)])
def test_strided_words(H: int, D: int) -> None:
    """Heads of bfloat16 from words of 32 bits, by the view of a ref that Mosaic compiles.

    The TPU interpreter lacks it, so the kernel takes another way there.
    """
    S, chunk = 64, 32
    layout = CacheForm.of(S, H, D, jnp.bfloat16).by_head()
    assert layout.strided
    x = jnp.arange(S * H * D, dtype=jnp.uint32).astype(jnp.uint16)
    x = lax.bitcast_convert_type(x, jnp.bfloat16).reshape(1, S, H, D)

    def kernel(x_ref: Any, out_ref: Any) -> None:
        plan: Any = SimpleNamespace(blocks=Blocks(S, chunk, 0))
        for j, head in itertools.product(range(S // chunk), range(H)):
            block = chunks.head_block(x_ref, layout, plan, j, head)
            out_ref[head, pl.ds(j * chunk, chunk)] = block.astype(out_ref.dtype)

    shape = jax.ShapeDtypeStruct((H, S, D), jnp.bfloat16)
    heads = pl.pallas_call(kernel, out_shape=shape, interpret=True)(layout.view(x))
    np.testing.assert_array_equal(
        np.asarray(heads, np.float32), np.asarray(x[0].transpose(1, 0, 2), np.float32)
    )


@pytest.mark.parametrize("H", [4, 8, 32])
def test_rows_of_bytes(H: int) -> None:
    """All heads of int8 from words of 32 bits, by the same view of a ref."""
    S, D, chunk = 64, 128, 32
    layout = CacheForm.of(S, H, D, jnp.int8)
    assert layout.interleaved
    x = lax.iota(jnp.uint32, S * H * D).astype(jnp.uint8)
    x = lax.bitcast_convert_type(x, jnp.int8).reshape(1, S, H, D)

    def kernel(x_ref: Any, out_ref: Any) -> None:
        plan: Any = SimpleNamespace(blocks=Blocks(S, chunk, 0))
        for j in range(S // chunk):
            rows = chunks.token_rows(x_ref, layout, plan, j)
            out_ref[pl.ds(j * chunk * H, chunk * H)] = rows

    shape = jax.ShapeDtypeStruct((S * H, D), jnp.int8)
    rows = pl.pallas_call(kernel, out_shape=shape, interpret=True)(layout.view(x))
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(x[0].reshape(S * H, D)))


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
@pytest.mark.parametrize(
    ("Q", "Hq", "Hkv", "strided"), [(1, 32, 32, False), (8, 32, 8, True), (1, 40, 40, True)]
)
def test_heads_are_separated_for_many_rows(
    kind: str, Q: int, Hq: int, Hkv: int, strided: bool
) -> None:
    """Eight queries of 32 heads are too many rows to multiply all heads with all.

    Of 40 heads, which do not divide the lanes, no logits are selected before the softmax.
    """
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((8, Q, Hq, 128), (8, 4096, Hkv, 128))
    )
    windows: Any = jax.ShapeDtypeStruct((8, Q), jnp.int32)
    arrays: list[Any] = [q, k, k, windows, windows]
    operands = contract.Operands(*arrays)
    chosen = forward.forward_choice(operands, RaggedAttentionParams(), chip_of(kind))
    assert chosen.sizes.key.strided is strided


def test_refused_block_size() -> None:
    """A block size that the kernel cannot honour is refused with those next to it that it can."""
    case = dataclasses.replace(CASES[0], block_size=100)
    operands = tuple(map(jnp.asarray, case.operands()))
    reason = r"block_size=100 is no multiple of 64.*Pass block_size=64 or 128.*'reference'"
    with pltpu.force_tpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=reason):
            ragged_attention(*operands, block_size=100, implementation="kernel")
        with pytest.warns(UserWarning, match=reason):
            results = ragged_attention(*operands, block_size=100)
    assert_results(results, case, case.operands())


def test_window_at_every_edge() -> None:
    """All windows of a few positions around the edges of blocks and of the cache."""
    edges = (0, 1, 31, 32, 33, 63, 64, 69, 70)
    windows = [(a, b) for a in edges for b in edges if a <= b]
    case = Case(
        "every_edge",
        tuple(b for _, b in windows),
        tuple(a for a, _ in windows),
        Hq=4,
        Hkv=4,
        S=70,
        D=128,
        Dv=128,
        block_size=32,
    )
    operands = case.operands()
    assert_results(_run(case, poison(operands)), case, operands)


def test_many_queries_in_tiles() -> None:
    """More rows of queries than one step takes."""
    Q, S = 70, 40
    ends = tuple(min(q + 1, S) for q in range(Q))
    case = Case("tiles_of_queries", (ends,), None, Q=Q, Hq=16, Hkv=2, S=S, D=16, Dv=16)
    assert case.Hq * Q > choice.MAX_ROWS
    operands = case.operands()
    assert_results(_run(case, operands), case, operands)


@pytest.mark.parametrize("cores", [1, 2])
def test_work_list(cores: int) -> None:
    """Each block that a window touches is one item, in order; the halves are equal."""
    rng = np.random.default_rng(0)
    V, T, blocks = 7, 16, 5
    lo = rng.integers(0, T * blocks, (V, 3)).astype(np.int32)
    hi = np.minimum(lo + rng.integers(-5, 40, (V, 3)), T * blocks).astype(np.int32)
    hi[2] = lo[2]
    work = WorkList.of(jnp.asarray(lo), jnp.asarray(hi), T, blocks, cores)
    expected = []
    for v in range(V):
        some = [(a, b) for a, b in zip(lo[v], hi[v], strict=True) if a < b]
        if some:
            first, end = min(a for a, _ in some), max(b for _, b in some)
            expected += [(v, j) for j in range(first // T, -(-end // T))]
    items, steps, last = np.asarray(work.size)
    assert items == len(expected)
    assert steps == -(-items // cores)
    rows = np.asarray(work.tile)[:items]
    got = [(int(r), int(work.offset[r]) + i) for i, r in enumerate(rows)]
    assert got == expected
    assert last == expected[steps - 1][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_between_two_cores(dtype: str) -> None:
    """A long row is cut in two parts, which merge exactly, between rows of one core each."""
    case = Case(
        "cut_row",
        (70, 300, 64),
        (60, 3, 0),
        Hq=4,
        Hkv=2,
        S=300,
        D=128,
        Dv=128,
        block_size=64,
        dtype=dtype,
    )
    assert chip_of(None).cores == 2
    operands = case.operands()
    assert_results(_run(case, poison(operands)), case, operands)
    assert _no_race()


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v3"])
def test_old_chips(kind: str) -> None:
    """Chips without kernels are refused."""
    q, k = (
        jax.ShapeDtypeStruct((1, 1, 2, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16),
    )
    refused = refusal(Target("tpu", kind), "forward", q, k, k, RaggedAttentionParams())
    assert refused is not None
    assert kind in refused.reason


def test_large_head_dim() -> None:
    """A head dimension beyond the limit is refused."""
    q, k = (
        jax.ShapeDtypeStruct((1, 1, 2, 513), jnp.float32),
        jax.ShapeDtypeStruct((1, 256, 2, 513), jnp.float32),
    )
    refused = refusal(Target("tpu", "TPU v5e"), "forward", q, k, k, RaggedAttentionParams())
    assert refused is not None
    assert "513" in refused.reason


def _of_dtype(dtype: str) -> Unsupported | None:
    q, k = (
        jax.ShapeDtypeStruct((1, 1, 2, 128), dtype),
        jax.ShapeDtypeStruct((1, 256, 2, 128), dtype),
    )
    return refusal(Target("tpu", "TPU v5e"), "forward", q, k, k, RaggedAttentionParams())


def test_float64_is_left_to_the_reference() -> None:
    """With the reason in the text of an error where the kernel was asked for."""
    with jax.enable_x64(True):
        refused = _of_dtype("float64")
    assert refused is not None
    assert "float64" in refused.reason
    assert refused.advice is None


def test_float16() -> None:
    """A dtype that no kernel takes is refused with the dtypes that one takes."""
    refused = _of_dtype("float16")
    assert refused is not None
    assert "float16" in refused.reason
    assert refused.advice is not None
    assert "bfloat16" in refused.advice
