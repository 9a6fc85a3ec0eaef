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

from jax_ragged.lowering import reference
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives import ragged_attention_jvp
from jax_ragged.primitives._avals import DIFFERENTIABLE, PRIMALS, RESULTS, Operands
from jax_ragged.primitives._folding import Folding, is_one, sum_shared
from jax_ragged.primitives._primitive import (
    eager,
    lead,
    lead_params,
    nonlinear_jvp,
    register_lowerings,
    scatter,
    with_effects,
)

RESIDUALS = (*PRIMALS, *RESULTS)
Marks = tuple[bool, bool, bool]
Shared = tuple[tuple[bool, ...], ...]


def _marked(names: Sequence[str], marks: Marks) -> list[str]:
    return [n for n, marked in zip(names, marks, strict=True) if marked]


def _ragged_attention_vjp_abstract_eval(
    *operands: ShapedArray,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> list[ShapedArray]:
    names = (*RESIDUALS, *(f"{n}_bar" for n in _marked(RESULTS, given)))
    checked = Operands.check("ragged_attention_vjp", dict(zip(names, operands, strict=True)))
    asked = _marked(DIFFERENTIABLE, wrt)
    return [checked.result(name, share) for name, share in zip(asked, shared, strict=True)]


def _ragged_attention_vjp_folded(
    implementation: Any,
    *operands: jax.Array,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> list[jax.Array]:
    query, key, value, *rest = operands[:8]
    cache_shared = [s for s, n in zip(shared, _marked("qkv", wrt), strict=True) if n != "q"]
    folding = Folding.of(query.ndim - 2, (query, *rest, *operands[8:]), (key, value), cache_shared)
    grads = implementation.vjp(
        folding.fold(query),
        folding.fold_cache(key),
        folding.fold_cache(value),
        *map(folding.fold, rest),
        scatter(given, map(folding.fold, operands[8:])),
        wrt,
        params=params,
    )
    unfold = (folding.unfold, folding.unfold_cache, folding.unfold_cache)
    asked = [u(g) for u, g, w in zip(unfold, grads, wrt, strict=True) if w]
    return [sum_shared(g, share) for g, share in zip(asked, shared, strict=True)]


# Linear in its cotangents, as ragged_attention_jvp_p is in its tangents.
def _ragged_attention_vjp_jvp_rule(
    primals: Sequence[jax.Array],
    tangents: Sequence[Any],
    *,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> tuple[list[jax.Array], list[Any]]:
    static: dict[str, Any] = {"params": params, "wrt": wrt, "shared": shared}
    results = ragged_attention_vjp_p.bind(*primals, given=given, **static)
    bars_dot = scatter(given, tangents[8:])
    linear = tuple(t is not None and not isinstance(t, ad.Zero) for t in bars_dot)
    tangents_out = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    if any(linear):
        nonzero = [t for t, given_dot in zip(bars_dot, linear, strict=True) if given_dot]
        tangents_out = ragged_attention_vjp_p.bind(*primals[:8], *nonzero, given=linear, **static)

    def plain(*residuals: jax.Array) -> list[jax.Array]:
        return _ragged_attention_vjp_folded(
            reference, *residuals, *primals[8:], given=given, **static
        )

    curved = nonlinear_jvp(plain, primals[:8], tangents[:8])
    if curved is not None:
        tangents_out = list(map(ad.add_tangents, tangents_out, curved))
    return results, tangents_out


def _ragged_attention_vjp_transpose_rule(
    tangents: Sequence[Any],
    *operands: Any,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> list[Any]:
    del shared  # a tangent of size 1 in a shared dimension is broadcast: the transpose of the sum
    residuals, linear = operands[:8], scatter(given, operands[8:])
    by_position = scatter(wrt, tangents)
    nonzero = tuple(t is not None and not isinstance(t, ad.Zero) for t in by_position)
    if not any(nonzero):
        return [None] * 8 + [ad.Zero(x.aval) for x in linear if x is not None]
    dots = ragged_attention_jvp.ragged_attention_jvp_p.bind(
        *residuals,
        *(t for t, n in zip(by_position, nonzero, strict=True) if n),
        params=params,
        wrt=nonzero,
    )
    cotangents: list[jax.Array | None] = []
    for dot, x in zip(dots, linear, strict=True):
        if x is None:
            continue
        if not ad.is_undefined_primal(x):
            cotangents.append(None)
            continue
        rank = residuals[0].ndim - 2
        cotangents.append(sum_shared(dot, [is_one(n) for n in x.aval.shape[:rank]]))
    return [None] * 8 + cotangents


def _ragged_attention_vjp_batch_rule(
    axis_data: Any,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    params: RaggedAttentionParams,
    given: Marks,
    wrt: Marks,
    shared: Shared,
) -> tuple[list[jax.Array], list[int | None]]:
    if all(d is None for d in dims):
        results = ragged_attention_vjp_p.bind(
            *operands, params=params, given=given, wrt=wrt, shared=shared
        )
        return results, [None] * len(results)
    results = ragged_attention_vjp_p.bind(
        *lead(operands, dims),
        params=lead_params(axis_data, params),
        given=given,
        wrt=wrt,
        shared=tuple((False, *share) for share in shared),
    )
    return results, [0] * len(results)


ragged_attention_vjp_p = Primitive("ragged_attention_vjp")
ragged_attention_vjp_p.multiple_results = True
ragged_attention_vjp_p.def_impl(eager(ragged_attention_vjp_p))
ragged_attention_vjp_p.def_effectful_abstract_eval(
    with_effects(_ragged_attention_vjp_abstract_eval)
)
ad.primitive_jvps[ragged_attention_vjp_p] = _ragged_attention_vjp_jvp_rule
ad.primitive_transposes[ragged_attention_vjp_p] = _ragged_attention_vjp_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_vjp_p] = _ragged_attention_vjp_batch_rule
register_lowerings(ragged_attention_vjp_p, _ragged_attention_vjp_folded)
