"""The primitive: ragged attention in its canonical form.

query [*N, Hq, D], key [*N, S, Hkv, D], value [*N, S, Hkv, Dv], lengths and starts int32 [*N] to
out [*N, Hq, Dv], max_logits and denominator [*N, Hq]. In each leading dimension an operand has
size n, or 1 where it is shared; the results have n.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_ragged.lowering import dispatch
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype
from jax_ragged.primitives._folding import is_one
from jax_ragged.primitives._primitive import (
    Definition,
    abstract_eval,
    batch_rule,
    bind,
    eager,
    filter_nonzero,
    register_lowerings,
)
from jax_ragged.primitives._signature import (
    RESULTS,
    Names,
    forward_signature,
    names,
    primals as primal_specs,
)
from jax_ragged.primitives.ragged_attention_jvp import ragged_attention_jvp_p
from jax_ragged.primitives.ragged_attention_vjp import ragged_attention_vjp_p


def _run(
    target: dispatch.Target,
    arrays: Mapping[str, jax.Array],
    wide: Names,
    *,
    params: RaggedAttentionParams,
) -> Mapping[str, jax.Array]:
    assert not wide, "a result of the forward is never summed"
    return target.forward(Operands(**arrays), params)._asdict()


# ragged_attention_jvp_p computes the tangents, linear in the tangents of query, key and value. Its
# residuals are the results, with `out` not rounded. They have names, so that a policy of
# jax.checkpoint can save them.
def _ragged_attention_jvp_rule(
    primals: Sequence[jax.Array], tangents: Sequence[Any], *, params: RaggedAttentionParams
) -> tuple[list[jax.Array], list[Any]]:
    dtype = primals[0].dtype
    unrounded = params.with_unrounded_out(dtype)
    unnamed = bind(ragged_attention_p, *primals, params=unrounded)
    out, *statistics = residuals = [
        checkpoint_name(x, f"ragged_attention_{name}")
        for name, x in zip(names(RESULTS), unnamed, strict=True)
    ]
    results = [out.astype(params.result_dtype(dtype)), *statistics]
    moving = dict(filter_nonzero(names(primal_specs(params)), tangents))
    if not moving:
        return results, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    return results, bind(
        ragged_attention_jvp_p,
        *primals,
        *residuals,
        *moving.values(),
        params=params,
        wrt=tuple(moving),
    )


# out is linear in value: out = p value, so value_bar = p.T out_bar. ragged_attention_vjp_p computes
# it from max_logits and denominator. These two do not depend on value, so the key stands for it.
# Nor does value_bar depend on value or on out, so zeros stand for them.
def _ragged_attention_transpose_rule(
    cotangents: Sequence[Any], *operands: Any, params: RaggedAttentionParams
) -> list[Any]:
    named = forward_signature(params=params).bind(operands)
    if {name for name, x in named.items() if ad.is_undefined_primal(x)} != {"value"}:
        raise NotImplementedError(
            "ragged_attention: it is linear in value alone, so it can be transposed in value only; "
            "got a linear query or key. Differentiate it with jax.vjp or jax.grad."
        )
    value = named["value"].aval
    grads: dict[str, Any] = {"value": ad.Zero(value)}
    given = dict(filter_nonzero(names(RESULTS), cotangents))
    if "out" in given:
        out_bar, query = given["out"], named["query"]
        unscaled = tuple(name for name in params.optional if name != "value_scale")
        key_params = dataclasses.replace(params, optional=unscaled)
        key_twice = named | {"value": named["key"]}
        key_twice.pop("value_scale", None)
        _, *statistics = bind(ragged_attention_p, *key_twice.values(), params=key_params)
        (grads["value"],) = bind(
            ragged_attention_vjp_p,
            *(named | {"value": ad.instantiate_zeros(ad.Zero(value))}).values(),
            jax.numpy.zeros_like(out_bar, dtype=statistics_dtype(query.dtype)),
            *statistics,
            out_bar,
            params=params,
            given=("out",),
            wrt=("value",),
            shared=(tuple(is_one(n) for n in value.shape[: query.ndim - 2]),),
        )
    return [grads.get(name) for name in named]


_DEFINITION = Definition(forward_signature, _run)

ragged_attention_p = Primitive("ragged_attention")
ragged_attention_p.multiple_results = True
ragged_attention_p.def_impl(eager(ragged_attention_p))
ragged_attention_p.def_effectful_abstract_eval(abstract_eval(_DEFINITION))
ad.primitive_jvps[ragged_attention_p] = _ragged_attention_jvp_rule
ad.primitive_transposes[ragged_attention_p] = _ragged_attention_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_p] = batch_rule(ragged_attention_p)
register_lowerings(ragged_attention_p, _DEFINITION)
