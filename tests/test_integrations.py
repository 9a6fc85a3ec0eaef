"""The functions of docs/integrations.md against the libraries that they stand in for."""

import ast
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import assert_close
from jax_ragged import merge_partials, ragged_attention
from programs import counts
from test_docs import ROOT, _blocks

eqx = pytest.importorskip("equinox", reason="pip install -e '.[integrations]'")
nnx = pytest.importorskip("flax.nnx", reason="pip install -e '.[integrations]'")

pytestmark = pytest.mark.full

BLOCKS = _blocks((ROOT / "docs" / "integrations.md").read_text())
# Both sides round each product and sum to 6e-8 of values of order 1.
FLOAT32 = 2e-6
B, S, Hq, Hkv, D = 4, 24, 4, 2, 8


def _of_page() -> dict[str, Any]:
    """The functions that the page defines, without the calls that it makes with them."""
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        tree = ast.parse(block.code)
        kept = (ast.Import, ast.ImportFrom, ast.FunctionDef)
        tree.body = [node for node in tree.body if isinstance(node, kept)]
        exec(compile(tree, "docs/integrations.md", "exec"), namespace)
    return namespace


PAGE = _of_page()


def _arrays(*shapes: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    seeds = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(seeds, shapes, strict=True)]


def _grouped(Q: int, dtype: str = "float32") -> list[jax.Array]:
    return _arrays((B, Q, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D), dtype=dtype)


def test_functions_have_at_most_13_lines() -> None:
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for block in BLOCKS
        for node in ast.parse(block.code).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {"windows", "dot_product_attention", "attention_fn", "attend", "decode"} < {*lengths}
    assert {"ragged_gqa", "ragged_decode_attention", "decode_attention"} < {*lengths}
    assert max(lengths.values()) <= 13


# jax.nn.dot_product_attention

CAUSAL, WINDOWS = (False, True), (None, 2, (3, 0), (1, 4))
QUERIES, KEYS = (None, [0, 3, 7, 1]), (None, [0, 24, 5, 9])


@pytest.mark.parametrize("Q", [1, 7, 24])
@pytest.mark.parametrize(
    ("causal", "window", "queries", "keys"), [*itertools.product(CAUSAL, WINDOWS, QUERIES, KEYS)]
)
def test_jax_nn(Q: int, causal: bool, window: Any, queries: Any, keys: Any) -> None:
    """Equal where the window has a position, and 0 elsewhere."""
    operands = _grouped(Q)
    limits: dict[str, Any] = {"is_causal": causal, "local_window_size": window}
    limits |= {
        name: None if n is None else jnp.minimum(jnp.array(n), most)
        for name, n, most in (
            ("query_seq_lengths", queries, Q), ("key_value_seq_lengths", keys, S)
        )
    }  # fmt: skip
    ours = PAGE["dot_product_attention"](*operands, **limits)
    theirs = jax.nn.dot_product_attention(*operands, **limits)
    i, t = np.arange(Q)[:, None], np.arange(S)
    left, right = (S, S) if window is None else (window, window) if window == 2 else window
    inside = np.broadcast_to((t >= i - left) & (t <= i + (0 if causal else right)), (B, Q, S))
    if keys is not None:
        inside = inside & (t < np.array(keys)[:, None, None])
    used = inside.any(-1)
    if queries is not None:
        used = used & (np.arange(Q) < np.array(queries)[:, None])
    assert_close(np.asarray(ours)[used], np.asarray(theirs)[used], FLOAT32)
    assert not np.asarray(ours)[~used].any()


def test_jax_nn_scale_and_gradients() -> None:
    operands = _grouped(S)

    def loss(function: Any) -> Any:
        return lambda *x: jnp.sin(function(*x, scale=0.3, is_causal=True)).sum()

    ours, theirs = (
        jax.grad(loss(f), argnums=(0, 1, 2))(*operands)
        for f in (PAGE["dot_product_attention"], jax.nn.dot_product_attention)
    )
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, np.asarray(want), 1e-5)  # sums of 24 queries, each as above


def test_jax_nn_log_sum_exp() -> None:
    query, key, value = _grouped(1)
    lengths = jnp.array([1, 5, 17, 24])
    _, theirs = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, return_residual=True
    )
    ours = ragged_attention(query, key, value, lengths, softmax_scale=D**-0.5)
    got = ours.max_logits + jnp.log(ours.denominator)
    assert_close(got, np.asarray(theirs), FLOAT32)


# flax


