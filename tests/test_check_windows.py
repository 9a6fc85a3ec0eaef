"""check_windows: errors under checkify, in every composition, and nothing without it."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, PartitionSpec as P

import sharded
from cases import SMALL
from jax_ragged import check_windows, ragged_attention
from programs import compiled_text

B, S, Hkv, D = 2, 8, 2, 4
PAST = r"lengths must be at most S = 8; got 9. End the row, or enlarge the cache"


def _cache() -> tuple[jax.Array, jax.Array]:
    return jnp.ones((B, 4, D)), jnp.ones((B, S, Hkv, D))


def _step(query: Any, cache: Any, lengths: Any) -> Any:
    check_windows(cache, lengths)
    return ragged_attention(query, cache, cache, lengths).out


def _report(run: Any, *operands: Any) -> str:
    error, _ = jax.jit(checkify.checkify(run))(*operands)
    return error.get() or ""


def test_under_jit() -> None:
    assert _report(_step, *_cache(), jnp.array([8, 0])) == ""
    with pytest.raises(checkify.JaxRuntimeError, match=PAST):
        checkify.checkify(jax.jit(_step))(*_cache(), jnp.array([3, 9]))[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match=PAST):
        jax.jit(checkify.checkify(_step))(*_cache(), jnp.array([3, 9]))[0].throw()


def test_a_decode_loop() -> None:
    """Rows of six positions take two steps, and overrun with the third."""

    def decode(lengths: Any, *, steps: int) -> Any:
        def step(carry: Any, _: None) -> Any:
            query, cache, lengths = carry
            row = jnp.arange(B)
            cache = cache.at[row, lengths].set(1.0)
            return (_step(query, cache, lengths + 1), cache, lengths + 1), None

        return jax.lax.scan(step, (*_cache(), lengths), length=steps)[0]

    lengths = jnp.array([6, 2])
    assert _report(lambda n: decode(n, steps=2), lengths) == ""
    assert "got 9" in _report(lambda n: decode(n, steps=3), lengths)


@pytest.mark.parametrize("last", [8, 9])
def test_under_vmap(last: int) -> None:
    query, cache = _cache()
    mapped = jax.vmap(_step, in_axes=(None, None, 0))
    report = _report(mapped, query, cache, jnp.array([[8, 0], [1, last], [2, 2]]))
    assert ("got 9" in report) == (last == 9)


@pytest.mark.parametrize("last", [8, 9])
def test_under_shard_map(last: int) -> None:
    query, cache = (jnp.concatenate([x] * 2) for x in _cache())
    rows = P("data")
    run = jax.shard_map(
        _step,
        mesh=sharded.make_mesh(AxisType.Auto),
        in_specs=(rows, rows, rows),
        out_specs=rows,
    )
    lengths = jnp.array([1, 2, 3, last])
    report = _report(run, query, cache, lengths)
    assert ("got 9" in report) == (last == 9)
    np.testing.assert_array_equal(
        jax.jit(run)(query, cache, lengths), ragged_attention(query, cache, cache, lengths).out
    )


def test_under_grad() -> None:
    query, cache = _cache()
    grad = jax.grad(lambda q, n: _step(q, cache, n).sum())
    assert _report(grad, query, jnp.array([3, 8])) == ""
    assert "got 9" in _report(grad, query, jnp.array([3, 9]))


def test_nothing_without_checkify() -> None:
    """No error, and the compiled program is the same but for names and line numbers."""

    def plain(query: Any, cache: Any, lengths: Any) -> Any:
        return ragged_attention(query, cache, cache, lengths).out

    def checked(query: Any, cache: Any, lengths: Any) -> Any:
        return checkify.checkify(_step)(query, cache, lengths)

    operands = *_cache(), jnp.array([3, 9])
    np.testing.assert_array_equal(jax.jit(_step)(*operands), plain(*operands))
    _step(*operands)  # by itself too
    step, without, functionalised = (
        Counter(re.findall(r"= \S+ ([\w-]+)\(", compiled_text(run, *operands)))
        for run in (_step, plain, checked)
    )
    assert step == without
    assert functionalised.total() > without.total() > 50
    assert "check" not in jax.jit(_step).lower(*operands).as_text()


@pytest.mark.parametrize(
    ("table", "lengths", "starts", "report"),
    [
        ([[5, 0, -1], [2, 9, 9]], [5, 4], None, ""),
        ([[5, -1, -1], [2, 9, 9]], [5, 4], None, "got -1 for row 0, page 1"),
        ([[5, 0, -1], [2, 9, 9]], [5, 5], None, "pages from 0 to 5.*got 9 for row 1, page 1"),
        ([[5, 0, -1], [2, 9, 9]], [5, 13], None, "lengths must be at most S = 12; got 13"),
        ([[9, 0, -1], [2, 9, 9]], [5, 4], [4, 0], ""),
        ([[9, 0, -1], [2, 9, 9]], [5, 4], [3, 0], "got 9 for row 0, page 0"),
        ([[9, 0, -1], [2, 9, 9]], [[0, 5], [4, 3]], [[0, 4], [2, -7]], ""),
        ([[9, 0, -1], [2, 9, 9]], [[0, 2], [4, 3]], [[0, 1], [2, -7]], "got 9 for row 0, page 0"),
        ([[9, 9, 9], [9, 9, 9]], [[3, 2], [6, 0]], [[3, 3], [7, 5]], ""),
        ([[5, 0, 1], [2, 3, 9]], 12, None, "got 9 for row 1, page 2"),
        ([[5, 0, 1], [2, 3, 9]], 8, None, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_pages(table: Any, lengths: Any, starts: Any, report: str, layout: Any) -> None:
    pool = jnp.ones((6, 4, Hkv, D) if layout == "BSHD" else (6, Hkv, 4, D))

    def run(pool: Any, table: Any) -> None:
        check_windows(pool, lengths, starts, page_table=table, cache_layout=layout)

    error, _ = checkify.checkify(run)(pool, jnp.array(table))
    if report:
        with pytest.raises(checkify.JaxRuntimeError, match=report):
            error.throw()
    else:
        error.throw()


def test_errors() -> None:
    cache = np.ones((B, S, Hkv, D), np.float32)
    with pytest.raises(ValueError, match=r"^check_windows: key must have shape \[B, S, Hkv, D\]"):
        check_windows(cache[0], 3)
    with pytest.raises(TypeError, match=r"^check_windows: lengths must have an integer dtype"):
        check_windows(cache, SMALL.operands().query)
    with pytest.raises(ValueError, match=r"^check_windows: page_table must have shape \[B, W\]"):
        check_windows(cache, 3, page_table=[1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": np.zeros(3, int)}, r"lengths must have shape \[B\].*B = 2; got \(3,\)"),
        ({"lengths": np.zeros((2, 3, 4), int)}, r"lengths must have.*got \(2, 3, 4\)"),
        ({"starts": np.zeros(3, int)}, r"starts must have.*got \(3,\)"),
        ({"page_table": np.zeros((3, 4), int)}, r"lengths must have.*B = 3; got \(2,\)"),
        ({"cache_layout": "x"}, 'cache_layout must be "BSHD" or "BHSD"; got'),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"lengths": np.zeros(2, int)} | changes
    with pytest.raises(ValueError, match=f"^check_windows: {message}"):
        check_windows(np.zeros((2, 8, 1, 4)), **arguments)
