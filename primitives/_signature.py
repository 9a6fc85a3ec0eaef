"""The operands and results of the three primitives, by name.

This is the one place that knows their order, their dimensions and their dtypes. The type rule,
folding, differentiation, transposition, sharding and `jax_ragged.costs` all read it here.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import jax.numpy as jnp

from jax_ragged.lowering.cache import NARROW
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype

T = TypeVar("T")

# The dtype: as query, as query or narrow, as out (see `RaggedAttentionParams.out_dtype`), as the
# statistics, or int32.
Kind = Literal["query", "cache", "out", "statistic", "position"]
# How leading dimensions fold: into rows and queries, [B, Q, ...]; into rows, [B, ...], for an
# operand that the queries of a row share; into pages, [P, ...], for a pool.
Fold = Literal["query", "row", "pool"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One operand or result.

    Attributes:
      name: the name; the name of a tangent ends in `_dot`, of a cotangent in `_bar`.
      trailing: the letters of the dimensions that follow the leading ones.
      kind: which dtype it has.
      fold: how its leading dimensions fold.
      optional: whether a call may lack it.
      differentiable: whether it is an operand with tangents and cotangents, or one of these.
      broadcasts: whether a trailing dimension may be 1 instead of its letter's size.
      linear: whether the primitive is linear in this operand.
      shared: for a result, the leading dimensions that it is summed over and keeps as 1; None
        for none.
    """

    name: str
    trailing: tuple[str, ...]
    kind: Kind
    fold: Fold = "query"
    optional: bool = False
    differentiable: bool = False
    broadcasts: bool = False
    linear: bool = False
    shared: tuple[bool, ...] | None = None

    def dtypes(self, query_dtype: Any, params: RaggedAttentionParams) -> tuple[Any, ...]:
        """The dtypes that it may have beside a query of query_dtype."""
        if self.kind == "position":
            return (jnp.dtype("int32"),)
        if self.kind == "statistic":
            return (statistics_dtype(query_dtype),)
        if self.kind == "out":
            return (params.result_dtype(query_dtype),)
        own = jnp.dtype(query_dtype)
        return (own, *NARROW) if self.kind == "cache" else (own,)

    def dot(self) -> "Spec":
        """The tangent of this operand or result."""
        return dataclasses.replace(self, name=f"{self.name}_dot", linear=True)

    def bar(self, shared: tuple[bool, ...] | None = None) -> "Spec":
        """The cotangent of this operand or result."""
        return dataclasses.replace(self, name=f"{self.name}_bar", linear=True, shared=shared)

    @property
    def primal(self) -> str:
        """The name without the ending of a tangent or cotangent."""
        return self.name.removesuffix("_dot").removesuffix("_bar")


def primals(params: RaggedAttentionParams) -> tuple[Spec, ...]:
    """The operands of ragged_attention_p, in order."""
    pages = ("P",) if params.paged else ()
    position = "T" if params.paged else "S"
    heads = ("Hkv", position) if params.cache_layout == "BHSD" else (position, "Hkv")
    cache = (*pages, *heads)
    of_cache = functools.partial(Spec, fold="pool" if params.paged else "row", differentiable=True)
    specs = (
        Spec("query", ("Hq", "D"), "query", differentiable=True),
        of_cache("key", (*cache, "D"), "cache"),
        of_cache("value", (*cache, "Dv"), "cache"),
        Spec("lengths", (), "position"),
        Spec("starts", (), "position"),
        Spec("page_table", ("W",), "position", "row", optional=True),
        of_cache("key_scale", cache, "statistic", optional=True, broadcasts=True),
        of_cache("value_scale", cache, "statistic", optional=True, broadcasts=True),
    )
    return tuple(spec for spec in specs if not spec.optional or spec.name in params.optional)


RESULTS = (
    Spec("out", ("Hq", "Dv"), "out"),
    Spec("max_logits", ("Hq",), "statistic"),
    Spec("denominator", ("Hq",), "statistic"),
)


def residuals(params: RaggedAttentionParams) -> tuple[Spec, ...]:
    """The operands and results of ragged_attention_p, with an `out` that is not rounded."""
    unrounded = (dataclasses.replace(spec, kind="statistic") for spec in RESULTS)
    return (*primals(params), *unrounded)


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
    return Signature("ragged_attention", primals(params), RESULTS)


def jvp_signature(*, params: RaggedAttentionParams, wrt: Names) -> Signature:
    """The signature of ragged_attention_jvp_p for the tangents of the operands in wrt."""
    dots = (spec.dot() for spec in named(primals(params), wrt))
    return Signature(
        "ragged_attention_jvp", (*residuals(params), *dots), tuple(spec.dot() for spec in RESULTS)
    )


def vjp_signature(
    *, params: RaggedAttentionParams, given: Names, wrt: Names, shared: Shared
) -> Signature:
    """The signature of ragged_attention_vjp_p.

    `given` names the results that have a cotangent. `wrt` names the operands whose cotangent is
    asked for. `shared` has, for each of these, the leading dimensions that it is summed over.
    """
    bars = (spec.bar() for spec in named(RESULTS, given))
    asked = zip(named(primals(params), wrt), shared, strict=True)
    return Signature(
        "ragged_attention_vjp",
        (*residuals(params), *bars),
        tuple(spec.bar(share) for spec, share in asked),
    )
