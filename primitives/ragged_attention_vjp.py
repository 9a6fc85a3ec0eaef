"""The cotangents of ragged attention, linear in the cotangents of its results.

The operands are the operands of ragged_attention_p, its results with `out` not rounded, and the
cotangents of the results that `given` names. The results are the cotangents of the operands that
`wrt` names. Each is summed over the leading dimensions that its entry of `shared` marks, and keeps
them as 1. So a cache that many queries share gets one gradient, and under a vmap over cotangents
each example gets its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_ragged.lowering import dispatch
from jax_ragged.lowering.contract import ByOperand, ByResult, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype
from jax_ragged.primitives import ragged_attention_jvp
from jax_ragged.primitives._folding import sum_to
from jax_ragged.primitives._primitive import (
    Definition,
    abstract_eval,
    batch_rule,
    bind,
    eager,
    filter_nonzero,
    linear_jvp_rule,
    register_lowerings,
)
from jax_ragged.primitives._signature import (
    RESULTS,
    Names,
    Shared,
    names,
    residuals as residual_specs,
    vjp_signature,
)


def _run(
    target: dispatch.Target,
    arrays: Mapping[str, jax.Array],
    wide: Names,
    *,
    params: RaggedAttentionParams,
    given: Names,
    wrt: Names,
    shared: Shared,
) -> Mapping[str, jax.Array | None]:
    del given, shared  # arrays holds the given cotangents; the caller sums
    residuals = Residuals(**{name: arrays[name] for name in names(residual_specs(params))})
    cotangents = ByResult(*(arrays.get(f"{name}_bar") for name in names(RESULTS)))

    def dtype(name: str) -> Any:
        if name not in wrt:
            return None
        own = arrays[name].dtype
        return statistics_dtype(own) if f"{name}_bar" in wide else own

    bars = target.vjp(residuals, cotangents, ByOperand(*map(dtype, ByOperand._fields)), params)
    return {f"{name}_bar": x for name, x in bars._asdict().items()}


def _ragged_attention_vjp_transpose_rule(
    tangents: Sequence[Any],
    *operands: Any,
    params: RaggedAttentionParams,
    given: Names,
    wrt: Names,
    shared: Shared,
) -> list[Any]:
    signature = vjp_signature(params=params, given=given, wrt=wrt, shared=shared)
    residuals, linear = signature.split(operands)
    asked = {
        name.removesuffix("_bar"): x.aval for name, x in linear.items() if ad.is_undefined_primal(x)
    }
    grads: dict[str, Any] = {name: ad.Zero(aval) for name, aval in asked.items()}
    # A tangent of size 1 in a shared dimension is broadcast: the transpose of the sum over it.
    moving = dict(filter_nonzero(wrt, tangents))
    if moving:
        dots = bind(
            ragged_attention_jvp.ragged_attention_jvp_p,
            *residuals.values(),
            *moving.values(),
            params=params.with_unrounded_out(residuals["query"].dtype),
            wrt=tuple(moving),
        )
        by_name = dict(zip(names(RESULTS), dots, strict=True))
        grads = {
            name: sum_to(by_name[name], aval).astype(aval.dtype) for name, aval in asked.items()
        }
    return [*[None] * len(residuals), *map(grads.get, given)]


def _lead_shared(static: dict[str, Any]) -> dict[str, Any]:
    """Marks the mapped axis as not shared: a result is mapped even if its operand is not."""
    return static | {"shared": tuple((False, *share) for share in static["shared"])}


_DEFINITION = Definition(vjp_signature, _run)

ragged_attention_vjp_p = Primitive("ragged_attention_vjp")
ragged_attention_vjp_p.multiple_results = True
ragged_attention_vjp_p.def_impl(eager(ragged_attention_vjp_p))
ragged_attention_vjp_p.def_effectful_abstract_eval(abstract_eval(_DEFINITION))
ad.primitive_jvps[ragged_attention_vjp_p] = linear_jvp_rule(
    ragged_attention_vjp_p, _DEFINITION, marks="given"
)
ad.primitive_transposes[ragged_attention_vjp_p] = _ragged_attention_vjp_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_vjp_p] = batch_rule(
    ragged_attention_vjp_p, _lead_shared
)
register_lowerings(ragged_attention_vjp_p, _DEFINITION)
