"""disable_jit: values and every transformation, and the op itself stays one compiled program."""

from typing import Any

import jax
import numpy as np

import oracle
from cases import FLOAT32, FLOAT32_DERIVATIVE, SMALL_QUERIES, assert_close, assert_results
from programs import op, pullback, pushforward

CASE = SMALL_QUERIES


def test_values_and_derivatives() -> None:
    operands, bars, moved = CASE.operands(), CASE.cotangents(), CASE.operands(seed=1)[:3]
    with jax.disable_jit():
        assert_results(op(CASE)(*operands), CASE, operands)
        assert_results(jax.jit(op(CASE))(*operands), CASE, operands)
        grads = pullback(op(CASE))(operands, bars)
        dots = pushforward(op(CASE))(operands, moved)
    for got, want in zip(grads, oracle.vjp(*operands, bars, **CASE.definition), strict=True):
        assert_close(got, want, FLOAT32_DERIVATIVE)
    for got, want in zip(dots, oracle.jvp(*operands, moved, **CASE.definition), strict=True):
        assert_close(got, want, FLOAT32_DERIVATIVE)


def test_vmap_and_scan() -> None:
    operands = CASE.operands()
    queries = np.stack([CASE.operands(i).query for i in range(3)])

    def attend(query: Any) -> Any:
        return op(CASE)(query, *operands[1:])[0]

    with jax.disable_jit():
        mapped = jax.vmap(attend)(queries)
        _, scanned = jax.lax.scan(lambda c, q: (c, attend(q)), None, queries)
    for i, query in enumerate(queries):
        want = oracle.attention(query, *operands[1:], **CASE.definition).out
        assert_close(mapped[i], want, FLOAT32)
        assert_close(scanned[i], want, FLOAT32)
