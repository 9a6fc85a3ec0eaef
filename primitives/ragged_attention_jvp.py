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

from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import Residuals
from jax_ragged.primitives import ragged_attention_vjp
from jax_ragged.primitives._avals import DIFFERENTIABLE, PRIMALS, RESULTS, Operands
from jax_ragged.primitives._folding import Folding, is_one
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

Wrt = tuple[bool, bool, bool]


def _ragged_attention_jvp_types(
    *operands: ShapedArray, params: RaggedAttentionParams, wrt: Wrt
) -> Types:
    names = (*PRIMALS, *RESULTS, *(f"{n}_dot" for n in gather(wrt, DIFFERENTIABLE)))
    named = dict(zip(names, operands, strict=True))
    checked = Operands.check("ragged_attention_jvp", named, params.partition)
    return Types(checked, [(name, None) for name in RESULTS])


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
        Residuals(fold(query), fold_cache(key), fold_cache(value), *map(fold, rest)),
        (
            None if q_dot is None else fold(q_dot),
            None if k_dot is None else fold_cache(k_dot),
            None if v_dot is None else fold_cache(v_dot),
        ),
        params=params,
    )
    return [folding.unfold(x) for x in results]


def _ragged_attention_jvp_transpose_rule(
    cotangents: Sequence[Any],
    *operands: Any,
    params: RaggedAttentionParams,
    wrt: Wrt,
) -> list[Any]:
    residuals, linear = operands[:8], operands[8:]
    undefined = [ad.is_undefined_primal(x) for x in linear]
    asked = [x for x in linear if ad.is_undefined_primal(x)]
    given = tuple(map(is_nonzero, cotangents))
    grads: list[Any] = [ad.Zero(x.aval) for x in asked]
    if any(given):
        rank = residuals[0].ndim - 2
        grads = ragged_attention_vjp.ragged_attention_vjp_p.bind(
            *residuals,
            *filter(is_nonzero, cotangents),
            params=params,
            given=given,
            wrt=tuple(map(bool, scatter(wrt, undefined))),
            shared=tuple(tuple(is_one(n) for n in x.aval.shape[:rank]) for x in asked),
        )
    return [None] * 8 + list(scatter(undefined, grads))


ragged_attention_jvp_p = Primitive("ragged_attention_jvp")
ragged_attention_jvp_p.multiple_results = True
ragged_attention_jvp_p.def_impl(eager(ragged_attention_jvp_p))
ragged_attention_jvp_p.def_effectful_abstract_eval(abstract_eval(_ragged_attention_jvp_types))
ad.primitive_jvps[ragged_attention_jvp_p] = linear_jvp_rule(
    ragged_attention_jvp_p, _ragged_attention_jvp_folded, _ragged_attention_jvp_types, marks="wrt"
)
ad.primitive_transposes[ragged_attention_jvp_p] = _ragged_attention_jvp_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_jvp_p] = batch_rule(ragged_attention_jvp_p)
register_lowerings(
    ragged_attention_jvp_p, _ragged_attention_jvp_folded, _ragged_attention_jvp_types
)
