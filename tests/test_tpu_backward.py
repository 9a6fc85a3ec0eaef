"""The TPU kernels of the derivatives: interpreted against the oracle, compiled by libtpu."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public reader of races
from jax.experimental.pallas import tpu as pltpu

import oracle
from benchmarks.tpu_cases import TOPOLOGIES
from cases import Case, assert_close, ids, poison, tiered
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.dispatch import Target
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.tpu import cost
from jax_ragged.lowering.tpu.chips import chip_of
from jax_ragged.lowering.tpu.choice import MAX_ROWS, KernelPlan, choose, readings
from jax_ragged.lowering.tpu.cost import Blocks
from jax_ragged.lowering.tpu.cotangents import vjp_work
from jax_ragged.lowering.tpu.grid import Walk, WorkList
from jax_ragged.lowering.tpu.layout import CacheForm
from lowerings import refusal
from programs import ALL, cache_sized, compile_call, op, pullback, pushforward

# One for each order in which XLA keeps a cache, and for what a block can hold of a window.
CASES = (
    Case("tokens", (150, 65, 0), (0, 63, 0), S=150, D=128, Dv=128, block_size=64),
    Case("tokens_flat", (70, 33), (3, 0), Hq=8, Hkv=8, S=150, D=128, Dv=128, block_size=32),
    Case("tokens_wide", (70, 33), (3, 0), S=150, D=256, Dv=256, block_size=32),
    Case("one_head", (150, 129), (3, 127), Hkv=1, S=150, D=128, Dv=64, block_size=128),
    Case("sequence", (200, 127), (130, 5), S=200, D=64, Dv=64, block_size=128),
    Case("mixed", (200, 127), (130, 5), S=200, D=64, Dv=128, block_size=128),
    Case("mixed_tiles", (200, 127), (130, 5), S=200, D=256, Dv=128, block_size=128),
    Case(
        "queries",
        ((140, 65, 9), (5, 64, 2**30)),
        ((80, 64, -3), (3, 60, 66)),
        Q=3,
        S=150,
        D=128,
        Dv=128,
        block_size=64,
    ),
    Case(
        "queries_sequence",
        ((200, 65, 9), (5, 64, 0)),
        ((80, 64, -3), (3, 60, 66)),
        Q=3,
        S=200,
        D=64,
        Dv=64,
        block_size=128,
    ),
    Case(
        "soft_cap",
        (150, 65),
        (0, 63),
        S=150,
        D=128,
        Dv=128,
        block_size=64,
        softmax_scale=0.3,
        logits_soft_cap=2.0,
    ),
)

# Of the default tier: columns of both kinds, tiles of lanes, queries.
DEFAULT = [c for c in CASES if c.name == "queries_sequence"]

# Sums over up to 256 products in float32, and the cancellation of z' with delta.
TOLERANCE = 4e-6


@contextlib.contextmanager
def _hostile(dma_execution_mode: Any = "on_wait") -> Iterator[None]:
    params = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        dma_execution_mode=dma_execution_mode,
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


@pytest.fixture
def interpreted() -> Iterator[None]:
    with _hostile():
        yield


def _assert_kernel_runs(case: Case, operation: str) -> None:
    query, key, value = (jax.ShapeDtypeStruct(s, case.dtype) for s in _folded_shapes(case))
    params = RaggedAttentionParams(block_size=case.block_size)
    assert refusal(Target("tpu"), operation, query, key, value, params) is None


def _folded_shapes(case: Case) -> list[tuple[int, ...]]:
    cache = (case.B, case.S, case.Hkv)
    return [(case.B, case.Q or 1, case.Hq, case.D), (*cache, case.D), (*cache, case.Dv)]


@pytest.mark.parametrize("case", tiered(CASES, DEFAULT), ids=ids(CASES))
def test_vjp(case: Case, interpreted: None) -> None:
    _assert_vjp(case)


def _assert_vjp(case: Case) -> None:
    """Through all three results, with NaN outside of the windows."""
    _assert_kernel_runs(case, "vjp")
    operands, bars = case.operands(), case.cotangents()
    got = jax.jit(pullback(op(case), ALL))(poison(operands), bars)
    want = oracle.vjp(*operands, bars, **case.definition)
    for name, x, y in zip(("query", "key", "value"), got, want, strict=True):
        assert_close(x, y, TOLERANCE, scale=1 + float(np.abs(y).max()), name=name)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES[:1], ids=ids(CASES[:1]))
def test_bits_do_not_depend_on_when_copies_happen(case: Case) -> None:
    operands, bars = case.operands(), case.cotangents()
    results = []
    for mode in ("on_wait", "eager"):
        with _hostile(mode):
            results.append(jax.jit(pullback(op(case), ALL))(poison(operands), bars))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", tiered(CASES, DEFAULT), ids=ids(CASES))
def test_jvp(case: Case, interpreted: None) -> None:
    _assert_jvp(case)


def _assert_jvp(case: Case) -> None:
    _assert_kernel_runs(case, "jvp")
    operands = case.operands()
    tangents = case.operands(seed=7)[:3]
    poisoned = poison(case.operands(seed=7))[:3]
    got = jax.jit(pushforward(op(case), ALL))(poison(operands), poisoned)
    want = oracle.jvp(*operands, tangents, **case.definition)
    for name, x, y in zip(("out", "max_logits", "denominator"), got, want, strict=True):
        assert_close(x, y, TOLERANCE, scale=1 + float(np.abs(y).max()), name=name)


GIVEN = ((True, False, False), (False, True, False), (False, True, True))
SUBSETS = list(itertools.product(((0,), (1,), (2,), (0, 2)), GIVEN))


@pytest.mark.parametrize(("wrt", "given"), tiered(SUBSETS, SUBSETS[::8]))
def test_subsets(wrt: tuple[int, ...], given: tuple[bool, ...]) -> None:
    case = CASES[0]
    operands = case.operands()
    bars = tuple(b if g else None for b, g in zip(case.cotangents(), given, strict=True))

    def fun(*operands: Any) -> Any:
        return tuple(x for x, g in zip(op(case)(*operands), given, strict=True) if g)

    with pltpu.force_tpu_interpret_mode():
        got = pullback(fun, wrt)(operands, tuple(b for b in bars if b is not None))
    want = oracle.vjp(*operands, bars, **case.definition)
    for i, x in zip(wrt, got, strict=True):
        assert_close(x, want[i], TOLERANCE, scale=1 + float(np.abs(want[i]).max()))


def _reading(case: Case, wrt: tuple[bool, bool, bool]) -> CacheForm:
    """How the kernel of the cotangents reads the keys."""
    arrays: list[Any] = [jax.ShapeDtypeStruct(s, case.dtype) for s in _folded_shapes(case)]
    arrays += [jax.ShapeDtypeStruct(arrays[0].shape[:2], jnp.int32)] * 2
    operands = Operands(*arrays)
    params = RaggedAttentionParams()
    work_of = functools.partial(vjp_work, wrt=wrt)
    return choose(readings(operands, params), work_of, chip_of(None), params).sizes.key


def _assert_bfloat16(case: Case, wrt: tuple[int, ...]) -> None:
    operands, bars = case.operands(), case.cotangents()
    got = pullback(op(case), wrt)(poison(operands), bars)
    want = oracle.vjp(*operands, bars, **case.definition)
    for x, i in zip(got, wrt, strict=True):
        # out, z' and p are rounded to bfloat16 once each, before sums over heads or positions.
        assert_close(x, want[i], 4 * 2.0**-8, scale=1 + float(np.abs(want[i]).max()))


@pytest.mark.parametrize("Q", tiered([1, 8], [8]))
def test_bfloat16(Q: int, interpreted: None) -> None:
    """Two heads share a word; with many queries each is read and written by itself."""
    ends, starts = ((70,) * Q, (33,) * Q), ((0,) * Q, (31,) * Q)
    case = Case("bfloat16", ends, starts, Q, Hq=8, S=70, D=128, Dv=128, dtype="bfloat16")
    assert _reading(case, (True, True, True)).strided == (Q > 1)
    _assert_bfloat16(case, ALL)


@pytest.mark.full
def test_grouped_tiles(interpreted: None) -> None:
    """More heads than sublanes: their tiles of lanes stand in groups of heads."""
    ends, starts, sizes = ((70,) * 8,), ((31,) * 8,), {"S": 70, "D": 256, "Dv": 256}
    case = Case("grouped_tiles", ends, starts, 8, Hq=32, Hkv=16, dtype="bfloat16", **sizes)
    layout = _reading(case, (False, True, False))
    assert (layout.strided, layout.pieces) == (True, 2)
    _assert_bfloat16(case, (1,))


@pytest.mark.full
def test_many_queries_in_tiles(interpreted: None) -> None:
    """More rows of queries than one step takes: the cotangents of a block are sums over tiles."""
    Q, S = 40, 150
    ends = tuple(min(4 * q + 1, S) for q in range(Q))
    case = Case("tiles_of_queries", (ends, ends[::-1]), (0, 70), Q=Q, Hq=16, Hkv=2, S=S)
    assert case.Hq * Q > MAX_ROWS
    _assert_vjp(case)
    _assert_jvp(case)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("D", [64, 128, 256, 384])
@pytest.mark.parametrize("H", tiered([1, 2, 3, 4, 8, 16, 32], [1, 3, 16]))
def test_unview(H: int, D: int, by_head: bool) -> None:
    layout = CacheForm.of(256, H, D, jnp.bfloat16)
    layout = layout.by_head() if by_head else layout
    x = jnp.arange(2 * 256 * H * D).reshape(2, 256, H, D)
    np.testing.assert_array_equal(layout.unview(layout.view(x), 256), x)


def _walk(rows: int, tiles: int, blocks: int, cores: int, *, every: bool) -> Walk:
    T = 128
    layout = CacheForm.of(blocks * T, 8, 128, jnp.bfloat16)
    plan = KernelPlan(
        key=layout,
        value=layout,
        blocks=Blocks(T, T, 0),
        rows=8,
        head_rows=1,
        queries=1,
        tiles=tiles,
        cores=cores,
        params=RaggedAttentionParams(),
    )
    return Walk(plan, rows * tiles, blocks, every)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("rows", "tiles", "blocks"),
    tiered([(1, 1, 1), (3, 1, 1), (3, 2, 3), (2, 1, 4)], [(1, 1, 1), (3, 2, 3)]),
)
def test_walk(rows: int, tiles: int, blocks: int, cores: int, every: bool) -> None:
    """Each block has one step, or each that a window touches; the cores have equal shares.

    Nothing is read but blocks in windows, and one for a row whose windows are empty.
    """
    walk = _walk(rows, tiles, blocks, cores, every=every)
    V, T = walk.V, walk.plan.blocks.T
    starts = np.resize([0, T + 1, 5], (V, 1)).astype(np.int32)
    ends = np.resize([T * blocks, 2 * T - 3, 5], (V, 1)).astype(np.int32)
    ends = np.minimum(ends, T * blocks)
    work = WorkList.of(jnp.asarray(starts), jnp.asarray(ends), T, blocks, cores)
    inside = {
        (row, block)
        for row in range(V)
        for block in range(blocks)
        if starts[row, 0] < ends[row, 0]
        and starts[row, 0] < (block + 1) * T
        and ends[row, 0] > block * T
    }
    steps = [
        (core, *(int(x) for x in walk.place(jnp.int32(core), jnp.int32(step), work)))
        for core in range(walk.cores)
        for step in range(int(walk.steps(work)))
    ]
    taken = [(core, row, block) for core, row, block, valid in steps if valid]
    places = [(row, block) for _, row, block in taken]
    assert len(places) == len(set(places))
    everything = {(row, block) for row in range(V) for block in range(blocks)}
    assert set(places) == (everything if every else inside)
    shares = [sum(core == c for core, _, _ in taken) for c in range(walk.cores)]
    assert max(shares) - min(shares) <= tiles
    visited = np.zeros((walk.cores, V), bool)
    for core, row, _ in taken:
        visited[core, row] = True
    np.testing.assert_array_equal(walk.visited(work), visited)
    for core in range(walk.cores):
        for step in range(int(walk.steps(work))):
            cache_row, block = (int(x) for x in walk.read(jnp.int32(core), jnp.int32(step), work))
            row = int(walk.place(jnp.int32(core), jnp.int32(step), work)[0])
            assert cache_row == row // tiles
            assert (row, block) in inside or starts[row, 0] >= ends[row, 0]


# Hq, Hkv, D, Dv of what is compiled for a TPU.
SIZES = (
    (32, 8, 128, 128),
    (64, 8, 64, 64),
    (32, 32, 128, 128),
    (16, 2, 256, 256),
    (8, 1, 128, 128),
    (8, 4, 80, 80),
    (32, 8, 128, 64),
)


def _vjp(call: Any) -> Any:
    def gradients(query: Any, key: Any, value: Any, *windows: Any) -> Any:
        return jax.grad(lambda *x: call(*x, *windows).out.sum(), ALL)(query, key, value)

    return gradients


def _vjp_of_query(call: Any) -> Any:
    return jax.grad(lambda *operands: call(*operands).out.sum())


def _jvp(call: Any) -> Any:
    def tangents(query: Any, key: Any, value: Any, *windows: Any) -> Any:
        operands = query, key, value
        return jax.jvp(lambda *x: call(*x, *windows), operands, operands)[1]

    return tangents


def _assert_no_copies(
    generation: str, sizes: tuple[int, ...], derivative: Callable[[Any], Any], dtype: str
) -> None:
    """The cotangents of the cache are its size; nothing else is."""
    Hq, Hkv, D, Dv = sizes
    B, S = 4, 2048
    program = compile_call(
        generation, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, dtype=dtype, B=B, S=S, transform=derivative
    )
    assert f"ragged_attention_{derivative.__name__[1:4]}" in program.as_text()
    assert cache_sized(program, B * S * Hkv * min(D, Dv) // 2) == []
    # Rows of queries and partial results of two cores in float32, padded to 128 lanes, and
    # statistics by lane.
    lanes = sum(-(-n // 128) * 128 for n in (D, Dv))
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes <= 6 * B * max(Hq, 8 * Hkv) * 4 * lanes + 2**19
    caches = B * S * Hkv * (D + Dv) * jnp.dtype(dtype).itemsize
    written = memory.output_size_in_bytes
    assert (written >= caches) == (derivative is _vjp)
    assert written <= caches * (derivative is _vjp) + B * Hq * (lanes + 256) * 4


COMPILED = (
    [("v5e", sizes, _vjp) for sizes in SIZES]
    + [("v5e", SIZES[0], d) for d in (_jvp, _vjp_of_query)]
    + [(g, SIZES[0], d) for g in TOPOLOGIES if g != "v5e" for d in (_jvp, _vjp)]
)


@pytest.mark.parametrize(
    ("generation", "sizes", "derivative"),
    # Every generation, and every derivative; different columns of keys and values on v5e.
    tiered(COMPILED, [COMPILED[i] for i in (6, 8, 9, 12, 13, 16)]),
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_compiles_without_copies(
    generation: str, sizes: tuple[int, ...], derivative: Callable[[Any], Any]
) -> None:
    _assert_no_copies(generation, sizes, derivative, "bfloat16")


DIFFERENT = [
    # Refused while the matrices between different columns were counted twice.
    ("v4", (16, 16, 64, 128), _vjp, "bfloat16"),
    ("v4", (16, 16, 128, 64), _jvp, "bfloat16"),
    ("v4", (32, 8, 192, 256), _vjp, "float32"),
    ("v5p", (32, 32, 64, 256), _jvp, "float32"),
    # With larger blocks than then.
    ("v4", (16, 4, 192, 128), _jvp, "float32"),
    ("v5e", (8, 2, 64, 256), _vjp, "bfloat16"),
    ("v5e", (4, 1, 128, 64), _jvp, "float32"),
    ("v5p", (8, 2, 64, 128), _vjp, "bfloat16"),
    ("v6e", (8, 2, 128, 256), _vjp, "bfloat16"),
    ("v6e", (4, 1, 64, 128), _jvp, "float32"),
    ("7x", (32, 8, 64, 128), _vjp, "bfloat16"),
    ("7x", (4, 1, 256, 128), _jvp, "float32"),
]


@pytest.mark.parametrize(
    ("generation", "sizes", "derivative", "dtype"),
    # A program of 17 s, for v5p in float32, is among the others.
    tiered(DIFFERENT, [x for x in DIFFERENT[::3] if x[0] != "v5p"]),
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_different_head_dims_compile(
    generation: str, sizes: tuple[int, ...], derivative: Callable[[Any], Any], dtype: str
) -> None:
    """Keys and values in different columns, on every generation."""
    _assert_no_copies(generation, sizes, derivative, dtype)


@pytest.mark.full
def test_there_is_room_for_what_many_rows_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler spills many numbers for each logit of a float32 derivative."""

    def compiled() -> Any:
        return compile_call(
            "v5p", Hq=6, Hkv=3, D=32, dtype="float32", B=1, S=4096, Q=128, transform=_jvp,
            logits_soft_cap=30.0,
        )  # fmt: skip

    assert "ragged_attention_jvp" in compiled().as_text()
    jax.clear_caches()
    monkeypatch.setattr(cost, "SPILLS", 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compiled()
