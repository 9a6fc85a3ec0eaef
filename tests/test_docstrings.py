"""Every public docstring: its examples run, and it describes each argument."""

import doctest
import inspect
from typing import Any

import pytest

import jax_ragged
from jax_ragged.lowering import dispatch

PUBLIC = {name: getattr(jax_ragged, name) for name in jax_ragged.__all__}
FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
# Where a reader needs an example: all functions but the definition, which is called alike.
WITH_EXAMPLES = sorted(FUNCTIONS.keys() - {"reference_ragged_attention"})


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An example may register a lowering, which is not for the tests that follow.
    monkeypatch.setattr(dispatch, "_LOWERINGS", dict(dispatch._LOWERINGS))
    documented = inspect.getdoc(FUNCTIONS[name]) or ""
    example = doctest.DocTestParser().get_doctest(documented, {}, name, None, None)
    assert example.examples
    report: list[str] = []
    results = doctest.DocTestRunner().run(example, out=report.append)
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_described(name: str) -> None:
    function: Any = FUNCTIONS[name]
    described = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters.values():
        star = "*" if argument.kind is argument.VAR_POSITIONAL else ""
        assert f"\n  {star}{argument.name}: " in described, argument.name
    for section in ("Args:", "Raises:"):
        assert f"\n{section}\n" in described


@pytest.mark.parametrize("name", [n for n, x in PUBLIC.items() if inspect.isclass(x)])
def test_attributes_are_described(name: str) -> None:
    described = inspect.getdoc(PUBLIC[name]) or ""
    for attribute in getattr(PUBLIC[name], "__annotations__", {}):
        assert f"\n  {attribute}: " in described, attribute
