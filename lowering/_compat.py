"""Everything that is private to JAX or differs between its versions, each with its reason."""

import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax._src import config as _config
from jax.core import ShapedArray
from jax.extend.core import Jaxpr
from jax.interpreters import mlir

# `inline=` of a jit whose equations stand in the enclosing jaxpr: from 0.11 on, where it is an
# enum, True inlines when lowering only.
INLINE_EQUATIONS: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)

# XLA on CPUs, before 0.12, updates a part of a bfloat16 array by widening all of it.
CPU_UPDATES_BFLOAT16 = jax.__version_info__ >= (0, 12)

# XLA on CPUs, from 0.11 on, wakes other threads for every product of matrices, however small.
CPU_THREADS_DOTS = jax.__version_info__ >= (0, 11)


def interpret_mode() -> Any:
    """The parameters of `pltpu.force_tpu_interpret_mode`, or None outside of it.

    Private: the public context manager has no public reader. Its value is part of the key of
    every trace and compilation cache, so rules may depend on it.
    """
    return _config.pallas_tpu_interpret_mode_context_manager.value


def interpret_effects() -> frozenset[Any]:
    """The effects that a kernel has when `interpret_mode` runs it on the CPU.

    Private: an equation must declare the effects that its lowering will emit.
    """
    mode = interpret_mode()
    if mode is None:
        return frozenset()
    from jax._src.pallas import core as pallas_core

    return frozenset(pallas_core.get_interpret_effects(mode))


def as_primitive(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function to jit as the evaluation of one primitive.

    Private: under `debug_nans` JAX runs a jitted function that gave a NaN again, operation by
    operation. Of a primitive's own evaluation, that would be itself without end; with the mark
    it reports the primitive, as it does for primitives of lax.
    """
    fun._apply_primitive = True  # type: ignore[attr-defined]
    return fun


def forget_serialization(serialized_name: str) -> None:
    """Forgets the class registered for export under a name, if there is one.

    Private: a module that is imported again, as by `importlib.reload`, makes its classes again, and
    JAX refuses a second one of the same name. Programs serialized before it can still be read.
    """
    from jax._src.export import _export

    known = _export.deserialization_registry.pop(serialized_name, None)
    if known is not None:
        _export.serialization_registry.pop(known[0], None)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which a value or aval varies (`vma` until jax 0.11)."""
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return frozenset(aval.manual_axis_type.varying)


def pcast_to_varying(x: jax.Array, axes: Collection[str]) -> jax.Array:
    """Marks x as varying over the given manual mesh axes too."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def axis_context(ctx: mlir.LoweringRuleContext) -> Any:
    """Where a lowering rule stands: ShardingContext, SPMDAxisContext or ReplicaAxisContext.

    Undocumented, but the same since before the oldest supported version.
    """
    return ctx.module_context.axis_context


def device_kind(ctx: mlir.LoweringRuleContext) -> str | None:
    """The kind of device a program is lowered for, or None where no device is known (export).

    Undocumented: a program for one device has no device assignment while it is lowered, but the
    client that will compile it.
    """
    module = ctx.module_context
    if module.lowering_parameters.for_export:
        return None
    devices = getattr(module.axis_context, "device_assignment", None)
    if not devices and module.backend is not None:
        devices = module.backend.devices()
    kind: str | None = devices[0].device_kind if devices else None
    return kind


def opened(jaxpr: Any) -> tuple[Jaxpr, list[Any]]:
    """A jaxpr and the values of its constants, whether it is closed or not.

    From 0.12 on a Jaxpr holds its constants, and there is no ClosedJaxpr around it.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def mosaic_gpu_load(ref: Any, *, layout: Any, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole ref, which until jax 0.11 took an index besides."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = inspect.signature(plgpu.load).parameters.get("idx")
    required = index is not None and index.default is inspect.Parameter.empty
    indices = ((),) if required else ()
    loaded: jax.Array = plgpu.load(ref, *indices, layout=layout, optimized=optimized)
    return loaded


def unchecked_varying_axes() -> AbstractContextManager[None]:
    """Traces without checking over which manual mesh axes values vary.

    Private: inside `jax.shard_map` the results of a Pallas kernel would have to name these axes,
    and a lowering rule, whose results get them from the primitive, does not know them.
    """
    context: AbstractContextManager[None] = _config._check_vma(False)
    return context
