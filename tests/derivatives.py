"""Derivatives of a function of ragged_attention's operands, as functions to transform."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import cases
import oracle
from jax_ragged import ragged_attention

ALL = (0, 1, 2)
WRT = ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), ALL)


def op(case: cases.Case, **params: Any) -> Callable[..., Any]:
    """ragged_attention with a case's static parameters; its results as a plain tuple."""
    keywords = {**case.params, **params}
    return lambda *operands: tuple(ragged_attention(*operands, **keywords))


def _moving(
    fun: Callable[..., Any], operands: Sequence[Any], wrt: Sequence[int]
) -> Callable[..., Any]:
    def of_moving(*moving: Any) -> Any:
        full = list(operands)
        for i, x in zip(wrt, moving, strict=True):
            full[i] = x
        return fun(*full)

    return of_moving


def pullback(fun: Callable[..., Any], wrt: Sequence[int] = ALL) -> Callable[..., Any]:
    """(operands, cotangents) to the cotangents of the operands in wrt."""

    def run(operands: Sequence[Any], cotangents: Any) -> Any:
        _, pull = jax.vjp(_moving(fun, operands, wrt), *(operands[i] for i in wrt))
        return pull(cotangents)

    return run


def pushforward(fun: Callable[..., Any], wrt: Sequence[int] = ALL) -> Callable[..., Any]:
    """(operands, tangents of those in wrt) to the tangents of the results."""

    def run(operands: Sequence[Any], tangents: Any) -> Any:
        primals = tuple(operands[i] for i in wrt)
        return jax.jvp(_moving(fun, operands, wrt), primals, tuple(tangents))[1]

    return run


def oracle_vjp_tangent(
    case: cases.Case, operands: cases.Operands, cotangents: Any, operands_dot: Any, bars_dot: Any
) -> oracle.Gradients:
    """The tangent of oracle.vjp for tangents of query, key, value and of the cotangents.

    By the complex step, as oracle.jvp.
    """
    step = 1e-100
    moved = [x + 1j * step * t for x, t in zip(operands[:3], operands_dot, strict=True)]
    bars = tuple(x + 1j * step * t for x, t in zip(cotangents, bars_dot, strict=True))
    windows = operands.lengths, operands.starts
    grads = oracle.vjp(moved[0], moved[1], moved[2], *windows, bars, **case.definition)
    return oracle.Gradients(*(np.imag(x) / step for x in grads))
