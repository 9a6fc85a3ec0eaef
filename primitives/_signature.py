"""The operands and results of the three primitives, by name.

This is the one place that knows their order, their dimensions and their dtypes. The type rule,
folding, differentiation, transposition, sharding and `jax_ragged.costs` all read it here.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np

from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype

T = TypeVar("T")

# The dtype: as query, as out (see `RaggedAttentionParams.out_dtype`), as the statistics, or int32.
Kind = Literal["query", "out", "statistic", "position"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One operand or result.

    Attributes:
      name: the name; the name of a tangent ends in `_dot`, of a cotangent in `_bar`.
      trailing: the letters of the dimensions that follow the leading ones.
      kind: which dtype it has.
      linear: whether the primitive is linear in this operand.
      shared: for a result, the leading dimensions that it is summed over and keeps as 1; None
        for none.
    """

    name: str
    trailing: tuple[str, ...]
    kind: Kind
    linear: bool = False
    shared: tuple[bool, ...] | None = None

    @property
    def is_cache(self) -> bool:
        """Whether it has the positions of a cache, which one row's queries share."""
        return "S" in self.trailing

    def dtype(self, query_dtype: Any, params: RaggedAttentionParams) -> np.dtype[Any]:
        """The dtype beside a query of query_dtype."""
        if self.kind == "position":
            return jnp.dtype("int32")
        if self.kind == "statistic":
            return statistics_dtype(query_dtype)
        return params.result_dtype(query_dtype) if self.kind == "out" else jnp.dtype(query_dtype)

    def dot(self) -> "Spec":
        """The tangent of this operand or result."""
        return dataclasses.replace(self, name=f"{self.name}_dot", linear=True)

    def bar(self, shared: tuple[bool, ...] | None = None) -> "Spec":
        """The cotangent of this operand or result."""
        return dataclasses.replace(self, name=f"{self.name}_bar", linear=True, shared=shared)


PRIMALS = (
    Spec("query", ("Hq", "D"), "query"),
    Spec("key", ("S", "Hkv", "D"), "query"),
    Spec("value", ("S", "Hkv", "Dv"), "query"),
    Spec("lengths", (), "position"),
    Spec("starts", (), "position"),
)
RESULTS = (
    Spec("out", ("Hq", "Dv"), "out"),
    Spec("max_logits", ("Hq",), "statistic"),
    Spec("denominator", ("Hq",), "statistic"),
)
DIFFERENTIABLE = PRIMALS[:3]
# The derivatives start from an `out` that is not rounded.
RESIDUALS = (*PRIMALS, *(dataclasses.replace(spec, kind="statistic") for spec in RESULTS))


def names(specs: Iterable[Spec]) -> tuple[str, ...]:
    """The names, in order."""
    return tuple(spec.name for spec in specs)


def named(specs: Sequence[Spec], wanted: Sequence[str]) -> tuple[Spec, ...]:
    """The specs with the wanted names, in their own order."""
    return tuple(spec for spec in specs if spec.name in wanted)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The operands and results of one equation.

    Attributes:
      primitive: the name of the primitive.
      operands: the operands in order, the linear ones last.
      results: the results in order.
    """

    primitive: str
    operands: tuple[Spec, ...]
    results: tuple[Spec, ...]

    def bind(self, values: Sequence[T]) -> dict[str, T]:
        """Returns the values of the operands, by name."""
        return dict(zip(names(self.operands), values, strict=True))

    def split(self, values: Sequence[T]) -> tuple[dict[str, T], dict[str, T]]:
        """Returns the values of the residuals and of the linear operands, each by name."""
        pairs = list(zip(self.operands, values, strict=True))
        residuals = {spec.name: x for spec, x in pairs if not spec.linear}
        return residuals, {spec.name: x for spec, x in pairs if spec.linear}


# A tuple of names, `wrt` of operands and `given` of results, stands in the equation's parameters.
Names = tuple[str, ...]
Shared = tuple[tuple[bool, ...], ...]


def forward_signature(*, params: RaggedAttentionParams) -> Signature:
    """The signature of ragged_attention_p."""
    del params  # no operand is optional
    return Signature("ragged_attention", PRIMALS, RESULTS)


def jvp_signature(*, params: RaggedAttentionParams, wrt: Names) -> Signature:
    """The signature of ragged_attention_jvp_p for the tangents of the operands in wrt."""
    del params
    dots = (spec.dot() for spec in named(DIFFERENTIABLE, wrt))
    return Signature(
        "ragged_attention_jvp", (*RESIDUALS, *dots), tuple(spec.dot() for spec in RESULTS)
    )


def vjp_signature(
    *, params: RaggedAttentionParams, given: Names, wrt: Names, shared: Shared
) -> Signature:
    """The signature of ragged_attention_vjp_p.

    `given` names the results that have a cotangent. `wrt` names the operands whose cotangent is
    asked for. `shared` has, for each of these, the leading dimensions that it is summed over.
    """
    del params
    bars = (spec.bar() for spec in named(RESULTS, given))
    asked = zip(named(DIFFERENTIABLE, wrt), shared, strict=True)
    return Signature(
        "ragged_attention_vjp",
        (*RESIDUALS, *bars),
        tuple(spec.bar(share) for spec, share in asked),
    )
