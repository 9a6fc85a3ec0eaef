"""jit: one program for all windows, static parameters, nesting."""

import functools

import jax
import numpy as np
import pytest

import cases
from cases import SMALL, SMALL_QUERIES, Case, assert_results
from jax_ragged import ragged_attention
from programs import op

CASES = (SMALL, SMALL_QUERIES)


@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_jit_and_eager(case: Case) -> None:
    operands = case.operands()
    for run in (op(case), jax.jit(op(case)), jax.jit(jax.jit(op(case)))):
        assert_results(run(*operands), case, operands)


def test_windows_are_traced() -> None:
    traces: list[None] = []

    @jax.jit
    def run(*operands):  # type: ignore[no-untyped-def]
        traces.append(None)
        return op(SMALL)(*operands)

    for lengths in ([5, 3, 2], [0, 0, 0], [6, 1, 100]):
        operands = SMALL.operands()._replace(lengths=np.array(lengths, np.int32))
        assert_results(run(*operands), SMALL, operands)
    assert len(traces) == 1


def test_parameters_as_static_arguments() -> None:
    names = ("softmax_scale", "logits_soft_cap", "block_size", "mask_value")
    run = jax.jit(ragged_attention, static_argnames=names)
    assert_results(run(*SMALL_QUERIES.operands(), **SMALL_QUERIES.params), SMALL_QUERIES)


def test_operands_as_constants() -> None:
    operands = SMALL.operands()
    run = jax.jit(functools.partial(op(SMALL), operands.query))
    assert_results(run(*operands[1:]), SMALL)
    assert_results(jax.jit(lambda: op(SMALL)(*operands))(), SMALL)


def test_results_are_a_named_tuple() -> None:
    results = jax.jit(ragged_attention)(*SMALL.operands())
    assert results._fields == ("out", "max_logits", "denominator")
    assert results.out is results[0]
