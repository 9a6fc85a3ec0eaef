"""Checks of operands and types of results that the three primitives share.

A result is built from the operands' types, so that it keeps what they carry: the mesh and the
sharding of an explicit mesh, and the manual axes over which values vary inside shard_map.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec

from jax_ragged.lowering._compat import varying_axes
from jax_ragged.lowering.reference import statistics_dtype
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


@dataclasses.dataclass(frozen=True)
class Operands:
    """The sizes, sharding and manual axes that a primitive's operands agree on."""

    sizes: Mapping[str, Any]
    axes: Mapping[str, Any]
    leading: tuple[Any, ...]
    leading_axes: tuple[Any, ...]
    template: ShapedArray
    dtype: Any

    @classmethod
    def check(cls, primitive: str, operands: Mapping[str, ShapedArray]) -> "Operands":
        """Checks named operands; a name may end in _dot (a tangent) or _bar (a cotangent)."""
        rank = operands["query"].ndim - 2
        trailing = {
            name: TRAILING[name.removesuffix("_dot").removesuffix("_bar")] for name in operands
        }
        for name, aval in operands.items():
            if aval.ndim != rank + len(trailing[name]):
                raise ValueError(
                    f"{primitive}: {name} must have shape [*N, {', '.join(trailing[name])}] "
                    f"with the {rank} leading dimensions of query; got {_describe(operands)}."
                )
        _check_dtypes(primitive, operands)
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
        return cls(
            sizes=sizes,
            axes=_joined_axes(primitive, operands, trailing, rank),
            leading=leading,
            leading_axes=_joined_leading_axes(primitive, operands, rank),
            template=_template(primitive, operands),
            dtype=operands["query"].dtype,
        )

    def result(self, name: str, shared: Sequence[bool] | None = None) -> ShapedArray:
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
            name: aval.sharding.spec[i]
            for name, aval in operands.items()
            if aval.sharding.spec[i] is not None
        }
        if len(set(found.values())) > 1:
            raise TypeError(
                f"{primitive}: leading dimension {i} must be sharded alike in every operand; "
                f"got {_describe(operands)}. Reshard with jax.sharding.reshard."
            )
        joined.append(next(iter(found.values()), None))
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
                    "Attend to each shard inside jax.shard_map and merge the partial results."
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
