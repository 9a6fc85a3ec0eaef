"""Caches that servers keep: paged, heads first, quantised, and combinations of these."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import oracle
from cases import FLOAT32, Case, assert_close, assert_results
from forms import Form, FormCase, Stored
from jax_ragged import costs, quantize_cache, ragged_attention

GQA = Case("caches", (37, 8, 0, 33), (0, 7, 3, 20), Hq=4, Hkv=2, S=40, D=16, Dv=24)
QUERIES = Case("caches_queries", ((37, 36, 0), (4, 5, 9)), ((0, 30, 7), (4, 3, 0)), Q=3, S=40)
CAPPED = dataclasses.replace(GQA, name="caches_cap", logits_soft_cap=2.0, softmax_scale=0.5)


def formed(case: Case, *form: Any, block_size: int | None = 8) -> FormCase:
    """A case whose cache has a form: see `Form` for its properties, in order."""
    fields: dict[str, Any] = {
        field.name: getattr(case, field.name) for field in dataclasses.fields(Case)
    }
    fields["block_size"] = block_size
    return FormCase(**fields, form=Form(*form))


def call(stored: Stored, **more: Any) -> Any:
    """The call of a stored case, with changes."""
    return ragged_attention(**(stored.arrays | stored.case.params | more))


@pytest.fixture(params=["reference", "kernel"])
def implementation(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(("page", "block_size"), [(5, 16), (20, 4), (8, None), (40, 64), (1, 7)])
def test_blocks_of_pages(page: int, block_size: int | None) -> None:
    """A block is a part of a page, or several pages."""
    stored = formed(GQA, page, "BSHD", "int8", "token", block_size=block_size).stored()
    assert_results(call(stored, implementation="kernel"), stored.case, stored.dense)


def test_gradient_of_a_shared_page() -> None:
    """Two rows with the same pages: the pool's gradient is that of a cache which they share."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((2, 4, 8)), "float32")
    pool = jnp.asarray(rng.standard_normal((3, 4, 2, 8)), "float32")
    table = jnp.array([[2, 0], [2, 0]])
    lengths = jnp.array([7, 5])

    def paged(pool: Any) -> Any:
        return jnp.sin(ragged_attention(query, pool, pool, lengths, page_table=table).out).sum()

    def dense(pool: Any) -> Any:
        cache = pool[jnp.array([2, 0])].reshape(1, 8, 2, 8)
        cache = jnp.broadcast_to(cache, (2, 8, 2, 8))
        return jnp.sin(ragged_attention(query, cache, cache, lengths).out).sum()

    assert_close(jax.grad(paged)(pool), jax.grad(dense)(pool), 1e-5)
    assert not np.asarray(jax.grad(paged)(pool)[1]).any()


class TestVmap:
    """One equation, whatever is mapped; a pool that is not mapped is never copied."""

    def test_of_tables_over_one_pool(self) -> None:
        arrays = formed(GQA, 8).stored().arrays
        mapped = ("query", "lengths", "starts", "page_table")
        both = {n: np.stack([x, x[::-1]]) if n in mapped else x for n, x in arrays.items()}
        axes = {n: 0 if n in mapped else None for n in arrays}
        attend = jax.vmap(lambda x: ragged_attention(**x), (axes,))
        eqn: Any
        (eqn,) = [
            e for e in jax.make_jaxpr(attend)(both).eqns if e.primitive.name == "ragged_attention"
        ]
        assert eqn.invars[1].aval.size == arrays["key"].size

    def test_gradients_by_example(self) -> None:
        """A gradient of a pool for each example of a vmap that shares it."""
        stored = formed(CAPPED, 8).stored()
        query, pool = stored.arrays["query"], stored.arrays["key"]
        queries = np.stack([query, 2 * query])

        def loss(query: Any, key: Any) -> Any:
            return jnp.sin(call(stored, query=query, key=key).out).sum()

        grads = jax.vmap(jax.grad(loss, 1), (0, None))(queries, pool)
        for query, grad in zip(queries, grads, strict=True):
            assert_close(grad, jax.grad(loss, 1)(query, pool), 1e-6)
        total = jax.grad(lambda key: sum(loss(q, key) for q in queries))(pool)
        of_sum = jax.grad(lambda key: jax.vmap(loss, (0, None))(queries, key).sum())(pool)
        assert_close(of_sum, total, 1e-6)

    def test_of_scales(self, implementation: Any) -> None:
        stored = formed(GQA, 8, "BSHD", "int8", "token").stored()
        scales = np.stack([stored.scales["key_scale"], 2 * stored.scales["key_scale"]])

        def attend(scale: Any) -> Any:
            return call(stored, key_scale=scale, implementation=implementation)

        mapped = jax.vmap(attend)(scales)
        for i, scale in enumerate(scales):
            jax.tree.map(
                lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), mapped, attend(scale)
            )


