"""Reverse mode: every subset of operands and of results, orders to 3, zeros, ties, NaN padding."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import oracle
from cases import (
    FLOAT32,
    FLOAT64,
    SMALL,
    SMALL_QUERIES,
    Case,
    Operands,
    assert_close,
    double,
    poison,
    tiered,
)
from jax_ragged.lowering.contract import ByOperand
from jax_ragged.primitives._signature import RESULTS, names
from lowerings import RUNNERS, Runner
from programs import ALL, WRT, counts, equations, largest_made, op, pullback


def _id(x: Any) -> str:
    return "".join(map(str, map(int, x))) if isinstance(x[0], bool) else str(x)


GIVEN = [g for g in itertools.product((False, True), repeat=3) if any(g)]


def _only(case: Case, given: tuple[bool, ...]) -> Any:
    def run(*operands: Any) -> Any:
        return tuple(x for x, g in zip(op(case)(*operands), given, strict=True) if g)

    return run


def _assert_grads(
    actual: Any, case: Case, operands: Operands, cotangents: Any, wrt: tuple[int, ...], tol: float
) -> None:
    expected = oracle.vjp(*operands, cotangents, **case.definition)
    for i, got in zip(wrt, actual, strict=True):
        name = ("query", "key", "value")[i]
        assert_close(got, expected[i], tol, name=name, scale=1 + np.abs(expected[i]).max())


SUBSETS = list(itertools.product(WRT, GIVEN))


@pytest.mark.parametrize(
    ("wrt", "given"), tiered(SUBSETS, [s for s in SUBSETS if s[0] == ALL or all(s[1])]), ids=_id
)
def test_subsets(x64: None, wrt: tuple[int, ...], given: tuple[bool, ...]) -> None:
    case = double(SMALL_QUERIES)
    operands = case.operands()
    bars = case.cotangents()
    asked = tuple(c if g else None for c, g in zip(bars, given, strict=True))
    run = pullback(_only(case, given), wrt)
    grads = run(operands, tuple(c for c in asked if c is not None))
    _assert_grads(grads, case, operands, asked, wrt, FLOAT64)


@pytest.mark.parametrize("given", GIVEN, ids=lambda g: "".join(map(str, map(int, g))))
def test_equations(x64: None, given: tuple[bool, ...]) -> None:
    """One forward and one backward; absent cotangents and gradients have no place in them."""
    case = double(SMALL)
    for wrt in WRT:
        run = pullback(_only(case, given), wrt)
        args = case.operands(), tuple(c for c, g in zip(case.cotangents(), given, strict=True) if g)
        assert counts(run, *args) == {"ragged_attention": 1, "ragged_attention_vjp": 1}
        (eqn,) = [e for e in equations(run, *args) if "vjp" in e.primitive.name]
        assert eqn.params["given"] == tuple(
            n for n, g in zip(names(RESULTS), given, strict=True) if g
        )
        assert eqn.params["wrt"] == tuple(ByOperand._fields[i] for i in wrt)
        assert len(eqn.invars) == 8 + sum(given)
        assert len(eqn.outvars) == len(wrt)


def test_query_alone_makes_nothing_of_the_size_of_the_cache() -> None:
    case = Case("wide", (64, 10), Hq=2, Hkv=1, S=64, D=16, Dv=16)
    operands = case.operands()

    def loss(query: Any) -> Any:
        return op(case)(query, *operands[1:])[0].sum()

    assert largest_made(jax.grad(loss), operands.query) <= operands.query.size
    assert operands.query.size < operands.key.size


@pytest.mark.full
def test_check_grads(x64: None) -> None:
    """Against finite differences, in both modes and their mixtures, to order 3.

    The default tier has order 2 against the oracle: test_jvp_vjp and test_jacobians.
    """
    sizes: dict[str, Any] = {"Q": 2, "Hq": 2, "Hkv": 1, "S": 3, "D": 2, "Dv": 2}
    case = double(Case("third", ((3, 2),), ((0, 1),), **sizes, logits_soft_cap=1.5))
    operands = case.operands()

    def run(*moving: Any) -> Any:
        return op(case)(*moving, *operands[3:])

    # Differences of third order: rounding 1e-16 / step and the next term step^2, with step 1e-4.
    check_grads(jax.jit(run), operands[:3], order=3, modes=("fwd", "rev"), rtol=2e-5, atol=2e-5)


def test_grad_of_a_scalar(x64: None) -> None:
    case = double(SMALL)
    operands, bars = case.operands(), case.cotangents()

    def loss(query: Any, key: Any, value: Any) -> Any:
        return jnp.vdot(op(case)(query, key, value, *operands[3:])[0], bars[0])

    value, grads = jax.value_and_grad(loss, ALL)(*operands[:3])
    np.testing.assert_allclose(value, np.vdot(case.expected().out, bars[0]), rtol=FLOAT64)
    _assert_grads(grads, case, operands, (bars[0], None, None), ALL, FLOAT64)


def test_padding_of_nan(x64: None) -> None:
    case = double(SMALL_QUERIES)
    operands, bars = case.operands(), case.cotangents()
    grads = pullback(op(case))(poison(operands), bars)
    _assert_grads(grads, case, operands, bars, ALL, FLOAT64)


def test_empty_windows(x64: None) -> None:
    case = double(Case("empty", (0, 3, 9), (0, 3, 7), S=5, Hq=2, Hkv=1, D=3, Dv=2))
    grads = pullback(op(case))(poison(case.operands()), case.cotangents())
    assert not any(np.asarray(g).any() for g in grads)


TIES = Case("ties", (7, 9), (2, 0), Hq=2, Hkv=1, S=9, D=2, Dv=2)


@pytest.mark.parametrize(
    "runner", [pytest.param(x, id=x.name, marks=x.marks(TIES)) for x in RUNNERS]
)
def test_ties_of_the_maximum(runner: Runner) -> None:
    """The first position of the window that attains it carries the derivative."""
    case = TIES
    operands, bars = case.operands(), case.cotangents()
    # Integers, whose dot products are exact; two keys in turn, so that every logit is a tie.
    query = np.array([[[1, 2], [-1, 3]], [[2, 1], [1, 1]]], np.float32)
    key = np.resize(np.array([[1, 0], [0, 2]], np.float32), (2, 9, 1, 2))
    operands = operands._replace(query=query, key=key)
    with runner.context():
        grads = pullback(runner.bound(case.params))(operands, _like(runner, operands, bars))
    _assert_grads(grads, case, operands, bars, ALL, FLOAT32)


def _like(runner: Runner, operands: Operands, bars: Any) -> Any:
    results = jax.eval_shape(runner.bound({}), *operands)
    return type(results)(*bars)


def test_shared_starts_of_one_for_all_rows(x64: None) -> None:
    """Without starts the equation has one start for all rows, and gradients do not see it."""
    case = double(Case("no_starts", (4, 2), S=4, Hq=2, Hkv=2, D=3, Dv=2))
    operands, bars = case.operands(), case.cotangents()
    _assert_grads(pullback(op(case))(operands, bars), case, operands, bars, ALL, FLOAT64)


def test_integer_operands_get_float0() -> None:
    operands = tuple(map(jnp.asarray, SMALL.operands()))
    _, pull = jax.vjp(op(SMALL), *operands)
    grads = pull(SMALL.cotangents())
    assert [g.dtype for g in grads[3:]] == [jax.dtypes.float0] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_of_gradients(dtype: str) -> None:
    case = Case("dtypes", (5, 2), S=5, Hq=2, Hkv=1, D=3, Dv=2, dtype=dtype)
    grads = pullback(op(case))(case.operands(), case.cotangents())
    assert [str(g.dtype) for g in grads] == [dtype] * 3