def _layers(**options: Any) -> list[Any]:
    options = {"num_heads": Hq, "num_kv_heads": Hkv, "in_features": 32} | options
    return [
        nnx.MultiHeadAttention(rngs=nnx.Rngs(0), **options, **more)
        for more in ({"attention_fn": PAGE["attention_fn"]}, {})
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_flax_layer(masked: bool, causal: bool) -> None:
    ours, theirs = _layers(decode=False)
    (x,) = _arrays((B, 8, 32))
    mask = None
    if masked:
        valid = jnp.arange(8) < jnp.array([8, 3, 1, 5])[:, None]
        mask = nnx.make_attention_mask(jnp.ones((B, 8)), valid)
    run = nnx.jit(lambda layer: layer(x, mask=mask, is_causal=causal))
    assert_close(run(ours), np.asarray(run(theirs)), FLOAT32)

    def loss(layer: Any) -> Any:
        return jnp.sin(layer(x, mask=mask, is_causal=causal)).sum()

    got, want = (jax.tree.leaves(nnx.grad(loss)(layer)) for layer in (ours, theirs))
    assert len(got) == 8
    # The gradient of the key's bias cancels to 0: a softmax does not change with it.
    scale = max(float(np.abs(w).max()) for w in want)
    for g, w in zip(got, want, strict=True):
        assert_close(g, np.asarray(w), 1e-5, scale=scale)  # sums over 32 tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flax_decodes(dtype: str) -> None:
    """With padding on the left and one index for all rows, until the cache is full."""
    ours, theirs = _layers(decode=True, dtype=jnp.dtype(dtype))
    for layer in (ours, theirs):
        layer.init_cache((B, 6, 32), dtype=jnp.dtype(dtype))
    padding = jnp.array([0, 1, 2, 5])
    mask = (jnp.arange(6) >= padding[:, None])[:, None, None]
    step = nnx.jit(lambda layer, x: layer(x, mask=mask))
    for t in range(6):
        x = jax.random.normal(jax.random.key(t), (B, 1, 32))
        got, want = step(ours, x), np.asarray(step(theirs, x), np.float64)
        used = np.asarray(padding) <= t
        # bfloat16 rounds to 2^-8, on the way here and there.
        tolerance = FLOAT32 if dtype == "float32" else 2**-7
        assert_close(np.asarray(got, np.float64)[used], want[used], tolerance)


def test_flax_refuses_weights() -> None:
    (x,) = _arrays((B, 8, 32))
    ours, _ = _layers(decode=False)
    with pytest.raises(NotImplementedError, match="to sow or to drop"):
        ours(x, sow_weights=True)
    ours, _ = _layers(decode=False, dropout_rate=0.5)
    assert ours(x, deterministic=True).shape == x.shape
    with pytest.raises(NotImplementedError, match="to sow or to drop"):
        ours(x, deterministic=False, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="squeeze"):
        ours(x, deterministic=True, mask=jnp.ones((B, Hq, 8, 8), bool))
    with pytest.raises(ValueError, match="neighbours"):
        ours(x, deterministic=True, mask=jnp.ones((B, 1, 8, 8), bool).at[0, 0, 0, 3].set(False))


# equinox


def _sequences() -> tuple[Any, jax.Array, jax.Array]:
    layer = eqx.nn.MultiheadAttention(
        Hq, 32, qk_size=8, vo_size=16, use_query_bias=True, use_output_bias=True,
        key=jax.random.key(1),
    )  # fmt: skip
    (x,) = _arrays((B, S, 32))
    t = jnp.arange(S)
    return layer, x, (t <= t[:, None]) & (t > t[:, None] - 5)


def test_equinox_layer() -> None:
    layer, x, mask = _sequences()

    def loss(function: Any) -> Any:
        def of(layer: Any, x: jax.Array) -> jax.Array:
            return jnp.sin(jax.vmap(lambda x: function(layer, x, x, x, mask))(x)).sum()

        return eqx.filter_value_and_grad(of)

    (ours, got), (theirs, want) = (
        loss(f)(layer, x) for f in (PAGE["attend"], lambda layer, *xs: layer(*xs))
    )
    assert_close(ours, np.asarray(theirs), 1e-5)  # sums over 96 tokens, here and below
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, np.asarray(w), 1e-5)


def test_equinox_decodes_in_one_equation() -> None:
    layer, x, _ = _sequences()
    step = jax.vmap(lambda *cache: PAGE["decode"](layer, *cache))
    keys, values = jnp.zeros((B, S, Hq, 8)), jnp.zeros((B, S, Hq, 16))
    causal = jnp.tril(jnp.ones((S, S), bool))
    want = np.asarray(jax.vmap(lambda x: layer(x, x, x, causal))(x))
    assert counts(step, x[:, 0], keys, values, jnp.zeros(B, jnp.int32))["ragged_attention"] == 1
    run = jax.jit(step, donate_argnums=(1, 2))
    for t in range(S):
        y, keys, values = run(x[:, t], keys, values, jnp.full(B, t))
        assert_close(y, want[:, t], FLOAT32)


# MaxText, by its contract: MaxText is in no package index.


