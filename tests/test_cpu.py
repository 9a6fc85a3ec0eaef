"""The CPU lowering: every case in blocks, and the memory that compiled programs use."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import oracle
from cases import CASES, Case, assert_close, assert_results, poison, tiered, tolerance
from jax_ragged import ragged_attention
from jax_ragged.lowering._compat import CPU_THREADS_DOTS
from programs import compiled_text, made, temporary_bytes

# Without a block size, these are small enough for the dense form.
BLOCKED = tuple(dataclasses.replace(case, block_size=case.block_size or 8) for case in CASES)
# The conformance tests have others in the default tier.
OTHERS = (
    "windows",
    "all_empty",
    "starts_past_the_end",
    "queries_mixed",
    "queries_gap",
    "head_dim_odd",
    "one_position",
    "block_leaves_rest",
    "block_odd",
    "block_one",
    "float64_queries",
    "tiles_queries",
)


@functools.cache
def _run(params: tuple[tuple[str, Any], ...]) -> Any:
    op = functools.partial(ragged_attention, **dict(params))

    def run(operands: Any, tangents: Any, cotangents: Any) -> Any:
        def moving(*qkv: Any) -> Any:
            return op(*qkv, *operands[3:])

        results, pull = jax.vjp(moving, *operands[:3])
        _, dots = jax.jvp(moving, operands[:3], tangents)
        return results, dots, pull(type(results)(*cotangents))

    return jax.jit(run)


@pytest.mark.parametrize(
    "case", tiered(BLOCKED, [c for c in BLOCKED if c.name in OTHERS]), ids=cases.ids(BLOCKED)
)
def test_blocks(case: Case) -> None:
    with cases.x64(case):
        operands, tangents = case.operands(), case.operands(seed=1)[:3]
        cotangents = case.cotangents()
        run = _run(tuple(case.params.items()))
        results, dots, grads = run(poison(operands), tangents, cotangents)
        assert_results(results, case, operands)
        # As in the conformance tests: twice the error of a result. Where terms of unit size cancel
        # to 0, as in a window of one position, it is theirs.
        tol = 2 * tolerance(case)
        expected_dots = oracle.jvp(*operands, tangents, **case.definition)
        for got, want in zip(dots, expected_dots, strict=True):
            assert_close(got, want, tol, scale=max(1.0, np.abs(want).max(initial=0)))
        expected_grads = oracle.vjp(*operands, cotangents, **case.definition)
        for got, want in zip(grads, expected_grads, strict=True):
            assert_close(got, want, tol, scale=max(1.0, np.abs(want).max(initial=0)))


def _operands(S: int, dtype: str, Hkv: int = 4, Hq: int = 8) -> tuple[jax.Array, ...]:
    case = Case("program", (S, S // 2, 7), S=S, Hq=Hq, Hkv=Hkv, D=32, Dv=32, dtype=dtype)
    return tuple(map(jnp.asarray, case.operands()[:4]))


def _forward(q: Any, k: Any, v: Any, lengths: Any) -> Any:
    return ragged_attention(q, k, v, lengths).out


def _grad(wrt: tuple[int, ...]) -> Any:
    def loss(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return ragged_attention(q, k, v, lengths).out.astype(jnp.float32).sum()

    return jax.grad(loss, wrt)


def _jvp(q: Any, k: Any, v: Any, lengths: Any) -> Any:
    def moving(q: Any, k: Any, v: Any) -> Any:
        return ragged_attention(q, k, v, lengths).out

    return jax.jvp(moving, (q, k, v), (q, k, v))[1]


PROGRAMS = {"forward": _forward, "jvp": _jvp, "grad_query": _grad((0,)), "grad": _grad((0, 1, 2))}
DTYPES = ("float32", "bfloat16", "float16")
COMPILED = list(itertools.product(PROGRAMS, DTYPES))
BY_HEADS = list(itertools.product(DTYPES, (4, 16)))


@pytest.mark.optimized
@pytest.mark.parametrize(("program", "dtype"), tiered(COMPILED, COMPILED[::3] + COMPILED[10:11]))
def test_memory_does_not_grow_with_the_cache(program: str, dtype: str) -> None:
    # A whole cache widened or copied, or logits of the whole sequence, would show here.
    function = PROGRAMS[program]
    short, long = (temporary_bytes(function, *_operands(S, dtype)) for S in (1024, 4096))
    allowed = 4096
    if (program, dtype) == ("grad", "bfloat16") and jax.__version_info__ < (0, 12):
        # The bits of a cotangent, written before they become bfloat16: XLA keeps the bits of one
        # operand in a buffer of its own.
        allowed += sum(x.nbytes for x in _operands(4096 - 1024, dtype)[1:2])
    assert long <= short + allowed


@pytest.mark.optimized
@pytest.mark.parametrize(("dtype", "Hkv"), tiered(BY_HEADS, BY_HEADS[::3] + BY_HEADS[4:5]))
def test_no_copy_of_the_cache(dtype: str, Hkv: int) -> None:
    operands = _operands(4096, dtype, Hkv, Hq=max(8, Hkv))
    hlo = compiled_text(_forward, *operands)
    # Neither a copy nor a conversion that writes as many elements as the cache has.
    sizes = [size for size, _ in made(hlo, "copy", "convert", "fusion")]
    assert sizes
    assert max(sizes) < operands[1].size


@pytest.mark.optimized
@pytest.mark.parametrize(("dtype", "Hkv"), tiered(BY_HEADS, BY_HEADS[::3] + BY_HEADS[4:5]))
def test_each_block_is_written_once(dtype: str, Hkv: int) -> None:
    T = 50

    def forward(*operands: Any) -> Any:
        return ragged_attention(*operands, block_size=T).out

    hlo = compiled_text(forward, *_operands(4096, dtype, Hkv, Hq=2 * Hkv))
    # Keys and values, widened and by head.
    assert len(re.findall(rf"= f32\[{Hkv},{T},32\]\S* fusion\(", hlo)) == 2


@pytest.mark.optimized
@pytest.mark.skipif(not CPU_THREADS_DOTS, reason="this XLA runs small products on its own thread")
@pytest.mark.parametrize("Hq", [8, 32])
def test_few_rows_wake_no_threads(Hq: int) -> None:
    hlo = compiled_text(_forward, *_operands(4096, "float32", Hq=Hq))
    # A fusion of this kind is XLA's call of its library of products in parallel.
    assert "kind=kCustom" not in hlo


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float_of_8_bits(dtype: str) -> None:
    """Each is what it stands for, numbers below the least normal one included.

    A window of one position has the weight 1 there, and the logit of a query of 1 is the key.
    """
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    cache, lengths = numbers.reshape(256, 1, 1, 1), np.ones(256, np.int32)
    call: Any = functools.partial(ragged_attention, block_size=1, implementation="kernel")
    ones = np.ones((256, 1, 1), np.float32)
    out = call(ones, np.ones_like(cache), cache, lengths).out
    wide = numbers.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(out)[:, 0, 0], wide)
    finite = np.isfinite(wide)
    logits = call(ones, cache, np.ones_like(cache), lengths).max_logits
    np.testing.assert_array_equal(np.asarray(logits)[finite, 0], wide[finite])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits_are_widened_by_their_bits(dtype: str) -> None:
    """XLA's own conversion takes several times as long as the products do."""
    query, key, value, lengths = _operands(4096, "float32")
    operands = query, key.astype(dtype), value.astype(dtype), lengths

    def conversions(implementation: Any) -> list[str]:
        run = functools.partial(ragged_attention, implementation=implementation)
        text = jax.jit(run).lower(*operands).as_text()
        return re.findall(r"stablehlo.convert .*: \(tensor<[\dx]*xf8\w+>\)", text)

    assert not conversions("kernel")
    assert conversions("reference")


