"""The tangents of ragged attention, linear in the tangents of query, key and value.

Operands: those of ragged_attention_p, its results, and the tangents of those of (query, key,
value) that `wrt` marks. Results: the tangents of out, max_logits and denominator.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_ragged.lowering import reference
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives import ragged_attention_vjp
from jax_ragged.primitives._avals import DIFFERENTIABLE, PRIMALS, RESULTS, Operands
from jax_ragged.primitives._folding import Folding, is_one
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
Wrt = tuple[bool, bool, bool]


def _names(wrt: Wrt) -> list[str]:
    return [f"{n}_dot" for n, w in zip(DIFFERENTIABLE, wrt, strict=True) if w]


def _ragged_attention_jvp_abstract_eval(
    *operands: ShapedArray, params: RaggedAttentionParams, wrt: Wrt
) -> list[ShapedArray]:
    names = (*RESIDUALS, *_names(wrt))
    checked = Operands.check("ragged_attention_jvp", dict(zip(names, operands, strict=True)))
    return [checked.result(name) for name in RESULTS]


def _ragged_attention_jvp_folded(
    implementation: Any, *operands: jax.Array, params: RaggedAttentionParams, wrt: Wrt
) -> list[jax.Array]:
    query, key, value, *rest = operands[:8]
    q_dot, k_dot, v_dot = scatter(wrt, operands[8:])
    folding = Folding.of(
        query.ndim - 2,
        [x for x in (query, *rest, q_dot) if x is not None],
        [x for x in (key, value, k_dot, v_dot) if x is not None],
    )
    fold, fold_cache = folding.fold, folding.fold_cache
    results = implementation.jvp(
        fold(query),
        fold_cache(key),
        fold_cache(value),
        *map(fold, rest),
        (
            None if q_dot is None else fold(q_dot),
            None if k_dot is None else fold_cache(k_dot),
            None if v_dot is None else fold_cache(v_dot),
        ),
        params=params,
    )
    return [folding.unfold(x) for x in results]


# A linear function of its tangents: theirs go through the same primitive. In the other operands
# it is not linear: their tangents go through JAX's own rules on the plain form.
def _ragged_attention_jvp_jvp_rule(
    primals: Sequence[jax.Array],
    tangents: Sequence[Any],
    *,
    params: RaggedAttentionParams,
    wrt: Wrt,
) -> tuple[list[jax.Array], list[Any]]:
    results = ragged_attention_jvp_p.bind(*primals, params=params, wrt=wrt)
    given = scatter(wrt, tangents[8:])
    linear = tuple(t is not None and not isinstance(t, ad.Zero) for t in given)
    tangents_out = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    if any(linear):
        nonzero = [t for t, w in zip(given, linear, strict=True) if w]
        tangents_out = ragged_attention_jvp_p.bind(
            *primals[:8], *nonzero, params=params, wrt=linear
        )

    def plain(*residuals: jax.Array) -> list[jax.Array]:
        return _ragged_attention_jvp_folded(
            reference, *residuals, *primals[8:], params=params, wrt=wrt
        )

    curved = nonlinear_jvp(plain, primals[:8], tangents[:8])
    if curved is not None:
        tangents_out = list(map(ad.add_tangents, tangents_out, curved))
    return results, tangents_out


def _ragged_attention_jvp_transpose_rule(
    cotangents: Sequence[Any],
    *operands: Any,
    params: RaggedAttentionParams,
    wrt: Wrt,
) -> list[Any]:
    residuals, linear = operands[:8], scatter(wrt, operands[8:])
    asked = tuple(ad.is_undefined_primal(x) for x in linear)
    given = tuple(not isinstance(ct, ad.Zero) for ct in cotangents)
    shared = tuple(
        tuple(is_one(n) for n in x.aval.shape[: residuals[0].ndim - 2])
        for x, a in zip(linear, asked, strict=True)
        if a
    )
    if not any(given):
        grads = [ad.Zero(x.aval) for x, a in zip(linear, asked, strict=True) if a]
    else:
        nonzero = [ct for ct, g in zip(cotangents, given, strict=True) if g]
        grads = ragged_attention_vjp.ragged_attention_vjp_p.bind(
            *residuals, *nonzero, params=params, given=given, wrt=asked, shared=shared
        )
    by_position = scatter(asked, grads)
    return [None] * 8 + [g for g, w in zip(by_position, wrt, strict=True) if w]


def _ragged_attention_jvp_batch_rule(
    axis_data: Any,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    params: RaggedAttentionParams,
    wrt: Wrt,
) -> tuple[list[jax.Array], list[int | None]]:
    if all(d is None for d in dims):
        return ragged_attention_jvp_p.bind(*operands, params=params, wrt=wrt), [None] * 3
    results = ragged_attention_jvp_p.bind(
        *lead(operands, dims), params=lead_params(axis_data, params), wrt=wrt
    )
    return results, [0] * 3


ragged_attention_jvp_p = Primitive("ragged_attention_jvp")
ragged_attention_jvp_p.multiple_results = True
ragged_attention_jvp_p.def_impl(eager(ragged_attention_jvp_p))
ragged_attention_jvp_p.def_effectful_abstract_eval(
    with_effects(_ragged_attention_jvp_abstract_eval)
)
ad.primitive_jvps[ragged_attention_jvp_p] = _ragged_attention_jvp_jvp_rule
ad.primitive_transposes[ragged_attention_jvp_p] = _ragged_attention_jvp_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_jvp_p] = _ragged_attention_jvp_batch_rule
register_lowerings(ragged_attention_jvp_p, _ragged_attention_jvp_folded)
