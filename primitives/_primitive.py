"""The rules that the three primitives share."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec

from jax_ragged.lowering import dispatch
from jax_ragged.lowering._compat import (
    as_primitive,
    interpret_effects,
    pcast_to_varying,
    varying_axes,
)
from jax_ragged.lowering.contract import Lowering
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives._avals import Checked
from jax_ragged.primitives._folding import Folding
from jax_ragged.primitives._signature import Signature


@dataclasses.dataclass(frozen=True)
class Definition:
    """A description of one primitive, from which its rules are made.

    Attributes:
      signature: the operands and results, for the equation's static parameters.
      run: `run(target, arrays, wide, **static)` runs the operation on a target, folded arrays in
        and folded results out, both by name. `wide` names the results that the caller sums
        afterwards, and rounds only then.
    """

    signature: Callable[..., Signature]
    run: Callable[..., Mapping[str, jax.Array | None]]

    def check(self, avals: Sequence[ShapedArray], static: Mapping[str, Any]) -> Checked:
        """Checks the operands of an equation; raises TypeError or ValueError for a misfit."""
        return Checked.of(self.signature(**static), avals, static["params"])

    def folded(
        self, target: dispatch.Target, static: Mapping[str, Any], *operands: jax.Array
    ) -> list[jax.Array]:
        """Folds the operands, runs the operation on the target, and unfolds the results.

        Results that are summed over shards later come back in a wider dtype than the equation's.
        """
        signature = self.signature(**static)
        values = signature.bind(operands)
        folding = Folding.of(signature, values)
        later = dict(zip(signature.results, target.summed, strict=False))
        sums = {spec: folding.summed(spec, values) for spec in signature.results}
        wide = tuple(spec.name for spec, axes in sums.items() if axes or later.get(spec))
        arrays = {spec.name: folding.fold(spec, values[spec.name]) for spec in signature.operands}
        results = self.run(target, arrays, wide, **static)
        unfolded = []
        for spec, axes in sums.items():
            x = results[spec.name]
            assert x is not None
            x = folding.unfold(spec, x)
            unfolded.append(x.sum(axis=axes, keepdims=True) if axes else x)
        return unfolded


def eager(primitive: Primitive) -> Callable[..., Any]:
    """Evaluates a primitive on concrete arrays, compiled even under `jax.disable_jit`.

    A jitted bind makes an eager call about as cheap as one of lax. Its programs are in JAX's own
    caches, which `jax.clear_caches` clears.
    """

    def run(*operands: jax.Array, params: tuple[tuple[str, Any], ...]) -> Any:
        return primitive.bind(*operands, **dict(params))

    run.__name__ = run.__qualname__ = primitive.name
    compiled = jax.jit(as_primitive(run), static_argnames="params")

    def impl(*operands: jax.Array, **params: Any) -> Any:
        with jax.disable_jit(False):
            return compiled(*operands, params=tuple(params.items()))

    return impl


def bind(primitive: Primitive, *operands: jax.Array, **static: Any) -> list[jax.Array]:
    """Binds a primitive to operands, after joining the manual mesh axes over which they vary."""
    varying = frozenset[str]().union(*map(varying_axes, operands))
    results: list[jax.Array] = primitive.bind(
        *(pcast_to_varying(x, varying) for x in operands), **static
    )
    return results


def abstract_eval(definition: Definition) -> Callable[..., Any]:
    """The types of the results, and the effects of the TPU kernel in interpret mode."""

    def rule(*operands: ShapedArray, **static: Any) -> tuple[list[ShapedArray], frozenset[Any]]:
        return definition.check(operands, static).results(), interpret_effects()

    return rule


def batch_rule(
    primitive: Primitive,
    lead_static: Callable[[dict[str, Any]], dict[str, Any]] = lambda static: static,
) -> Callable[..., Any]:
    """Puts the mapped axis in front, and a 1 in front of the operands that do not have it.

    No operand is broadcast, and any nesting of vmaps is one equation.
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
            results = bind(primitive, *operands, params=params, **static)
            return results, [None] * len(results)
        led = [
            jnp.expand_dims(x, 0) if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(operands, dims, strict=True)
        ]
        led_params = _lead(axis_data, params)
        results = bind(primitive, *led, params=led_params, **lead_static(static))
        return results, [0] * len(results)

    return rule


def _lead(axis_data: Any, params: RaggedAttentionParams) -> RaggedAttentionParams:
    """Gives `partition` an entry for the mapped axis; explicit mesh axes are in the types."""
    if params.partition is None:
        return params
    partition = PartitionSpec(axis_data.spmd_name, *params.partition)
    return dataclasses.replace(params, partition=partition)


