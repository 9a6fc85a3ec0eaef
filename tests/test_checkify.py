"""checkify: user checks beside the op, and automatic checks that raise no false alarm."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from cases import SMALL, SMALL_QUERIES, Case, assert_results, poison
from programs import op, pullback

CASES = (SMALL, SMALL_QUERIES)
ALL = checkify.float_checks | checkify.index_checks | checkify.user_checks


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_false_alarm(case: Case) -> None:
    operands = poison(case.operands())
    error, results = jax.jit(checkify.checkify(op(case), errors=ALL))(*operands)
    error.throw()
    assert_results(results, case, operands)
    error, _ = jax.jit(checkify.checkify(pullback(op(case)), errors=ALL))(
        operands, case.cotangents()
    )
    error.throw()


def test_user_check() -> None:
    def run(*operands: Any) -> Any:
        checkify.check(jnp.all(operands[3] <= SMALL.S), "past the cache")
        return op(SMALL)(*operands)

    operands = SMALL.operands()
    error, results = checkify.checkify(run)(*operands)
    error.throw()
    assert_results(results, SMALL, operands)
    error, _ = checkify.checkify(run)(*operands[:3], operands.lengths + 9, operands.starts)
    with pytest.raises(checkify.JaxRuntimeError, match="past the cache"):
        error.throw()
