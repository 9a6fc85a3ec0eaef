"""costs: figures against counts by hand, trip counts, known and unknown windows, the table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

from jax_ragged import Costs, EquationCost, costs, ragged_attention

B, Q, Hq, Hkv, S, D, Dv = 3, 2, 4, 2, 64, 16, 8
QUERY = jax.ShapeDtypeStruct((B, Hq, D), jnp.bfloat16)
QUERIES = jax.ShapeDtypeStruct((B, Q, Hq, D), jnp.bfloat16)
KEY = jax.ShapeDtypeStruct((B, S, Hkv, D), jnp.bfloat16)
VALUE = jax.ShapeDtypeStruct((B, S, Hkv, Dv), jnp.bfloat16)
LENGTHS: Any = np.array([10, 0, 100], np.int32)
TOKENS = 10 + 0 + 64

# Bytes of one position of key and of value, and of the rest that the forward reads and writes:
# query, lengths, one 0 for all starts; out and two statistics.
K, V = Hkv * D * 2, Hkv * Dv * 2
IO = B * Hq * D * 2 + B * 4 + 4 + B * Hq * (Dv * 2 + 4 + 4)
# The derivatives start from an out of float32.
UNROUNDED = B * Hq * Dv * 2


def _sum(*amounts: int | None) -> int:
    return sum(n for n in amounts if n is not None)


def _only(found: Costs) -> EquationCost:
    (eqn,) = found.equations
    return eqn


def test_forward() -> None:
    eqn = _only(costs(ragged_attention, QUERY, KEY, VALUE, LENGTHS))
    assert eqn.name == "ragged_attention"
    assert eqn.sizes == {"B": B, "Q": 1, "Hq": Hq, "Hkv": Hkv, "S": S, "D": D, "Dv": Dv}
    assert eqn.dtype == "bfloat16"
    assert eqn.trips == 1
    assert not eqn.conditional
    assert eqn.bytes == TOKENS * (K + V) + IO
    assert eqn.bytes_at_most == B * S * (K + V) + IO
    assert eqn.flops == 2 * Hq * TOKENS * (D + Dv)
    assert eqn.flops_at_most == 2 * Hq * B * S * (D + Dv)
    assert eqn.intensity == 2 * Hq * TOKENS * (D + Dv) / (TOKENS * (K + V) + IO)


def test_windows_that_are_not_known() -> None:
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    eqn = _only(costs(ragged_attention, QUERY, KEY, VALUE, lengths))
    assert eqn.bytes is None
    assert eqn.flops is None
    assert eqn.intensity == eqn.flops_at_most / eqn.bytes_at_most


def test_queries_that_share_a_cache_read_it_once() -> None:
    """Bytes of the union of a row's windows, flops of each."""
    lengths: Any = np.array([[10, 12], [0, 0], [64, 5]], np.int32)
    starts: Any = np.array([[2, 8], [0, 0], [60, 0]], np.int32)
    eqn = _only(costs(ragged_attention, QUERIES, KEY, VALUE, lengths, starts))
    moved = Q * (B * Hq * D * 2 + 2 * B * 4 + B * Hq * (Dv * 2 + 4 + 4))
    assert eqn.sizes["Q"] == Q
    assert eqn.bytes == (10 + 0 + 4 + 5) * (K + V) + moved
    assert eqn.flops == 2 * Hq * (8 + 4 + 4 + 5) * (D + Dv)
    assert eqn.bytes_at_most == B * S * (K + V) + moved