class TestQuantize:
    @pytest.mark.parametrize(
        ("dtype", "step"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)]
    )
    def test_error(self, dtype: str, step: float) -> None:
        """Half a unit of int8, or a rounding of an 8-bit float, of a head's largest element."""
        x = np.random.default_rng(0).standard_normal((3, 5, 2, 16)).astype("float32")
        values, scale = quantize_cache(jnp.asarray(x), dtype)
        assert values.dtype == jnp.dtype(dtype)
        assert scale.shape == x.shape[:-1]
        back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[..., None]
        bound = step * np.abs(x).max(axis=-1, keepdims=True)
        assert (np.abs(back - x) <= bound * (1 + 1e-6)).all()

    @pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
    @pytest.mark.parametrize("size", [1e-30, 1e-33, 3e-36, 1e-37])
    def test_tiny_heads(self, dtype: str, size: float) -> None:
        """A head is not lost where its scale would be less than float32 holds with full precision.

        The scale is the least normal number there, and a unit of int8 is as much.
        """
        x = np.array([[0.25, -1.0, 0.5, 0.75]], np.float32) * np.float32(size)
        values, scale = quantize_cache(jnp.asarray(x), dtype)
        back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[..., None]
        step = {"int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}[dtype]
        least = 0.5 * float(np.finfo(np.float32).tiny)
        assert np.abs(back - x).max() <= max(step * size, least) * (1 + 1e-5)

    def test_zeros(self) -> None:
        values, scale = quantize_cache(jnp.zeros((2, 4)), "int8")
        assert not values.any()
        assert not scale.any()

    def test_errors(self) -> None:
        with pytest.raises(
            TypeError, match=r"^quantize_cache: dtype must be one of int8.*got 'int16'"
        ):
            quantize_cache(jnp.zeros((2, 4)), "int16")
        with pytest.raises(
            TypeError, match=r"^quantize_cache: x must have a float dtype; got int32"
        ):
            quantize_cache(jnp.zeros((2, 4), "int32"), "int8")


class TestStackOfLayers:
    """The layers of a model in one stack, carried through lax.scan and read as pages."""

    L, B, S, Hkv, D = 3, 2, 64, 2, 8

    def _operands(self) -> tuple[Any, ...]:
        rng = np.random.default_rng(0)
        stacks = rng.standard_normal((2, self.L, self.B, self.S, self.Hkv, self.D))
        query, new = rng.standard_normal((2, self.B, self.Hkv, self.D))
        keys, values, query, new = (jnp.asarray(x, "float32") for x in (*stacks, query, new))
        return keys, values, query, new, jnp.array([5, 60])

    def _carried(self, keys: Any, values: Any, query: Any, new: Any, lengths: Any) -> Any:
        """A page of S positions for each layer and row: nothing is sliced out of the stack."""
        row = jnp.arange(self.B)

        def layer(carry: Any, i: Any) -> Any:
            keys, values, x = carry
            keys, values = (c.at[i, row, lengths].set(new) for c in (keys, values))
            pools = (c.reshape(self.L * self.B, *c.shape[2:]) for c in (keys, values))
            table = (i * self.B + row)[:, None]
            keywords: dict[str, Any] = {"page_table": table, "block_size": 16}
            x = ragged_attention(x, next(pools), next(pools), lengths + 1, **keywords).out
            return (keys, values, x), None

        return jax.lax.scan(layer, (keys, values, query), jnp.arange(self.L))[0]

    def _scanned(self, keys: Any, values: Any, query: Any, new: Any, lengths: Any) -> Any:
        """The stack as xs and ys: every layer's cache is sliced out of it and written back."""
        row = jnp.arange(self.B)

        def layer(x: Any, caches: Any) -> Any:
            keys, values = (c.at[row, lengths].set(new) for c in caches)
            return ragged_attention(x, keys, values, lengths + 1, block_size=16).out, (keys, values)

        x, (keys, values) = jax.lax.scan(layer, query, (keys, values))
        return keys, values, x

    def test_values(self) -> None:
        operands = self._operands()
        jax.tree.map(
            lambda x, y: assert_close(x, y, 1e-6),
            jax.jit(self._carried)(*operands),
            jax.jit(self._scanned)(*operands),
        )

    @pytest.mark.optimized
    def test_no_layer_is_copied(self) -> None:
        operands = self._operands()
        one_layer = operands[0][0].nbytes

        def temporary(step: Any) -> int:
            donated = jax.jit(step, donate_argnums=(0, 1))
            analysis = donated.lower(*operands).compile().memory_analysis()
            assert analysis is not None
            return int(analysis.temp_size_in_bytes)

        assert temporary(self._carried) < one_layer
        assert temporary(self._scanned) >= 2 * one_layer


def _call(**changes: Any) -> Any:
    """A call that works, with changes."""
    arguments: dict[str, Any] = {
        "query": jnp.zeros((2, 4, 8)),
        "key": jnp.zeros((5, 3, 2, 8)),
        "value": jnp.zeros((5, 3, 2, 6)),
        "lengths": jnp.array([5, 3]),
        "page_table": jnp.zeros((2, 2), "int32"),
    }
    return ragged_attention(**{k: v for k, v in (arguments | changes).items() if v is not None})


def test_call_that_the_errors_start_from() -> None:
    assert _call().out.shape == (2, 4, 6)


_INT8 = {"key": jnp.zeros((5, 3, 2, 8), "int8"), "value": jnp.zeros((5, 3, 2, 6), "int8")}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"page_table": jnp.zeros(2, "int32")},
            ValueError,
            r"page_table must have shape \[B, W\].*got \(2,\)",
        ),
        (
            {"page_table": jnp.zeros((3, 2), "int32")},
            ValueError,
            r"page_table must have shape \[B, W\].*with B of query; got \(3, 2\)",
        ),
        (
            {"page_table": jnp.zeros((2, 2))},
            TypeError,
            "page_table must have an integer dtype; got float32",
        ),
        (
            {"key": jnp.zeros((5, 2, 8))},
            ValueError,
            r"key must have shape \[P, T, Hkv, D\]; got key \(5, 2, 8\)",
        ),
        ({"page_table": None}, ValueError, r"key must have shape \[B, S, Hkv, D\] with B and D"),
        (
            {"value": jnp.zeros((4, 3, 2, 6))},
            ValueError,
            r"value must have shape \[P, T, Hkv, Dv\]",
        ),
        ({"cache_layout": "SBHD"}, ValueError, "cache_layout must be 'BSHD'.*got 'SBHD'"),
        (
            {"key": jnp.zeros((5, 2, 3, 8)), "value": jnp.zeros((5, 2, 3, 6))},
            ValueError,
            r"heads of query must be a multiple.*cache \[P, Hkv, T, D\], pass cache_layout='BHSD'",
        ),
        (_INT8, TypeError, "key in int8 must come with key_scale.*quantize_cache"),
        ({"key_scale": 1.0}, TypeError, "key_scale must come with a quantised key.*float32"),
        (
            _INT8 | {"key_scale": np.ones(2, np.int32), "value_scale": 1.0},
            TypeError,
            "key_scale must have a float dtype; got int32",
        ),
        (
            _INT8 | {"key_scale": jnp.ones(3), "value_scale": 1.0},
            ValueError,
            r"key_scale must broadcast against \[P, T, Hkv\] = \(5, 3, 2\); got \(3,\)",
        ),
        (
            {"key": jnp.zeros((5, 3, 2, 8), "int16")},
            TypeError,
            "key must have the dtype of query or, quantised, one of int8",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^ragged_attention: .*{message}"):
        _call(**changes)


def test_costs_names_a_copy_of_the_cache() -> None:
    """Nothing is copied of a cache that is passed as it lies; see the two that follow."""
    query, key, lengths = jnp.zeros((2, 4, 8)), jnp.zeros((2, 16, 2, 8)), jnp.array([3, 4])
    found = costs(lambda q, k: ragged_attention(q, k, k, lengths), query, key)
    assert not found.equations[0].copies
    assert "copied" not in str(found)


@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (lambda key: key.swapaxes(1, 2), "transpose"),
        (lambda key: key[1], "slice"),
        (lambda key: key[jnp.array([1, 0])], "gather"),
        (lambda key: key.astype("float32"), "convert_element_type"),
        (lambda key: key.astype("float32") * 2.0, "mul"),
        (lambda key: jax.jit(lambda x: x.swapaxes(1, 2))(key)[None][0], "transpose"),
    ],
)
def test_costs_names_the_operation(make: Any, operation: str) -> None:
    shape = {"slice": (2, 2, 16, 2, 8), "transpose": (2, 2, 16, 8)}.get(operation, (2, 16, 2, 8))
    cast = operation in ("convert_element_type", "mul")
    key = jnp.zeros(shape, "bfloat16" if cast else "float32")
    lengths = jnp.array([3, 4])

    def call(query: Any, key: Any) -> Any:
        key = make(key)
        return ragged_attention(query, key, key, lengths)

    (eqn,) = costs(call, jnp.zeros((2, 4, 8)), key).equations
    assert {n: c.operation for n, c in eqn.copies.items()} == dict.fromkeys(
        ("key", "value"), operation
    )
    assert eqn.copies["key"].bytes == 2 * 16 * 2 * 8 * 4


