"""The TPU kernels of the derivatives: interpreted against the oracle, compiled by libtpu."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import oracle
from cases import Case, assert_close, ids, poison
from derivatives import ALL, op, pullback, pushforward
from jax_ragged.lowering.dispatch import Implementation
from jax_ragged.lowering.params import RaggedAttentionParams

# One for each order in which XLA keeps a cache, and for what a block can hold of a window.
CASES = (
    Case("tokens", (70, 33, 0), (0, 31, 0), Hq=4, Hkv=2, S=70, D=128, Dv=128, block_size=32),
    Case("tokens_flat", (70, 33), (3, 0), Hq=8, Hkv=8, S=70, D=128, Dv=128, block_size=32),
    Case("tokens_wide", (40, 33), (3, 0), Hq=4, Hkv=2, S=40, D=256, Dv=256, block_size=32),
    Case("one_head", (150, 129), (3, 127), Hq=4, Hkv=1, S=150, D=128, Dv=64, block_size=128),
    Case("sequence", (200, 127), (130, 5), Hq=4, Hkv=2, S=200, D=64, Dv=64, block_size=128),
    Case("mixed", (200, 127), (130, 5), Hq=4, Hkv=2, S=200, D=128, Dv=64, block_size=128),
    Case(
        "queries",
        ((70, 33, 9), (5, 64, 2**30)),
        ((40, 32, -3), (3, 60, 66)),
        Q=3,
        Hq=4,
        Hkv=2,
        S=70,
        D=128,
        Dv=128,
        block_size=32,
    ),
    Case(
        "soft_cap",
        (70, 33),
        (0, 31),
        Hq=4,
        Hkv=2,
        S=70,
        D=128,
        Dv=128,
        block_size=32,
        softmax_scale=0.3,
        logits_soft_cap=2.0,
    ),
)

# Sums over up to 256 products in float32, and the cancellation of z' with delta.
TOLERANCE = 4e-6


def _hostile(dma_execution_mode: Any = "on_wait") -> Any:
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(
            detect_races=True,
            uninitialized_memory="nan",
            dma_execution_mode=dma_execution_mode,
        )
    )


@pytest.fixture
def interpreted() -> Iterator[None]:
    with _hostile():
        yield


def _assert_kernel_runs(case: Case, operation: str) -> None:
    query, key, value = (jax.ShapeDtypeStruct(s, case.dtype) for s in _folded_shapes(case))
    params = RaggedAttentionParams(block_size=case.block_size)
    assert Implementation("tpu").why_reference(operation, query, key, value, params) is None


def _folded_shapes(case: Case) -> list[tuple[int, ...]]:
    cache = (case.B, case.S, case.Hkv)
    return [(case.B, case.Q or 1, case.Hq, case.D), (*cache, case.D), (*cache, case.Dv)]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_vjp(case: Case, interpreted: None) -> None:
    """Through all three results, with NaN outside of the windows."""
    _assert_kernel_runs(case, "vjp")
    operands, bars = case.operands(), case.cotangents()
    got = jax.jit(pullback(op(case), ALL))(poison(operands), bars)
    want = oracle.vjp(*operands, bars, **case.definition)
    for name, x, y in zip(("query", "key", "value"), got, want, strict=True):
        assert_close(x, y, TOLERANCE, scale=1 + float(np.abs(y).max()), name=name)


@pytest.mark.parametrize("case", CASES[:1], ids=ids(CASES[:1]))
def test_bits_do_not_depend_on_when_copies_happen(case: Case) -> None:
    operands, bars = case.operands(), case.cotangents()
    results = []
    for mode in ("on_wait", "eager"):
        with _hostile(mode):
            results.append(jax.jit(pullback(op(case), ALL))(poison(operands), bars))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_jvp(case: Case, interpreted: None) -> None:
    _assert_kernel_runs(case, "jvp")
    operands = case.operands()
    tangents = case.operands(seed=7)[:3]
    poisoned = poison(case.operands(seed=7))[:3]
    got = jax.jit(pushforward(op(case), ALL))(poison(operands), poisoned)
    want = oracle.jvp(*operands, tangents, **case.definition)
    for name, x, y in zip(("out", "max_logits", "denominator"), got, want, strict=True):
        assert_close(x, y, TOLERANCE, scale=1 + float(np.abs(y).max()), name=name)


@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, True, True)])
@pytest.mark.parametrize("wrt", [(0,), (1,), (2,), (0, 2)])
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


def test_bfloat16(interpreted: None) -> None:
    case = Case("bfloat16", (70, 33), (0, 31), Hq=8, Hkv=2, S=70, D=128, Dv=128, dtype="bfloat16")
    operands, bars = case.operands(), case.cotangents()
    got = pullback(op(case), ALL)(operands, bars)
    want = oracle.vjp(*operands, bars, **case.definition)
    for x, y in zip(got, want, strict=True):
        # out, z' and p are rounded to bfloat16 once each, before sums over heads or positions.
        assert_close(x, y, 4 * 2.0**-8, scale=1 + float(np.abs(y).max()))


# Sizes Hq, Hkv, D, Dv of what is compiled for a TPU.
SIZES = (
    (32, 8, 128, 128),
    (64, 8, 64, 64),
    (32, 32, 128, 128),
    (16, 2, 256, 256),
    (8, 1, 128, 128),
    (8, 4, 80, 80),
)
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def _compiled(topology: str, sizes: tuple[int, ...], dtype: Any, function: Any) -> Any:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    Hq, Hkv, D, Dv = sizes
    shapes = ((2, Hq, D), (2, 2048, Hkv, D), (2, 2048, Hkv, Dv))
    arrays = [jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for s in shapes]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=sharding)
    return jax.jit(function).lower(*arrays, lengths).compile()


def _gradients(query: Any, key: Any, value: Any, lengths: Any) -> Any:
    from jax_ragged import ragged_attention

    def loss(query: Any, key: Any, value: Any) -> Any:
        return ragged_attention(query, key, value, lengths, implementation="kernel").out.sum()

    return jax.grad(loss, ALL)(query, key, value)


def _gradient_of_query(query: Any, key: Any, value: Any, lengths: Any) -> Any:
    from jax_ragged import ragged_attention

    def loss(query: Any) -> Any:
        return ragged_attention(query, key, value, lengths, implementation="kernel").out.sum()

    return jax.grad(loss)(query)


def _cache_copies(text: str) -> list[str]:
    moves = (" copy(", " transpose(", " convert(", " broadcast(")
    return [line for line in text.splitlines() if "2048" in line and any(m in line for m in moves)]


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [("v5e:2x2", s) for s in SIZES] + [(t, SIZES[0]) for t in TOPOLOGIES if t != "v5e:2x2"],
    ids=str,
)
def test_compiles_without_copies(topology: str, sizes: tuple[int, ...]) -> None:
    """The cotangents of the cache are its size; nothing else is."""
    compiled = _compiled(topology, sizes, jnp.bfloat16, _gradients)
    Hq, _, D, Dv = sizes
    rows = 2 * Hq * (D + Dv) * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * rows + 2**18
    assert "ragged_attention_vjp" in compiled.as_text()
    assert _cache_copies(compiled.as_text()) == []


def test_gradient_of_the_query_writes_nothing_of_the_cache() -> None:
    compiled = _compiled("v5e:2x2", SIZES[0], jnp.bfloat16, _gradient_of_query)
    memory = compiled.memory_analysis()
    query_bytes = 2 * 32 * 128 * 2
    assert memory.output_size_in_bytes <= 2 * query_bytes
    assert memory.temp_size_in_bytes <= 2**20
