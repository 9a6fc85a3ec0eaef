"""The cotangents of ragged attention, linear in those of out, max_logits and denominator.

Operands: those of ragged_attention_p, its results, and the cotangents of those of the results
that `given` marks. Results: the cotangents of those of (query, key, value) that `wrt` marks,
each summed over the leading dimensions that its entry of `shared` marks, which have size 1 in
it. So a cache shared by many queries gets one gradient, and a cotangent mapped by vmap gets one
for each example.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Residuals
from jax_ragged.primitives import ragged_attention_jvp
from jax_ragged.primitives._avals import DIFFERENTIABLE, PRIMALS, RESULTS, Operands
from jax_ragged.primitives._folding import Folding, is_one, sum_shared
from jax_ragged.primitives._primitive import (
    Types,
    abstract_eval,
    batch_rule,
    eager,
    gather,
    is_nonzero,
    linear_jvp_rule,
    register_lowerings,
    scatter,
)

Marks = tuple[bool, bool, bool]
Shared = tuple[tuple[bool, ...], ...]


def _ragged_attention_vjp_types(
    *operands: ShapedArray,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> Types:
    names = (*PRIMALS, *RESULTS, *(f"{n}_bar" for n in gather(given, RESULTS)))
    named = dict(zip(names, operands, strict=True))
    checked = Operands.check("ragged_attention_vjp", named, params.partition)
    return Types(checked, list(zip(gather(wrt, DIFFERENTIABLE), shared, strict=True)))


def _ragged_attention_vjp_folded(
    implementation: Any,
    *operands: jax.Array,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> list[jax.Array]:
    query, key, value, *rest = operands[:8]
    cache_shared = shared[1:] if wrt[0] else shared
    folding = Folding.of(query.ndim - 2, (query, *rest, *operands[8:]), (key, value), cache_shared)
    fold, fold_cache = folding.fold, folding.fold_cache
    grads = implementation.vjp(
        Residuals(fold(query), fold_cache(key), fold_cache(value), *map(fold, rest)),
        scatter(given, map(fold, operands[8:])),
        wrt,
        params=params,
    )
    unfold = (folding.unfold, folding.unfold_cache, folding.unfold_cache)
    asked = zip(gather(wrt, unfold), gather(wrt, grads), shared, strict=True)
    return [sum_shared(unfold(grad), share) for unfold, grad, share in asked]


def _ragged_attention_vjp_transpose_rule(
    tangents: Sequence[Any],
    *operands: Any,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> list[Any]:
    del shared  # a tangent of size 1 in a shared dimension is broadcast: the transpose of the sum
    residuals, linear = operands[:8], operands[8:]
    undefined = [ad.is_undefined_primal(x) for x in linear]
    asked = [x.aval for x in linear if ad.is_undefined_primal(x)]
    moving = tuple(map(is_nonzero, scatter(wrt, tangents)))
    cotangents: list[Any] = [ad.Zero(aval) for aval in asked]
    if any(moving):
        rank = residuals[0].ndim - 2
        dots = ragged_attention_jvp.ragged_attention_jvp_p.bind(
            *residuals, *filter(is_nonzero, tangents), params=params, wrt=moving
        )
        dots = gather(undefined, gather(given, dots))
        cotangents = [
            sum_shared(dot, [is_one(n) for n in aval.shape[:rank]])
            for dot, aval in zip(dots, asked, strict=True)
        ]
    return [None] * 8 + list(scatter(undefined, cotangents))


def _lead_shared(static: dict[str, Any]) -> dict[str, Any]:
    """A result is mapped, one for each example, whether or not its operand is."""
    return static | {"shared": tuple((False, *share) for share in static["shared"])}


ragged_attention_vjp_p = Primitive("ragged_attention_vjp")
ragged_attention_vjp_p.multiple_results = True
ragged_attention_vjp_p.def_impl(eager(ragged_attention_vjp_p))
ragged_attention_vjp_p.def_effectful_abstract_eval(abstract_eval(_ragged_attention_vjp_types))
ad.primitive_jvps[ragged_attention_vjp_p] = linear_jvp_rule(
    ragged_attention_vjp_p, _ragged_attention_vjp_folded, _ragged_attention_vjp_types, marks="given"
)
ad.primitive_transposes[ragged_attention_vjp_p] = _ragged_attention_vjp_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_vjp_p] = batch_rule(
    ragged_attention_vjp_p, _lead_shared
)
register_lowerings(
    ragged_attention_vjp_p, _ragged_attention_vjp_folded, _ragged_attention_vjp_types
)
