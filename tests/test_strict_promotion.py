"""Strict promotion of dtypes and ranks, over values, derivatives and vmap."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from cases import BY_NAME, SMALL, SMALL_QUERIES, Case, assert_results
from programs import op, pullback, pushforward

pytestmark = pytest.mark.usefixtures("strict")
CASES = (SMALL, SMALL_QUERIES, BY_NAME["bfloat16_queries"], BY_NAME["float16"])


@pytest.fixture
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all(case: Case) -> None:
    operands = case.operands()
    assert_results(op(case)(*operands), case, operands)
    jax.eval_shape(pullback(op(case)), operands, case.cotangents())
    jax.eval_shape(pushforward(op(case)), operands, operands[:3])
    jax.jit(pullback(op(case))).lower(operands, case.cotangents())
    jax.jit(pushforward(op(case))).lower(operands, operands[:3])
    mapped = jax.vmap(op(case), (0, None, None, None, None))
    jax.jit(mapped).lower(operands.query[None], *operands[1:])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32])
def test_integer_windows(dtype: type) -> None:
    operands = SMALL.operands()
    windows = (x.astype(dtype) for x in operands[3:] if x is not None)
    assert_results(op(SMALL)(*operands[:3], *windows), SMALL, operands)
