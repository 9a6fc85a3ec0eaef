"""linear_transpose in value, in which out is linear."""

from typing import Any

import jax
import numpy as np
import pytest

import oracle
from cases import FLOAT64, SMALL, SMALL_QUERIES, Case, assert_close, double
from programs import counts, op

pytestmark = pytest.mark.usefixtures("x64")
CASES = [double(SMALL), double(SMALL_QUERIES)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def _of_value(case: Case) -> Any:
    query, key, _, *windows = case.operands()
    return lambda value: op(case)(query, key, value, *windows)[0]


@every_case
def test_transpose_of_out(case: Case) -> None:
    operands, bars = case.operands(), case.cotangents()
    transpose = jax.linear_transpose(_of_value(case), operands.value)
    (got,) = transpose(bars[0])
    expected = oracle.vjp(*operands, (bars[0], None, None), **case.definition)
    assert_close(got, expected.value, FLOAT64)


def test_transpose_of_a_mapped_value() -> None:
    case = CASES[0]
    operands = case.operands()
    bars = np.stack([case.cotangents(i)[0] for i in range(3)])
    values = np.stack([operands.value] * 3, 1)
    transpose = jax.linear_transpose(jax.vmap(_of_value(case), in_axes=1), values)
    (got,) = transpose(bars)
    for i in range(3):
        expected = oracle.vjp(*operands, (bars[i], None, None), **case.definition)
        assert_close(got[:, i], expected.value, FLOAT64)


def test_transpose_of_a_shared_value() -> None:
    case = CASES[0]
    operands = case.operands()
    bars = np.stack([case.cotangents(i)[0] for i in range(3)])
    queries = np.stack([case.operands(i).query for i in range(3)])

    def run(value: Any) -> Any:
        return jax.vmap(lambda q: op(case)(q, operands.key, value, *operands[3:])[0])(queries)

    (got,) = jax.linear_transpose(run, operands.value)(bars)
    expected = sum(
        oracle.vjp(q, *operands[1:], (b, None, None), **case.definition).value
        for q, b in zip(queries, bars, strict=True)
    )
    assert_close(got, expected, FLOAT64)


def test_transpose_is_jitted_and_differentiated() -> None:
    case = CASES[0]
    operands, bars = case.operands(), case.cotangents()
    transpose = jax.jit(lambda bar: jax.linear_transpose(_of_value(case), operands.value)(bar)[0])
    assert counts(transpose, bars[0])["ragged_attention_vjp"] == 1
    # The transpose of the transpose is the function.
    (back,) = jax.linear_transpose(transpose, bars[0])(operands.value)
    assert_close(back, case.expected().out, FLOAT64)


def test_not_linear_in_query_or_key() -> None:
    operands = SMALL.operands()
    for i in (0, 1):

        def run(x: Any, i: int = i) -> Any:
            return op(SMALL)(*operands[:i], x, *operands[i + 1 :])[0]

        with pytest.raises(NotImplementedError, match="linear in value alone"):
            jax.linear_transpose(run, operands[i])(SMALL.cotangents()[0])
