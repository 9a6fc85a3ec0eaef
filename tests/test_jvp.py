"""jvp: every subset of tangents, through all three outputs, symbolic zeros left out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import oracle
from cases import FLOAT64, SMALL, SMALL_QUERIES, Case, assert_close, double
from jax_ragged.lowering.contract import ByOperand
from programs import ALL, WRT, counts, equations, largest_made, op, pushforward

pytestmark = pytest.mark.usefixtures("x64")
CASES = (double(SMALL), double(SMALL_QUERIES))
every_case = pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))


@every_case
@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_subset_of_tangents(case: Case, wrt: tuple[int, ...]) -> None:
    operands, moved = case.operands(), case.operands(seed=1)
    run = pushforward(op(case), wrt)
    tangents = [moved[i] for i in wrt]
    dots = run(operands, tangents)
    full = tuple(moved[i] if i in wrt else None for i in ALL)
    expected = oracle.jvp(*operands, full, **case.definition)
    for got, want, name in zip(dots, expected, ("out", "max_logits", "denominator"), strict=True):
        assert_close(got, want, FLOAT64, name=name, scale=1 + np.abs(want).max())
    assert counts(run, operands, tangents) == {"ragged_attention": 1, "ragged_attention_jvp": 1}
    (eqn,) = [e for e in equations(run, operands, tangents) if "jvp" in e.primitive.name]
    assert eqn.params["wrt"] == tuple(ByOperand._fields[i] for i in wrt)
    assert len(eqn.invars) == 8 + len(wrt)  # no tangent stands for a zero


def test_no_tangent() -> None:
    """Only operands without derivatives move: the tangents are zeros and nothing computes them."""
    operands = SMALL.operands()

    def run(shift: Any) -> Any:
        return jax.jvp(lambda s: (op(SMALL)(*operands)[0], s), (shift,), (1.0,))

    _, tangents = run(1.0)
    assert not np.asarray(tangents[0]).any()
    assert counts(run, 1.0) == {"ragged_attention": 1}


def test_integer_operands() -> None:
    case = double(SMALL)
    operands, moved = case.operands(), case.operands(seed=1)
    zeros = [np.zeros(x.shape, jax.dtypes.float0) for x in operands[3:] if x is not None]
    _, dots = jax.jvp(op(case), tuple(map(jnp.asarray, operands)), (*moved[:3], *zeros))
    expected = oracle.jvp(*operands, moved[:3], **case.definition)
    for got, want in zip(dots, expected, strict=True):
        assert_close(got, want, FLOAT64)


def test_query_alone_makes_nothing_of_the_size_of_the_cache() -> None:
    case = Case("wide", (64, 10), Hq=2, Hkv=1, S=64, D=16, Dv=16, dtype="float64")
    operands = case.operands()
    run = pushforward(op(case), (0,))
    assert largest_made(run, operands, [operands.query]) <= operands.query.size < operands.key.size


def test_zero_tangents_give_zeros() -> None:
    case = double(SMALL_QUERIES)
    operands = case.operands()
    dots = pushforward(op(case))(operands, [np.zeros_like(x) for x in operands[:3]])
    assert not any(np.asarray(x).any() for x in dots)
