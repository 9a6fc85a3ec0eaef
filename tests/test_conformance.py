"""Every lowering against the oracle: values, tangents, cotangents, on the whole case table."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

import cases
import oracle
from cases import CASES, Case, Operands, assert_close, assert_results, poison, tolerance
from lowerings import RUNNERS, Runner

Setting = tuple[Runner, Case]
_SCOPES = ("reference", "cpu_kernel", "tpu_kernel", "cuda_kernel")


def _settings(*, derivatives: bool) -> pytest.MarkDecorator:
    pairs = [
        pytest.param((runner, case), id=f"{runner.name}-{case.name}", marks=runner.marks(case))
        for runner in RUNNERS
        for case in CASES
        if runner.takes(case, derivatives=derivatives)
    ]
    return pytest.mark.parametrize("setting", pairs, indirect=True)


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    runner, case = request.param
    with runner.context(), cases.x64(case):
        yield runner, case


def _values(op: Callable[..., Any]) -> Callable[..., Any]:
    return op


def _jvp(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(operands: Operands, tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(lambda *moving: op(*moving, *operands[3:]), operands[:3], tangents)

    return run


def _vjp(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(operands: Operands, cotangents: tuple[Any, ...]) -> Any:
        results, pull = jax.vjp(lambda *moving: op(*moving, *operands[3:]), *operands[:3])
        return pull(type(results)(*cotangents))

    return run


@functools.cache
def _compiled(
    runner: Runner, transform: Any, params: tuple[tuple[str, Any], ...], tree: Any, *types: Any
) -> tuple[Callable[..., Any], str]:
    args = jax.tree.unflatten(tree, types)
    lowered = jax.jit(transform(runner.bound(dict(params)))).lower(*args)
    return lowered.compile(), lowered.as_text(debug_info=True)


def _program(setting: Setting, transform: Any, operation: str, *args: Any) -> Callable[..., Any]:
    """A function of the op, compiled for args, after a look at which lowering is in it."""
    runner, case = setting
    arrays, tree = jax.tree.flatten(args)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    run, text = _compiled(runner, transform, tuple(case.params.items()), tree, *types)
    scopes = runner.scopes(case, operation)
    ran = [x for x in _SCOPES if f"ragged_attention_{operation}_{x}" in text]
    assert len(ran) == bool(scopes)
    assert set(ran) <= set(scopes)
    return run


def _assert_same(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _assert_derivatives(actual: Any, expected: Any, case: Case) -> None:
    # A derivative is a sum of products of logits' derivatives with differences of values, which
    # cancel: relative to the largest element, twice the error of a result in float32. In a
    # narrow dtype the saved out is itself rounded, and is one more factor of each difference.
    tol = 2 * tolerance(case)
    for got, want, name in zip(actual, expected, ("first", "second", "third"), strict=True):
        assert_close(got, want, tol, scale=max(1e-30, np.abs(want).max(initial=0)), name=name)


class TestConformance:
    """What every implementation meets."""

    @_settings(derivatives=False)
    def test_values(self, setting: Setting) -> None:
        case = setting[1]
        operands = case.operands()
        run = _program(setting, _values, "forward", *operands)
        results = run(*operands)
        assert_results(results, case, operands)
        # What lies outside every window is not used, and the same inputs give the same bits.
        _assert_same(run(*poison(operands)), results)

    @_settings(derivatives=True)
    def test_jvp(self, setting: Setting) -> None:
        case = setting[1]
        operands, tangents = case.operands(), case.operands(seed=1)[:3]
        run = _program(setting, _jvp, "jvp", operands, tangents)
        results, dots = run(operands, tangents)
        assert_results(results, case, operands)
        _assert_derivatives(dots, oracle.jvp(*operands, tangents, **case.definition), case)
        moved = poison(Operands(*tangents, *operands[3:]))[:3]
        _assert_same(run(poison(operands), moved), (results, dots))

    @_settings(derivatives=True)
    def test_vjp(self, setting: Setting) -> None:
        case = setting[1]
        operands, cotangents = case.operands(), case.cotangents()
        run = _program(setting, _vjp, "vjp", operands, cotangents)
        grads = run(operands, cotangents)
        _assert_derivatives(grads, oracle.vjp(*operands, cotangents, **case.definition), case)
        outside = ~oracle.inside(operands.query, case.S, operands.lengths, operands.starts)
        for grad in grads[1:]:
            assert not np.asarray(grad)[outside].any()
        _assert_same(run(poison(operands), cotangents), grads)
