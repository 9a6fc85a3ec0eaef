"""Every lowering against the oracle: values, tangents, cotangents, on the whole case table."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import cases
import oracle
from cases import CASES, Case, Operands, assert_close, assert_results, poison, tolerance
from lowerings import LOWERINGS, Lowering

Setting = tuple[Lowering, Case]

# The definition and the reference know no blocks, and JAX's own rules differentiate the former.
_DERIVED_DEFINITION = ("gqa", "empty_windows", "queries", "soft_cap_scale", "bfloat16", "float64")
# The TPU interpreter takes seconds a case. The kernels have tests of their own besides.
_TPU = (
    "gqa",
    "windows",
    "empty_windows",
    "past_the_end",
    "before_the_start",
    "mha",
    "mqa",
    "queries",
    "value_head_dim",
    "no_positions",
    "soft_cap_scale",
    "mask_value",
    "bfloat16_queries",
    "float64",
    "tiles_gqa",
    "tiles_queries",
    "tiles_bfloat16",
)
_DERIVED_TPU = ("empty_windows", "queries", "soft_cap_scale", "bfloat16_queries", "tiles_queries")


def _runs(lowering: Lowering, case: Case, derivatives: bool) -> bool:
    if lowering.name == "tpu":
        return case.name in (_DERIVED_TPU if derivatives else _TPU)
    if lowering.name == "definition" and derivatives:
        return case.name in _DERIVED_DEFINITION
    return case.block_size is None or lowering.name not in ("definition", "reference")


def _settings(derivatives: bool) -> pytest.MarkDecorator:
    pairs = [(x, c) for x in LOWERINGS for c in CASES if _runs(x, c, derivatives)]
    ids = [f"{lowering.name}-{case.name}" for lowering, case in pairs]
    return pytest.mark.parametrize("setting", pairs, ids=ids, indirect=True)


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    lowering, case = request.param
    # What users run is compiled as for them; the others for a fast suite.
    if lowering.name not in ("cpu", "gpu"):
        request.getfixturevalue("fast_compile")
    with lowering.context(), cases.x64(case):
        yield lowering, case


@functools.cache
def _values(lowering: Lowering, params: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(lowering.bound(dict(params)))


@functools.cache
def _jvp(lowering: Lowering, params: tuple[tuple[str, Any], ...]) -> Any:
    op = lowering.bound(dict(params))

    def run(operands: Operands, tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(lambda *moving: op(*moving, *operands[3:]), operands[:3], tangents)

    return jax.jit(run)


@functools.cache
def _vjp(lowering: Lowering, params: tuple[tuple[str, Any], ...]) -> Any:
    op = lowering.bound(dict(params))

    def run(operands: Operands, cotangents: tuple[Any, ...]) -> Any:
        results, pull = jax.vjp(lambda *moving: op(*moving, *operands[3:]), *operands[:3])
        return pull(type(results)(*cotangents))

    return jax.jit(run)


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
        lowering, case = setting
        run = _values(lowering, tuple(case.params.items()))
        operands = case.operands()
        results = run(*operands)
        assert_results(results, case, operands)
        # What lies outside every window is not used, and the same inputs give the same bits.
        _assert_same(run(*poison(operands)), results)

    @_settings(derivatives=True)
    def test_jvp(self, setting: Setting) -> None:
        lowering, case = setting
        run = _jvp(lowering, tuple(case.params.items()))
        operands, tangents = case.operands(), case.operands(seed=1)[:3]
        results, dots = run(operands, tangents)
        assert_results(results, case, operands)
        _assert_derivatives(dots, oracle.jvp(*operands, tangents, **case.definition), case)
        moved = poison(Operands(*tangents, *operands[3:]))[:3]
        _assert_same(run(poison(operands), moved), (results, dots))

    @_settings(derivatives=True)
    def test_vjp(self, setting: Setting) -> None:
        lowering, case = setting
        run = _vjp(lowering, tuple(case.params.items()))
        operands, cotangents = case.operands(), case.cotangents()
        grads = run(operands, cotangents)
        _assert_derivatives(grads, oracle.vjp(*operands, cotangents, **case.definition), case)
        outside = ~oracle.inside(operands.query, case.S, operands.lengths, operands.starts)
        for grad in grads[1:]:
            assert not np.asarray(grad)[outside].any()
        _assert_same(run(poison(operands), cotangents), grads)