def test_mapped() -> None:
    """A vmap over queries shares the cache, one over caches does not."""
    queries = jax.ShapeDtypeStruct((5, *QUERY.shape), QUERY.dtype)
    shared = jax.vmap(ragged_attention, (0, None, None, None))
    eqn = _only(costs(shared, queries, KEY, VALUE, LENGTHS))
    assert (eqn.sizes["B"], eqn.sizes["Q"]) == (B, 5)
    others = B * 4 + 4 + 5 * (IO - B * 4 - 4)
    assert eqn.bytes == TOKENS * (K + V) + others
    assert eqn.flops == 5 * 2 * Hq * TOKENS * (D + Dv)
    caches = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in (KEY, VALUE)]
    eqn = _only(costs(jax.vmap(ragged_attention, (0, 0, 0, None)), queries, *caches, LENGTHS))
    assert (eqn.sizes["B"], eqn.sizes["Q"]) == (5 * B, 1)
    assert eqn.bytes == 5 * TOKENS * (K + V) + others


def _loss(query: Any, key: Any, value: Any, lengths: Any) -> Any:
    return ragged_attention(query, key, value, lengths).out.sum()


def test_reverse() -> None:
    found = costs(jax.grad(_loss, (0, 1, 2)), QUERY, KEY, VALUE, LENGTHS)
    assert [e.name for e in found.equations] == ["ragged_attention", "ragged_attention_vjp"]
    eqn = found.equations[1]
    # Reads the forward's operands and results and the cotangent of out; writes three gradients,
    # those of the cache whole.
    moved = TOKENS * (K + V) + IO + UNROUNDED + B * Hq * Dv * 2 + B * Hq * D * 2 + B * S * (K + V)
    assert eqn.bytes == moved
    # Logits, the products with the cotangent, and three gradients.
    assert eqn.flops == 2 * Hq * TOKENS * (3 * D + 2 * Dv)
    assert found.bytes == _sum(found.equations[0].bytes, moved)
    assert found.flops == _sum(found.equations[0].flops, eqn.flops)
    # Of query alone nothing the size of the cache is written.
    eqn = costs(jax.grad(_loss), QUERY, KEY, VALUE, LENGTHS).equations[1]
    assert eqn.bytes == TOKENS * (K + V) + IO + UNROUNDED + B * Hq * Dv * 2 + B * Hq * D * 2
    assert eqn.flops == 2 * Hq * TOKENS * (2 * D + Dv)


def test_gradient_of_value_reads_no_value() -> None:
    eqn = costs(jax.grad(_loss, 2), QUERY, KEY, VALUE, LENGTHS).equations[1]
    residuals = IO - B * Hq * Dv * 2  # out is not needed either
    assert eqn.bytes == TOKENS * K + residuals + B * Hq * Dv * 2 + B * S * V
    assert eqn.flops == 2 * Hq * TOKENS * (D + Dv)


def test_forward_mode() -> None:
    def tangent(query: Any, key: Any, value: Any, key_dot: Any) -> Any:
        attend = lambda k: tuple(ragged_attention(query, k, value, LENGTHS))  # noqa: E731
        return jax.jvp(attend, (key,), (key_dot,))

    eqn = costs(tangent, QUERY, KEY, VALUE, KEY).equations[1]
    assert eqn.name == "ragged_attention_jvp"
    assert eqn.bytes == TOKENS * (2 * K + V) + IO + UNROUNDED + B * Hq * (Dv * 2 + 4 + 4)
    assert eqn.flops == 2 * Hq * TOKENS * (2 * D + Dv)


def _step(query: Any, key: Any, value: Any, lengths: Any) -> Any:
    out = ragged_attention(query, key, value, lengths).out
    return jnp.concatenate([out, out], -1)


