"""linearize: the forward runs once, the linear function is one equation."""

from typing import Any

import jax
import numpy as np
import pytest

import oracle
from cases import FLOAT64, SMALL_QUERIES, assert_close, double
from programs import counts, op

pytestmark = pytest.mark.usefixtures("x64")
CASE = double(SMALL_QUERIES)


def test_linearize() -> None:
    operands = CASE.operands()

    def run(*moving: Any) -> Any:
        return op(CASE)(*moving, *operands[3:])

    results, linear = jax.linearize(run, *operands[:3])
    for got, want in zip(results, CASE.expected(), strict=True):
        assert_close(got, want, FLOAT64)
    for seed in (1, 2):
        tangents = CASE.operands(seed)[:3]
        expected = oracle.jvp(*operands, tangents, **CASE.definition)
        for got, want in zip(linear(*tangents), expected, strict=True):
            assert_close(got, want, FLOAT64)
    assert counts(linear, *CASE.operands(1)[:3]) == {"ragged_attention_jvp": 1}


def test_linear_function_is_transposed_and_mapped() -> None:
    operands, bars = CASE.operands(), CASE.cotangents()
    _, linear = jax.linearize(lambda *m: op(CASE)(*m, *operands[3:]), *operands[:3])
    grads = jax.linear_transpose(linear, *operands[:3])(bars)
    for got, want in zip(grads, oracle.vjp(*operands, bars, **CASE.definition), strict=True):
        assert_close(got, want, FLOAT64)
    stacked = [np.stack([CASE.operands(s)[i] for s in (1, 2, 3)]) for i in range(3)]
    mapped = jax.vmap(linear)(*stacked)
    for i in range(3):
        for got, want in zip(mapped, linear(*(x[i] for x in stacked)), strict=True):
            assert_close(got[i], want, FLOAT64)


def test_pullback_does_not_run_the_forward() -> None:
    operands = CASE.operands()
    _, pull = jax.vjp(lambda *m: op(CASE)(*m, *operands[3:]), *operands[:3])
    assert counts(pull, CASE.cotangents()) == {"ragged_attention_vjp": 1}
