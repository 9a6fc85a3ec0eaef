"""Second order by hand: jvp of vjp, vjp of jvp, vjp of vjp, jvp of jvp."""

from typing import Any

import jax
import numpy as np
import pytest

import cases
import oracle
from cases import FLOAT64_INNER, FLOAT64_SECOND, SMALL, SMALL_QUERIES, Case, double
from programs import ALL, WRT, op, pullback, pushforward

pytestmark = pytest.mark.usefixtures("x64")
CASES = (double(SMALL), double(SMALL_QUERIES))
every_case = pytest.mark.parametrize("case", cases.tiered(CASES, CASES[1:]), ids=cases.ids(CASES))


def _inner(xs: Any, ys: Any) -> float:
    return float(sum(np.vdot(x, y) for x, y in zip(xs, ys, strict=True)))


def _close(actual: Any, expected: Any) -> None:
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            got, want, rtol=0, atol=FLOAT64_SECOND * (1 + np.abs(want).max())
        )


@every_case
@pytest.mark.parametrize(
    "wrt", cases.tiered([(x,) for x in WRT], [((0,),), ((1, 2),), (ALL,)]), ids=str
)
def test_jvp_of_vjp(case: Case, wrt: tuple[int, ...]) -> None:
    """In the operands and in the cotangents, for every subset of operands."""
    operands, bars = case.operands(), case.cotangents()
    drawn = case.operands(seed=2)[:3]
    dots = tuple(x if i in wrt else np.zeros_like(x) for i, x in enumerate(drawn))
    bars_dot = case.cotangents(seed=2)

    def run(moving: Any, bars: Any) -> Any:
        full = list(operands)
        for i, x in zip(wrt, moving, strict=True):
            full[i] = x
        return pullback(op(case))(full, bars)

    at = tuple(operands[i] for i in wrt)
    along = tuple(drawn[i] for i in wrt)
    grads, actual = jax.jvp(run, (at, bars), (along, bars_dot))
    _close(grads, oracle.vjp(*operands, bars, **case.definition))
    _close(actual, oracle.vjp_tangent(*operands, bars, dots, bars_dot, **case.definition))


@every_case
def test_vjp_of_jvp(case: Case) -> None:
    """In the tangents it is the vjp; in the operands the second derivative, both symmetric."""
    operands, bars = case.operands(), case.cotangents()
    tangents, along = case.operands(seed=1)[:3], case.operands(seed=2)[:3]

    def run(moving: Any, tangents: Any) -> Any:
        return pushforward(op(case))((*moving, *operands[3:]), tangents)

    _, pull = jax.vjp(run, operands[:3], tangents)
    operands_bar, tangents_bar = pull(bars)
    _close(tangents_bar, oracle.vjp(*operands, bars, **case.definition))
    zeros = tuple(np.zeros_like(x) for x in bars)
    curved = oracle.vjp_tangent(*operands, bars, along, zeros, **case.definition)
    np.testing.assert_allclose(
        _inner(operands_bar, along), _inner(curved, tangents), rtol=FLOAT64_INNER
    )


@every_case
def test_vjp_of_vjp(case: Case) -> None:
    operands, bars = case.operands(), case.cotangents()
    weights, along = case.operands(seed=1)[:3], case.operands(seed=2)[:3]

    def run(moving: Any, bars: Any) -> Any:
        return pullback(op(case))((*moving, *operands[3:]), bars)

    _, pull = jax.vjp(run, operands[:3], bars)
    operands_bar, bars_bar = pull(weights)
    _close(bars_bar, oracle.jvp(*operands, weights, **case.definition))
    zeros = tuple(np.zeros_like(x) for x in bars)
    curved = oracle.vjp_tangent(*operands, bars, along, zeros, **case.definition)
    np.testing.assert_allclose(
        _inner(operands_bar, along), _inner(curved, weights), rtol=FLOAT64_INNER
    )


@every_case
def test_jvp_of_jvp(case: Case) -> None:
    operands, bars = case.operands(), case.cotangents()
    first, second = case.operands(seed=1)[:3], case.operands(seed=2)[:3]

    def run(*moving: Any) -> Any:
        return pushforward(op(case))((*moving, *operands[3:]), first)

    _, actual = jax.jvp(run, operands[:3], second)
    zeros = tuple(np.zeros_like(x) for x in bars)
    curved = oracle.vjp_tangent(*operands, bars, second, zeros, **case.definition)
    np.testing.assert_allclose(_inner(actual, bars), _inner(curved, first), rtol=FLOAT64_INNER)


def test_second_order_keeps_the_linear_primitives() -> None:
    """In its linear operands, the derivative of a fused primitive is the fused primitive."""
    case = CASES[0]
    operands, bars = case.operands(), case.cotangents()

    def of_bars(bars: Any) -> Any:
        return pullback(op(case))(operands, bars)

    jaxpr = jax.make_jaxpr(lambda t: jax.jvp(of_bars, (bars,), (t,))[1])(bars)
    names = [e.primitive.name for e in jaxpr.eqns]
    assert names.count("ragged_attention_vjp") >= 1
    assert set(names) <= {
        "ragged_attention",
        "ragged_attention_vjp",
        "name",
        "reshape",
        "broadcast_in_dim",
    }
