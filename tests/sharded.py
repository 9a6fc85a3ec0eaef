"""Meshes of the eight CPU devices, operands laid out on them, and results of sharded programs."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import cases
import oracle
from cases import FLOAT32_SUMMED, Case

CASES = (
    Case("sharded_mha", (20, 0, 7, 30), (3, 0, 6, -4), Hq=4, Hkv=4, S=20, D=8, Dv=4),
    Case("sharded_gqa", (20, 0, 7, 9), Q=2, Hq=8, Hkv=4, S=20, D=8, Dv=8, logits_soft_cap=2.0),
    Case("sharded_mqa", (20, 0, 7, 9), Q=3, Hq=8, Hkv=1, S=20, D=8, Dv=8),
)
GQA, MQA = CASES[1:]


def make_mesh(kind: AxisType, shape: Sequence[int] = (2, 4)) -> Any:
    """A mesh with the axes "data" and "model", all of one type."""
    return jax.make_mesh(
        tuple(shape), ("data", "model"), axis_types=(kind, kind), devices=jax.devices("cpu")
    )


def specs(case: Case) -> tuple[P, ...]:
    """Rows over "data" and heads over "model", for the operands of a case."""
    heads = None if case.Hkv == 1 else "model"
    query = P("data", "model") if case.Q is None else P("data", None, "model")
    cache = P("data", None, heads)
    return (query, cache, cache, P("data"), P("data"))[: 4 if case.starts is None else 5]


def partition(case: Case) -> P:
    """The argument `partition` with the meaning of `specs`."""
    return specs(case)[0]


def operands(case: Case) -> tuple[Any, ...]:
    """The operands of a case, without starts where it has none."""
    return tuple(x for x in case.operands() if x is not None)


def place(mesh: Any, x: Any, *spec: Any) -> jax.Array:
    """One array on a mesh."""
    placed: jax.Array = jax.device_put(x, NamedSharding(mesh, P(*spec)))
    return placed


def put(mesh: Any, case: Case) -> tuple[jax.Array, ...]:
    """The operands of a case on a mesh, as `specs` says."""
    return tuple(place(mesh, x, *s) for x, s in zip(operands(case), specs(case), strict=True))


def put_results(mesh: Any, case: Case, results: Sequence[Any]) -> tuple[jax.Array, ...]:
    """Cotangents (or tangents) of the results on a mesh."""
    sharding = NamedSharding(mesh, specs(case)[0])
    return tuple(jax.device_put(x, sharding) for x in results)


def assert_gradients(actual: Sequence[Any], case: Case) -> None:
    """Compares gradients by query, key and value for the case's cotangents with the oracle's."""
    expected = oracle.vjp(*case.operands(), case.cotangents(), **case.definition)
    for name, got, want in zip(("query", "key", "value"), actual, expected, strict=True):
        cases.assert_close(got, want, FLOAT32_SUMMED, scale=1 + np.abs(want).max(), name=name)


def assert_tangents(actual: Sequence[Any], case: Case, tangents: Sequence[Any]) -> None:
    """Compares tangents of the results with the oracle's."""
    expected = oracle.jvp(*case.operands(), tuple(tangents), **case.definition)
    for name, got, want in zip(("out", "max_logits", "denominator"), actual, expected, strict=True):
        cases.assert_close(got, want, FLOAT32_SUMMED, scale=1 + np.abs(want).max(), name=name)