def _maxtext_normalised(parts: list[Any]) -> Any:
    """MaxText's merge of results (o, m, l), o not normalised: sum e^(m_p - m) o_p / l."""
    m = jnp.max(jnp.stack([m for _, m, _ in parts]), axis=0)
    total = sum(jnp.exp(m_p - m) * l_p for _, m_p, l_p in parts)
    return sum(jnp.exp(m_p - m) * o_p for o_p, m_p, _ in parts) / total


@pytest.mark.parametrize("heads", [Hkv, Hq])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maxtext_contract(heads: int, dtype: str) -> None:
    query, key, value = _arrays((B, 1, heads, D), (B, S, Hkv, D), (B, S, Hkv, D), dtype=dtype)
    lengths = jnp.array([0, 1, 17, 24], jnp.int32)
    ours = PAGE["ragged_gqa"](query, key, value, lengths)
    wide = [x.astype("float32") for x in (query, key, value)]
    theirs = PAGE["contract"](*wide, lengths)
    # The kernel rounds weights to bfloat16, 2^-9 each, for the product with the values.
    tolerance = FLOAT32 if dtype == "float32" else 2**-8
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        assert got.dtype == jnp.float32
        largest = np.abs(want[1:]).max()
        assert_close(got[1:] / largest, np.asarray(want[1:] / largest), tolerance)
    assert not ours[0][0].any()
    assert not ours[2][0].any()


def test_maxtext_merges_two_caches() -> None:
    """Its prefill cache and its cache of new tokens, each of them empty in some row."""
    query, key, value = _grouped(1)
    early, late = jnp.array([0, 3, 8, 8], jnp.int32), jnp.array([2, 0, 16, 5], jnp.int32)
    halves = [(key[:, :8], value[:, :8], early), (key[:, 8:], value[:, 8:], late)]
    parts = [PAGE["ragged_gqa"](query, *half) for half in halves]
    whole = merge_partials(
        ragged_attention(query, key, value, early),
        ragged_attention(query, key, value, 8 + late, jnp.full(B, 8)),
    )
    assert_close(_maxtext_normalised(parts), np.asarray(whole.out), FLOAT32)


# ejkernel and EasyDeL

ENDS = [0, 5, 17, 24], [0, 3, 2, 9]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": (4, 0)},
    {"sliding_window": (4, 9), "softmax_scale": 0.7},
    {"logits_soft_cap": 1.5},
]
SINKS = [None, (3,), (Hkv, 3), (Hq, 2)]


def _ejkernel_definition(
    query: Any, key: Any, value: Any, start: Any, end: Any, aux: Any, **options: Any
) -> Any:
    """By `definition` of the page, which has one sink or more for each query head."""
    sinks = jnp.full((Hq, 1), -jnp.inf)
    if aux is not None:
        sinks = jnp.repeat(jnp.atleast_2d(aux), Hq // len(jnp.atleast_2d(aux)), axis=0)
    left, _ = options.get("sliding_window") or (S, S)
    begin = jnp.maximum(start, end - 1 - left)
    scale, cap = options.get("softmax_scale", D**-0.5), options.get("logits_soft_cap")
    return PAGE["definition"](query, key, value, begin, end, sinks, scale, cap)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SINKS)
def test_ejkernel(options: dict[str, Any], shape: Any) -> None:
    query, key, value, *aux = _arrays(
        (B, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D), *([shape] if shape else [])
    )
    end, start = (jnp.array(x, jnp.int32) for x in ENDS)
    operands = (query, key, value, start, end, *aux)
    ours = PAGE["ragged_decode_attention"](*operands, **options)
    sinks = aux[0] if aux else None
    want = _ejkernel_definition(query, key, value, start, end, sinks, **options)
    assert_close(ours[1:], np.asarray(want)[1:], FLOAT32)
    assert not ours[0].any()
    metadata = types.SimpleNamespace(starts=start[:, None], indexs=end[:, None])
    if not aux:
        easydel = PAGE["decode_attention"](query[:, None], key, value, metadata, **options)
        np.testing.assert_array_equal(easydel, ours[:, None])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SINKS)
def test_ejkernel_itself(options: dict[str, Any], shape: Any) -> None:
    """Its implementation in XLA. Its releases ask for one minor version of JAX, which is 0.10."""
    modules = pytest.importorskip("ejkernel.modules", reason="ejkernel asks for JAX 0.10")
    operands = _arrays((B, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D), *([shape] if shape else []))
    end, start = (jnp.array(x, jnp.int32) for x in ENDS)
    operands = [*operands[:3], start, end, *operands[3:]]
    want = modules.ragged_decode_attention(*operands, platform="xla", **options)
    assert_close(PAGE["ragged_decode_attention"](*operands, **options), np.asarray(want), FLOAT32)
