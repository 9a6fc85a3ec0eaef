"""Every message for bad input: raised while tracing, it names what is required and what was got."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cases import SMALL, SMALL_QUERIES
from jax_ragged import merge_partials, ragged_attention, reference_ragged_attention
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.dispatch import Target
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives import ragged_attention_p

F32 = np.float32
# SMALL: query (3, 2, 4), key (3, 6, 1, 4), value (3, 6, 1, 3), lengths and starts (3,).
OPERANDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"query": np.zeros((2, 4), F32)},
        ValueError,
        r"query must have shape \[B, Hq, D\] or.*\(2, 4",
    ),
    ({"query": np.zeros((1, 1, 3, 2, 4), F32)}, ValueError, "query must have shape.*jax.vmap"),
    (
        {"key": np.zeros((3, 6, 4), F32)},
        ValueError,
        r"key must have shape \[B, S, Hkv, D",
    ),
    (
        {"value": np.zeros((3, 6, 3), F32)},
        ValueError,
        r"value must have shape \[B, S, Hkv, Dv",
    ),
    ({"key": np.zeros((2, 6, 1, 4), F32)}, ValueError, "key must have.* B and D of query"),
    ({"key": np.zeros((3, 6, 1, 5), F32)}, ValueError, "key must have.* B and D of query"),
    ({"value": np.zeros((2, 6, 1, 3), F32)}, ValueError, "value must have.*B, S and Hkv of key"),
    ({"value": np.zeros((3, 7, 1, 3), F32)}, ValueError, "value must have.*B, S and Hkv of key"),
    ({"value": np.zeros((3, 6, 2, 3), F32)}, ValueError, "value must have.*B, S and Hkv of key"),
    (
        {"key": np.zeros((3, 6, 3, 4), F32), "value": np.zeros((3, 6, 3, 3), F32)},
        ValueError,
        "the heads of query must be a multiple.*Hq = 2.*for Hkv = 3",
    ),
    (
        {"key": np.zeros((3, 6, 0, 4), F32), "value": np.zeros((3, 6, 0, 3), F32)},
        ValueError,
        "the heads of query must be a multiple.*Hkv = 0",
    ),
    ({"lengths": np.zeros(2, np.int32)}, ValueError, r"lengths must have shape \(3,\).*got \(2,\)"),
    ({"lengths": np.zeros((3, 1), np.int32)}, ValueError, "lengths must have shape"),
    ({"starts": np.zeros(4, np.int32)}, ValueError, "starts must have shape"),
    ({"lengths": [[1, 2], [3]]}, TypeError, "lengths must be an array.*got list"),
    ({"lengths": np.zeros((3, 1), np.int32)}, ValueError, r".*Pass lengths\[:, 0\]"),
    ({"starts": np.zeros(1, np.int32)}, ValueError, r".*Pass starts\[0\], a scalar"),
    ({"lengths": np.zeros(4, np.int32)}, ValueError, r".*jnp.diff\(cu_seqlens\)"),
    ({"lengths": np.ones((3, 6), np.int32)}, ValueError, r".*mask.*pass mask.sum\(axis=-1\)"),
    ({"lengths": np.zeros(3, F32)}, TypeError, "lengths must have an integer dtype; got float32"),
    (
        {"lengths": np.ones((3, 6), bool)},
        TypeError,
        r"lengths must .*; got bool\[3, 6\]. Of a mask.*mask.sum\(axis.*windows_from_mask",
    ),
    ({"starts": np.ones((3, 6), bool)}, TypeError, r"starts must .*pass mask.argmax\(axis=-1\)"),
    ({"starts": np.zeros(3, F32)}, TypeError, "starts must have an integer dtype; got float32"),
    (
        {"query": np.zeros((3, 2, 4), np.int32)},
        TypeError,
        "query must be one of.*got int32",
    ),
    ({"key": np.zeros((3, 6, 1, 4), np.int8)}, TypeError, "key in int8 must come with key_scale"),
    (
        {"query": jnp.zeros((3, 2, 4), jnp.bfloat16)},
        TypeError,
        "key must have the dtype of query or, quantised, one of int8.*for query in bfloat16",
    ),
    (
        {"key": np.zeros((3, 6, 1, 4), np.uint8)},
        TypeError,
        r"key must have .*got uint8.*bitcast_convert_type\(key, jnp.float8_e4m3fn\)",
    ),
    (
        {"key": np.zeros((3, 6, 1, 4), np.int16)},
        TypeError,
        "key must have .*got int16.*Quantise the cache with jax_ragged.quantize_cache",
    ),
    ({"query": [[1.0]]}, ValueError, r"query must have shape.*got \(1, 1\). Insert the dimension"),
    ({"query": [[1.0], []]}, TypeError, "query must be an array, or anything.*got list"),
    ({"query": "q"}, TypeError, "query must be an array.*got str"),
    ({"query": np.array([None])}, TypeError, "query must be an array.*got ndarray of object"),
    ({"key": None}, TypeError, "key must be an array.*got NoneType"),
    ({"lengths": None}, TypeError, "lengths must .*NoneType.*windows of the whole cache, pass S"),
    ({"lengths": np.zeros((3, 2, 1, 6), F32)}, TypeError, "lengths must .*lengths is no bias"),
    ({"lengths": np.ones((3, 1, 1, 6), bool)}, TypeError, r"lengths must .*reshaped to \[B\] or"),
    (
        {"value": jax.ShapeDtypeStruct((3, 6, 1, 3), F32)},
        TypeError,
        "value must be an array.*got ShapeDtypeStruct",
    ),
]

PARAMETERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"softmax_scale": np.nan}, ValueError, "softmax_scale must be finite; got nan"),
    ({"softmax_scale": np.inf}, ValueError, "softmax_scale must be finite; got inf"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a Python number.*of type str"),
    ({"softmax_scale": True}, TypeError, "softmax_scale must be a Python number.*of type bool"),
    ({"softmax_scale": np.array(True)}, TypeError, "softmax_scale must be a Python number"),
    ({"softmax_scale": jnp.ones(2)}, TypeError, "softmax_scale must be .*fold factors of heads"),
    ({"softmax_scale": 1j}, TypeError, "softmax_scale must be a Python number.*of type complex"),
    ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be positive; got 0.0.*None"),
    ({"logits_soft_cap": -1}, ValueError, "logits_soft_cap must be positive; got -1.0"),
    ({"logits_soft_cap": np.inf}, ValueError, "logits_soft_cap must be finite; got inf"),
    ({"logits_soft_cap": 1e39}, ValueError, "logits_soft_cap must be from .* 1e.30.*got 1e.39"),
    ({"logits_soft_cap": float(np.finfo(F32).max)}, ValueError, "logits_soft_cap must be from"),
    ({"logits_soft_cap": 1e-39}, ValueError, "logits_soft_cap must be from 1.18e-38"),
    ({"logits_soft_cap": 10**400}, ValueError, "logits_soft_cap must be finite; got inf"),
    ({"softmax_scale": 1e39}, ValueError, "softmax_scale must be 0 or .*float32 holds; got 1e.39"),
    ({"softmax_scale": -1e39}, ValueError, "softmax_scale must be 0 or .*; got -1e.39.*Scale"),
    ({"softmax_scale": 1e-39}, ValueError, "softmax_scale must be 0 or .*; got 1e-39"),
    ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be finite; got inf"),
    ({"mask_value": -np.inf}, ValueError, "mask_value must be finite; got -inf"),
    ({"mask_value": -1e39}, ValueError, "mask_value must be finite in float32; got -1e"),
    ({"block_size": "auto"}, TypeError, "block_size must .*let the lowering.*static_argnames"),
    ({"block_size": 0}, ValueError, "block_size must be positive; got 0.*None"),
    ({"block_size": -8}, ValueError, "block_size must be positive; got -8"),
    ({"block_size": 8.0}, TypeError, "block_size must be a Python int or None; got 8.0.*float"),
    ({"block_size": True}, TypeError, "block_size must be a Python int or None.*bool"),
    ({"implementation": "xla"}, ValueError, "implementation must be 'reference'.* is plain XLA"),
    ({"out_dtype": "nothing"}, TypeError, "out_dtype must be a dtype or None; got 'nothing'.*str"),
    ({"out_dtype": 1.5}, TypeError, "out_dtype must be a dtype or None; got 1.5 of type float"),
    ({"out_dtype": "bfloat16"}, TypeError, "out_dtype must be the dtype of query, float32.*bfloat"),
    ({"out_dtype": "float64"}, TypeError, "out_dtype must be the dtype of query, float32.*float64"),
    ({"partition": ("x",)}, TypeError, "partition must be a jax.sharding.PartitionSpec, a N"),
    ({"partition": P("x", unreduced=frozenset("y"))}, ValueError, "partition must say how"),
    ({"key_scale": 1}, TypeError, "key_scale must come with a quantised key.*softmax_scale by it"),
    ({"value_scale": 1}, TypeError, "value_scale must come with a .*or multiply out by it"),
    ({"sinks": np.zeros((1, 2, 1), F32)}, ValueError, r"sinks must .*Pass jnp.ravel\(sinks\)"),
    ({"sinks": np.zeros(2, int)}, ValueError, r"sinks must .*int.*\[2\].*astype\(jnp.float32\)"),
    ({"sinks": 0.0}, ValueError, r"sinks must have shape \[Hq\].*jnp.full\(Hq, sink\)"),
]  # fmt: skip


def _id(x: Any) -> str | None:
    return "-".join(x) if isinstance(x, dict) else None


@pytest.mark.parametrize(("changed", "error", "message"), OPERANDS, ids=_id)
@pytest.mark.parametrize("fun", [ragged_attention, reference_ragged_attention])
def test_operands(fun: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    operands = {**SMALL.operands()._asdict(), **changed}
    with pytest.raises(error, match=f"^ragged_attention: {message}"):
        fun(**operands)


@pytest.mark.parametrize(("changed", "error", "message"), PARAMETERS, ids=_id)
def test_parameters(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^ragged_attention: {message}"):
        ragged_attention(*SMALL.operands(), **changed)


@pytest.mark.parametrize("out_dtype", ["float16", "float64", "int8"])
def test_out_dtype_of_narrow_operands(out_dtype: str) -> None:
    query, key, value, *windows = SMALL.operands()
    narrow = (x.astype(jnp.bfloat16) for x in (query, key, value))
    message = f"out_dtype must be the dtype of query, bfloat16, or the .*float32; got {out_dtype}"
    with pytest.raises(TypeError, match=f"^ragged_attention: {message}"):
        reference_ragged_attention(*narrow, *windows, out_dtype=out_dtype)


@pytest.mark.parametrize("cap", [1e20, 1e30])
def test_a_large_soft_cap_is_no_cap(cap: float) -> None:
    for block_size in (None, 2):
        run = functools.partial(ragged_attention, *SMALL.operands(), block_size=block_size)
        for got, want in zip(run(logits_soft_cap=cap), run(), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("fun", [ragged_attention, reference_ragged_attention])
def test_more_positions_than_int32_counts(fun: Any) -> None:
    query, cache = (jax.ShapeDtypeStruct(s, F32) for s in ((1, 1, 1), (1, 2**31, 1, 1)))
    with pytest.raises(ValueError, match=r"must have fewer than 2\*\*31 positions.*merge_partials"):
        jax.eval_shape(fun, query, cache, cache, np.ones(1, np.int32))


@pytest.mark.parametrize("fun", [ragged_attention, reference_ragged_attention])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("softmax_scale", "as D .. -0.5; mark it with static_argnames.*or multiply query by"),
        ("logits_soft_cap", "Compute it with Python or numpy, or mark it with static_argnames"),
        ("mask_value", "Compute it with Python or numpy, or mark it with static_argnames"),
    ],
)  # fmt: skip
def test_traced_number(fun: Any, name: str, advice: str) -> None:
    def run(number: Any) -> Any:
        return fun(*SMALL.operands(), **{name: number})

    message = rf"{name} must be a Python number, known while tracing; got a traced float32\[\].*"
    with pytest.raises(TypeError, match=message + advice):
        jax.jit(run)(0.5)
    with pytest.raises(TypeError, match=message + advice):
        jax.grad(lambda number: run(number).out.sum())(0.5)
    assert jax.jit(run, static_argnums=0)(0.5).out.shape == (3, 2, 3)


# Caches of B = 3 rows, S = 40 positions, Hkv = 2 heads of D = 16, for 4 query heads.
LAYOUTS = [
    ((3, 2, 40, 16), (3, 4, 16), {}, r"For a cache \[B, Hkv, S, D\], pass cache_layout='BHSD'"),
    (
        (3, 40, 2, 16),
        (3, 4, 16),
        {"cache_layout": "BHSD"},
        r"For a cache \[B, S, Hkv, D\], pass cache_layout='BSHD'",
    ),
    (
        (9, 5, 2, 16),
        (3, 4, 16),
        {},
        r"For a pool of pages \[P, T, Hkv, D\], pass page_table=, integers \[B, W\], too",
    ),
    (
        (9, 2, 5, 16),
        (3, 4, 16),
        {},
        r"pool of pages \[P, Hkv, T, D\], pass page_table=.* and cache_layout='BHSD' too",
    ),
    (
        (9, 2, 5, 16),
        (3, 4, 16),
        {"page_table": np.zeros((3, 8), np.int32)},
        r"For a cache \[P, Hkv, T, D\], pass cache_layout='BHSD'",
    ),
    ((3, 40, 2, 16), (3, 4, 1, 16), {}, r"query \[B, Hq, Q, D\], pass jnp.swapaxes\(query, 1, 2"),
    ((3, 2, 16, 40), (3, 4, 16), {}, "The head dimension D comes last in every layout"),
    ((2, 3, 40, 2, 16), (3, 4, 16), {}, r"pages of S positions, key.reshape\(L \* B.*page_table="),
    ((3, 40, 16), (3, 4, 16), {}, r"Insert the dimension of one head, key\[:, :, None\]"),
    ((52, 2, 16), (3, 4, 16), {}, r"Packed sequences \[tokens, Hkv, D\] are not taken"),
    ((40, 3, 2, 16), (3, 4, 16), {}, r"pages.*Keep a cache \[S, B, Hkv, D\] as \[B, S, Hkv, D\]"),
    (
        (3, 2, 40, 16),
        (3, 4, 1, 16),
        {},
        r"\[B, Hq, Q, D\], pass jnp.swapaxes\(query, 1, 2\), and cache_layout='BHSD'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "query", "keywords", "advice"), LAYOUTS)
def test_layouts(key: Any, query: Any, keywords: dict[str, Any], advice: str) -> None:
    """Both shapes are shown, with the letters that are required, and a way on."""
    cache, lengths = np.zeros(key, F32), np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=advice) as raised:
        ragged_attention(np.zeros(query, F32), cache, cache, lengths, **keywords)
    for part in (str(key), str(query), ", D]"):
        assert part in str(raised.value)


def test_flat_page_table() -> None:
    query, pool = np.zeros((3, 4, 16), F32), np.zeros((9, 5, 2, 16), F32)
    with pytest.raises(ValueError, match=r"page_table must have shape \[B, W\].*reshape\(B, -1\)"):
        ragged_attention(query, pool, pool, 3, page_table=np.zeros(24, np.int32))


def test_scales_of_rows_and_heads() -> None:
    query, cache = np.zeros((3, 4, 16), F32), np.zeros((3, 40, 2, 16), np.int8)
    scale = np.ones((3, 2), F32)
    run = functools.partial(ragged_attention, query, cache, cache, 3)
    with pytest.raises(ValueError, match=r"key_scale must broadcast .* as in key_scale\[:, None\]"):
        run(key_scale=scale, value_scale=scale)
    assert run(key_scale=scale[:, None], value_scale=scale[:, None]).out.shape == (3, 4, 16)


def test_integer_scales() -> None:
    query, cache = np.zeros((3, 4, 16), F32), np.zeros((3, 40, 2, 16), np.int8)
    scale = np.ones((3, 40, 2), np.int32)
    with pytest.raises(TypeError, match=r"key_scale must have.*jnp.asarray\(key_scale, jnp"):
        ragged_attention(query, cache, cache, 3, key_scale=scale, value_scale=scale)


def test_raised_while_tracing() -> None:
    operands = SMALL.operands()._replace(lengths=np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="lengths must have shape"):
        jax.eval_shape(ragged_attention, *operands)


def test_windows_of_queries() -> None:
    operands = SMALL_QUERIES.operands()._replace(lengths=np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\) or \(2, 2\).*got \(2, 3"):
        ragged_attention(*operands)


# Keywords of other libraries, and what the answer holds.
KEYWORDS = {
    "scale": "called softmax_scale here",
    "sm_scale": "called softmax_scale here",
    "mask": r"lengths=mask.sum\(axis=-1\)",
    "is_causal": r"lengths \[B, Q\]: the position of the query, plus 1",
    "sliding_window": "starts=lengths - window",
    "window": "starts=lengths - window",
    "seq_lens": "called lengths here",
    "kv_lens": "called lengths here",
    "context_lens": "called lengths here",
    "sequence_end": "called lengths here",
    "sequence_start": "called starts here",
    "bias": "one more column of query and key",
    "soft_cap": "called logits_soft_cap here",
    "attn_logits_soft_cap": "called logits_soft_cap here",
    "query_start_loc": r"query \[B, Q, Hq, D\]",
    "return_residual": r"max_logits \+ log\(denominator\)",
    "dropout_p": "no dropout",
    "softmax_scal": "Did you mean softmax_scale",
}  # fmt: skip
# For arguments that the definition lacks.
FORMS = {
    "block_tables": ("called page_table here", "takes page_table"),
    "k_scale": ("called key_scale here", "takes key_scale"),
    "s_aux": ("called sinks here", "takes sinks"),
    "mesh": ("partition=NamedSharding", "unexpected keyword argument 'mesh'"),
    "backend": ("called implementation here", "This is the definition itself"),
    "page_table": (None, r"ragged_attention\(..., implementation='reference'\) takes page_table"),
}
BOTH: list[Any] = [ragged_attention, reference_ragged_attention]


@pytest.mark.parametrize("fun", BOTH)
@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_of_other_libraries(fun: Any, name: str) -> None:
    start = rf"^{fun.__name__}\(\) got an unexpected keyword argument '{name}'. .*"
    with pytest.raises(TypeError, match=start + KEYWORDS[name]):
        fun(*SMALL.operands(), **{name: None})


@pytest.mark.parametrize("name", FORMS)
def test_keywords_for_arguments_of_one(name: str) -> None:
    for fun, message in zip(BOTH, FORMS[name], strict=True):
        if message is not None:
            with pytest.raises(TypeError, match=message):
                fun(*SMALL.operands(), **{name: None})


def test_every_keyword_of_jax_has_an_answer() -> None:
    parameters = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(ragged_attention).parameters
    others = set(parameters) - set(ours)
    assert {"bias", "mask", "scale", "is_causal", "key_value_seq_lengths"} <= others
    for name in others:
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'\. {name}"):
            BOTH[0](*SMALL.operands(), **{name: None})


def test_all_keywords_at_once() -> None:
    """The call of FlashAttention's users."""
    query, key, value, lengths, _ = SMALL.operands()
    answers = (
        "'k_cache'. k_cache is called key here. v_cache is called value here. "
        "cache_seqlens is called lengths here. causal: Pass a window for each query"
    )
    with pytest.raises(TypeError, match=re.escape(answers)):
        BOTH[0](query, k_cache=key, v_cache=value, cache_seqlens=lengths, causal=True)


