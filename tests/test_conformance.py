"""Every lowering against the oracle: values, tangents, cotangents, on the whole case table."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

import cases
import oracle
from cases import CASES, Case, Operands, assert_close, assert_results, poison, tolerance
from forms import Arrays, FormCase, Stored
from lowerings import RUNNERS, Runner

Setting = tuple[Runner, Case]
FormSetting = tuple[Runner, FormCase]
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


def _form_settings(*, derivatives: bool) -> pytest.MarkDecorator:
    pairs = [
        pytest.param(
            (runner, case),
            id=f"{runner.name}-{case.name}",
            marks=runner.form_marks(case, derivatives=derivatives),
        )
        for runner in RUNNERS
        for case in runner.forms
        if not derivatives or case.name in runner.form_derivatives
    ]
    return pytest.mark.parametrize("setting", pairs, indirect=True)


def _form_values(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda arrays: op(**arrays)


def _form_jvp(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(arrays: Arrays, tangents: Arrays) -> Any:
        moving = {name: arrays[name] for name in tangents}
        return jax.jvp(lambda moving: op(**(arrays | moving)), (moving,), (tangents,))

    return run


def _form_vjp(op: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def run(arrays: Arrays, cotangents: tuple[Any, ...]) -> Any:
        moving = {name: arrays[name] for name in names}
        results, pull = jax.vjp(lambda moving: op(**(arrays | moving)), moving)
        return pull(type(results)(*cotangents))[0]

    return run


def _form_vmap(op: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def run(arrays: Arrays) -> Any:
        axes = {name: 0 if name in names else None for name in arrays}
        return jax.vmap(lambda arrays: op(**arrays), (axes,))(arrays)

    return run


def _form_program(
    setting: FormSetting,
    transform: Callable[..., Any],
    operation: str,
    *args: Any,
    **options: Any,
) -> Callable[..., Any]:
    """A function of the op, compiled for args: the kernel's, or the reference's by its refusal.

    A refusal has a reason, and then the default implementation runs the reference.
    """
    runner, case = setting

    def lowered(**params: Any) -> Any:
        op = runner.bound(runner.form_params(case) | params)
        return jax.jit(transform(op, **options)).lower(*args)

    refusal = None
    try:
        program = lowered(implementation="kernel") if runner.kernel else lowered()
    except NotImplementedError as error:
        refusal = str(error)
        with warnings.catch_warnings():
            # The warning, if there is one, has the advice.
            warnings.filterwarnings("ignore", "ragged_attention: the reference runs")
            program = lowered()
    refused = refusal is not None
    assert re.search(r"cannot be honoured on \w+: \w.{20,}\. ", refusal or "") or not refused
    reads = runner.reads(case, operation, options.get("names", ()))
    assert reads in (None, runner.kernel is not None and not refused)
    text = program.as_text(debug_info=True)
    ran = [x for x in _SCOPES if f"ragged_attention_{operation}_{x}" in text]
    # Of a program that is refused, this operation may have a kernel and another none.
    assert ran == [runner.kernel or "reference"] or (refused and ran == ["reference"])
    compiled: Callable[..., Any] = program.compile()
    return compiled


def _assert_form_vjp(grads: Arrays, stored: Stored, cotangents: Any) -> None:
    for name, want, tol in stored.expected_vjp(cotangents):
        if name in grads:
            assert grads[name].dtype == stored.arrays[name].dtype
            assert_close(grads[name], want, tol, scale=1, name=name)


class TestForms:
    """What every implementation meets on every form of cache."""

    @_form_settings(derivatives=False)
    def test_values(self, setting: FormSetting) -> None:
        stored = setting[1].stored()
        run = _form_program(setting, _form_values, "forward", stored.arrays)
        results = run(stored.arrays)
        assert_results(results, stored.case, stored.dense)
        _assert_same(run(stored.poisoned()), results)

    @_form_settings(derivatives=True)
    def test_jvp(self, setting: FormSetting) -> None:
        stored = setting[1].stored()
        tangents = stored.tangents()
        run = _form_program(setting, _form_jvp, "jvp", stored.arrays, tangents)
        results, dots = run(stored.arrays, tangents)
        assert_results(results, stored.case, stored.dense)
        _assert_derivatives(dots, stored.expected_jvp(tangents), stored.case)
        _assert_same(run(stored.poisoned(), stored.poisoned(tangents)), (results, dots))

    @_form_settings(derivatives=True)
    @pytest.mark.parametrize("wrt", ["query", "all"])
    def test_vjp(self, setting: FormSetting, wrt: str) -> None:
        stored = setting[1].stored()
        names = stored.differentiable if wrt == "all" else ("query",)
        cotangents = stored.case.cotangents()
        run = _form_program(setting, _form_vjp, "vjp", stored.arrays, cotangents, names=names)
        grads = run(stored.arrays, cotangents)
        assert set(grads) == set(names)
        _assert_form_vjp(grads, stored, cotangents)
        again = run(stored.poisoned(), cotangents)
        runner, case = setting
        # XLA adds the gradients of pages in any order there.
        unordered = runner.name == "gpu" and case.form.page is not None
        for name, x in grads.items():
            if unordered and name != "query":
                assert_close(again[name], x, 2 * tolerance(case), name=name)
            else:
                np.testing.assert_array_equal(again[name], x)

    @_form_settings(derivatives=True)
    @pytest.mark.parametrize("pools", [False, True], ids=["tables", "pools"])
    def test_vmap(self, setting: FormSetting, pools: bool) -> None:
        """Of queries, windows and tables over one pool (or cache), or over a pool each."""
        both = [setting[1].stored(seed) for seed in (0, 1)]
        if not pools:
            both[1] = both[0].beside(both[1])
        names: tuple[str, ...] = ("query", "lengths", "starts", "page_table")
        names += ("key", "value", "key_scale", "value_scale") if pools else ()
        arrays = {
            name: np.stack([one.arrays[name] for one in both]) if name in names else x
            for name, x in both[0].arrays.items()
        }
        run = _form_program(setting, _form_vmap, "forward", arrays, names=names)
        results = run(arrays)
        for i, one in enumerate(both):
            assert_results(jax.tree.map(lambda x, i=i: x[i], results), one.case, one.dense)
