"""Any windows and page tables, a pool of shapes, forms and block sizes, against the oracle."""

import dataclasses

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

import oracle
from cases import FLOAT32_DERIVATIVE, Case, Operands, assert_close, assert_results, poison
from forms import Form, FormCase, Stored
from jax_ragged import ragged_attention
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


# The page, layout, dtype and scale of forms; S is a multiple of the page. The kinds of page table
# play no part: tables are drawn.
FORMS = [
    FormCase(str(form), (0,) * 3, (0,) * 3, Q=Q, S=S, D=8, Dv=6, block_size=block_size, form=form)
    for form, S, Q, block_size in (
        (Form(4), 20, None, 8),
        (Form(1, "BHSD"), 17, 2, 4),
        (Form(7, "BSHD", "int8", "token"), 21, 2, None),
        (Form(16, "BHSD", "int8", "head"), 32, None, 8),
        (Form(5, "BSHD", "float8_e4m3fn", "page"), 20, None, 10),
    )
]
FORM_RUNS = {c.name: jax.jit(lambda x, c=c: ragged_attention(**x, **c.params)) for c in FORMS}
FORM_GRADIENTS = {
    c.name: jax.jit(
        lambda x, bars, names, c=c: jax.vjp(
            lambda moving: tuple(ragged_attention(**(x | moving), **c.params)),
            {name: x[name] for name in names},
        )[1](bars)[0],
        static_argnames="names",
    )
    for c in FORMS
}


@st.composite
def _drawn_form(draw: st.DrawFn) -> Stored:
    """Windows and a page table of any numbers, most of them pages: shared, repeated, unused."""
    case = draw(st.sampled_from(FORMS))
    stored = case.stored(seed=draw(st.integers(0, 9)))
    assert stored.table is not None
    shape = stored.operands.query.shape[:-2]
    bound = st.one_of(st.integers(-3, case.S + 3), st.sampled_from([-(2**31), 2**31 - 1]))
    pages = len(stored.operands.key)
    page = st.one_of(
        st.integers(0, min(3, pages - 1)),
        st.integers(-2, pages + 1),
        st.sampled_from([-(2**31), 2**31 - 1]),
    )

    def array(numbers: st.SearchStrategy[int], shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        return np.array(draw(st.lists(numbers, min_size=count, max_size=count)), np.int32).reshape(
            shape
        )

    operands = stored.operands._replace(lengths=array(bound, shape), starts=array(bound, shape))
    return dataclasses.replace(stored, operands=operands, table=array(page, stored.table.shape))


@hypothesis.settings(max_examples=60)
@hypothesis.given(_drawn_form())
def test_values_of_forms(stored: Stored) -> None:
    run = FORM_RUNS[stored.case.name]
    assert_results(run(stored.poisoned()), stored.case, stored.dense)


@hypothesis.settings(max_examples=30)
@hypothesis.given(_drawn_form())
def test_gradients_of_forms(stored: Stored) -> None:
    bars = stored.case.cotangents()
    run = FORM_GRADIENTS[stored.case.name]
    grads = run(stored.poisoned(), bars, stored.differentiable)
    for name, want, tol in stored.expected_vjp(bars):
        assert_close(grads[name], want, tol, scale=1, name=name)
