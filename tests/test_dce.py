"""Dead code: an unused call vanishes, a partly used one stays, derivatives ask for no more."""

from typing import Any

import jax
import pytest

from cases import SMALL
from programs import op

OPERANDS = SMALL.operands()
MARK = "ragged_attention"


def _lowered(fun: Any, *args: Any) -> str:
    return jax.jit(fun).lower(*args).as_text()


def test_unused_call_vanishes() -> None:
    def run(query: Any) -> Any:
        op(SMALL)(query, *OPERANDS[1:])
        return query + 1

    assert MARK not in _lowered(run, OPERANDS.query)
    assert MARK in _lowered(lambda q: op(SMALL)(q, *OPERANDS[1:]), OPERANDS.query)


@pytest.mark.parametrize("result", range(3))
def test_partly_used_call_stays(result: int) -> None:
    def run(query: Any) -> Any:
        return op(SMALL)(query, *OPERANDS[1:])[result]

    assert MARK in _lowered(run, OPERANDS.query)
    assert str(jax.make_jaxpr(run)(OPERANDS.query)).count("_:f32") == 2  # the unused two


def test_unused_tangent_and_gradient_vanish() -> None:
    def tangent(query: Any) -> Any:
        return jax.jvp(lambda q: op(SMALL)(q, *OPERANDS[1:])[0], (query,), (query,))[0]

    def gradient(query: Any) -> Any:
        out, _ = jax.vjp(lambda q: op(SMALL)(q, *OPERANDS[1:])[0], query)
        return out

    for run in (tangent, gradient):
        text = _lowered(run, OPERANDS.query)
        assert MARK in text
        assert f"{MARK}_jvp" not in text
        assert f"{MARK}_vjp" not in text

    def both(query: Any) -> Any:
        out, pull = jax.vjp(lambda q: op(SMALL)(q, *OPERANDS[1:])[0], query)
        return pull(out), jax.jvp(lambda q: op(SMALL)(q, *OPERANDS[1:])[0], (query,), (query,))[1]

    text = _lowered(both, OPERANDS.query)
    assert f"{MARK}_jvp" in text
    assert f"{MARK}_vjp" in text


def test_call_unused_in_a_loop_vanishes() -> None:
    def step(state: Any, _: None) -> Any:
        query, last = state
        return (query + 1, op(SMALL)(query, *OPERANDS[1:])[0] + 0 * last), None

    def run(query: Any, result: int) -> Any:
        return jax.lax.scan(step, (query, OPERANDS.query[..., :3]), None, length=3)[0][result]

    assert MARK not in _lowered(lambda query: run(query, 0), OPERANDS.query)
    assert MARK in _lowered(lambda query: run(query, 1), OPERANDS.query)