def linear_jvp_rule(primitive: Primitive, definition: Definition, marks: str) -> Callable[..., Any]:
    """The JVP rule of a primitive that is linear in some operands and not in its residuals.

    The static parameter called `marks` names the linear operands. Their tangents go through the
    primitive itself. The tangents of the residuals go through JAX's own rules on the reference:
    they are derivatives of second order.
    """

    def rule(
        primals: Sequence[jax.Array], tangents: Sequence[Any], **static: Any
    ) -> tuple[list[jax.Array], list[Any]]:
        results = bind(primitive, *primals, **static)
        tangents_out: list[Any] = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
        signature = definition.signature(**static)
        residuals, linear = map(list, map(dict.values, signature.split(primals)))
        residuals_dot, linear_dot = map(list, map(dict.values, signature.split(tangents)))
        moving = dict(filter_nonzero(static[marks], linear_dot))
        if moving:
            marked = static | {marks: tuple(moving)}
            tangents_out = bind(primitive, *residuals, *moving.values(), **marked)

        def plain(*residuals: jax.Array) -> list[jax.Array]:
            layout = definition.check([*map(jax.typeof, primals)], static).layout()
            summed = tuple(map(bool, layout.sums))
            target = dispatch.higher_order_target(static["params"], summed)
            run = functools.partial(definition.folded, target, static)
            plain_results = layout.per_shard(run)(*residuals, *linear)
            return [x.astype(y.dtype) for x, y in zip(plain_results, results, strict=True)]

        if any(map(is_nonzero, residuals_dot)):
            curved = _jvp_of_moving(plain, residuals, residuals_dot)
            tangents_out = list(map(ad.add_tangents, tangents_out, curved))
        return results, tangents_out

    return rule


def _jvp_of_moving(
    plain: Callable[..., list[jax.Array]], primals: Sequence[jax.Array], tangents: Sequence[Any]
) -> list[jax.Array]:
    """The tangents of plain for the operands that move; the other operands are constants."""
    moving = [i for i, t in enumerate(tangents) if is_nonzero(t)]

    def of_moving(*values: jax.Array) -> list[jax.Array]:
        operands = list(primals)
        for i, x in zip(moving, values, strict=True):
            operands[i] = x
        return plain(*operands)

    at, along = [primals[i] for i in moving], [tangents[i] for i in moving]
    tangents_out: list[jax.Array] = jax.jvp(of_moving, at, along)[1]
    return tangents_out


_DEFINITIONS: dict[Primitive, Definition] = {}


def register_lowerings(primitive: Primitive, definition: Definition) -> None:
    """Registers the lowering of a primitive for the default and each platform with kernels."""
    _DEFINITIONS[primitive] = definition
    rule = functools.partial(_lowering_rule, definition, "default")
    mlir.register_lowering(primitive, rule, inline=False)
    for platform in ("cpu", "tpu", "cuda"):
        _register_platform(primitive, platform)


def definition_of(primitive: Primitive) -> Definition:
    """The definition of one of the package's primitives."""
    return _DEFINITIONS[primitive]


# `jax.default_backend()` is "gpu" on all of these, and programs are lowered for one of them.
_ALIASES = {"gpu": ("cuda", "rocm", "oneapi")}


def register_lowering(platform: str, lowering: Lowering) -> None:
    """Sets the lowering of a platform, in place of the one that the package has for it.

    Call it before the first use of ragged attention: programs that are compiled already keep
    theirs. `docs/add_a_lowering.md` writes a lowering step by step.

    Args:
      platform: the platform's name in JAX: "cpu", "cuda", "rocm", "oneapi" or "tpu". "gpu" is
        short for "cuda", "rocm" and "oneapi".
      lowering: an instance of a subclass of `jax_ragged.Lowering`.

    Raises:
      TypeError: if platform is not a string, or lowering not an instance of `jax_ragged.Lowering`.
      NotImplementedError: from JAX, for a platform that it does not know.

    Examples:
      A lowering that refuses every call, so that the reference runs:

      >>> from jax_ragged import Lowering, register_lowering
      >>> class Refusing(Lowering):
      ...     pass
      >>> register_lowering("rocm", Refusing())
    """
    if not isinstance(platform, str):
        raise TypeError(
            "register_lowering: platform must be the name of a platform, such as 'cpu'; "
            f"got {platform!r} of type {type(platform).__name__}."
        )
    if not isinstance(lowering, Lowering):
        raise TypeError(
            "register_lowering: lowering must be an instance of jax_ragged.Lowering; "
            f"got {lowering!r} of type {type(lowering).__name__}. Derive its class from "
            "jax_ragged.Lowering and pass an instance."
        )
    for name in _ALIASES.get(platform, (platform,)):
        for primitive in _DEFINITIONS:
            _register_platform(primitive, name)
        dispatch.register(name, lowering)


def _register_platform(primitive: Primitive, platform: str) -> None:
    rule = functools.partial(_lowering_rule, _DEFINITIONS[primitive], platform)
    mlir.register_lowering(primitive, rule, platform=platform, inline=False)


def _lowering_rule(
    definition: Definition, platform: str, ctx: Any, *operands: Any, **static: Any
) -> Any:
    """Lowers an equation to the operation on each shard, as JAX's lowering rules do."""
    layout = definition.check(ctx.avals_in, static).layout()
    layout.check_devices(ctx)
    target = dispatch.target_of(
        platform, ctx, layout.unpartitioned_devices(ctx), tuple(map(bool, layout.sums))
    )
    run = layout.per_shard(functools.partial(definition.folded, target, static))

    def rounded(*operands: jax.Array) -> list[jax.Array]:
        results = zip(run(*operands), ctx.avals_out, strict=True)
        return [x.astype(aval.dtype) for x, aval in results]

    return mlir.lower_fun(rounded, multiple_results=True)(ctx, *operands)


def filter_nonzero(names: Iterable[str], values: Iterable[Any]) -> list[tuple[str, Any]]:
    """The pairs of a name and a value that is not a symbolic zero."""
    return [(name, x) for name, x in zip(names, values, strict=True) if is_nonzero(x)]


def is_nonzero(x: Any) -> bool:
    """Whether a tangent or cotangent is there and not a symbolic zero."""
    return x is not None and not isinstance(x, ad.Zero)
