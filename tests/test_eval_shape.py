"""eval_shape: shapes and dtypes without arrays, for values and derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import cases
from cases import CASES, Case
from programs import op, pullback, pushforward


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _described(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_shapes_and_dtypes(case: Case) -> None:
    operands = jax.tree.map(_abstract, case.operands())
    bars = jax.tree.map(_abstract, case.cotangents())
    with cases.x64(case):
        results = jax.eval_shape(op(case), *operands)
        grads = jax.eval_shape(pullback(op(case)), operands, bars)
        dots = jax.eval_shape(pushforward(op(case)), operands, operands[:3])
    assert _described(results) == _described(case.cotangents())
    assert _described(dots) == _described(case.cotangents())
    assert _described(grads) == _described(operands[:3])


def test_results_are_not_weakly_typed() -> None:
    operands = jax.tree.map(_abstract, CASES[0].operands())
    assert not any(x.weak_type for x in jax.eval_shape(op(CASES[0]), *operands))


def test_large_shapes_allocate_nothing() -> None:
    cache = jax.ShapeDtypeStruct((1024, 2**20, 8, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((1024, 32, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1024,), jnp.int32)
    out, _, denominator = jax.eval_shape(op(CASES[0]), query, cache, cache, lengths, None)
    assert (out.shape, out.dtype) == ((1024, 32, 128), jnp.bfloat16)
    assert (denominator.shape, denominator.dtype) == ((1024, 32), jnp.float32)
