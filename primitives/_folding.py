"""Folds leading dimensions: [*N, ...] to [B, ...] for a cache, [B, Q, ...] for the others.

A leading dimension in which the cache has size n becomes part of the rows B. One in which it has
size 1 is shared by queries and becomes part of the queries Q. So a cache that is shared is read
once and not copied. A key or value that is shared where the other one is not is copied n times.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

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
    """

    leading: tuple[Any, ...]
    batch: tuple[bool, ...]

    @classmethod
    def of(cls, signature: Signature, operands: Mapping[str, Any]) -> "Folding":
        """Folds the leading dimensions of an equation's operands, by name."""
        rank = operands["query"].ndim - 2
        caches = [operands[spec.name] for spec in signature.operands if spec.is_cache]
        sums = [spec.shared for spec in signature.results if spec.is_cache and spec.shared]
        leading = [joined_size([x.shape[i] for x in operands.values()]) for i in range(rank)]
        batch = [
            not all(is_one(x.shape[i]) for x in caches) or not all(shared[i] for shared in sums)
            for i in range(rank)
        ]
        return cls(tuple(leading), tuple(batch))

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
        """[*N, ...], with sizes n or 1, to [B, S, H, D] for a cache and [B, Q, ...] for others.

        A cache is broadcast only where another one has size n and this one has 1.
        """
        rank = len(self.leading)
        rest = x.shape[rank:]
        if spec.is_cache:
            return jnp.broadcast_to(x, (*self._cache_sizes, *rest)).reshape(self.B, *rest)
        x = jnp.broadcast_to(x, (*self.leading, *rest))
        order = (*self._batch_dims, *self._query_dims, *range(rank, x.ndim))
        return x.transpose(order).reshape(self.B, self.Q, *rest)

    def unfold(self, spec: Spec, x: jax.Array) -> jax.Array:
        """The inverse of fold for full sizes: a cache has 1 in the dimensions of Q."""
        if spec.is_cache:
            return x.reshape(*self._cache_sizes, *x.shape[1:])
        order = [*self._batch_dims, *self._query_dims]
        x = x.reshape(*(self.leading[i] for i in order), *x.shape[2:])
        inverse = [order.index(i) for i in range(len(order))]
        return x.transpose(*inverse, *range(len(order), x.ndim))

    def summed(self, spec: Spec) -> tuple[int, ...]:
        """The leading dimensions over which an unfolded result has yet to be summed."""
        sizes = self._cache_sizes if spec.is_cache else self.leading
        shared = spec.shared or [False] * len(sizes)
        return tuple(i for i, n in enumerate(sizes) if shared[i] and not is_one(n))

    @property
    def _cache_sizes(self) -> list[Any]:
        return [n if batch else 1 for n, batch in zip(self.leading, self.batch, strict=True)]


def sum_to(x: jax.Array, aval: Any) -> jax.Array:
    """Sums x over the leading dimensions in which aval has 1: the transpose of sharing."""
    axes = tuple(i for i, n in enumerate(aval.shape) if is_one(n) and not is_one(x.shape[i]))
    if not axes:
        return x
    return x.sum(axis=axes, keepdims=True)
