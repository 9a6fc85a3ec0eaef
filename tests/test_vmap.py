"""vmap: closed under every mapping, always one equation, a shared cache never copied."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from cases import FLOAT32, SMALL, SMALL_QUERIES, Case, Operands, assert_close
from jax_ragged.primitives import ragged_attention_p
from programs import counts, equations, largest_made, op, temporary_bytes

N = 3
SUBSETS = [s for s in itertools.product((False, True), repeat=5) if any(s)]
AXES = (1, 2, 0, 1, 0)


def _example(case: Case, i: int) -> Operands:
    """Operands that differ from one example to the next, windows too."""
    operands = case.operands(seed=i)
    assert operands.starts is not None
    return operands._replace(
        lengths=(operands.lengths + i) % (case.S + 1), starts=(operands.starts + 2 * i) % case.S
    )


def _mapped(
    case: Case, subset: Sequence[bool], n: int = N
) -> tuple[list[Any], list[int | None], list[Operands]]:
    """Operands stacked where the subset says so, their axes, and the examples they stand for."""
    examples = [_example(case, i) for i in range(n)]
    axes: list[int | None] = [a if mapped else None for a, mapped in zip(AXES, subset, strict=True)]
    stacked = [
        examples[0][j] if axis is None else np.stack([x[j] for x in examples], axis)
        for j, axis in enumerate(axes)
    ]
    standing = [
        Operands(*(x[j] if mapped else examples[0][j] for j, mapped in enumerate(subset)))
        for x in examples
    ]
    return stacked, axes, standing


def _expected(case: Case, examples: list[Operands]) -> list[Any]:
    results = [oracle.attention(*x, **case.definition) for x in examples]
    return [np.stack(x) for x in zip(*results, strict=True)]


def _assert_all_close(actual: Any, expected: Any) -> None:
    for got, want in zip(actual, expected, strict=True):
        # An empty window's max_logits would dwarf the scale of all others.
        empty = want < -1e30
        np.testing.assert_array_equal(np.asarray(got)[empty], want[empty].astype(np.float32))
        assert_close(np.where(empty, 0, got), np.where(empty, 0, want), FLOAT32)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "".join(map(str, map(int, s))))
def test_subset_of_operands(subset: Sequence[bool]) -> None:
    stacked, axes, examples = _mapped(SMALL, subset)
    run = jax.vmap(op(SMALL), in_axes=axes)
    _assert_all_close(run(*stacked), _expected(SMALL, examples))
    assert counts(run, *stacked) == {"ragged_attention": 1}
    # The cache of one example has B S Hkv D = 72 elements; the results of all have 54.
    assert largest_made(run, *stacked) <= N * 3 * 2 * 3


@pytest.mark.parametrize("subset", [(1, 0, 0, 1, 1), (0, 1, 1, 0, 0), (1, 1, 1, 1, 1)])
def test_with_queries(subset: Sequence[bool]) -> None:
    stacked, axes, examples = _mapped(SMALL_QUERIES, subset)
    run = jax.vmap(op(SMALL_QUERIES), in_axes=axes)
    _assert_all_close(run(*stacked), _expected(SMALL_QUERIES, examples))
    assert counts(run, *stacked) == {"ragged_attention": 1}


def test_out_axes() -> None:
    stacked, axes, examples = _mapped(SMALL, [True] * 5)
    results = jax.vmap(op(SMALL), in_axes=axes, out_axes=(-1, 1, 2))(*stacked)
    moved = [np.moveaxis(x, a, 0) for x, a in zip(results, (-1, 1, 2), strict=True)]
    _assert_all_close(moved, _expected(SMALL, examples))


def test_nested() -> None:
    """Query is mapped twice, the windows inside, the cache outside; starts by a third vmap."""
    outer, inner, third = 2, 3, 2
    examples = [[_example(SMALL, 3 * i + j) for j in range(inner)] for i in range(outer)]
    query = np.stack([[x.query for x in row] for row in examples])
    key, value = (np.stack([row[0][k] for row in examples], axis=2) for k in (1, 2))
    lengths = np.stack([x.lengths for x in examples[0]], axis=1)
    starts = np.stack([_example(SMALL, i).starts for i in range(third)])
    run = jax.vmap(
        jax.vmap(
            jax.vmap(op(SMALL), in_axes=(None, None, None, None, 0)),
            in_axes=(0, None, None, 1, None),
        ),
        in_axes=(0, 2, 2, None, None),
    )
    expected = _expected(
        SMALL,
        [
            Operands(query[i, j], key[:, :, i], value[:, :, i], lengths[:, j], starts[k])
            for i, j, k in np.ndindex(outer, inner, third)
        ],
    )
    results = run(query, key, value, lengths, starts)
    shapes = [(outer, inner, third, *x.shape[1:]) for x in expected]
    _assert_all_close(results, [x.reshape(s) for x, s in zip(expected, shapes, strict=True)])
    assert counts(run, query, key, value, lengths, starts) == {"ragged_attention": 1}


def test_size_zero() -> None:
    stacked, axes, _ = _mapped(SMALL, [True] * 5, n=1)
    emptied = [np.take(x, [], a) for x, a in zip(stacked, axes, strict=True)]
    results = jax.vmap(op(SMALL), in_axes=axes)(*emptied)
    assert [x.shape for x in results] == [(0, 3, 2, 3), (0, 3, 2), (0, 3, 2)]


def test_nothing_mapped() -> None:
    operands = SMALL.operands()
    function: Any = lambda *x: op(SMALL)(*x)  # noqa: E731
    run = jax.vmap(function, axis_size=N, in_axes=None)
    _assert_all_close(run(*operands), _expected(SMALL, [operands] * N))
    # The rule itself, when a transformation calls it with nothing mapped.
    once = jax.vmap(op(SMALL), axis_size=N, in_axes=None, out_axes=None)
    assert counts(once, *operands) == {"ragged_attention": 1}
    assert [x.shape for x in jax.eval_shape(once, *operands)] == [(3, 2, 3), (3, 2), (3, 2)]


def test_spmd_axis_name() -> None:
    stacked, axes, examples = _mapped(SMALL, [True] * 5)
    run = jax.vmap(op(SMALL), in_axes=axes, spmd_axis_name="data")
    _assert_all_close(run(*stacked), _expected(SMALL, examples))


def test_axis_name_is_free() -> None:
    stacked, axes, examples = _mapped(SMALL, [True] * 5)

    def run(*operands: Any) -> Any:
        return tuple(jax.lax.pmax(x, "i") for x in op(SMALL)(*operands))

    expected = [np.broadcast_to(x.max(0), x.shape) for x in _expected(SMALL, examples)]
    _assert_all_close(jax.vmap(run, axis_name="i", in_axes=axes)(*stacked), expected)


def test_equation_is_canonical() -> None:
    """A 1 stands in front of an unmapped operand: nothing is broadcast before the equation."""
    stacked, axes, _ = _mapped(SMALL, (True, False, False, True, False))
    run = jax.vmap(op(SMALL), in_axes=axes)
    (eqn,) = [e for e in equations(run, *stacked) if e.primitive is ragged_attention_p]
    shapes = [getattr(x.aval, "shape", None) for x in eqn.invars]
    assert shapes == [(N, 3, 2, 4), (1, 3, 6, 1, 4), (1, 3, 6, 1, 3), (N, 3), (1, 3)]


@pytest.mark.optimized
def test_shared_cache_is_not_copied() -> None:
    """In the compiled program, over 8 queries that share a cache of 128 KiB."""
    n, S, D = 8, 128, 256
    rng = np.random.default_rng(0)
    query = rng.standard_normal((n, 1, 1, D), np.float32)
    key, value = (rng.standard_normal((1, S, 1, D), np.float32) for _ in range(2))
    lengths = np.full((n, 1), 100, np.int32)
    run = jax.vmap(op(SMALL), in_axes=(0, None, None, 0, None))
    operands = (query, key, value, lengths, np.zeros(1, np.int32))
    # The reference may hold key and value once each, with positions outside the windows zeroed.
    assert temporary_bytes(run, *operands) < 3 * key.nbytes
    program = jax.jit(run).lower(*operands).compile().as_text() or ""
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"f32\[([\d,]+)\]", program)
    ]
    assert max(sizes) <= key.size


def test_int_lengths_of_each_width() -> None:
    stacked, axes, examples = _mapped(SMALL, (True, True, True, True, True))
    for dtype in (jnp.uint8, jnp.int8, jnp.int16, jnp.uint32):
        narrow = [*stacked[:3], *(x.astype(dtype) for x in stacked[3:])]
        _assert_all_close(jax.vmap(op(SMALL), in_axes=axes)(*narrow), _expected(SMALL, examples))
