"""A check, under checkify, of windows that the operation would cut off silently."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
from jax.experimental import checkify

from jax_ragged._arguments import ArrayLike, array, positions, saturated_int32
from jax_ragged._caches import CacheArguments, letters, sizes
from jax_ragged.lowering.params import CacheLayout

_OPERATION = "check_windows"


def check_windows(
    key: ArrayLike,
    lengths: ArrayLike,
    starts: ArrayLike | None = None,
    *,
    page_table: ArrayLike | None = None,
    cache_layout: CacheLayout = "BSHD",
) -> None:
    """Checks, under `checkify`, that windows end inside of the cache and use existing pages.

    `ragged_attention` cuts off lengths past S and clamps pages that do not exist, both silently:
    such a decode loop goes on with tokens missing. Call this beside it, with the same arguments.
    Under `jax.experimental.checkify.checkify` a violation becomes an error. Everywhere else the
    check is dropped: in a compiled program it costs nothing. It composes with jit, vmap, scan, grad
    and shard_map, as `checkify.debug_check` does.

    Args:
      key: the cache, [B, S, Hkv, D], or a pool of pages [P, T, Hkv, D] with page_table; in the
        layout "BHSD" heads come before positions. Its shape alone is used.
      lengths: integers [B] or [B, Q], or a scalar, as in `ragged_attention`. They must be at most
        S.
      starts: integers as lengths; None is 0. They matter for a page table alone.
      page_table: integers [B, W]; each entry that a window touches must be in [0, P).
      cache_layout: "BSHD" or "BHSD".

    Raises:
      TypeError, ValueError: while tracing, for arguments that are not of these shapes and dtypes.
        Violations are in the error that `checkify` returns.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.experimental import checkify
      >>> from jax_ragged import check_windows, ragged_attention
      >>> def step(query, keys, values, lengths):
      ...     check_windows(keys, lengths + 1)
      ...     return ragged_attention(query, keys, values, lengths + 1).out
      >>> query, keys = jnp.ones((2, 4, 16)), jnp.ones((2, 8, 2, 16))  # S is 8
      >>> error, out = jax.jit(checkify.checkify(step))(query, keys, keys, jnp.array([3, 8]))
      >>> print(error.get().split(" (")[0])
      ragged_attention: lengths must be at most S = 8; got 9. End the row, or enlarge the cache.
    """
    key = array(_OPERATION, "key", key)
    ends = _integers("lengths", lengths)
    begins = _integers("starts", 0 if starts is None else starts)
    if key.ndim != 4:
        shape = letters(cache_layout, page_table is not None, "D")
        raise ValueError(
            f"{_OPERATION}: key must have shape {shape}; got {key.shape}. Pass it as to "
            "ragged_attention."
        )
    if cache_layout not in get_args(CacheLayout):
        raise ValueError(
            f'{_OPERATION}: cache_layout must be "BSHD" or "BHSD"; got {cache_layout!r}.'
        )
    S, _ = sizes(CacheArguments(key, key), cache_layout)
    table = None if page_table is None else _integers("page_table", page_table)
    if table is not None and table.ndim != 2:
        raise ValueError(
            f"{_OPERATION}: page_table must have shape [B, W]; got {table.shape}. Pass it as to "
            "ragged_attention."
        )
    B = (key if table is None else table).shape[0]
    for name, x in (("lengths", ends), ("starts", begins)):
        # An empty shape is one window for all rows.
        if x.ndim > 2 or (x.ndim and x.shape[0] != B):
            raise ValueError(
                f"{_OPERATION}: {name} must have shape [B] or [B, Q], or be a scalar, for B = {B}; "
                f"got {x.shape}. Pass it as to ragged_attention."
            )
    if table is None:
        _check_ends(ends, S)
        return
    W, T, P = table.shape[1], S, key.shape[0]
    _check_ends(ends, W * T)
    # Windows as [B or 1, Q or 1, 1]; page w holds positions w * T to (w + 1) * T.
    ends, begins = (x.reshape(*x.shape, *[1] * (3 - x.ndim)) for x in (ends, begins))
    first = T * jnp.arange(W)
    touched = (jnp.maximum(begins, first) < jnp.minimum(ends, first + T)).any(axis=1)  # [B or 1, W]
    absent = touched & ((table < 0) | (table >= P))
    row, w = jnp.unravel_index(absent.argmax(), absent.shape)
    checkify.debug_check(
        ~absent.any(),
        f"ragged_attention: page_table must hold pages from 0 to {P - 1} inside the windows; got "
        "{page} for row {row}, page {w} of its window. Allocate the page first.",
        page=table[row, w],
        row=row,
        w=w,
    )


def _integers(name: str, x: Any) -> Any:
    x = positions(_OPERATION, name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"{_OPERATION}: {name} must have an integer dtype; got {x.dtype}. Pass it as to "
            "ragged_attention."
        )
    return jnp.asarray(saturated_int32(x))


def _check_ends(ends: Any, S: int) -> None:
    checkify.debug_check(
        (ends <= S).all(),
        f"ragged_attention: lengths must be at most S = {S}; got {{longest}}. End the row, or "
        "enlarge the cache.",
        longest=ends.max(),
    )
