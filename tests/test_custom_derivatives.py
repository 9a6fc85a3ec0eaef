"""custom_jvp and custom_vjp around the op, and around functions that use it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from cases import FLOAT32, FLOAT32_DERIVATIVE, SMALL, assert_close
from programs import op

OPERANDS, BARS = SMALL.operands(), SMALL.cotangents()


@jax.custom_jvp
def _attend(query: Any) -> Any:
    return op(SMALL)(query, *OPERANDS[1:])[0]


@_attend.defjvp
def _attend_jvp(primals: Any, tangents: Any) -> Any:
    """Twice the derivative: so a test sees that this rule ran."""
    out, dot = jax.jvp(lambda q: op(SMALL)(q, *OPERANDS[1:])[0], primals, tangents)
    return out, 2 * dot


@jax.custom_vjp
def _attend_clipped(query: Any) -> Any:
    return op(SMALL)(query, *OPERANDS[1:])[0]


def _attend_forward(query: Any) -> Any:
    return jax.vjp(lambda q: op(SMALL)(q, *OPERANDS[1:])[0], query)


def _attend_backward(pull: Any, bar: Any) -> Any:
    return tuple(3 * g for g in pull(bar))


_attend_clipped.defvjp(_attend_forward, _attend_backward)


def _grad() -> np.ndarray:
    return oracle.vjp(*OPERANDS, (BARS[0], None, None), **SMALL.definition).query


@pytest.mark.parametrize(("fun", "factor"), [(_attend, 2), (_attend_clipped, 3)])
def test_rule_around_the_op(fun: Any, factor: float) -> None:
    def loss(query: Any) -> Any:
        return jnp.vdot(fun(query), BARS[0])

    assert_close(fun(OPERANDS.query), SMALL.expected().out, FLOAT32)
    assert_close(jax.jit(jax.grad(loss))(OPERANDS.query), factor * _grad(), FLOAT32_DERIVATIVE)
    both = jax.vmap(jax.grad(loss))(np.stack([OPERANDS.query, OPERANDS.query]))
    assert_close(both, factor * np.stack([_grad(), _grad()]), FLOAT32_DERIVATIVE)


def test_rule_inside_of_the_op() -> None:
    """A straight-through function of the query feeds the op."""

    @jax.custom_vjp
    def scaled(x: Any) -> Any:
        return x * 1.0

    scaled.defvjp(lambda x: (x * 1.0, None), lambda _, bar: (5 * bar,))

    def loss(query: Any) -> Any:
        return jnp.vdot(op(SMALL)(scaled(query), *OPERANDS[1:])[0], BARS[0])

    assert_close(jax.grad(loss)(OPERANDS.query), 5 * _grad(), FLOAT32_DERIVATIVE)


def test_stop_gradient() -> None:
    def loss(query: Any) -> Any:
        return jnp.vdot(op(SMALL)(jax.lax.stop_gradient(query), *OPERANDS[1:])[0], BARS[0])

    assert not np.asarray(jax.grad(loss)(OPERANDS.query)).any()
