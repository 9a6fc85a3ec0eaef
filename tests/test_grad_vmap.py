"""Gradient of a vmap: an operand that the examples share gets the sum, without a copy for each."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from cases import (
    FLOAT32_DERIVATIVE,
    SMALL,
    SMALL_QUERIES,
    Case,
    Operands,
    assert_close,
    ids,
    tiered,
)
from programs import ALL, WRT, counts, largest_made, op, pullback, temporary_bytes

N = 3
AXES = [
    (0, None, None, None, None),
    (0, None, None, 1, None),
    (None, 0, 0, None, None),
    (None, 2, None, None, 0),
    (None, None, 1, None, None),
    (None, None, None, 0, 0),
    (1, 0, 2, 1, 0),
]


def _arguments(case: Case, axes: Any) -> tuple[list[Any], list[Operands]]:
    drawn = [case.operands(seed=i) for i in range(N)]
    drawn = [
        x._replace(lengths=(x.lengths + i) % 7, starts=(x.starts + i) % 3)
        for i, x in enumerate(drawn)
    ]
    stacked = [
        drawn[0][j] if a is None else np.stack([x[j] for x in drawn], a) for j, a in enumerate(axes)
    ]
    examples = [
        Operands(*(drawn[0 if a is None else i][j] for j, a in enumerate(axes))) for i in range(N)
    ]
    return stacked, examples


def _expected(case: Case, axes: Any, examples: list[Operands], bars: Any) -> list[Any]:
    each = [
        oracle.vjp(*x, tuple(b[i] for b in bars), **case.definition) for i, x in enumerate(examples)
    ]
    return [
        sum(g[j] for g in each) if axes[j] is None else np.stack([g[j] for g in each], axes[j])
        for j in ALL
    ]


def _bars(case: Case) -> Any:
    return tuple(
        np.stack(b) for b in zip(*(case.cotangents(seed=i) for i in range(N)), strict=True)
    )


@pytest.mark.parametrize(
    "case", tiered([SMALL, SMALL_QUERIES], [SMALL_QUERIES]), ids=ids([SMALL, SMALL_QUERIES])
)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_shared_operands_get_the_sum(case: Case, axes: Any) -> None:
    stacked, examples = _arguments(case, axes)
    run = pullback(jax.vmap(op(case), in_axes=axes))
    grads = run(stacked, _bars(case))
    for got, want in zip(grads, _expected(case, axes, examples, _bars(case)), strict=True):
        assert_close(got, want, FLOAT32_DERIVATIVE)
    assert counts(run, stacked, _bars(case)) == {"ragged_attention": 1, "ragged_attention_vjp": 1}


@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_subset_of_operands(wrt: tuple[int, ...]) -> None:
    axes = (0, None, 0, None, None)
    stacked, examples = _arguments(SMALL, axes)
    grads = pullback(jax.vmap(op(SMALL), in_axes=axes), wrt)(stacked, _bars(SMALL))
    expected = _expected(SMALL, axes, examples, _bars(SMALL))
    for i, got in zip(wrt, grads, strict=True):
        assert_close(got, expected[i], FLOAT32_DERIVATIVE)


def test_nested_maps() -> None:
    """grad(vmap(grad(vmap))): a loss over per-example gradients of a shared operand."""
    axes = (0, None, None, None, None)
    stacked, _ = _arguments(SMALL, axes)

    def inner(query: Any, key: Any) -> Any:
        out = jax.vmap(lambda q: op(SMALL)(q, key, *stacked[2:])[0])(query)
        return (out**2).sum()

    def outer(query: Any, keys: Any) -> Any:
        grads = jax.vmap(jax.grad(inner, argnums=1), in_axes=(None, 0))(query, keys)
        return (grads**2).sum()

    keys = np.stack([stacked[1], stacked[1] + 1])

    def loop(query: Any, keys: Any) -> Any:
        def one(key: Any) -> Any:
            out = jnp.stack([op(SMALL)(q, key, *stacked[2:])[0] for q in query])
            return (out**2).sum()

        return sum((jax.grad(one)(key) ** 2).sum() for key in keys)

    got = jax.jit(jax.grad(outer, argnums=(0, 1)))(stacked[0], keys)
    want = jax.jit(jax.grad(loop, argnums=(0, 1)))(stacked[0], keys)
    for x, y in zip(got, want, strict=True):
        # Two derivatives in float32, each with the error of one.
        assert_close(x, y, 4e-6)


@pytest.mark.optimized
def test_shared_cache_is_not_copied() -> None:
    """The gradient of a cache that 8 queries share is summed before it is written."""
    n, S, D = 8, 128, 256
    rng = np.random.default_rng(0)
    query = rng.standard_normal((n, 1, 1, D), np.float32)
    key, value = (rng.standard_normal((1, S, 1, D), np.float32) for _ in range(2))
    operands = (query, key, value, np.full(1, 100, np.int32), np.zeros(1, np.int32))
    run = pullback(jax.vmap(op(SMALL), in_axes=(0, None, None, None, None)))
    results = jax.eval_shape(op(SMALL), query[0], *operands[1:])
    bars = tuple(np.ones((n, *x.shape), np.float32) for x in results)
    assert largest_made(run, operands, bars) <= key.size
    # The reference may hold both once, zeroed outside the windows, and both gradients.
    assert temporary_bytes(run, operands, bars) < 5 * key.nbytes
    program = jax.jit(run).lower(operands, bars).compile().as_text() or ""
    shapes = re.findall(r"f32\[([\d,]+)\]", program)
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) <= key.size
