"""The oracle against itself: values by hand, tangents and cotangents by each other."""

import numpy as np
import pytest

import cases
import oracle
from cases import CASES, Case, assert_close

DERIVED = tuple(c for c in CASES if c.D <= 32 and c.dtype == "float32" and c.logit_size == 1)


def test_by_hand() -> None:
    query = np.array([[[1.0], [2.0]]])  # B = 1, Hq = 2, D = 1
    key = np.log(np.array([1.0, 2.0, 4.0, 8.0])).reshape(1, 4, 1, 1)
    value = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    results = oracle.attention(query, key, value, np.array([3]), np.array([1]))
    # Window {1, 2}: logits (log 2, log 4) of head 0, twice the logits of head 1.
    np.testing.assert_allclose(results.max_logits, np.log([[4.0, 16.0]]), rtol=1e-15)
    np.testing.assert_allclose(results.denominator, [[1 + 1 / 2, 1 + 1 / 4]], rtol=1e-15)
    expected = [(2 * 2 + 4 * 3) / 6, (4 * 2 + 16 * 3) / 20]
    np.testing.assert_allclose(results.out[0, :, 0], expected, rtol=1e-15)


def test_soft_cap_by_hand() -> None:
    one = np.ones((1, 1, 1, 1))
    results = oracle.attention(
        one[0] * 3, one, one, np.array([1]), softmax_scale=2.0, logits_soft_cap=4.0
    )
    np.testing.assert_allclose(results.max_logits, [[4 * np.tanh(6 / 4)]], rtol=1e-15)


def test_empty_window() -> None:
    one = np.ones((1, 2, 1, 1))
    results = oracle.attention(one[0, :1], one, one, np.array([1]), np.array([1]), mask_value=-7)
    assert [x.item() for x in results] == [0, -7, 0]


@pytest.mark.parametrize("case", DERIVED, ids=cases.ids(DERIVED))
def test_jvp_is_the_limit_of_differences(case: Case) -> None:
    query, key, value, lengths, starts = case.operands()
    tangents = tuple(x.astype(float) for x in case.operands(seed=1)[:3])
    step = 1e-6
    sides = []
    for s in (step, -step):
        moved = [x + s * t for x, t in zip((query, key, value), tangents, strict=True)]
        operands = cases.Operands(moved[0], moved[1], moved[2], lengths, starts)
        sides.append(oracle.attention(*operands, **case.definition))
    actual = oracle.jvp(query, key, value, lengths, starts, tangents, **case.definition)
    for got, plus, minus in zip(actual, *sides, strict=True):
        # Central differences err by step^2 times the third derivative, and by rounding / step.
        assert_close(got, (plus - minus) / (2 * step), 1e-7, scale=1 + np.abs(got).max(initial=0))


@pytest.mark.parametrize("case", DERIVED, ids=cases.ids(DERIVED))
def test_vjp_is_the_transpose_of_jvp(case: Case) -> None:
    operands = case.operands()
    tangents, cotangents = case.operands(seed=1)[:3], case.cotangents()
    out = oracle.jvp(*operands, tangents, **case.definition)
    grads = oracle.vjp(*operands, cotangents, **case.definition)
    forward = sum(np.vdot(c, x) for c, x in zip(cotangents, out, strict=True))
    reverse = sum(np.vdot(g, t) for g, t in zip(grads, tangents, strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-11, atol=1e-11)


def test_inside() -> None:
    mask = oracle.inside(np.zeros((2, 2, 1, 1)), 4, np.array([[1, 9], [0, 3]]), np.array([-1, 2]))
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0, 0, 1, 0]])
