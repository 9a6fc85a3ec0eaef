"""Tracer leak checks and key-reuse checks on: no rule keeps a tracer."""

from typing import Any

import jax

from cases import SMALL
from programs import op, pullback, pushforward

OPERANDS, BARS = SMALL.operands(), SMALL.cotangents()


def test_no_tracer_leaks() -> None:
    with jax.checking_leaks():
        jax.jit(op(SMALL)).trace(*OPERANDS)
        jax.jit(pullback(op(SMALL))).trace(OPERANDS, BARS)
        jax.jit(pushforward(op(SMALL))).trace(OPERANDS, OPERANDS[:3])
        jax.jit(jax.vmap(op(SMALL), (0, None, None, None, None))).trace(
            OPERANDS.query[None], *OPERANDS[1:]
        )


def test_key_reuse_checks() -> None:
    def run(key: Any) -> Any:
        first, second = jax.random.split(key)
        query = jax.random.normal(first, OPERANDS.query.shape)
        noise = jax.random.normal(second, (3, 2, 3))
        return op(SMALL)(query, *OPERANDS[1:])[0] + noise

    with jax.debug_key_reuse(True):
        assert jax.jit(run)(jax.random.key(0)).shape == (3, 2, 3)
