"""Folds leading dimensions into rows B, queries Q and pages P.

A leading dimension in which the cache has size n becomes part of the rows B. One in which it has
size 1 is shared by queries and becomes part of the queries Q. So a cache that is shared is read
once and not copied. A key or value that is shared where the other one is not is copied n times.

For a pool of pages, the page table plays the part of the cache. A pool that is shared stays as it
is. One that is mapped joins its pages into one pool, and the table counts pages in that.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_ragged.primitives._signature import Signature, Spec


def is_one(size: Any) -> bool:
    """Whether a dimension is known to be 1; a symbolic dimension is not."""
    return isinstance(size, int) and size == 1


def joined_size(sizes: Sequence[Any]) -> Any:
    """The size n of a leading dimension in which every operand has n or 1."""
    return next((size for size in sizes if not is_one(size)), 1)


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


@dataclasses.dataclass(frozen=True)
class Folding:
    """How leading dimensions fold.

    Attributes:
      leading: the size of each leading dimension.
      batch: whether each goes to the rows B, because the cache is not shared in it.
      pooled: whether each has a pool for every element; these are among the rows.
      pages: the number of pages of one pool, or None where there is no pool.
    """

    leading: tuple[Any, ...]
    batch: tuple[bool, ...]
    pooled: tuple[bool, ...]
    pages: Any

    @classmethod
    def of(cls, signature: Signature, operands: Mapping[str, Any]) -> "Folding":
        """Folds the leading dimensions of an equation's operands, by name."""
        rank = operands["query"].ndim - 2

        def full(i: int, *folds: str) -> bool:
            """Whether an array folded so has, or its gradient needs, dimension i at size n."""
            return any(
                not is_one(operands[spec.name].shape[i])
                for spec in signature.operands
                if spec.fold in folds
            ) or any(
                not spec.shared[i]
                for spec in signature.results
                if spec.fold in folds and spec.shared
            )

        paged = "page_table" in operands
        return cls(
            leading=tuple(
                joined_size([x.shape[i] for x in operands.values()]) for i in range(rank)
            ),
            batch=tuple(full(i, "row", "pool") for i in range(rank)),
            pooled=tuple(full(i, "pool") for i in range(rank)),
            pages=operands["key"].shape[rank] if paged else None,
        )

    @property
    def _batch_dims(self) -> list[int]:
        return [i for i, batch in enumerate(self.batch) if batch]

    @property
    def _query_dims(self) -> list[int]:
        return [i for i, batch in enumerate(self.batch) if not batch]

    @property
    def B(self) -> Any:
        return _product([self.leading[i] for i in self._batch_dims])

    @property
    def Q(self) -> Any:
        return _product([self.leading[i] for i in self._query_dims])

    def fold(self, spec: Spec, x: jax.Array) -> jax.Array:
        """Folds an operand [*N, ...], with sizes n or 1, to [B, Q, ...], [B, ...] or [P, ...].

        A cache or pool is broadcast only where another one has size n and this one has 1.
        """
        rank = len(self.leading)
        rest = x.shape[rank:]
        if spec.fold == "query":
            x = jnp.broadcast_to(x, (*self.leading, *rest))
            order = (*self._batch_dims, *self._query_dims, *range(rank, x.ndim))
            return x.transpose(order).reshape(self.B, self.Q, *rest)
        if spec.name == "page_table":
            x = jnp.clip(x, 0, jnp.asarray(self.pages - 1, x.dtype)) + self._page_offsets(x.dtype)
        x = jnp.broadcast_to(x, (*self._sizes(spec), *rest))
        if spec.fold == "row":
            return x.reshape(self.B, *rest)
        if any(self.pooled):  # pools that are joined do not share the scale of all their pages
            x = jnp.broadcast_to(x, (*self._sizes(spec), self.pages, *rest[1:]))
        return x.reshape(-1, *rest[1:])

    def unfold(self, spec: Spec, x: jax.Array) -> jax.Array:
        """Unfolds a result: the inverse of fold for full sizes, with 1 where it is shared."""
        if spec.fold == "row":
            return x.reshape(*self._sizes(spec), *x.shape[1:])
        if spec.fold == "pool":
            sizes = self._sizes(spec)
            pages = self.pages if any(self.pooled) else x.shape[0]
            return x.reshape(*sizes, pages, *x.shape[1:])
        order = [*self._batch_dims, *self._query_dims]
        x = x.reshape(*(self.leading[i] for i in order), *x.shape[2:])
        inverse = [order.index(i) for i in range(len(order))]
        return x.transpose(*inverse, *range(len(order), x.ndim))

    def summed(self, spec: Spec, operands: Mapping[str, Any]) -> tuple[int, ...]:
        """The dimensions over which an unfolded result has yet to be summed."""
        sizes = self._sizes(spec)
        shared = spec.shared or [False] * len(sizes)
        axes = [i for i, n in enumerate(sizes) if shared[i] and not is_one(n)]
        if spec.broadcasts and any(self.pooled) and is_one(operands[spec.primal].shape[len(sizes)]):
            axes.append(len(sizes))  # the pages, for which fold repeated the scale
        return tuple(axes)

    def _sizes(self, spec: Spec) -> list[Any]:
        """The leading dimensions of an array, unfolded."""
        full = {"query": [True] * len(self.leading), "row": self.batch, "pool": self.pooled}
        return [n if f else 1 for n, f in zip(self.leading, full[spec.fold], strict=True)]

    def _page_offsets(self, dtype: Any) -> jax.Array:
        """The first page of each pool in the joined pool: [*N, 1], 1 where pools are shared."""
        offsets = jnp.zeros((1,) * (len(self.leading) + 1), dtype)
        stride = self.pages
        for i in reversed(range(len(self.leading))):
            if self.pooled[i]:
                shape = [1] * (len(self.leading) + 1)
                shape[i] = self.leading[i]
                offsets += lax.broadcasted_iota(dtype, shape, i) * stride
                stride *= self.leading[i]
        return offsets


def sum_to(x: jax.Array, aval: Any) -> jax.Array:
    """Sums x over the leading dimensions in which aval has 1: the transpose of sharing."""
    axes = tuple(i for i, n in enumerate(aval.shape) if is_one(n) and not is_one(x.shape[i]))
    if not axes:
        return x
    return x.sum(axis=axes, keepdims=True)
