"""merge_partials: along an array axis and over a mesh, empty parts, derivatives, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.test_util import check_grads

import sharded
from cases import (
    BY_NAME,
    FLOAT32,
    FLOAT64_SECOND,
    Case,
    assert_close,
    assert_results,
    double,
    ids,
    tiered,
)
from jax_ragged import RaggedAttention, merge_partials, ragged_attention
from programs import collectives, compiled_text, op, pullback, pushforward

# Windows that end in the first part, begin in the last, are empty, out of range; ties.
CASES = (
    Case("merged", (20, 3, 0, 9, 25), (0, 0, 0, 7, 16), Hq=4, Hkv=2, S=20, D=8, Dv=4),
    Case(
        "merged_mask", (20, 3, 0), Q=2, Hq=4, Hkv=1, S=20, D=8, Dv=8, mask_value=0.0, logit_size=8.0
    ),
    Case("merged_bfloat16", (20, 3, 0), Hq=4, Hkv=2, S=20, D=8, Dv=8, dtype="bfloat16"),
    Case("merged_all_empty", (0, 0), (0, 3), Hq=2, Hkv=2, S=20, D=8, Dv=8, mask_value=-7.0),
)
every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
WAYS = ("array", "mesh")
T = 5


def _merged(case: Case, way: str) -> Any:
    """The op by parts of T positions, as a function of all operands but with starts given."""

    def by_array(query: Any, key: Any, value: Any, lengths: Any, starts: Any) -> Any:
        parts = [
            op(case)(query, key[:, i : i + T], value[:, i : i + T], lengths - i, starts - i)
            for i in range(0, case.S, T)
        ]
        return tuple(merge_partials(*parts))

    def local(query: Any, key: Any, value: Any, lengths: Any, starts: Any) -> Any:
        first = jax.lax.axis_index("model") * key.shape[1]
        parts = op(case)(query, key, value, lengths - first, starts - first)
        return tuple(merge_partials(parts, axis="model"))

    if way == "array":
        return by_array
    cache = P(None, "model")
    return jax.shard_map(
        local,
        mesh=sharded.make_mesh(AxisType.Auto),
        in_specs=(P(), cache, cache, P(), P()),
        out_specs=P(),
    )


def _operands(case: Case) -> tuple[Any, ...]:
    query, key, value, lengths, starts = case.operands()
    return query, key, value, lengths, np.zeros_like(lengths) if starts is None else starts


@pytest.mark.parametrize("way", WAYS)
@every_case
def test_forward(case: Case, way: str) -> None:
    results = jax.jit(_merged(case, way))(*_operands(case))
    # Each part rounds its out to the dtype of query, and so does the whole.
    assert_results(results, case, tol=2e-2 if case.dtype == "bfloat16" else None)


@pytest.mark.parametrize("way", tiered(WAYS, ["array"]))
@pytest.mark.parametrize("case", tiered(CASES[:2], CASES[:1]), ids=ids(CASES[:2]))
def test_derivatives(case: Case, way: str) -> None:
    run, operands = _merged(case, way), _operands(case)
    grads = jax.jit(pullback(run))(operands, case.cotangents())
    sharded.assert_gradients(grads, case)
    tangents = tuple(np.cos(x) for x in operands[:3])
    actual = jax.jit(pushforward(run))(operands, tangents)
    sharded.assert_tangents(actual, case, tangents)


@pytest.mark.parametrize("way", tiered(WAYS, ["mesh"]))
def test_second_order(x64: None, way: str) -> None:
    case = double(CASES[0])
    operands = _operands(case)

    def hessian(run: Any) -> Any:
        def loss(scale: Any) -> Any:
            results = run(operands[0] * scale, *operands[1:])
            return sum((jnp.where(jnp.abs(x) < 1e9, x, 0) ** 2).sum() for x in results)

        return jax.jit(jax.hessian(loss))(1.0)

    np.testing.assert_allclose(hessian(_merged(case, way)), hessian(op(case)), rtol=FLOAT64_SECOND)


def _parts(rng: Any, shape: tuple[int, ...], Dv: int, dtype: Any) -> RaggedAttention:
    out = rng.standard_normal((*shape, Dv)).astype(dtype)
    max_logits = rng.standard_normal(shape).astype(dtype)
    return RaggedAttention(*map(jnp.asarray, (out, max_logits, np.exp(max_logits) + 1)))


def _with_empty(parts: RaggedAttention, empty: Any, mask_value: float) -> RaggedAttention:
    return RaggedAttention(
        jnp.where(empty[..., None], 0, parts.out),
        jnp.where(empty, mask_value, parts.max_logits),
        jnp.where(empty, 0, parts.denominator),
    )


@pytest.mark.parametrize("mask_value", [-1e30, 0.0, 1e30])
def test_empty_parts_change_no_bit(mask_value: float) -> None:
    parts = _parts(np.random.default_rng(0), (3, 4, 2), 8, np.float32)
    for kept in range(3):
        empty = jnp.broadcast_to(jnp.arange(3)[:, None, None] != kept, (3, 4, 2))
        merged = merge_partials(_with_empty(parts, empty, mask_value), axis=0)
        for got, want in zip(merged, parts, strict=True):
            np.testing.assert_array_equal(got, want[kept])


@pytest.mark.full
@pytest.mark.parametrize("modes", [("fwd",), ("rev",)])
def test_derivatives_with_empty_parts(x64: None, modes: tuple[str, ...]) -> None:
    """By all three results to second order; no NaN where some or all parts are empty."""
    parts = _parts(np.random.default_rng(1), (3, 4), 2, np.float64)
    empty = jnp.array([[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]], bool)
    parts = _with_empty(parts, empty, -5.0)

    # Steps leave the statistics of empty parts alone.
    def run(out: Any, max_logits: Any, scale: Any) -> Any:
        max_logits = jnp.where(empty, -5.0, max_logits)
        return merge_partials((out, max_logits, parts.denominator * scale), axis=0)

    scale = jnp.ones_like(parts.denominator)
    check_grads(run, (parts.out, parts.max_logits, scale), 2, modes=modes)


def test_tie_goes_to_the_first_part() -> None:
    parts = RaggedAttention(jnp.ones((3, 2)), jnp.array([1.0, 2.0, 2.0]), jnp.ones(3))
    grad = jax.grad(lambda m: merge_partials(parts._replace(max_logits=m), axis=0).max_logits)
    np.testing.assert_array_equal(grad(parts.max_logits), [0.0, 1.0, 0.0])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_array_axes(axis: int) -> None:
    parts = _parts(np.random.default_rng(2), (3, 4, 5), 6, np.float32)
    moved = RaggedAttention(*(jnp.moveaxis(x, 0, axis % 3) for x in parts))
    for got, want in zip(
        merge_partials(moved, axis=axis), merge_partials(parts, axis=0), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=FLOAT32)


def test_merging_is_associative() -> None:
    parts = _parts(np.random.default_rng(3), (4, 5), 6, np.float32)
    halves = [
        merge_partials(RaggedAttention(*(x[i : i + 2] for x in parts)), axis=0) for i in (0, 2)
    ]
    merged = merge_partials(*halves)
    assert isinstance(merged, RaggedAttention)
    for got, want in zip(merged, merge_partials(parts, axis=0), strict=True):
        assert_close(got, want, FLOAT32)


def test_shared_prefix() -> None:
    """A prefix that all rows share, read once, and each row's own continuation."""
    case = BY_NAME["mha"]
    query, key, value, lengths = sharded.operands(case)
    prefix = [np.broadcast_to(x[:1, :8], x[:, :8].shape) for x in (key, value)]
    whole: list[Any] = [
        np.concatenate([p, x], 1) for p, x in zip(prefix, (key, value), strict=True)
    ]
    shared = jax.vmap(
        lambda q: ragged_attention(q[None], key[:1, :8], value[:1, :8], jnp.array([8]))
    )(query)
    own = ragged_attention(query, key, value, lengths)
    for got, want in zip(
        merge_partials(RaggedAttention(*(x[:, 0] for x in shared)), own),
        ragged_attention(query, whole[0], whole[1], lengths + 8),
        strict=True,
    ):
        assert_close(got, want, FLOAT32)


