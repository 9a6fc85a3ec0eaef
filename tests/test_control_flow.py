"""scan, while_loop, fori_loop, cond, switch and map around the op, with their derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import oracle
from cases import (
    FLOAT32,
    FLOAT32_DERIVATIVE,
    FLOAT64_SECOND,
    SMALL,
    SMALL_QUERIES,
    Case,
    assert_close,
    assert_results,
)
from programs import counts, op

STEPS = 4
DECODE = Case("decode", (0, 1, 2), Hq=2, Hkv=1, S=6, D=4, Dv=4)


def _decode(query: Any, cache: Any, lengths: Any, feeds: Any) -> Any:
    """Appends a position to every row's cache and attends, STEPS times; by scan."""
    rows = jnp.arange(query.shape[0])

    def step(state: Any, feed: Any) -> Any:
        cache, lengths = state
        cache = cache.at[rows, lengths, 0].set(feed)
        out, _, _ = op(DECODE)(query, cache, cache, lengths + 1, None)
        return (cache, lengths + 1), out

    return lax.scan(step, (cache, lengths), feeds)


def _decode_arguments() -> tuple[Any, ...]:
    operands = DECODE.operands()
    feeds = np.random.default_rng(0).standard_normal((STEPS, DECODE.B, DECODE.D), np.float32)
    return operands.query, operands.key, operands.lengths, feeds


def _decoded(query: Any, cache: Any, lengths: Any, feeds: Any) -> Any:
    cache, lengths, outs = cache.copy(), lengths.copy(), []
    for feed in feeds:
        cache[np.arange(len(lengths)), lengths, 0] = feed
        lengths = lengths + 1
        outs.append(oracle.attention(query, cache, cache, lengths).out)
    return cache, lengths, np.stack(outs)


def test_decoding_by_scan() -> None:
    arguments = _decode_arguments()
    (cache, lengths), outs = jax.jit(_decode)(*arguments)
    want_cache, want_lengths, want_outs = _decoded(*arguments)
    np.testing.assert_array_equal(cache, want_cache)
    np.testing.assert_array_equal(lengths, want_lengths)
    assert_close(outs, want_outs, FLOAT32)
    assert counts(_decode, *arguments) == {"ragged_attention": 1}


def test_decoding_by_while() -> None:
    query, cache, lengths, feeds = _decode_arguments()

    def step(i: Any, state: Any) -> Any:
        cache, lengths, _ = state
        cache = cache.at[jnp.arange(DECODE.B), lengths, 0].set(jnp.asarray(feeds)[i])
        return cache, lengths + 1, op(DECODE)(query, cache, cache, lengths + 1, None)[0]

    start = (jnp.asarray(cache), jnp.asarray(lengths), jnp.zeros_like(query))
    out = jax.jit(lambda n, x: lax.fori_loop(0, n, step, x))(STEPS, start)[2]
    assert_close(out, _decoded(query, cache, lengths, feeds)[2][-1], FLOAT32)


def test_gradient_through_scan(x64: None) -> None:
    """Of the fed positions and the query, along a direction, against central differences."""
    arguments = [x.astype(float) if x.dtype == np.float32 else x for x in _decode_arguments()]
    query, cache, lengths, feeds = arguments
    rng = np.random.default_rng(1)
    along = [rng.standard_normal(x.shape) for x in (query, feeds)]
    weights = rng.standard_normal((STEPS, *query.shape))

    def loss(query: Any, feeds: Any) -> Any:
        return jnp.vdot(_decode(query, cache, lengths, feeds)[1], weights)

    def by_oracle(step: float) -> float:
        moved = (query + step * along[0], cache, lengths, feeds + step * along[1])
        return float(np.vdot(_decoded(*moved)[2], weights))

    grads = jax.jit(jax.grad(loss, (0, 1)))(query, feeds)
    got = sum(np.vdot(g, a) for g, a in zip(grads, along, strict=True))
    _, tangent = jax.jvp(loss, (query, feeds), tuple(along))
    # Differences err by step^2 and by rounding / step.
    np.testing.assert_allclose(got, (by_oracle(1e-5) - by_oracle(-1e-5)) / 2e-5, rtol=1e-8)
    np.testing.assert_allclose(tangent, got, rtol=FLOAT64_SECOND)


