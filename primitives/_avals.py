"""The checks of operands and the types of results, shared by the three primitives.

A result is built from the operands' types, so that it keeps the mesh and the sharding of an
explicit mesh, and the manual axes over which values vary inside shard_map.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_ragged.lowering._compat import varying_axes
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.sharding import Layout, axes_of_type, axis_names
from jax_ragged.primitives._folding import is_one, joined_size
from jax_ragged.primitives._signature import Signature, Spec


def _describe(operands: Mapping[str, ShapedArray]) -> str:
    return ", ".join(f"{name} {aval.str_short()}" for name, aval in operands.items())


@dataclasses.dataclass(frozen=True)
class Checked:
    """The checked operands of one equation, and the properties that they agree on.

    Attributes:
      signature: the operands and results.
      params: the static parameters of the equation.
      avals: the types of the operands, by name.
      sizes: the sizes of the trailing dimensions, by letter.
      axes: the explicit mesh axes of the trailing dimensions, by letter.
      leading: the sizes of the leading dimensions.
      leading_axes: the explicit mesh axes of the leading dimensions.
      template: the type that carries the mesh and the manual axes to the results.
    """

    signature: Signature
    params: RaggedAttentionParams
    avals: Mapping[str, ShapedArray]
    sizes: Mapping[str, Any]
    axes: Mapping[str, Any]
    leading: tuple[Any, ...]
    leading_axes: tuple[Any, ...]
    template: ShapedArray

    @classmethod
    def of(
        cls, signature: Signature, avals: Sequence[ShapedArray], params: RaggedAttentionParams
    ) -> "Checked":
        """Checks the operands of an equation.

        Raises:
          TypeError, ValueError: if the operands do not fit each other.
        """
        primitive, operands = signature.primitive, signature.bind(avals)
        rank = operands["query"].ndim - 2
        trailing = {spec.name: spec.trailing for spec in signature.operands}
        for name, aval in operands.items():
            if aval.ndim != rank + len(trailing[name]):
                raise ValueError(
                    f"{primitive}: {name} must have shape [*N, {', '.join(trailing[name])}] "
                    f"with the {rank} leading dimensions of query; got {_describe(operands)}."
                )
        _check_dtypes(signature, operands, params)
        _check_reduced(primitive, operands)
        leading = tuple(joined_size([a.shape[i] for a in operands.values()]) for i in range(rank))
        for name, aval in operands.items():
            for i, size in enumerate(aval.shape[:rank]):
                if not is_one(size) and size != leading[i]:
                    raise ValueError(
                        f"{primitive}: leading dimension {i} of {name} must be {leading[i]} or 1; "
                        f"got {_describe(operands)}."
                    )
        sizes = joined_sizes(signature, operands, rank)
        if is_zero(sizes["Hkv"]) or sizes["Hq"] % sizes["Hkv"] != 0:
            raise ValueError(
                f"{primitive}: the query heads must be a multiple of the key heads; "
                f"got {_describe(operands)}."
            )
        if isinstance(sizes["S"], int) and sizes["S"] >= 2**31:
            raise ValueError(
                f"{primitive}: a cache must have fewer than 2**31 positions, which int32 counts; "
                f"got {_describe(operands)}. Attend to parts of it and merge the results with "
                "jax_ragged.merge_partials."
            )
        axes = _joined_axes(signature, operands, sizes, rank)
        _check_distinct(primitive, operands, rank, axes["Hq"])
        leading_axes = _joined_leading_axes(primitive, operands, rank)
        checked = cls(
            signature=signature,
            params=params,
            avals=operands,
            sizes=sizes,
            axes=axes,
            leading=leading,
            leading_axes=leading_axes,
            template=_template(primitive, operands),
        )
        if params.partition is not None and not checked.template.sharding.mesh.empty:
            _check_partition(checked, params.partition, checked.template.sharding.mesh)
        return checked

    def results(self) -> list[ShapedArray]:
        """The types of the results."""
        return [self._result(spec) for spec in self.signature.results]

    def layout(self) -> Layout:
        """How the operands and the results lie on the mesh.

        The mesh comes from the operands' types or, for values made outside a mesh, from the
        context. The types say how explicit axes are split, `partition` how automatic ones are.
        """
        mesh = self.template.sharding.mesh
        if mesh.empty:
            mesh = jax.sharding.get_abstract_mesh()
        auto = axes_of_type(mesh, AxisType.Auto)
        if self.params.partition is None:
            auto = frozenset(axis for axis in auto if mesh.shape[axis] == 1)
        else:
            _check_partition(self, self.params.partition, mesh)
        return Layout(
            mesh=mesh,
            axes=axes_of_type(mesh, AxisType.Explicit) | auto,
            in_specs=tuple(map(self._operand_spec, self.signature.operands)),
            out_specs=tuple(self._spec(spec, spec.shared) for spec in self.signature.results),
        )

    def _operand_spec(self, spec: Spec) -> PartitionSpec:
        leading = self.avals[spec.name].shape[: len(self.leading)]
        return self._spec(spec, tuple(map(is_one, leading)))

    def _spec(self, spec: Spec, shared: Sequence[bool] | None) -> PartitionSpec:
        """The mesh axes of an operand or result, with none in its shared dimensions."""
        *leading, heads = self.params.partition or [None] * (len(self.leading) + 1)
        key_heads = None if is_one(self.sizes["Hkv"]) else heads
        axes = {
            **self.axes,
            "Hq": _merged(self.axes["Hq"], heads),
            "Hkv": _merged(self.axes["Hkv"], key_heads),
        }
        share = shared or [False] * len(self.leading)
        entries = [
            None if s else _merged(explicit, auto)
            for s, explicit, auto in zip(share, self.leading_axes, leading, strict=True)
        ]
        return PartitionSpec(*entries, *self._trailing_axes(spec, axes))

    def _trailing_axes(self, spec: Spec, axes: Mapping[str, Any]) -> list[Any]:
        """The mesh axes of the trailing dimensions; a dimension that is 1 instead has none."""
        operand = self.avals.get(spec.primal)
        if not spec.broadcasts or operand is None:
            return [axes[letter] for letter in spec.trailing]
        sizes = operand.shape[len(self.leading) :]
        return [None if is_one(n) else axes[x] for x, n in zip(spec.trailing, sizes, strict=True)]

    def _result(self, spec: Spec) -> ShapedArray:
        share = spec.shared or [False] * len(self.leading)
        leading = [1 if s else n for s, n in zip(share, self.leading, strict=True)]
        leading_axes = [None if s else a for s, a in zip(share, self.leading_axes, strict=True)]
        if spec.differentiable:  # the cotangent of an operand
            operand = self.avals[spec.primal]
            trailing, dtype = operand.shape[len(self.leading) :], operand.dtype
        else:
            trailing = tuple(self.sizes[letter] for letter in spec.trailing)
            (dtype,) = spec.dtypes(self.avals["query"].dtype, self.params)
        aval: ShapedArray = self.template.update(
            shape=(*leading, *trailing),
            dtype=dtype,
            weak_type=False,
            sharding=NamedSharding(
                self.template.sharding.mesh,
                PartitionSpec(*leading_axes, *self._trailing_axes(spec, self.axes)),
            ),
        )
        return aval


def joined_sizes(
    signature: Signature, operands: Mapping[str, ShapedArray], rank: int
) -> dict[str, Any]:
    """The sizes of the trailing dimensions, by letter."""
    sizes: dict[str, Any] = {}
    for spec in sorted(signature.operands, key=lambda spec: spec.broadcasts):
        for letter, size in zip(spec.trailing, operands[spec.name].shape[rank:], strict=True):
            if spec.broadcasts and is_one(size):
                continue
            if sizes.setdefault(letter, size) != size:
                or_one = " (or 1 in a scale)" if spec.broadcasts else ""
                raise ValueError(
                    f"{signature.primitive}: {letter} must be one size in all operands{or_one}; "
                    f"got {_describe(operands)}."
                )
    if "W" in sizes:
        sizes["S"] = sizes["W"] * sizes["T"]
    return sizes


def _check_dtypes(
    signature: Signature, operands: Mapping[str, ShapedArray], params: RaggedAttentionParams
) -> None:
    for spec in signature.operands:
        expected = spec.dtypes(operands["query"].dtype, params)
        if operands[spec.name].dtype not in expected:
            raise TypeError(
                f"{signature.primitive}: {spec.name} must have dtype "
                f"{' or '.join(map(str, expected))}; got {_describe(operands)}."
            )


def _check_reduced(primitive: str, operands: Mapping[str, ShapedArray]) -> None:
    for name, aval in operands.items():
        spec, manual = aval.sharding.spec, aval.manual_axis_type
        if spec.unreduced or spec.reduced or manual.unreduced or manual.reduced:
            raise TypeError(
                f"{primitive}: {name} must be neither unreduced nor reduced over axes of a mesh; "
                f"got {_describe(operands)}. Reshard it with jax.sharding.reshard."
            )


def _check_distinct(
    primitive: str, operands: Mapping[str, ShapedArray], rank: int, heads: Any
) -> None:
    """Raises where two dimensions of a result would be split over one mesh axis."""
    dims = [
        {axis for aval in operands.values() for axis in axis_names(aval.sharding.spec[i])}
        for i in range(rank)
    ]
    used = [axis for dim in (*dims, set(axis_names(heads))) for axis in dim]
    if len(set(used)) < len(used):
        raise TypeError(
            f"{primitive}: leading dimensions and heads must be sharded over different axes of "
            f"the mesh; got {_describe(operands)}. Reshard with jax.sharding.reshard."
        )


def _merged(*entries: Any) -> Any:
    """One entry of a PartitionSpec, with the mesh axes of all the entries."""
    merged = tuple(axis for entry in entries for axis in axis_names(entry))
    return merged[0] if len(merged) == 1 else merged or None


def _check_partition(operands: Checked, partition: PartitionSpec, mesh: AbstractMesh) -> None:
    """Raises unless partition splits the operands evenly over automatic axes of the mesh."""
    primitive, rank = operands.signature.primitive, len(operands.leading)
    if len(partition) != rank + 1:
        raise ValueError(
            f"{primitive}: partition must have {rank + 1} entries, one for each of the {rank} "
            "leading dimensions and the last for the heads; "
            f"got {partition} for {_describe(operands.avals)}."
        )
    auto = axes_of_type(mesh, AxisType.Auto)
    used = [axis for entry in partition for axis in axis_names(entry)]
    if mesh.empty and used:
        raise ValueError(
            f"{primitive}: partition names axes of a mesh; got {partition} where there is none. "
            "Call under jax.set_mesh(mesh), pass a NamedSharding, or leave partition out on one "
            "device."
        )
    if not set(used) <= auto or len(set(used)) < len(used):
        raise ValueError(
            f"{primitive}: partition must name automatic axes of the mesh, each at most once; "
            f"got {partition} on {mesh}. Leave out explicit axes, which the operands' types "
            "carry, and manual ones, over which shard_map has split the operands."
        )
    sizes = {"heads of query": operands.sizes["Hq"]}
    if not is_one(operands.sizes["Hkv"]):
        sizes["heads of key"] = operands.sizes["Hkv"]
    dims = [(f"leading dimension {i}", n, partition[i]) for i, n in enumerate(operands.leading)]
    dims += [(name, n, partition[-1]) for name, n in sizes.items()]
    for name, n, entry in dims:
        shards = math.prod(mesh.shape[axis] for axis in axis_names(entry))
        if n % shards != 0:
            raise ValueError(
                f"{primitive}: partition must split dimensions evenly; got {name} of size {n} "
                f"over {entry}, {shards} shards. Pad the batch, repeat the heads of key and "
                "value, or name fewer axes."
            )


def is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def _template(primitive: str, operands: Mapping[str, ShapedArray]) -> ShapedArray:
    """The type of an operand with a mesh if there is one: values made outside it have none."""
    varying = {name: varying_axes(aval) for name, aval in operands.items()}
    if len(set(varying.values())) > 1:
        got = ", ".join(f"{name} over {sorted(axes)}" for name, axes in varying.items())
        raise ValueError(
            f"{primitive}: all operands must vary over the same manual axes; got {got}. "
            'Join them with jax.lax.pcast(x, axes, to="varying"), or call '
            "jax_ragged.ragged_attention, which does."
        )
    avals = list(operands.values())
    return next((aval for aval in avals if not aval.sharding.mesh.empty), avals[0])


def _joined_leading_axes(
    primitive: str, operands: Mapping[str, ShapedArray], rank: int
) -> tuple[Any, ...]:
    """The mesh axes of each leading dimension, from the operands that have it at size n."""
    joined = []
    for i in range(rank):
        found = {
            aval.sharding.spec[i]
            for aval in operands.values()
            if not is_one(aval.shape[i]) and not aval.sharding.mesh.empty
        }
        if len(found) > 1:
            raise TypeError(
                f"{primitive}: leading dimension {i} must be sharded alike in every operand; "
                f"got {_describe(operands)}. Reshard with jax.sharding.reshard; "
                "jax_ragged.ragged_attention does where the others are replicated."
            )
        joined.append(next(iter(found), None))
    return tuple(joined)


_SHARD_OTHERS = "Shard the batch or the heads instead."
# The dimensions that must not be sharded: the name of each, and the advice.
_UNSHARDED = {
    "S": ("sequence", "Attend to each shard in jax.shard_map and use jax_ragged.merge_partials."),
    "P": ("page", "Give each shard a pool and a page table of its own in jax.shard_map."),
    "T": ("position", _SHARD_OTHERS),
    "W": ("position", _SHARD_OTHERS),
    "D": ("head_dim", _SHARD_OTHERS),
    "Dv": ("head_dim", _SHARD_OTHERS),
}


def _joined_axes(
    signature: Signature, operands: Mapping[str, ShapedArray], sizes: Mapping[str, Any], rank: int
) -> dict[str, Any]:
    """The mesh axes of the trailing dimensions, by letter: only the heads may have any."""
    primitive = signature.primitive
    axes: dict[str, Any] = {}
    for spec in signature.operands:
        aval = operands[spec.name]
        for letter, size, axis in zip(
            spec.trailing, aval.shape[rank:], aval.sharding.spec[rank:], strict=True
        ):
            if axis is not None and letter in _UNSHARDED:
                name, instead = _UNSHARDED[letter]
                raise TypeError(
                    f"{primitive}: the {name} dimension {letter} of {spec.name} must not be "
                    f"sharded; got {_describe(operands)}. {instead}"
                )
            if spec.broadcasts and is_one(size):
                continue
            if axes.setdefault(letter, axis) != axis:
                raise TypeError(
                    f"{primitive}: {letter} must be sharded alike in every operand; "
                    f"got {_describe(operands)}. Reshard with jax.sharding.reshard."
                )
    if axes["Hq"] != axes["Hkv"] and not is_one(sizes["Hkv"]):
        raise TypeError(
            f"{primitive}: query heads and key heads must be sharded alike; "
            f"got {_describe(operands)}. Reshard with jax.sharding.reshard."
        )
    return axes