def test_costs_names_a_scan() -> None:
    stack, lengths = jnp.zeros((3, 2, 16, 2, 8)), jnp.array([3, 4])

    def layers(query: Any, stack: Any) -> Any:
        body = lambda x, cache: (ragged_attention(x, cache, cache, lengths).out, None)  # noqa: E731
        return jax.lax.scan(body, query, stack)[0]

    found = costs(layers, jnp.zeros((2, 4, 8)), stack)
    assert found.equations[0].copies["key"].operation == "scan"
    assert "key is copied in front of it by scan, 2 KiB a trip" in str(found)


class TestSinks:
    """One more logit for each head, with the value 0."""

    @staticmethod
    def _expected(case: Case, operands: Any, sinks: Any) -> oracle.Results:
        """The oracle's results with the sink as one more position, which every window has."""
        out, m, denominator = case.expected(operands)
        total = denominator * np.exp(np.where(denominator > 0, m - sinks, -np.inf)) + 1
        largest = np.where(denominator > 0, np.maximum(m, sinks), sinks + 0 * m)
        return oracle.Results(
            out * (1 - 1 / total)[..., None], largest, total * np.exp(sinks - largest)
        )

    @pytest.mark.parametrize("case", [GQA, QUERIES, CAPPED], ids=lambda case: case.name)
    def test_values(self, case: Case, implementation: Any) -> None:
        operands = case.operands()
        sinks = jnp.array([0.5, -2.0, 3.0, 0.0])
        results = ragged_attention(
            *operands, sinks=sinks, **case.params, implementation=implementation
        )
        expected = self._expected(case, operands, np.asarray(sinks, np.float64))
        for name, got, want in zip(expected._fields, results, expected, strict=True):
            assert_close(got, want, FLOAT32, scale=1 + np.abs(want).max(), name=name)

    def test_none_for_a_head(self) -> None:
        """-inf is no sink, to the bit."""
        operands = GQA.operands()
        sinks = jnp.full(4, -jnp.inf)
        jax.tree.map(
            np.testing.assert_array_equal,
            ragged_attention(*operands, sinks=sinks),
            ragged_attention(*operands),
        )

    def test_gradients(self) -> None:
        """As of one more position whose key gives the sink's logit and whose value is 0."""
        query, key, value, lengths, _ = GQA.operands()
        sinks = jnp.array([0.5, -2.0, 3.0, 0.0])

        def loss(query: Any, value: Any, sinks: Any) -> Any:
            return jnp.sin(ragged_attention(query, key, value, lengths, sinks=sinks).out).sum()

        def dense(query: Any, value: Any, sinks: Any) -> Any:
            k, v = (jnp.repeat(x, 2, axis=2) for x in (jnp.asarray(key), value))
            z = jnp.einsum("bhd,bshd->bhs", query, k)
            inside = np.arange(GQA.S) < lengths[:, None, None]
            sink = jnp.broadcast_to(sinks[:, None], (4, 4, 1))
            z = jnp.concatenate([jnp.where(inside, z, -jnp.inf), sink], axis=2)
            out = jnp.einsum("bhs,bshe->bhe", jax.nn.softmax(z)[..., :-1], v)
            return jnp.sin(out).sum()

        got = jax.grad(loss, (0, 1, 2))(query, value, sinks)
        want = jax.grad(dense, (0, 1, 2))(query, value, sinks)
        for x, y in zip(got, want, strict=True):
            assert_close(x, y, 1e-5)

    def test_rounded_once(self) -> None:
        case = dataclasses.replace(GQA, dtype="bfloat16")
        operands, sinks = case.operands(), jnp.zeros(4)
        out = ragged_attention(*operands, sinks=sinks).out
        wide = ragged_attention(*operands, sinks=sinks, out_dtype="float32").out
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))

    @pytest.mark.parametrize("sinks", [jnp.zeros(3), jnp.zeros((1, 4)), jnp.zeros(4, "int32")])
    def test_errors(self, sinks: Any) -> None:
        with pytest.raises(ValueError, match=r"^ragged_attention: sinks must have shape \[Hq\]"):
            ragged_attention(*GQA.operands(), sinks=sinks)


