"""ALiBi as docs/recipes.md has it, over heads, queries, dtypes and windows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import assert_close
from jax_ragged import ragged_attention
from test_docs import ROOT, _blocks

pytestmark = pytest.mark.full

B, S, D = 3, 600, 16
LENGTHS = np.array([[1, 2, 3], [400, 401, 402], [598, 599, 600]])


def _definition() -> Any:
    namespace: dict[str, Any] = {}
    exec(_blocks((ROOT / "docs" / "recipes.md").read_text())[0].code, namespace)
    return namespace["definition"]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [None, 50])
def test_alibi(heads: tuple[int, int], Q: int, dtype: str, width: int | None) -> None:
    """Slopes that are powers of two, and a scale of 1/4, are exact in each dtype."""
    Hq, Hkv = heads
    seeds = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(seeds[0], (B, Q, Hq, D), dtype)
    key = jax.random.normal(seeds[1], (B, S, Hkv, D), dtype)
    value = jax.random.normal(seeds[2], (B, S, Hkv, D), dtype)
    slopes, scale = 2.0 ** -np.arange(1, Hq + 1), D**-0.5
    lengths = LENGTHS[:, :Q]
    starts = None if width is None else lengths - width

    position = jnp.arange(S)
    columns = jnp.stack([position // 256 * 256, position % 256], axis=-1)[:, None]
    wide_key = jnp.concatenate([key, jnp.broadcast_to(columns, (B, S, Hkv, 2)).astype(dtype)], -1)
    slope = jnp.broadcast_to((slopes / scale)[:, None], (B, Q, Hq, 2)).astype(dtype)
    wide_query = jnp.concatenate([query, slope], -1)
    out = ragged_attention(
        wide_query, wide_key, value, lengths, starts, softmax_scale=scale, out_dtype="float32"
    ).out

    t = np.arange(S)
    allowed = t < lengths[..., None]
    if width is not None:
        allowed &= t >= lengths[..., None] - width
    bias = slopes[:, None, None] * (t - (lengths[:, None, :, None] - 1))
    # Positions behind the query would have a bias that overflows exp in the definition.
    bias = np.where(allowed[:, None], bias, 0)
    expected = _definition()(query, key, value, allowed, bias)
    # Logits up to 300 round to 300 * 2^-24 = 2e-5; narrow weights round to half an ulp.
    tolerance = {"float32": 5e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert_close(out, expected, tolerance)
