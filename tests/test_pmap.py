"""pmap: values and derivatives, nested with vmap and with merging over its axis."""

from typing import Any

import jax
import numpy as np
import pytest

import sharded
from cases import Case, assert_results, ids
from jax_ragged import merge_partials
from programs import op, pullback
from sharded import CASES, GQA

every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))


def _split(x: Any) -> Any:
    """Rows [4, ...] to two for each of two devices."""
    return np.asarray(x).reshape(2, 2, *np.shape(x)[1:])


def _joined(x: Any) -> Any:
    return np.asarray(x).reshape(-1, *x.shape[2:])


@every_case
def test_forward(case: Case) -> None:
    results = jax.pmap(op(case))(*map(_split, sharded.operands(case)))
    assert_results([_joined(x) for x in results], case)


@every_case
def test_reverse(case: Case) -> None:
    operands = tuple(map(_split, sharded.operands(case)))
    bars = tuple(map(_split, case.cotangents()))
    grads = jax.pmap(pullback(op(case)))(operands, bars)
    sharded.assert_gradients([_joined(x) for x in grads], case)


def test_mapped() -> None:
    operands = [np.stack([x, x])[:, None] for x in sharded.operands(GQA)]
    results = jax.pmap(jax.vmap(op(GQA)))(*operands)
    for i in range(2):
        assert_results([np.asarray(x)[i, 0] for x in results], GQA)


def test_sequence_over_its_axis() -> None:
    """A cache split by sequence over devices."""
    query, key, value, lengths = sharded.operands(GQA)
    caches = [np.stack([x[:, :10], x[:, 10:]]) for x in (key, value)]

    def local(key: Any, value: Any) -> Any:
        first = jax.lax.axis_index("shard") * key.shape[1]
        return tuple(merge_partials(op(GQA)(query, key, value, lengths - first), axis="shard"))

    results = jax.pmap(local, axis_name="shard")(*caches)
    for i in range(2):
        assert_results([np.asarray(x)[i] for x in results], GQA)