def test_vmap_of_scan() -> None:
    query, cache, lengths, feeds = _decode_arguments()
    queries = np.stack([query, 2 * query])
    _, outs = jax.jit(jax.vmap(_decode, in_axes=(0, None, None, None)))(
        queries, cache, lengths, feeds
    )
    for i in range(2):
        assert_close(outs[i], _decoded(queries[i], cache, lengths, feeds)[2], FLOAT32)


def test_vmap_of_while_with_a_mapped_condition() -> None:
    """Rows of the map stop at different steps; each keeps its values from then on."""
    operands = SMALL.operands()

    def run(limit: Any) -> Any:
        def step(state: Any) -> Any:
            i, _ = state
            return i + 1, op(SMALL)(*operands[:3], operands.lengths + i, operands.starts)[0]

        return lax.while_loop(lambda s: s[0] < limit, step, (0, jnp.zeros((3, 2, 3))))[1]

    outs = jax.jit(jax.vmap(run))(jnp.array([0, 1, 3]))
    assert not np.asarray(outs[0]).any()
    for got, last in zip(outs[1:], (0, 2), strict=True):
        want = oracle.attention(
            *operands[:3], operands.lengths + last, operands.starts, **SMALL.definition
        )
        assert_close(got, want.out, FLOAT32)


@pytest.mark.parametrize("case", [SMALL, SMALL_QUERIES], ids=lambda c: c.name)
def test_cond(case: Case) -> None:
    operands = case.operands()

    def zeros(*operands: Any) -> Any:
        return tuple(map(jnp.zeros_like, op(case)(*operands)))

    run = jax.jit(lambda flag: lax.cond(flag, op(case), zeros, *operands))
    assert_results(run(True), case, operands)
    assert not any(np.asarray(x).any() for x in run(False))
    # Under a mapped flag, cond is a select.
    results = jax.jit(jax.vmap(run))(jnp.array([True, False]))
    assert_results([x[0] for x in results], case, operands)
    assert not any(np.asarray(x[1]).any() for x in results)


def test_gradient_of_cond() -> None:
    operands, bars = SMALL.operands(), SMALL.cotangents()

    def loss(query: Any, flag: Any) -> Any:
        out = lax.cond(flag, lambda q: op(SMALL)(q, *operands[1:])[0], lambda q: q[..., :3], query)
        return jnp.vdot(out, bars[0])

    grad = jax.jit(jax.grad(loss))
    want = oracle.vjp(*operands, (bars[0], None, None), **SMALL.definition).query
    assert_close(grad(operands.query, True), want, FLOAT32_DERIVATIVE)
    assert_close(grad(operands.query, False)[..., :3], bars[0], 0)


def test_switch() -> None:
    operands = SMALL.operands()
    scales = (0.5, 1.0, 2.0)
    branches = [op(SMALL, softmax_scale=s) for s in scales]
    run = jax.jit(lambda i: lax.switch(i, branches, *operands))
    for i, scale in enumerate(scales):
        want = oracle.attention(*operands, softmax_scale=scale)
        assert_close(run(i)[0], want.out, FLOAT32)


def test_map() -> None:
    operands = SMALL.operands()
    queries = np.stack([SMALL.operands(i).query for i in range(4)])
    for batch_size in (None, 3):
        outs = jax.jit(
            lambda q, n=batch_size: lax.map(
                lambda x: op(SMALL)(x, *operands[1:])[0], q, batch_size=n
            )
        )(queries)
        for query, out in zip(queries, outs, strict=True):
            want = oracle.attention(query, *operands[1:], **SMALL.definition)
            assert_close(out, want.out, FLOAT32)