@pytest.mark.parametrize(
    ("number", "page"),
    [
        (np.array([[2**31 + 5]], np.uint32), 4),
        (np.array([[2**32 + 1]], np.int64), 4),
        (np.array([[-(2**32) + 3]], np.int64), 0),
        (np.array([[2**64 - 1]], np.uint64), 4),
        (np.array([[-1]], np.int8), 0),
    ],
)
def test_page_numbers_of_any_integer_dtype(number: Any, page: int) -> None:
    """One that is no page is clamped to the nearest, also where int32 cannot hold it."""
    pool = jnp.arange(5.0)[:, None, None, None] * jnp.ones((5, 4, 1, 8))
    out = ragged_attention(jnp.ones((1, 2, 8)), pool, pool, jnp.array([4]), page_table=number).out
    np.testing.assert_array_equal(out, page)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_scale_for_each_head(layout: Any) -> None:
    """Of one dimension, it is for the heads in both layouts, also where S is Hkv."""
    query, key = jnp.ones((2, 4, 8)), jnp.ones((2, 2, 2, 8), "int8")
    scale = jnp.array([1.0, 3.0])
    keywords: dict[str, Any] = {"cache_layout": layout, "key_scale": 1.0, "value_scale": scale}
    out = ragged_attention(query, key, key, jnp.array([2, 2]), **keywords).out
    np.testing.assert_array_equal(out[0, :, 0], [1, 1, 3, 3])