LAYERS = list(itertools.product((1, 2), DTYPES))


@pytest.mark.optimized
@pytest.mark.parametrize(("layers", "dtype"), tiered(LAYERS, [LAYERS[1], LAYERS[3]]))
def test_gradients_of_the_cache_are_not_copied(dtype: str, layers: int) -> None:
    # Each starts as zeros of its own, not as a copy of zeros that another also needs.
    def loss(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        for layer in range(layers):
            q = ragged_attention(q, k[layer], v[layer], lengths).out
        return q.astype(jnp.float32).sum()

    q, k, v, lengths = _operands(4096, dtype)
    hlo = compiled_text(jax.grad(loss, (1, 2)), q, [k] * layers, [v] * layers, lengths)
    assert k.size in [size for size, _ in made(hlo, "fusion")]
    assert k.size not in [size for size, _ in made(hlo, "copy")]


@pytest.mark.optimized
def test_gradient_of_query_writes_no_cache() -> None:
    operands = _operands(4096, "float32")
    compiled = jax.jit(_grad((0,))).lower(*operands).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.output_size_in_bytes + analysis.temp_size_in_bytes < operands[1].nbytes


def test_maximum_costs_only_what_asks_for_it() -> None:
    def text(result: int) -> str:
        def loss(q: Any, k: Any, v: Any, lengths: Any) -> Any:
            return ragged_attention(q, k, v, lengths)[result].sum()

        return jax.jit(jax.grad(loss, 1)).lower(*_operands(4096, "float32")).as_text()

    assert "scatter" not in text(0)
    assert "scatter" in text(1)


def test_program_does_not_grow_with_the_rows_or_the_sequence() -> None:
    def lines(S: int, B: int) -> int:
        operands = [jnp.tile(x, (B, *[1] * (x.ndim - 1))) for x in _operands(S, "float32")]
        return jax.jit(_forward).lower(*operands).as_text().count("\n")

    assert lines(1024, 1) == lines(4096, 8)
