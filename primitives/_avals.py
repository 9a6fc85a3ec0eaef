"""Checks of operands and types of results that the three primitives share.

A result is built from the operands' types, so that it keeps what they carry: the mesh and the
sharding of an explicit mesh, and the manual axes over which values vary inside shard_map.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_ragged.lowering._compat import varying_axes
from jax_ragged.lowering.reference import statistics_dtype
from jax_ragged.lowering.sharding import Layout, axes_of_type, axis_names
from jax_ragged.primitives._folding import is_one, joined_size

PRIMALS = ("query", "key", "value", "lengths", "starts")
DIFFERENTIABLE = PRIMALS[:3]
RESULTS = ("out", "max_logits", "denominator")

# Dimensions that follow the leading ones, by operand and result.
TRAILING: Mapping[str, tuple[str, ...]] = {
    "query": ("Hq", "D"),
    "key": ("S", "Hkv", "D"),
    "value": ("S", "Hkv", "Dv"),
    "lengths": (),
    "starts": (),
    "out": ("Hq", "Dv"),
    "max_logits": ("Hq",),
    "denominator": ("Hq",),
}


def _describe(operands: Mapping[str, ShapedArray]) -> str:
    return ", ".join(f"{name} {aval.str_short()}" for name, aval in operands.items())


# Which leading dimensions are 1 in a result because it is summed over them; None is none.
Shared = Sequence[bool] | None


@dataclasses.dataclass(frozen=True)
class Operands:
    """The sizes, sharding and manual axes that a primitive's operands agree on."""

    primitive: str
    avals: Mapping[str, ShapedArray]
    partition: PartitionSpec | None
    sizes: Mapping[str, Any]
    axes: Mapping[str, Any]
    leading: tuple[Any, ...]
    leading_axes: tuple[Any, ...]
    template: ShapedArray
    dtype: Any

    @classmethod
    def check(
        cls,
        primitive: str,
        operands: Mapping[str, ShapedArray],
        partition: PartitionSpec | None = None,
    ) -> "Operands":
        """Checks named operands; a name may end in _dot (a tangent) or _bar (a cotangent)."""
        rank = operands["query"].ndim - 2
        trailing = {name: _trailing(name) for name in operands}
        for name, aval in operands.items():
            if aval.ndim != rank + len(trailing[name]):
                raise ValueError(
                    f"{primitive}: {name} must have shape [*N, {', '.join(trailing[name])}] "
                    f"with the {rank} leading dimensions of query; got {_describe(operands)}."
                )
        _check_dtypes(primitive, operands)
        _check_reduced(primitive, operands)
        leading = tuple(joined_size([a.shape[i] for a in operands.values()]) for i in range(rank))
        for name, aval in operands.items():
            for i, size in enumerate(aval.shape[:rank]):
                if not is_one(size) and size != leading[i]:
                    raise ValueError(
                        f"{primitive}: leading dimension {i} of {name} must be {leading[i]} or 1; "
                        f"got {_describe(operands)}."
                    )
        sizes: dict[str, Any] = {}
        for name, aval in operands.items():
            for letter, size in zip(trailing[name], aval.shape[rank:], strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(
                        f"{primitive}: {letter} must be one size in all operands; "
                        f"got {_describe(operands)}."
                    )
        if is_zero(sizes["Hkv"]) or sizes["Hq"] % sizes["Hkv"] != 0:
            raise ValueError(
                f"{primitive}: the query heads must be a multiple of the key heads; "
                f"got {_describe(operands)}."
            )
        checked = cls(
            primitive=primitive,
            avals=operands,
            partition=partition,
            sizes=sizes,
            axes=_joined_axes(primitive, operands, trailing, rank),
            leading=leading,
            leading_axes=_joined_leading_axes(primitive, operands, rank),
            template=_template(primitive, operands),
            dtype=operands["query"].dtype,
        )
        if partition is not None and not checked.template.sharding.mesh.empty:
            _check_partition(checked, partition, checked.template.sharding.mesh)
        return checked

    def layout(self, results: Sequence[tuple[str, Shared]]) -> Layout:
        """How the operands and the results, by name and shared dimensions, lie on the mesh.

        The mesh is that of the operands' types or, as for values made outside of it, the
        context's. Explicit axes are split as the types say, automatic ones as `partition` does.
        """
        mesh = self.template.sharding.mesh
        if mesh.empty:
            mesh = jax.sharding.get_abstract_mesh()
        auto = axes_of_type(mesh, AxisType.Auto)
        if self.partition is None:
            auto = frozenset(axis for axis in auto if mesh.shape[axis] == 1)
        else:
            _check_partition(self, self.partition, mesh)
        rank = len(self.leading)
        ones = {name: [is_one(n) for n in a.shape[:rank]] for name, a in self.avals.items()}
        return Layout(
            mesh=mesh,
            axes=axes_of_type(mesh, AxisType.Explicit) | auto,
            in_specs=tuple(self._spec(name, ones[name]) for name in self.avals),
            out_specs=tuple(self._spec(name, shared) for name, shared in results),
        )

    def _spec(self, name: str, shared: Shared) -> PartitionSpec:
        """The mesh axes of an operand or result; in its shared dimensions it has none."""
        *leading, heads = self.partition or [None] * (len(self.leading) + 1)
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
        return PartitionSpec(*entries, *(axes[letter] for letter in _trailing(name)))

    def result(self, name: str, shared: Shared = None) -> ShapedArray:
        """The type of a result shaped as the named one, with 1 in its shared dimensions."""
        share = [False] * len(self.leading) if shared is None else shared
        leading = [1 if s else n for s, n in zip(share, self.leading, strict=True)]
        leading_axes = [None if s else a for s, a in zip(share, self.leading_axes, strict=True)]
        statistic = name in ("max_logits", "denominator")
        aval: ShapedArray = self.template.update(
            shape=(*leading, *(self.sizes[d] for d in TRAILING[name])),
            dtype=statistics_dtype(self.dtype) if statistic else self.dtype,
            weak_type=False,
            sharding=NamedSharding(
                self.template.sharding.mesh,
                PartitionSpec(*leading_axes, *(self.axes[d] for d in TRAILING[name])),
            ),
        )
        return aval


def _check_dtypes(primitive: str, operands: Mapping[str, ShapedArray]) -> None:
    dtype = operands["query"].dtype
    for name, aval in operands.items():
        if name in ("lengths", "starts"):
            expected = jnp.dtype("int32")
        elif name.startswith(("max_logits", "denominator")):
            expected = statistics_dtype(dtype)
        else:
            expected = dtype
        if aval.dtype != expected:
            raise TypeError(
                f"{primitive}: {name} must have dtype {expected}; got {_describe(operands)}."
            )


def _check_reduced(primitive: str, operands: Mapping[str, ShapedArray]) -> None:
    for name, aval in operands.items():
        spec, manual = aval.sharding.spec, aval.manual_axis_type
        if spec.unreduced or spec.reduced or manual.unreduced or manual.reduced:
            raise TypeError(
                f"{primitive}: {name} must be neither unreduced nor reduced over axes of a mesh; "
                f"got {_describe(operands)}. Reshard it with jax.sharding.reshard."
            )


def _trailing(name: str) -> tuple[str, ...]:
    return TRAILING[name.removesuffix("_dot").removesuffix("_bar")]


def _merged(*entries: Any) -> Any:
    """One entry of a PartitionSpec with the mesh axes of all."""
    merged = tuple(axis for entry in entries for axis in axis_names(entry))
    return merged[0] if len(merged) == 1 else merged or None


def _check_partition(operands: Operands, partition: PartitionSpec, mesh: AbstractMesh) -> None:
    """Raises unless partition splits the operands evenly over automatic axes of the mesh."""
    primitive, rank = operands.primitive, len(operands.leading)
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
            "Call under jax.set_mesh(mesh), or leave partition out on one device."
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
    dims += [(what, n, partition[-1]) for what, n in sizes.items()]
    for what, n, entry in dims:
        shards = math.prod(mesh.shape[axis] for axis in axis_names(entry))
        if n % shards != 0:
            raise ValueError(
                f"{primitive}: partition must split dimensions evenly; got {what} of size {n} "
                f"over {entry}, {shards} shards. Pad the batch, repeat the heads of key and "
                "value, or name fewer axes."
            )


def is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def _template(primitive: str, operands: Mapping[str, ShapedArray]) -> ShapedArray:
    """An operand with a mesh, if one has any: values made outside of the mesh have none."""
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


def _joined_axes(
    primitive: str,
    operands: Mapping[str, ShapedArray],
    trailing: Mapping[str, tuple[str, ...]],
    rank: int,
) -> dict[str, Any]:
    """The mesh axes of the trailing dimensions, by letter: only the heads may have any."""
    axes: dict[str, Any] = {}
    for name, aval in operands.items():
        for letter, axis in zip(trailing[name], aval.sharding.spec[rank:], strict=True):
            if axis is not None and letter in ("S", "D", "Dv"):
                what = "sequence" if letter == "S" else "head_dim"
                how = (
                    "Attend to each shard in jax.shard_map and use jax_ragged.merge_partials."
                    if letter == "S"
                    else "Shard the batch or the heads instead."
                )
                raise TypeError(
                    f"{primitive}: the {what} dimension {letter} of {name} must not be sharded; "
                    f"got {_describe(operands)}. {how}"
                )
            if axes.setdefault(letter, axis) != axis:
                raise TypeError(
                    f"{primitive}: {letter} must be sharded alike in every operand; "
                    f"got {_describe(operands)}. Reshard with jax.sharding.reshard."
                )
    Hkv = next(a.shape[rank + 1] for n, a in operands.items() if n == "key")
    if axes["Hq"] != axes["Hkv"] and not is_one(Hkv):
        raise TypeError(
            f"{primitive}: query heads and key heads must be sharded alike; "
            f"got {_describe(operands)}. Reshard with jax.sharding.reshard."
        )
    return axes