@pytest.mark.parametrize("pool", [(0, 3, 2, 8), (5, 0, 2, 8)])
def test_pools_without_positions(pool: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^ragged_attention: key must have at least one page"):
        _call(key=jnp.zeros(pool), value=jnp.zeros(pool))


def test_gradients_of_no_pools() -> None:
    def gradient(pool: Any) -> Any:
        return jax.grad(lambda x: _call(key=x, value=x).out.sum())(pool)

    assert jax.vmap(gradient)(jnp.ones((0, 5, 3, 2, 8))).shape == (0, 5, 3, 2, 8)


@pytest.mark.parametrize(("rows", "heads"), [("x", None), (None, "x")])
@pytest.mark.parametrize("split", [False, True])
def test_sinks_on_an_explicit_mesh(rows: Any, heads: Any, split: bool) -> None:
    """Rows or heads are split over the mesh; the sinks as the heads, or not at all."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    operands, sinks = GQA.operands(), jnp.array([0.5, -2.0, 3.0, 0.0])
    expected = ragged_attention(*operands, sinks=sinks)
    with jax.set_mesh(mesh):
        specs = P(rows, heads), P(rows, None, heads), P(rows, None, heads), P(rows), P(rows)
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, s))
            for x, s in zip(operands, specs, strict=True)
        ]
        sinks = jax.device_put(sinks, jax.NamedSharding(mesh, P(heads if split else None)))
        results = ragged_attention(*placed, sinks=sinks)
    for got, want in zip(results, expected, strict=True):
        assert_close(got, want, FLOAT32)
