"""vmap of a gradient: one of each equation, a gradient for every example."""

from typing import Any

import jax
import numpy as np
import pytest

import oracle
from cases import FLOAT32_DERIVATIVE, SMALL, SMALL_QUERIES, Case, Operands, assert_close
from programs import counts, op, pullback

N = 3
# Axes of query, key, value, lengths, starts and of the cotangents.
AXES = [
    (0, None, None, None, None, 0),
    (0, None, None, 1, None, None),
    (None, 0, 0, None, None, None),
    (None, 2, None, None, 0, None),
    (None, None, 1, None, None, 0),
    (None, None, None, None, None, 0),
    (None, None, None, 0, 0, None),
    (1, 0, 2, 1, 0, 1),
]


def _arguments(case: Case, axes: Any) -> tuple[Operands, Any, list[tuple[Operands, Any]]]:
    """Stacked operands and cotangents, and the examples that they stand for."""
    drawn: list[Any] = [(*case.operands(seed=i), case.cotangents(seed=i)) for i in range(N)]
    drawn = [(*x[:3], (x[3] + i) % 7, (x[4] + i) % 3, x[5]) for i, x in enumerate(drawn)]

    def pick(i: int, j: int) -> Any:
        return drawn[0 if axes[j] is None else i][j]

    examples = [(Operands(*(pick(i, j) for j in range(5))), pick(i, 5)) for i in range(N)]

    def stack(j: int) -> Any:
        if axes[j] is None:
            return drawn[0][j]
        return jax.tree.map(lambda *x: np.stack(x, axes[j]), *(x[j] for x in drawn))

    return Operands(*(stack(j) for j in range(5))), stack(5), examples


def _in_axes(axes: Any) -> tuple[Operands, Any]:
    return Operands(*axes[:5]), axes[5]


@pytest.mark.parametrize("case", [SMALL, SMALL_QUERIES], ids=lambda c: c.name)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_gradients_of_every_example(case: Case, axes: Any) -> None:
    operands, bars, examples = _arguments(case, axes)
    run = jax.vmap(pullback(op(case)), in_axes=_in_axes(axes))
    grads = run(operands, bars)
    expected = [oracle.vjp(*x, b, **case.definition) for x, b in examples]
    for got, *want in zip(grads, *expected, strict=True):
        # As for one gradient: twice the error of a result.
        assert_close(got, np.stack(want), FLOAT32_DERIVATIVE)
    assert counts(run, operands, bars) == {"ragged_attention": 1, "ragged_attention_vjp": 1}


def test_forward_is_not_mapped_with_the_cotangents() -> None:
    """Only the cotangents are mapped: the forward runs once, the backward once for all."""
    axes = (None, None, None, None, None, 0)
    operands, bars, _ = _arguments(SMALL, axes)
    jaxpr = jax.make_jaxpr(jax.vmap(pullback(op(SMALL)), in_axes=_in_axes(axes)))(operands, bars)
    forward: Any
    backward: Any
    (forward,) = [e for e in jaxpr.eqns if e.primitive.name == "ragged_attention"]
    assert forward.outvars[0].aval.shape == (3, 2, 3)
    (backward,) = [e for e in jaxpr.eqns if e.primitive.name == "ragged_attention_vjp"]
    assert backward.invars[8].aval.shape == (N, 3, 2, 3)
    assert backward.invars[1].aval.shape == (1, 3, 6, 1, 4)


def test_nested() -> None:
    """query mapped outside, the cache and its cotangents inside."""
    operands, bars, _ = _arguments(SMALL, (0, 0, 0, None, None, 0))
    inner = jax.vmap(pullback(op(SMALL)), in_axes=(Operands(None, 0, 0, None, None), 0))
    run = jax.vmap(inner, in_axes=(Operands(0, None, None, None, None), None))
    grads = run(operands, bars)
    for i, j in np.ndindex(N, N):
        example = operands._replace(
            query=operands.query[i], key=operands.key[j], value=operands.value[j]
        )
        want = oracle.vjp(*example, tuple(b[j] for b in bars), **SMALL.definition)
        for got, expected in zip(grads, want, strict=True):
            assert_close(got[i, j], expected, FLOAT32_DERIVATIVE)
    assert counts(run, operands, bars) == {"ragged_attention": 1, "ragged_attention_vjp": 1}
