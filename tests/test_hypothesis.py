"""Any windows, a pool of shapes and block sizes, against the oracle."""

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

import oracle
from cases import FLOAT32_DERIVATIVE, Case, Operands, assert_close, assert_results, poison
from programs import op, pullback

# A pool, so that programs are compiled once for each and windows drawn freely.
SHAPES = [
    Case("a", (0,) * 4, (0,) * 4, Hq=4, Hkv=2, S=19, D=8, Dv=8, block_size=4),
    Case("b", (0,) * 2, (0,) * 2, Q=3, Hq=2, Hkv=1, S=16, D=4, Dv=6, block_size=7),
    Case("c", (0,) * 3, (0,) * 3, Hq=3, Hkv=3, S=1, D=5, Dv=2, block_size=1),
]
RUNS = {case.name: jax.jit(op(case)) for case in SHAPES}
GRADIENTS = {case.name: jax.jit(pullback(op(case))) for case in SHAPES}
BOUND = st.one_of(st.integers(-3, 22), st.sampled_from([-(2**31), 2**31 - 1]))


@st.composite
def _drawn(draw: st.DrawFn) -> tuple[Case, Operands]:
    case = draw(st.sampled_from(SHAPES))
    operands = case.operands(seed=draw(st.integers(0, 9)))
    shape = operands.query.shape[:-2]
    count = int(np.prod(shape))
    windows = (draw(st.lists(BOUND, min_size=count, max_size=count)) for _ in range(2))
    lengths, starts = (np.array(x, np.int32).reshape(shape) for x in windows)
    return case, operands._replace(lengths=lengths, starts=starts)


@hypothesis.settings(max_examples=60)
@hypothesis.given(_drawn())
def test_values(drawn: tuple[Case, Operands]) -> None:
    case, operands = drawn
    assert_results(RUNS[case.name](*poison(operands)), case, operands)


@hypothesis.settings(max_examples=30)
@hypothesis.given(_drawn())
def test_gradients(drawn: tuple[Case, Operands]) -> None:
    case, operands = drawn
    bars = case.cotangents()
    grads = GRADIENTS[case.name](poison(operands), bars)
    for got, want in zip(grads, oracle.vjp(*operands, bars, **case.definition), strict=True):
        assert_close(got, want, FLOAT32_DERIVATIVE, scale=1 + np.abs(want).max(initial=0))
