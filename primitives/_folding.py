"""Folding of leading dimensions: [*N, ...] to [B, ...] for a cache, [B, Q, ...] for the rest.

A leading dimension in which the cache has size n goes to the batch axis B, one in which it has
size 1 is shared by all its queries and goes to the query axis Q. So a shared cache is read once
and never copied, whatever is mapped over it.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def is_one(size: Any) -> bool:
    """Whether a dimension is known to be 1; a symbolic one is not."""
    return isinstance(size, int) and size == 1


def joined_size(sizes: Sequence[Any]) -> Any:
    """The size n of a leading dimension in which every operand has n or 1."""
    return next((size for size in sizes if not is_one(size)), 1)


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


@dataclasses.dataclass(frozen=True)
class Folding:
    """The sizes of the leading dimensions and which of them the cache is not shared in."""

    leading: tuple[Any, ...]
    batch: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        rank: int,
        others: Sequence[jax.Array],
        caches: Sequence[jax.Array],
        shared: Sequence[Sequence[bool]] = (),
    ) -> "Folding":
        """Folds `rank` leading dimensions of cache-like operands and all others.

        `shared` tells for every cache-like result in which dimensions it is summed.
        """
        leading = [joined_size([x.shape[i] for x in (*others, *caches)]) for i in range(rank)]
        batch = [
            not all(is_one(x.shape[i]) for x in caches) or not all(s[i] for s in shared)
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

    def fold(self, x: jax.Array) -> jax.Array:
        """[*N, ...], sizes n or 1, to [B, Q, ...]; for all that is not a cache."""
        rank = len(self.leading)
        rest = x.shape[rank:]
        x = jnp.broadcast_to(x, (*self.leading, *rest))
        order = (*self._batch_dims, *self._query_dims, *range(rank, x.ndim))
        return x.transpose(order).reshape(self.B, self.Q, *rest)

    def unfold(self, x: jax.Array) -> jax.Array:
        """[B, Q, ...] to [*N, ...]: the inverse of fold for full sizes."""
        order = [*self._batch_dims, *self._query_dims]
        x = x.reshape(*(self.leading[i] for i in order), *x.shape[2:])
        inverse = [order.index(i) for i in range(len(order))]
        return x.transpose(*inverse, *range(len(order), x.ndim))

    def fold_cache(self, x: jax.Array) -> jax.Array:
        """[*N, S, H, D], sizes n or 1, to [B, S, H, D].

        Broadcasts only where another cache-like operand has size n and this one has 1.
        """
        rank = len(self.leading)
        rest = x.shape[rank:]
        return jnp.broadcast_to(x, (*self._cache_sizes, *rest)).reshape(self.B, *rest)

    def unfold_cache(self, x: jax.Array) -> jax.Array:
        """[B, S, H, D] to [*N, S, H, D] with 1 in the dimensions of Q."""
        return x.reshape(*self._cache_sizes, *x.shape[1:])

    @property
    def _cache_sizes(self) -> list[Any]:
        return [n if batch else 1 for n, batch in zip(self.leading, self.batch, strict=True)]


def sum_shared(x: jax.Array, shared: Sequence[bool]) -> jax.Array:
    """Sums x over the leading dimensions marked, and keeps them as 1: the transpose of sharing."""
    axes = tuple(i for i, share in enumerate(shared) if share and not is_one(x.shape[i]))
    return x.sum(axis=axes, keepdims=True, dtype=x.dtype) if axes else x
