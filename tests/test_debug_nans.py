"""debug_nans: no false alarm for empty windows and NaN padding; a true one for NaN inside."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from cases import SMALL, SMALL_QUERIES, Case, poison
from forms import Arrays, Form, FormCase
from jax_ragged import ragged_attention
from programs import op, pullback, pushforward

pytestmark = pytest.mark.usefixtures("debug_nans")
EMPTY = Case("empty", (0, 2), (0, 2), Hq=2, Hkv=1, S=6, D=4, Dv=3)
CASES = (SMALL, SMALL_QUERIES, EMPTY)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture
def debug_nans() -> Iterator[None]:
    with jax.debug_nans(True):
        yield


@every_case
def test_values(case: Case) -> None:
    for run in (op(case), jax.jit(op(case))):
        assert all(np.isfinite(x).all() for x in run(*poison(case.operands())))


@every_case
def test_derivatives(case: Case) -> None:
    bars, moved = case.cotangents(), case.operands(seed=1)[:3]
    # Outside of jit the cache is itself a value that a vjp keeps, which JAX would report.
    runs = ((lambda f: f, case.operands()), (jax.jit, poison(case.operands())))
    for transform, operands in runs:
        grads = transform(pullback(op(case)))(operands, bars)
        dots = transform(pushforward(op(case)))(operands, moved)
        assert all(np.isfinite(x).all() for x in (*grads, *dots))


FORMS = [
    FormCase("nans", (12, 0, 5), (3, 0, 2), S=12, D=8, Dv=6, block_size=4, form=form)
    for form in (
        Form(4, "BSHD", "int8", "token", "shared"),
        Form(3, "BHSD", "float8_e4m3fn", "page"),
        Form(None, "BHSD", "int8", "token"),
        Form(6, "BHSD"),
    )
]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: str(case.form))
def test_forms(case: FormCase) -> None:
    """NaN in unused pages, and in the padding of values and scales, for all that has gradients."""
    stored = case.stored()
    arrays, bars = stored.poisoned(), case.cotangents()

    def gradients(arrays: Arrays) -> Any:
        moving = {name: arrays[name] for name in stored.differentiable}
        call = lambda m: tuple(ragged_attention(**(arrays | m), **case.params))  # noqa: E731
        results, pull = jax.vjp(call, moving)
        return results, pull(bars)[0]

    # Outside of jit, a vjp keeps arrays of the cache, which JAX would report.
    for x in jax.tree.leaves(jax.jit(gradients)(arrays)):
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_nan_inside_of_a_window_is_found() -> None:
    operands = SMALL.operands()
    operands.value[0, 2] = np.nan
    with pytest.raises(FloatingPointError, match=r"nan.* encountered in ragged_attention"):
        op(SMALL)(*operands)
    with pytest.raises(FloatingPointError, match="nan"):
        jax.jit(op(SMALL))(*operands)
    with pytest.raises(FloatingPointError, match="nan"):
        pullback(op(SMALL))(operands, SMALL.cotangents())
