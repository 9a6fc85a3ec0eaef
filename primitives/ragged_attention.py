"""The primitive: ragged attention in its canonical form.

query [*N, Hq, D], key [*N, S, Hkv, D], value [*N, S, Hkv, Dv], lengths and starts int32 [*N] to
out [*N, Hq, Dv], max_logits and denominator [*N, Hq]. In each leading dimension an operand has
size n, or 1 where it is shared; the results have n.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_ragged.lowering import dispatch
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives._avals import PRIMALS, RESULTS, Operands
from jax_ragged.primitives._folding import Folding, is_one
from jax_ragged.primitives._primitive import (
    Types,
    abstract_eval,
    batch_rule,
    eager,
    is_nonzero,
    register_lowerings,
)
from jax_ragged.primitives.ragged_attention_jvp import ragged_attention_jvp_p
from jax_ragged.primitives.ragged_attention_vjp import ragged_attention_vjp_p


def _ragged_attention_types(*operands: ShapedArray, params: RaggedAttentionParams) -> Types:
    named: dict[str, ShapedArray] = dict(zip(PRIMALS, operands, strict=True))
    checked = Operands.check("ragged_attention", named, params.partition)
    return Types(checked, [(name, None) for name in RESULTS])


def _ragged_attention_folded(
    implementation: dispatch.Implementation,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    *,
    params: RaggedAttentionParams,
) -> list[jax.Array]:
    folding = Folding.of(query.ndim - 2, (query, lengths, starts), (key, value))
    results = implementation.forward(
        folding.fold(query),
        folding.fold_cache(key),
        folding.fold_cache(value),
        folding.fold(lengths),
        folding.fold(starts),
        params=params,
    )
    return [folding.unfold(x) for x in results]


# The tangents are those of ragged_attention_jvp_p, linear in the tangents of query, key and
# value; the results are its residuals, named so that a remat policy can save them.
def _ragged_attention_jvp_rule(
    primals: Sequence[jax.Array], tangents: Sequence[Any], *, params: RaggedAttentionParams
) -> tuple[list[jax.Array], list[Any]]:
    results = ragged_attention_p.bind(*primals, params=params)
    results = [
        checkpoint_name(x, f"ragged_attention_{name}")
        for x, name in zip(results, RESULTS, strict=True)
    ]
    wrt = tuple(map(is_nonzero, tangents[:3]))
    if not any(wrt):
        return results, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    nonzero = filter(is_nonzero, tangents[:3])
    return results, ragged_attention_jvp_p.bind(
        *primals, *results, *nonzero, params=params, wrt=wrt
    )


# out is linear in value: out = P value, so value' = P^T out', which ragged_attention_vjp_p gives
# from max_logits and denominator. Those do not depend on value, so that the key can stand for it;
# nor does value' depend on value or on out, so that zeros can stand for them.
def _ragged_attention_transpose_rule(
    cotangents: Sequence[Any], *operands: Any, params: RaggedAttentionParams
) -> list[Any]:
    query, key, value, lengths, starts = operands
    if ad.is_undefined_primal(query) or ad.is_undefined_primal(key):
        raise NotImplementedError(
            "ragged_attention: linear in value alone, and only there can it be transposed; "
            "got a linear query or key. Differentiate it with jax.vjp or jax.grad."
        )
    out_bar = cotangents[0]
    if not is_nonzero(out_bar):
        return [None, None, ad.Zero(value.aval), None, None]
    _, *statistics = ragged_attention_p.bind(query, key, key, lengths, starts, params=params)
    rank = query.ndim - 2
    (value_bar,) = ragged_attention_vjp_p.bind(
        query,
        key,
        ad.instantiate_zeros(ad.Zero(value.aval)),
        lengths,
        starts,
        ad.instantiate_zeros(ad.Zero(jax.typeof(out_bar))),
        *statistics,
        out_bar,
        params=params,
        given=(True, False, False),
        wrt=(False, False, True),
        shared=(tuple(is_one(n) for n in value.aval.shape[:rank]),),
    )
    return [None, None, value_bar, None, None]


ragged_attention_p = Primitive("ragged_attention")
ragged_attention_p.multiple_results = True
ragged_attention_p.def_impl(eager(ragged_attention_p))
ragged_attention_p.def_effectful_abstract_eval(abstract_eval(_ragged_attention_types))
ad.primitive_jvps[ragged_attention_p] = _ragged_attention_jvp_rule
ad.primitive_transposes[ragged_attention_p] = _ragged_attention_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_p] = batch_rule(ragged_attention_p)
register_lowerings(ragged_attention_p, _ragged_attention_folded, _ragged_attention_types)
