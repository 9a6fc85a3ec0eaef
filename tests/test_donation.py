"""Donation: a cache updated and attended to in one step is updated in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import Case, assert_results
from jax_ragged import ragged_attention
from programs import op

pytestmark = pytest.mark.optimized
CASE = Case("donated", (5, 3), Hq=2, Hkv=1, S=64, D=16, Dv=16)


def _step(query: Any, key: Any, value: Any, lengths: Any) -> Any:
    rows = jnp.arange(CASE.B)
    key = key.at[rows, lengths - 1].add(1.0)
    value = value.at[rows, lengths - 1].add(1.0)
    return op(CASE)(query, key, value, lengths, None), key, value


def test_cache_is_donated() -> None:
    operands = CASE.operands()
    arrays = [jnp.array(x) for x in operands[:4]]
    step = jax.jit(_step, donate_argnums=(1, 2))
    aliased = step.lower(*arrays).compile().memory_analysis()
    assert aliased is not None
    assert aliased.alias_size_in_bytes == 2 * operands.key.nbytes
    results, key, value = step(*arrays)
    assert [x.is_deleted() for x in arrays] == [False, True, True, False]
    updated = operands._replace(key=np.asarray(key), value=np.asarray(value))
    assert_results(results, CASE, updated)


def test_operands_of_the_op_alone_can_be_donated() -> None:
    """query may be overwritten by out: same shape and dtype."""
    operands = CASE.operands()
    run = jax.jit(ragged_attention, donate_argnums=0)
    results = run(jnp.array(operands.query), *operands[1:4])
    assert_results(results, CASE, operands)