def test_over_two_mesh_axes() -> None:
    case = Case("two_axes", (24, 3, 0), Hq=4, Hkv=2, S=24, D=8, Dv=4)

    def local(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        first = jax.lax.axis_index(("data", "model")) * key.shape[1]
        parts = op(case)(query, key, value, lengths - first)
        return tuple(merge_partials(parts, axis=("data", "model")))

    cache = P(None, ("data", "model"))
    run = jax.shard_map(
        local,
        mesh=sharded.make_mesh(AxisType.Auto),
        in_specs=(P(), cache, cache, P()),
        out_specs=P(),
    )
    assert_results(jax.jit(run)(*sharded.operands(case)), case)


def test_over_the_axis_of_a_vmap() -> None:
    parts = _parts(np.random.default_rng(4), (3, 4), 6, np.float32)
    merged = jax.vmap(lambda *x: tuple(merge_partials(x, axis="parts")), axis_name="parts")(*parts)
    for got, want in zip(merged, merge_partials(parts, axis=0), strict=True):
        np.testing.assert_allclose(got, np.stack([want] * 3), rtol=FLOAT32)


def test_along_an_explicit_axis() -> None:
    parts = _parts(np.random.default_rng(5), (4, 8), 6, np.float32)
    mesh = sharded.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data", "model"))
        placed = RaggedAttention(*(jax.device_put(x, split) for x in parts))
        merged = jax.jit(lambda x: merge_partials(x, axis=0))(placed)
    for got, want in zip(merged, merge_partials(parts, axis=0), strict=True):
        assert_close(got, want, FLOAT32)
        assert got.sharding.spec[0] == "model"


def test_the_cache_is_not_gathered() -> None:
    """Three all-reduces, none larger than out, whatever the length of the cache."""
    case = CASES[0]
    text = compiled_text(_merged(case, "mesh"), *_operands(case))
    assert collectives(text) == {"all-reduce": 3}


@pytest.mark.parametrize(
    ("change", "axis", "error", "message"),
    [
        ({"max_logits": jnp.ones((3, 5))}, 0, ValueError, "must have shape"),
        ({"denominator": jnp.ones(4)}, 0, ValueError, "must have shape"),
        ({"out": jnp.ones((3, 4))}, 0, ValueError, "must have shape"),
        ({"max_logits": jnp.ones((3, 4), "bfloat16")}, 0, TypeError, "must be float32 for out"),
        ({}, 2, ValueError, "axis must be one of the 2 of max_logits; got 2"),
        ({}, -3, ValueError, "axis must be one of the 2 of max_logits; got -3"),
        ({}, 1.0, TypeError, "axis must be an int, or the name of a mesh axis"),
        ({}, True, TypeError, "axis must be an int, or the name of a mesh axis"),
    ],
)
def test_errors(change: Any, axis: Any, error: type[Exception], message: str) -> None:
    parts = RaggedAttention(jnp.ones((3, 4, 6)), jnp.ones((3, 4)), jnp.ones((3, 4)))
    with pytest.raises(error, match=message):
        merge_partials(parts._replace(**change), axis=axis)


PART = RaggedAttention(jnp.ones((4, 6)), jnp.ones(4), jnp.ones(4))


def test_several_results_are_one_stacked() -> None:
    parts = _parts(np.random.default_rng(6), (3, 4), 6, np.float32)
    several = [RaggedAttention(*(x[i] for x in parts)) for i in range(3)]
    got, want = merge_partials(*several), merge_partials(parts, axis=0)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("narrow", tiered(["bfloat16", "float16"], ["float16"]))
def test_out_in_float32_is_rounded_once(narrow: str) -> None:
    """Parts of a narrow cache whose outs are not rounded merge as precisely as one call."""
    case = Case("merged_narrow", (20, 17), Hq=4, Hkv=2, S=20, D=8, Dv=8, dtype=narrow)
    query, key, value, lengths, _ = case.operands()

    def part(i: int, **params: Any) -> RaggedAttention:
        cache = key[:, i : i + T], value[:, i : i + T]
        return ragged_attention(query, *cache, lengths - i, **params)

    starts = range(0, case.S, T)
    expected = case.expected().out
    merged = merge_partials(*(part(i, out_dtype="float32") for i in starts))
    assert merged.out.dtype == jnp.float32
    assert_close(merged.out, expected, 1e-6)
    rounded = merge_partials(*(part(i) for i in starts))
    assert rounded.out.dtype == jnp.dtype(narrow)
    assert np.abs(np.asarray(rounded.out, np.float64) - expected).max() > 1e-4

    def loss(query: Any) -> Any:
        parts = (
            ragged_attention(
                query, key[:, i : i + T], value[:, i : i + T], lengths - i, out_dtype="float32"
            )
            for i in starts
        )
        return merge_partials(*parts).out.sum()

    def whole(query: Any) -> Any:
        return ragged_attention(query, key, value, lengths, out_dtype="float32").out.sum()

    # The gradients of the parts are each rounded to the dtype of query, and so is their sum.
    want = np.asarray(jax.grad(whole)(query), np.float64)
    assert_close(jax.grad(loss)(query), want, 2e-2 if narrow == "bfloat16" else 3e-3)


@pytest.mark.parametrize(
    ("parts", "axis", "error", "message"),
    [
        ((PART,), None, TypeError, "axis must be given for one argument"),
        ((PART, PART), 0, TypeError, "axis must be left out for several results"),
        (([PART, PART],), 0, TypeError, "each of parts must be.*got list of 2 items"),
        (([PART, PART, PART],), 0, TypeError, "each of parts must be.*got list of 3 items"),
        (tuple(PART), None, TypeError, "each of parts must be.*got ArrayImpl"),
        ((PART, "model"), None, TypeError, "each of parts must be.*got str"),
        ((PART, 0), None, TypeError, "each of parts must be.*got int"),
        ((PART, PART._replace(out=jnp.ones((4, 5)))), None, ValueError, "out must have one shape"),
        (
            (PART, PART._replace(out=jnp.ones((4, 6), "bfloat16"))),
            None,
            ValueError,
            "out must have one shape and dtype.*bfloat16",
        ),
        ((), None, ValueError, "at least one part"),
        (
            ((jnp.ones((0, 4, 6)), jnp.ones((0, 4)), jnp.ones((0, 4))),),
            0,
            ValueError,
            "at least one part",
        ),
    ],
)
def test_arguments(parts: Any, axis: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^merge_partials: .*{message}"):
        merge_partials(*parts, axis=axis)
