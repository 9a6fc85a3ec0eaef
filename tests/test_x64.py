"""With 64-bit types on: float64 throughout, float32 unchanged, wide integer windows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import SMALL, SMALL_QUERIES, assert_results, double
from programs import op, pullback

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("case", [SMALL, SMALL_QUERIES, double(SMALL)], ids=lambda c: c.dtype)
def test_dtypes(case) -> None:  # type: ignore[no-untyped-def]
    operands = case.operands()
    assert_results(op(case)(*operands), case, operands)
    grads = pullback(op(case))(operands, case.cotangents())
    assert [str(g.dtype) for g in grads] == [case.dtype] * 3


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32])
def test_windows_that_int32_cannot_hold(dtype: Any) -> None:
    """They saturate: 2^32 + 1 is past the end, and not 1."""
    last = 2 if dtype is np.uint32 else 2**32 + 2
    lengths = np.array([2**32 - 1, 3, last], dtype)
    operands = SMALL.operands()
    results = op(SMALL)(*operands[:3], lengths, operands.starts.astype(dtype))
    assert_results(results, SMALL, operands._replace(lengths=np.minimum(lengths, 100).astype(int)))


def test_negative_starts_of_int64() -> None:
    operands = SMALL.operands()
    starts = np.array([-(2**40), -(2**32) + 5, 0])
    results = jax.jit(op(SMALL))(*operands[:4], jnp.asarray(starts))
    assert_results(results, SMALL, operands._replace(starts=np.maximum(starts, -1)))
