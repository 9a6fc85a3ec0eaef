"""What the three primitives do alike."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec

from jax_ragged.lowering import dispatch, reference
from jax_ragged.lowering._compat import as_primitive, interpret_effects
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.sharding import Layout
from jax_ragged.primitives._avals import Operands, Shared


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Any:
    """A jitted bind: what makes an eager call about as cheap as one of lax."""

    def run(*operands: jax.Array) -> Any:
        return primitive.bind(*operands, **dict(params))

    run.__name__ = run.__qualname__ = primitive.name
    return jax.jit(as_primitive(run))


def eager(primitive: Primitive) -> Callable[..., Any]:
    """The implementation of a primitive on concrete arrays; `disable_jit` does not reach it."""

    def impl(*operands: jax.Array, **params: Any) -> Any:
        with jax.disable_jit(False):
            return _compiled(primitive, tuple(params.items()))(*operands)

    return impl


class Types(NamedTuple):
    """The checked operands of an equation, and its results by name and shared dimensions."""

    operands: Operands
    results: Sequence[tuple[str, Shared]]

    def avals(self) -> list[ShapedArray]:
        return [self.operands.result(name, shared) for name, shared in self.results]

    def layout(self) -> Layout:
        return self.operands.layout(self.results)


def abstract_eval(types: Callable[..., Types]) -> Callable[..., Any]:
    """The types of the results, and the effects of the TPU kernel in interpret mode."""

    def rule(*operands: ShapedArray, **static: Any) -> tuple[list[ShapedArray], frozenset[Any]]:
        return types(*operands, **static).avals(), interpret_effects()

    return rule


def batch_rule(
    primitive: Primitive,
    lead_static: Callable[[dict[str, Any]], dict[str, Any]] = lambda static: static,
) -> Callable[..., Any]:
    """Puts the mapped axis in front, and a 1 in front of the operands that do not have it.

    Nothing is reshaped, copied or broadcast, and any nesting of vmaps is one equation.
    `lead_static` gives the static parameters other than `params` their entry for the axis.
    """

    def rule(
        axis_data: Any,
        operands: Sequence[jax.Array],
        dims: Sequence[int | None],
        *,
        params: RaggedAttentionParams,
        **static: Any,
    ) -> tuple[list[jax.Array], list[int | None]]:
        if all(d is None for d in dims):
            results = primitive.bind(*operands, params=params, **static)
            return results, [None] * len(results)
        led = [
            jnp.expand_dims(x, 0) if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(operands, dims, strict=True)
        ]
        results = primitive.bind(*led, params=_lead(axis_data, params), **lead_static(static))
        return results, [0] * len(results)

    return rule


def _lead(axis_data: Any, params: RaggedAttentionParams) -> RaggedAttentionParams:
    """Gives `partition` an entry for the mapped axis; explicit mesh axes are in the types."""
    if params.partition is None:
        return params
    partition = PartitionSpec(axis_data.spmd_name, *params.partition)
    return dataclasses.replace(params, partition=partition)


def linear_jvp_rule(
    primitive: Primitive, folded: Callable[..., Any], types: Callable[..., Types], marks: str
) -> Callable[..., Any]:
    """The JVP rule of a primitive linear in the operands after its eight residuals.

    The static parameter called `marks` tells which of three such operands there are. Their
    tangents go through the primitive itself; those of the residuals, in which it is not linear,
    go through JAX's own rules on the plain form.
    """

    def rule(
        primals: Sequence[jax.Array], tangents: Sequence[Any], **static: Any
    ) -> tuple[list[jax.Array], list[Any]]:
        results = primitive.bind(*primals, **static)
        residuals, linear = primals[:8], primals[8:]
        tangents_out = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
        moving = tuple(map(is_nonzero, scatter(static[marks], tangents[8:])))
        if any(moving):
            nonzero = filter(is_nonzero, tangents[8:])
            tangents_out = primitive.bind(*residuals, *nonzero, **(static | {marks: moving}))

        def plain(*residuals: jax.Array) -> list[jax.Array]:
            run = functools.partial(folded, reference, **static)
            layout = types(*map(jax.typeof, primals), **static).layout()
            return list(layout.per_shard(run)(*residuals, *linear))

        if any(map(is_nonzero, tangents[:8])):
            curved = _jvp_of_moving(plain, residuals, tangents[:8])
            tangents_out = list(map(ad.add_tangents, tangents_out, curved))
        return results, tangents_out

    return rule


def _jvp_of_moving(
    plain: Callable[..., list[jax.Array]], primals: Sequence[jax.Array], tangents: Sequence[Any]
) -> list[jax.Array]:
    """The tangents of plain for those of its operands that move; the others are constants."""
    moving = [i for i, t in enumerate(tangents) if is_nonzero(t)]

    def of_moving(*values: jax.Array) -> list[jax.Array]:
        operands = list(primals)
        for i, x in zip(moving, values, strict=True):
            operands[i] = x
        return plain(*operands)

    at, along = [primals[i] for i in moving], [tangents[i] for i in moving]
    tangents_out: list[jax.Array] = jax.jvp(of_moving, at, along)[1]
    return tangents_out


def register_lowerings(
    primitive: Primitive, folded: Callable[..., Any], types: Callable[..., Types]
) -> None:
    """Registers `folded(implementation, *operands, **static)` for every platform, per shard."""

    def rule(platform: str, ctx: Any, *operands: Any, **static: Any) -> Any:
        layout = types(*ctx.avals_in, **static).layout()
        implementation = dispatch.implementation_for(
            platform, ctx, layout.unpartitioned_devices(ctx)
        )
        run = layout.per_shard(functools.partial(folded, implementation, **static))
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    mlir.register_lowering(primitive, functools.partial(rule, "default"), inline=False)
    for platform in ("cpu", "tpu", "cuda"):
        mlir.register_lowering(
            primitive, functools.partial(rule, platform), platform=platform, inline=False
        )


def scatter(marks: Sequence[bool], values: Iterable[Any]) -> tuple[Any, ...]:
    """Puts values where marks are true and None elsewhere."""
    rest = iter(values)
    return tuple(next(rest) if marked else None for marked in marks)


def gather(marks: Sequence[bool], values: Iterable[Any]) -> list[Any]:
    """The values where marks are true."""
    return [x for x, marked in zip(values, marks, strict=True) if marked]


def is_nonzero(x: Any) -> bool:
    """Whether a tangent or cotangent is there and not a symbolic zero."""
    return x is not None and not isinstance(x, ad.Zero)
