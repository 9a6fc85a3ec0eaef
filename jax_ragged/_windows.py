"""Windows of boolean masks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer
from jax.experimental import checkify

from jax_ragged._arguments import ArrayLike, array

_ADVICE = (
    "ragged_attention attends to one window a query. Attend to each run of True in a call of its "
    "own, and merge the results with merge_partials."
)


class Windows(NamedTuple):
    """The window of each query, in the order in which `ragged_attention` takes its ends.

    Attributes:
      lengths: int32 [...]: the end of the window, exclusive; 0 for an empty one.
      starts: int32 [...]: the first position of the window; 0 for an empty one.
    """

    lengths: jax.Array
    starts: jax.Array


def windows_from_mask(mask: ArrayLike) -> Windows:
    """The windows that a mask lets queries attend to, for `ragged_attention`.

        ragged_attention(query, key, value, *windows_from_mask(mask))

    The True of each query must be neighbours: they are one window. A mask in an array of numbers
    is checked at once. The elements of a traced mask, as inside of `jax.jit`, are not known. If you
    transform the program with `jax.experimental.checkify`, it checks them as it runs. Otherwise a
    query with a gap attends to all positions from its first True to its last.

    Args:
      mask: booleans [..., S], or integers of which 0 is False: True where a query attends to a
        position. [B, S] is one window a row and [B, Q, S] one a query. Masks of other functions
        have an axis of heads, [B, 1, Q, S]: pass `mask.squeeze(1)`. All heads of a query share
        its window.

    Returns:
      `Windows(lengths, starts)`, each int32 [...].

    Raises:
      TypeError: for a mask of floats, which is one to add to the logits.
      ValueError: for a mask without an axis, or a mask of known elements that has a gap.

    Examples:
      >>> from jax_ragged import windows_from_mask
      >>> windows = windows_from_mask([[True, True, True, False], [False, False, True, True]])
      >>> print(windows.lengths, windows.starts)
      [3 4] [0 2]
    """
    mask = array("windows_from_mask", "mask", mask)
    if not (mask.dtype == np.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(
            f"windows_from_mask: mask must be boolean, or integers 0 and 1; got {mask.dtype}. Pass "
            "mask.astype(bool) for 0 and 1 in floats, and mask >= 0 for one that is added to "
            "logits, 0 or a large negative number."
        )
    if mask.ndim == 0:
        raise ValueError("windows_from_mask: mask must have shape [..., S]; got a scalar.")
    true = mask != 0
    t = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    lengths = jnp.max(jnp.where(true, t + 1, 0), axis=-1, initial=0)
    starts = jnp.min(jnp.where(true, t, mask.shape[-1]), axis=-1, initial=mask.shape[-1])
    starts = jnp.minimum(starts, lengths)
    if isinstance(mask, Tracer) or not getattr(mask, "is_fully_addressable", True):
        whole = true.sum(axis=-1, dtype=jnp.int32) == lengths - starts
        message = f"windows_from_mask: the True of each query in mask must be neighbours. {_ADVICE}"
        checkify.debug_check(jnp.all(whole), message)
    else:
        _check(np.asarray(mask) != 0)
    return Windows(lengths, starts)


def _check(true: npt.NDArray[np.bool_]) -> None:
    """Raises for a row in which True begins more than once."""
    begins = true & ~np.pad(true, [(0, 0)] * (true.ndim - 1) + [(1, 0)])[..., :-1]
    broken = np.argwhere(begins.sum(axis=-1) > 1)
    if len(broken):
        row = ", ".join([*map(str, broken[0]), ":"])
        raise ValueError(
            "windows_from_mask: the True of each query in mask must be neighbours; got a gap in "
            f"mask[{row}]. {_ADVICE}"
        )
