"""jacfwd, jacrev, hessian: whole matrices against the oracle, in one equation of each kind."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import oracle
from cases import FLOAT64, FLOAT64_SECOND, SMALL, SMALL_QUERIES, Case, double
from programs import ALL, counts, op

pytestmark = pytest.mark.usefixtures("x64")
CASES = (double(SMALL), double(SMALL_QUERIES))
every_case = pytest.mark.parametrize("case", cases.tiered(CASES, CASES[1:]), ids=cases.ids(CASES))


def _basis(x: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(x.size):
        yield (np.arange(x.size) == i).astype(float).reshape(x.shape)


def _jacobian(case: Case) -> list[list[np.ndarray]]:
    """By result, then operand, in the shape of jax.jacobian."""
    operands = case.operands()
    columns = [
        [
            oracle.jvp(*operands, tuple(e if j == i else None for j in ALL), **case.definition)
            for e in _basis(operands[i])
        ]
        for i in ALL
    ]
    return [
        [
            np.stack([column[k] for column in columns[i]], -1).reshape(
                *columns[i][0][k].shape,
                *operands[i].shape,
            )
            for i in ALL
        ]
        for k in range(3)
    ]


@every_case
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["jacfwd", "jacrev"])
def test_jacobian(case: Case, mode: Any) -> None:
    operands = case.operands()
    run = mode(lambda *moving: op(case)(*moving, *operands[3:]), ALL)
    for got, want in zip(run(*operands[:3]), _jacobian(case), strict=True):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=FLOAT64 * (1 + np.abs(y).max()))


def test_jacobian_is_one_equation_of_a_mapped_tangent() -> None:
    case = CASES[0]
    operands = case.operands()

    def of_query(query: Any) -> Any:
        return op(case)(query, *operands[1:])

    forward, reverse = jax.jacfwd(of_query), jax.jacrev(of_query)
    one = {"ragged_attention": 1, "ragged_attention_jvp": 1}
    assert counts(forward, operands.query) == one
    one = {"ragged_attention": 1, "ragged_attention_vjp": 1}
    assert counts(reverse, operands.query) == one


@every_case
def test_hessian(case: Case) -> None:
    """Of a loss over all three results that is quadratic in them, every block of it."""
    operands = case.operands()
    bars = case.cotangents()
    held = np.asarray(case.expected().denominator > 0)

    def loss(query: Any, key: Any, value: Any) -> Any:
        results = op(case)(query, key, value, *operands[3:])
        masks = (held[..., None], held, held)
        # Empty windows left out: mask_value squared is not finite.
        terms = (
            jnp.where(m, x * (b + x / 2), 0) for m, x, b in zip(masks, results, bars, strict=True)
        )
        return sum(x.sum() for x in terms)

    run = jax.jit(jax.hessian(loss, ALL))
    actual = run(*operands[:3])
    results = case.expected()
    masks = (held[..., None], held, held)

    def column(i: int, e: np.ndarray) -> Any:
        dots = [e if j == i else np.zeros_like(operands[j]) for j in ALL]
        results_dot = oracle.jvp(*operands, tuple(dots), **case.definition)
        at = tuple(np.where(m, b + x, 0) for m, b, x in zip(masks, bars, results, strict=True))
        bars_dot = tuple(np.where(m, t, 0) for m, t in zip(masks, results_dot, strict=True))
        return oracle.vjp_tangent(*operands, at, dots, bars_dot, **case.definition)

    for i in ALL:
        columns = [column(i, e) for e in _basis(operands[i])]
        for j in ALL:
            want = np.stack([c[j] for c in columns], -1)
            got = np.asarray(actual[j][i]).reshape(want.shape)
            np.testing.assert_allclose(
                got, want, rtol=0, atol=FLOAT64_SECOND * (1 + np.abs(want).max())
            )
