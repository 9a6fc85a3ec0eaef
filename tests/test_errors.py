"""Every message for bad input: raised while tracing, it names what is required and what was got."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import SMALL, SMALL_QUERIES
from jax_ragged import ragged_attention, reference_ragged_attention
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
        "the heads of query must be a multiple.*Hq = 2 for Hkv = 3",
    ),
    (
        {"key": np.zeros((3, 6, 0, 4), F32), "value": np.zeros((3, 6, 0, 3), F32)},
        ValueError,
        "the heads of query must be a multiple.*Hkv = 0",
    ),
    ({"lengths": np.zeros(2, np.int32)}, ValueError, r"lengths must have shape \(3,\).*got \(2,\)"),
    ({"lengths": np.zeros((3, 1), np.int32)}, ValueError, "lengths must have shape"),
    ({"starts": np.zeros(4, np.int32)}, ValueError, "starts must have shape"),
    (
        {"lengths": np.int32(3)},
        TypeError,
        "lengths must be a jax.Array or.*; got int32",
    ),
    ({"lengths": np.zeros(3, F32)}, TypeError, "lengths must have an integer dtype; got float32"),
    ({"lengths": np.zeros(3, bool)}, TypeError, "lengths must have an integer dtype; got bool"),
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
    ({"query": [[1.0]]}, TypeError, "query must be a jax.Array or numpy.ndarray; got list"),
    ({"key": None}, TypeError, "key must be a jax.Array or numpy.ndarray; got NoneType"),
    ({"starts": 0}, TypeError, "starts must be a jax.Array or numpy.ndarray; got int"),
]

PARAMETERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"softmax_scale": np.nan}, ValueError, "softmax_scale must be finite; got nan"),
    ({"softmax_scale": np.inf}, ValueError, "softmax_scale must be finite; got inf"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a Python number.*of type str"),
    ({"softmax_scale": True}, TypeError, "softmax_scale must be a Python number.*of type bool"),
    ({"softmax_scale": jnp.ones(())}, TypeError, "softmax_scale must be a Python number"),
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
    ({"block_size": 0}, ValueError, "block_size must be positive; got 0.*None"),
    ({"block_size": -8}, ValueError, "block_size must be positive; got -8"),
    ({"block_size": 8.0}, TypeError, "block_size must be a Python int or None; got 8.0.*float"),
    ({"block_size": True}, TypeError, "block_size must be a Python int or None.*bool"),
    ({"implementation": "fast"}, ValueError, "implementation must be 'reference'"),
    ({"out_dtype": "nothing"}, TypeError, "out_dtype must be a dtype or None; got 'nothing'.*str"),
    ({"out_dtype": 1.5}, TypeError, "out_dtype must be a dtype or None; got 1.5 of type float"),
    ({"out_dtype": "bfloat16"}, TypeError, "out_dtype must be the dtype of query, float32.*bfloat"),
    ({"out_dtype": "float64"}, TypeError, "out_dtype must be the dtype of query, float32.*float64"),
    ({"partition": ("x",)}, TypeError, "partition must be a jax.sharding.PartitionSpec or None"),
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
    message = (
        f"out_dtype must be the dtype of query, bfloat16, or that of the.*float32; got {out_dtype}"
    )
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


def test_traced_scale() -> None:
    def run(scale: Any) -> Any:
        return ragged_attention(*SMALL.operands(), softmax_scale=scale)

    with pytest.raises(TypeError, match=r"known while tracing.*Multiply query"):
        jax.jit(run)(0.5)


def test_raised_while_tracing() -> None:
    operands = SMALL.operands()._replace(lengths=np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="lengths must have shape"):
        jax.eval_shape(ragged_attention, *operands)


def test_windows_of_queries() -> None:
    operands = SMALL_QUERIES.operands()._replace(lengths=np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\) or \(2, 2\).*got \(2, 3"):
        ragged_attention(*operands)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="mask"):
        ragged_attention(*SMALL.operands(), mask=None)  # type: ignore[call-arg]


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