def test_unlike_any_keyword() -> None:
    """Python's own words where there is nothing to add."""
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'xyz'") as raised:
        ragged_attention(*SMALL.operands(), xyz=None)  # type: ignore[call-arg]
    assert str(raised.value).endswith("'xyz'")


@pytest.mark.parametrize("fun", [*BOTH, merge_partials])
def test_signatures_are_exact(fun: Any) -> None:
    parameters = inspect.signature(fun).parameters
    assert inspect.Parameter.VAR_KEYWORD not in {p.kind for p in parameters.values()}
    assert inspect.getdoc(fun)


def test_kernel_where_there_is_none() -> None:
    params = RaggedAttentionParams(implementation="kernel")
    query, key, value = (jnp.zeros(s) for s in ((1, 1, 2, 4), (1, 6, 1, 4), (1, 6, 1, 3)))
    windows = jnp.zeros((1, 1), jnp.int32)
    operands = Operands(query, key, value, windows, windows)
    with pytest.raises(NotImplementedError, match=r"'kernel' cannot be honoured on default.*Pass"):
        Target("default").forward(operands, params)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"key": np.zeros((3, 6, 4), F32)}, ValueError, r"key must have shape \[\*N, S, Hkv, D\]"),
        ({"lengths": np.zeros(2, np.int32)}, ValueError, "leading dimension 0 of lengths must"),
        ({"lengths": np.zeros(3, np.int8)}, TypeError, "lengths must have dtype int32"),
        ({"value": np.zeros((3, 7, 1, 3), F32)}, ValueError, "S must be one size in all operands"),
        ({"key": np.zeros((3, 6, 1, 4), np.float16)}, TypeError, "key must have dtype float32"),
        (
            {"key": np.zeros((3, 6, 3, 4), F32), "value": np.zeros((3, 6, 3, 3), F32)},
            ValueError,
            "the query heads must be a multiple of the key heads",
        ),
    ],
)  # fmt: skip
def test_bound_directly(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    operands = {**SMALL.operands()._asdict(), **changed}
    with pytest.raises(error, match=f"^ragged_attention: {message}"):
        ragged_attention_p.bind(
            *map(jnp.asarray, operands.values()), params=RaggedAttentionParams()
        )