def test_scans() -> None:
    """Trip counts multiply; lengths that grow from trip to trip are followed."""

    def decode(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            query, lengths = carry
            layer = lambda q, _: (jax.checkpoint(_step)(q, key, value, lengths), None)  # noqa: E731
            query, _ = jax.lax.scan(layer, query, None, length=7)
            return (query, lengths + 1), None

        return jax.lax.scan(step, (query, lengths), None, length=5)

    eqn = _only(costs(decode, QUERY, KEY, VALUE, LENGTHS))
    assert eqn.trips == 35
    assert eqn.where[:2] == ("scan x5", "scan x7")
    tokens = 7 * sum(10 + i + i + 64 for i in range(5))
    assert eqn.bytes == tokens * (K + V) + 35 * IO
    assert eqn.bytes_at_most == 35 * (B * S * (K + V) + IO)
    assert eqn.flops == 2 * Hq * tokens * (D + Dv)


@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_lengths(reverse: bool) -> None:
    """Elements of a scanned operand, and the carry that a scan leaves."""
    steps = np.array([[1, 2, 3], [4, 5, 6]], np.int32)

    def run(query: Any, key: Any, value: Any, steps: Any) -> Any:
        def step(lengths: Any, more: Any) -> Any:
            out = ragged_attention(query, key, value, lengths).out
            return lengths * 2 + more, out

        lengths, _ = jax.lax.scan(step, jnp.zeros(B, jnp.int32), steps, reverse=reverse)
        return ragged_attention(query, key, value, lengths)

    inside, after = costs(run, QUERY, KEY, VALUE, steps).equations
    first, last = (steps[1], steps[0]) if reverse else (steps[0], steps[1])
    assert inside.bytes == first.sum() * (K + V) + 2 * IO
    assert after.bytes == (2 * first + last).sum() * (K + V) + IO


def test_while() -> None:
    """The trip count is not in the jaxpr, and no total can be given."""

    def run(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        body = lambda q: _step(q, key, value, lengths)  # noqa: E731
        return jax.lax.while_loop(lambda q: q.sum() > 0, body, query)

    found = costs(run, QUERY, KEY, VALUE, LENGTHS)
    eqn = _only(found)
    assert eqn.trips is None
    assert eqn.bytes == TOKENS * (K + V) + IO
    assert found.bytes is None
    assert found.bytes_at_most is None
    assert found.flops is None


def test_cond() -> None:
    """A branch that is known alone, else all, and then the total is an upper bound."""

    def run(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        heavy = lambda q: _step(q, key, value, lengths)  # noqa: E731
        query = jax.lax.cond((lengths > 5).any(), heavy, lambda q: q, query)
        return jax.lax.cond(query.sum() > 0, lambda q: q, heavy, query)

    found = costs(run, QUERY, KEY, VALUE, LENGTHS)
    assert [e.conditional for e in found.equations] == [False, True]
    assert found.bytes is None
    assert found.bytes_at_most == 2 * (B * S * (K + V) + IO)
    found = costs(run, QUERY, KEY, VALUE, np.zeros(B, np.int32))
    assert [e.conditional for e in found.equations] == [True]


def test_loops_and_calls_round_the_lengths() -> None:
    """Integer arithmetic is followed through jit, cond and custom rules; floats are not."""

    def run(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        lengths = jax.jit(lambda n: jnp.where(n > 20, 20, n) + 1)(lengths)
        lengths = jax.lax.cond(True, lambda n: n[::-1], lambda n: n, lengths)
        known = ragged_attention(query, key, value, lengths)
        grown = lengths + (query.sum() > 0)
        return known, ragged_attention(query, key, value, grown)

    known, unknown = costs(run, QUERY, KEY, VALUE, LENGTHS).equations
    assert known.bytes == (11 + 1 + 21) * (K + V) + IO
    assert unknown.bytes is None


def test_no_model_is_run() -> None:
    """The cache is never made, nor is a callback called."""

    def fail(_: Any) -> Any:
        raise AssertionError

    def run(query: Any, lengths: Any) -> Any:
        huge = jnp.zeros((B, 10**9, Hkv, D), jnp.bfloat16)
        more = jax.pure_callback(fail, jax.ShapeDtypeStruct((B,), jnp.int32), lengths)
        return ragged_attention(query, huge, huge, lengths), ragged_attention(
            query, huge, huge, more
        )

    known, unknown = costs(run, QUERY, LENGTHS).equations
    assert known.bytes == 110 * 2 * K + IO + B * Hq * (D - Dv) * 2
    assert unknown.bytes is None


def test_jaxprs() -> None:
    """As make_jaxpr returns them, with and without arguments."""
    jaxpr = jax.make_jaxpr(ragged_attention)(QUERY, KEY, VALUE, LENGTHS)
    assert _only(costs(jaxpr)).bytes is None
    eqn = _only(costs(jaxpr, QUERY, KEY, VALUE, LENGTHS))
    assert eqn.bytes == TOKENS * (K + V) + IO
    with pytest.raises(ValueError, match="one argument for each of its inputs"):
        costs(jaxpr, QUERY)


def test_lengths_that_the_function_holds() -> None:
    held = jnp.asarray(LENGTHS)
    eqn = _only(costs(lambda q, k, v: ragged_attention(q, k, v, held), QUERY, KEY, VALUE))
    assert eqn.bytes == TOKENS * (K + V) + IO


def test_under_jit() -> None:
    """While another function is traced, costs only reads."""
    seen = []

    @jax.jit
    def run(lengths: Any) -> Any:
        seen.append(costs(ragged_attention, QUERY, KEY, VALUE, LENGTHS))
        seen.append(costs(ragged_attention, QUERY, KEY, VALUE, lengths))
        return lengths

    run(LENGTHS)
    assert _only(seen[0]).bytes == TOKENS * (K + V) + IO
    assert _only(seen[1]).bytes is None


def test_shard_map_counts_one_shard() -> None:
    mesh = jax.make_mesh(
        (2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2]
    )
    run = jax.shard_map(
        ragged_attention,
        mesh=mesh,
        in_specs=(P(None, "model"), P(None, None, "model"), P(None, None, "model"), P()),
        out_specs=P(None, "model"),
    )
    eqn = _only(costs(run, QUERY, KEY, VALUE, LENGTHS))
    assert eqn.where[0] == "shard_map"
    assert eqn.sizes["Hkv"] == Hkv // 2
    assert eqn.trips == 1
    assert eqn.bytes is None


def test_a_program_without_any() -> None:
    found = costs(lambda x: x + 1, 1.0)
    assert found.equations == ()
    assert found.bytes == found.bytes_at_most == found.flops == 0
    assert str(found).splitlines()[0].startswith("equation")


def test_table() -> None:
    """One line a row, columns aligned, unknown figures as question marks."""
    big = jax.ShapeDtypeStruct((B, 2**20, Hkv, D), jnp.bfloat16)

    def run(query: Any, lengths: Any) -> Any:
        key = jnp.zeros(big.shape, big.dtype)
        first = ragged_attention(query, key, key, LENGTHS)
        return first, ragged_attention(query, key, key, lengths)

    table = str(costs(run, QUERY, jax.ShapeDtypeStruct((B,), jnp.int32)))
    head, known, unknown, total = table.splitlines()
    assert head.split()[:3] == ["equation", "in", "trips"]
    assert known.split()[:10] == "ragged_attention - 1 3 1 4 2 1048576 16 16".split()  # noqa: SIM905
    assert "384 Mi" in known
    assert "?" in unknown
    assert "768 Mi" in total
    assert "?" in total
    assert head.index("dtype") + len("dtype") == known.index("bfloat16") + len("bfloat16")


def test_symbolic_shapes_are_refused() -> None:
    b = export.symbolic_shape("b")[0]
    arrays = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (QUERY, KEY, VALUE)]
    with pytest.raises(ValueError, match="every size must be known"):
        costs(ragged_attention, *arrays, jax.ShapeDtypeStruct((b,), jnp.int32))


@pytest.mark.parametrize("wrong", [3, None, "f", jnp.ones(3), (jnp.ones(3),)], ids=str)
def test_neither_a_function_nor_a_jaxpr(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^costs: fn_or_jaxpr must be a function or a jaxpr; got"):
        costs(wrong)
