"""One call for each shard of a mesh.

A kernel cannot be partitioned by the compiler, so where the mesh and the layout of the operands
are known the implementation is wrapped in shard_map and sees local arrays only. Axes that are
manual already need nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_ragged.lowering._compat import axis_context, interpret_mode, pcast_to_varying, varying_axes


def axes_of_type(mesh: AbstractMesh, axis_type: AxisType) -> frozenset[str]:
    """The names of the axes of a mesh that have the type."""
    named = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in named if kind == axis_type)


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def split_alike(operands: Sequence[jax.Array], rank: int) -> tuple[jax.Array, ...]:
    """Splits replicated leading dimensions over the explicit axes that split the others'.

    Splitting an array that every device holds moves nothing. Dimensions of size 1 are shared and
    stay whole. A dimension that two operands split differently stays as it is, and so does one that
    would repeat an axis, and everything where an operand is unreduced: the checks of the primitive
    then state the requirement.
    """
    avals = [jax.typeof(x) for x in operands]
    mesh = next((a.sharding.mesh for a in avals if not a.sharding.mesh.empty), None)
    if mesh is None or not axes_of_type(mesh, AxisType.Explicit):
        return tuple(operands)
    if any(a.sharding.spec.unreduced or a.sharding.spec.reduced for a in avals):
        return tuple(operands)
    split = [{a.sharding.spec[i] for a in avals} - {None} for i in range(rank)]
    resharded = []
    for x, aval in zip(operands, avals, strict=True):
        spec = list(aval.sharding.spec)
        for i, axes in enumerate(split):
            used = {axis for entry in spec for axis in axis_names(entry)}
            free = not any(used.intersection(axis_names(entry)) for entry in axes)
            if len(axes) == 1 and spec[i] is None and aval.shape[i] != 1 and free:
                (spec[i],) = axes
        resharded.append(_with_spec(x, mesh, PartitionSpec(*spec)))
    return tuple(resharded)


def split_as(x: jax.Array, other: jax.Array, axis: int) -> jax.Array:
    """Splits a replicated dimension of x over the explicit mesh axes that split the other's.

    As with `split_alike`, a dimension of size 1 stays whole.
    """
    aval, like = jax.typeof(x), jax.typeof(other)
    mesh, axes = like.sharding.mesh, like.sharding.spec[axis]
    if mesh.empty or axes is None or aval.shape[axis] == 1:
        return x
    spec = list(aval.sharding.spec)
    used = {name for entry in spec for name in axis_names(entry)}
    if spec[axis] is not None or used.intersection(axis_names(axes)):
        return x
    spec[axis] = axes
    return _with_spec(x, mesh, PartitionSpec(*spec))


def result_type(
    shape: Sequence[int], dtype: jax.typing.DTypeLike, operand: jax.Array
) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over manual axes as its operands do."""
    manual = jax.typeof(operand).manual_axis_type
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=manual)


def _with_spec(x: jax.Array, mesh: AbstractMesh, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    return x if jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def _named(specs: Sequence[PartitionSpec]) -> Iterator[str]:
    return (axis for spec in specs for entry in spec for axis in axis_names(entry))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the operands and results of one call lie on a mesh.

    Attributes:
      mesh: of the operands, or else of the context.
      axes: the axes of the mesh that a call for each shard makes manual.
      in_specs: of the operands, over `axes`.
      out_specs: of the results, over `axes`.
    """

    mesh: AbstractMesh
    axes: frozenset[str]
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]

    def unpartitioned_devices(self, ctx: mlir.LoweringRuleContext) -> int:
        """Over how many devices the compiler would have to partition an implementation."""
        if self.mesh.empty:
            return getattr(axis_context(ctx), "num_devices", 1)
        left = axes_of_type(self.mesh, AxisType.Auto) - self.axes
        return math.prod(self.mesh.shape[axis] for axis in left)

    def check_devices(self, ctx: mlir.LoweringRuleContext) -> None:
        """Raises ValueError where the program has fewer devices than the mesh of its shards.

        That is so where `partition` alone names the mesh, and the operands lie elsewhere.
        """
        devices = getattr(axis_context(ctx), "num_devices", None)
        if self.axes and devices is not None and devices < self.mesh.size:
            raise ValueError(
                "ragged_attention: the operands must be on the mesh of partition, a "
                f"mesh of {self.mesh.size} devices; got a program for {devices}. Put the operands "
                "on the mesh with jax.device_put, give in_shardings to jax.jit, or call under "
                "jax.set_mesh(mesh)."
            )

    @property
    def sums(self) -> list[tuple[str, ...]]:
        """The mesh axes over which each result is summed.

        A result that is not split over an axis that splits the operands is a sum over the shards:
        the gradient of a shared cache, or of the one key head of many query heads.
        """
        split = frozenset(_named(self.in_specs))
        return [tuple(sorted(split - set(_named([spec])))) for spec in self.out_specs]

    def per_shard(
        self, run: Callable[..., Sequence[jax.Array]]
    ) -> Callable[..., Sequence[jax.Array]]:
        """Wraps `run` to be called on the shards of its operands, and sums its results."""
        if not self.axes:
            return run

        def shard(*operands: jax.Array) -> tuple[jax.Array, ...]:
            varying = frozenset[str]().union(*map(varying_axes, operands))
            results = run(*(pcast_to_varying(x, varying) for x in operands))
            return tuple(
                jax.lax.psum(pcast_to_varying(x, axes), axes) if axes else x
                for x, axes in zip(results, self.sums, strict=True)
            )

        sharded: Callable[..., Sequence[jax.Array]] = jax.shard_map(
            shard,
            mesh=self.mesh,
            in_specs=self.in_specs,
            out_specs=self.out_specs,
            axis_names=self.axes,
            # JAX's interpreter of TPU kernels has no rule for index maps of values that vary.
            check_vma=interpret_mode() is None,
        )

        def resharded(*operands: jax.Array) -> Sequence[jax.Array]:
            return sharded(*map(self._explicit, operands, self.in_specs))

        return resharded

    def _explicit(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Gives x the explicit axes of spec, which it lacks where it was made outside the mesh."""
        explicit = axes_of_type(self.mesh, AxisType.Explicit)
        if not explicit:
            return x
        entries = (tuple(a for a in axis_names(entry) if a in explicit) for entry in spec)
        return _with_spec(x, self.mesh, PartitionSpec(*(entry or None for entry in entries)))
