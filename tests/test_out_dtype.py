"""`out_dtype`: an `out` that is not rounded, in values, derivatives, vmap and jaxprs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import oracle
from cases import Case, assert_close
from jax_ragged import RaggedAttention, ragged_attention, reference_ragged_attention

CASES = tuple(
    Case(f"wide_{dtype}", ((37, 36), (4, 0)), (2, 3), Q=2, dtype=dtype, logits_soft_cap=3.0)
    for dtype in ("bfloat16", "float16")
)
WAYS: dict[str, Callable[..., RaggedAttention]] = {
    "definition": reference_ragged_attention,
    "dense": ragged_attention,
    "blocks": lambda *x, **p: ragged_attention(*x, block_size=8, **p),
}
ways = pytest.mark.parametrize("way", cases.tiered(WAYS, ["blocks", "dense"]))
cases_ = pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
# Operands are exact in float32, and nothing on the way is rounded to less.
TOL = 1e-5


def _run(way: str, case: Case, **params: Any) -> Callable[..., Any]:
    keywords = {**case.definition, "out_dtype": "float32", **params}
    return jax.jit(lambda *operands: tuple(WAYS[way](*operands, **keywords)))


@pytest.mark.parametrize("way", cases.tiered(WAYS, ["blocks"]))
@cases_
def test_values_and_derivatives(case: Case, way: str) -> None:
    operands, run = case.operands(), _run(way, case)
    results = run(*operands)
    assert {x.dtype for x in results} == {jnp.dtype("float32")}
    for got, want in zip(results, case.expected(), strict=True):
        assert_close(got, want, TOL)

    def moving(*qkv: Any) -> Any:
        return run(*qkv, *operands[3:])

    primals = tuple(map(jnp.asarray, operands[:3]))
    tangents = case.operands(seed=1)[:3]
    _, dots = jax.jit(functools.partial(jax.jvp, moving))(primals, tuple(tangents))
    for got, want in zip(dots, oracle.jvp(*operands, tangents, **case.definition), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, want, TOL, scale=1 + np.abs(want).max())
    out_bar, *statistics_bar = case.cotangents()
    bars = out_bar.astype("float32") * np.float32(1.001), *statistics_bar
    grads = jax.jit(lambda primals, bars: jax.vjp(moving, *primals)[1](bars))(primals, bars)
    for got, want in zip(grads, oracle.vjp(*operands, bars, **case.definition), strict=True):
        assert got.dtype == jnp.dtype(case.dtype)
        # The gradients alone are rounded, to the dtype of the operands: half a unit.
        rounding = 2.0**-8 if case.dtype == "bfloat16" else 2.0**-11
        assert_close(got, want, rounding + TOL)


@ways
@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0)])
def test_vmap(way: str, axes: tuple[int | None, ...]) -> None:
    case = CASES[0]
    query, key, value, *windows = case.operands()
    stacked = [
        x if axis is None else np.stack([x, x[::-1]])
        for x, axis in zip((query, key, value), axes, strict=True)
    ]
    run = _run(way, case)
    results = jax.vmap(lambda *x: run(*x, *windows), axes)(*stacked)
    assert results[0].dtype == jnp.float32
    for i in range(2):
        operands = (x if a is None else x[i] for x, a in zip(stacked, axes, strict=True))
        for got, want in zip(results, run(*operands, *windows), strict=True):
            assert_close(got[i], want, 1e-6)


@ways
def test_rounding_once_is_the_default(way: str) -> None:
    """The default `out` is that `out`, rounded; and the query's own dtype changes nothing."""
    case = CASES[0]
    operands = case.operands()
    wide = _run(way, case)(*operands)
    rounded = _run(way, case, out_dtype=None)(*operands)
    assert_close(rounded[0], wide[0], 2.0**-8)
    for dtype in ("bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)):
        same = _run(way, case, out_dtype=dtype)(*operands)
        for got, want in zip(same, rounded, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


def test_in_the_jaxpr() -> None:
    """The dtype is a parameter of the equation, where it is not the query's."""
    operands = CASES[0].operands()

    def text(operands: Any, **params: Any) -> str:
        return str(jax.make_jaxpr(lambda *x: ragged_attention(*x, **params))(*operands))

    assert "RaggedAttentionParams(out_dtype='float32')" in text(operands, out_dtype=jnp.float32)
    wide = [x.astype("float32") for x in operands[:3]]
    assert "out_dtype" not in text((*wide, *operands[3:]), out_dtype="float32")


def test_float64(x64: None) -> None:
    case = cases.double(CASES[0])
    operands = case.operands()
    results = ragged_attention(*operands, **case.definition, out_dtype="float64")
    assert results.out.dtype == jnp.float64
    with pytest.raises(TypeError, match=r"out_dtype must be the dtype of query, float64.*float32"):
        ragged_attention(*operands, out_dtype="float32")
