"""What the three primitives do alike: eager evaluation, effects, mapped axes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec

from jax_ragged.lowering import dispatch
from jax_ragged.lowering._compat import interpret_effects


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Any:
    """A jitted bind: what makes an eager call about as cheap as one of lax."""

    def run(*operands: jax.Array) -> Any:
        return primitive.bind(*operands, **dict(params))

    run.__name__ = run.__qualname__ = primitive.name
    return jax.jit(run)


def eager(primitive: Primitive) -> Callable[..., Any]:
    """The implementation of a primitive on concrete arrays; `disable_jit` does not reach it."""

    def impl(*operands: jax.Array, **params: Any) -> Any:
        with jax.disable_jit(False):
            return _compiled(primitive, tuple(params.items()))(*operands)

    return impl


def with_effects(abstract_eval: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the effects of the TPU kernel where interpret mode runs it on this host."""

    def effectful(*operands: Any, **params: Any) -> tuple[Any, frozenset[Any]]:
        return abstract_eval(*operands, **params), interpret_effects()

    return effectful


def lead(operands: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Puts the mapped axis in front, and a 1 in front of the operands that do not have it."""
    return [
        jnp.expand_dims(x, 0) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]


def lead_params(axis_data: Any, params: Any) -> Any:
    """Gives the `partition` of the parameters an entry for the mapped axis."""
    if params.partition is None:
        return params
    axis = axis_data.spmd_name if axis_data.spmd_name is not None else axis_data.explicit_mesh_axis
    return dataclasses.replace(params, partition=PartitionSpec(axis, *params.partition))


def register_lowerings(primitive: Primitive, folded: Callable[..., Any]) -> None:
    """Registers `folded(implementation, *operands, **params)` for every platform."""

    def rule(platform: str, ctx: Any, *operands: Any, **params: Any) -> Any:
        implementation = dispatch.implementation_for(platform, ctx)
        lower = mlir.lower_fun(functools.partial(folded, implementation), multiple_results=True)
        return lower(ctx, *operands, **params)

    mlir.register_lowering(primitive, functools.partial(rule, "default"), inline=False)
    for platform in ("cpu", "tpu", "cuda"):
        mlir.register_lowering(
            primitive, functools.partial(rule, platform), platform=platform, inline=False
        )


def scatter(marks: Sequence[bool], values: Iterable[Any]) -> tuple[Any, ...]:
    """Puts values where marks are true and None elsewhere."""
    rest = iter(values)
    return tuple(next(rest) if marked else None for marked in marks)


def nonlinear_jvp(
    plain: Callable[..., list[jax.Array]], primals: Sequence[jax.Array], tangents: Sequence[Any]
) -> list[jax.Array] | None:
    """The tangents of plain for those of its operands that have one, or None if none has."""
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    if not moving:
        return None

    def of_moving(*values: jax.Array) -> list[jax.Array]:
        operands = list(primals)
        for i, x in zip(moving, values, strict=True):
            operands[i] = x
        return plain(*operands)

    at, along = [primals[i] for i in moving], [tangents[i] for i in moving]
    tangents_out: list[jax.Array] = jax.jvp(of_moving, at, along)[1]
    return tangents_out
