"""The tangents of ragged attention, linear in the tangents of query, key and value.

The operands are the operands of ragged_attention_p, its results with `out` not rounded, and the
tangents of the operands that `wrt` names. The results are the tangents of out, max_logits and
denominator.

This file and `ragged_attention_vjp` need each other, since each primitive is the transpose of the
other. They meet when rules run, after both are imported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_ragged.lowering import dispatch
from jax_ragged.lowering.contract import ByOperand, Residuals
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives import ragged_attention_vjp
from jax_ragged.primitives._folding import is_one
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
    jvp_signature,
    names,
    residuals as residual_specs,
)


def _run(
    target: dispatch.Target,
    arrays: Mapping[str, jax.Array],
    wide: Names,
    *,
    params: RaggedAttentionParams,
    wrt: Names,
) -> Mapping[str, jax.Array]:
    assert not wide, "a tangent of a result is never summed"
    residuals = Residuals(**{name: arrays[name] for name in names(residual_specs(params))})
    tangents = ByOperand(*(arrays.get(f"{name}_dot") for name in ByOperand._fields))
    dots = target.jvp(residuals, tangents, params)
    return {f"{name}_dot": x for name, x in dots._asdict().items()}


def _ragged_attention_jvp_transpose_rule(
    cotangents: Sequence[Any], *operands: Any, params: RaggedAttentionParams, wrt: Names
) -> list[Any]:
    signature = jvp_signature(params=params, wrt=wrt)
    residuals, linear = signature.split(operands)
    asked = {
        name.removesuffix("_dot"): x.aval for name, x in linear.items() if ad.is_undefined_primal(x)
    }
    grads: dict[str, Any] = {name: ad.Zero(aval) for name, aval in asked.items()}
    given = dict(filter_nonzero(names(RESULTS), cotangents))
    if given:
        rank = residuals["query"].ndim - 2
        bars = bind(
            ragged_attention_vjp.ragged_attention_vjp_p,
            *residuals.values(),
            *given.values(),
            params=params,
            given=tuple(given),
            wrt=tuple(asked),
            shared=tuple(tuple(map(is_one, aval.shape[:rank])) for aval in asked.values()),
        )
        grads = dict(zip(asked, bars, strict=True))
    return [*[None] * len(residuals), *map(grads.get, wrt)]


_DEFINITION = Definition(jvp_signature, _run)

ragged_attention_jvp_p = Primitive("ragged_attention_jvp")
ragged_attention_jvp_p.multiple_results = True
ragged_attention_jvp_p.def_impl(eager(ragged_attention_jvp_p))
ragged_attention_jvp_p.def_effectful_abstract_eval(abstract_eval(_DEFINITION))
ad.primitive_jvps[ragged_attention_jvp_p] = linear_jvp_rule(
    ragged_attention_jvp_p, _DEFINITION, marks="wrt"
)
ad.primitive_transposes[ragged_attention_jvp_p] = _ragged_attention_jvp_transpose_rule
batching.fancy_primitive_batchers[ragged_attention_jvp_p] = batch_rule(ragged_attention_jvp_p)
register_lowerings(ragged_attention_jvp_p, _DEFINITION)
