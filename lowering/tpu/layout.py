"""How a cache lies in memory on a TPU, and the view of it that costs nothing.

XLA pads the two minor dimensions of an array to 8 sublanes and 128 lanes, and lays [B, S, H, D] out
with the least padding. A kernel that asks for another order makes XLA copy the whole cache at every
call; a transpose or reshape to the physical order is a bitcast. A cache [B, H, S, D] is taken as
its transpose, which XLA does not move; the layout knows of it only where two orders are padded
alike.
"""

import dataclasses
import enum
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

LANES = 128
SUBLANES = 8


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


class Form(enum.Enum):
    """The physical order of [B, S, H, D]."""

    TOKENS = "token, head, lane"
    HEADS = "head, token, lane"
    SEQUENCE = "head, lane, token"


def _second_minor(H: int, dtype: DTypeLike) -> int:
    """H as XLA pads it in the sublanes: small powers of two are padded less."""
    least = 4 // jnp.dtype(dtype).itemsize
    return H if H in (1, 2, 4) and H >= least else round_up(H, SUBLANES)


def physical_form(S: int, H: int, D: int, dtype: DTypeLike, *, heads_first: bool = False) -> Form:
    """The order that XLA chooses for an argument [B, S, H, D], or [B, H, S, D] if heads_first.

    It is the least padded one, and of those alike the one nearest to the order of dimensions.
    """
    padded = {
        Form.TOKENS: S * _second_minor(H, dtype) * round_up(D, LANES),
        Form.HEADS: H * round_up(S, SUBLANES) * round_up(D, LANES),
        Form.SEQUENCE: H * round_up(D, SUBLANES) * round_up(S, LANES),
    }
    first = Form.HEADS if heads_first else Form.TOKENS
    return min(padded, key=lambda form: (padded[form], form is not first))


@dataclasses.dataclass(frozen=True)
class CacheForm:
    """A cache as the kernels see it.

    In the form TOKENS the kernel sees rows [B, S * H, D], a row for each (token, head); or, if D
    is cut in pieces of 128 lanes, [B, S * pieces * H, 128], a row for each (token, piece, head), or
    for more than 8 heads (token, eight heads, piece, head). In the others [B, H, S, D] and
    [B, H, D, S].

    Attributes:
      form: the physical order.
      heads: H.
      head_dim: D.
      dtype: of the cache.
      pieces: rows into which the lanes of one head of one token are cut, in the form TOKENS.
      strided: whether a head is read by itself in the form TOKENS, by strided loads.
    """

    form: Form
    heads: int
    head_dim: int
    dtype: DTypeLike
    pieces: int = 1
    strided: bool = False

    @classmethod
    def of(cls, S: int, H: int, D: int, dtype: DTypeLike, *, heads_first: bool = False) -> Self:
        """The layout of [B, S, H, D], or of [B, H, S, D] if heads_first."""
        form = physical_form(S, H, D, dtype, heads_first=heads_first)
        if form is not Form.TOKENS or H % SUBLANES == 0:
            return cls(form, H, D, dtype)
        pieces = D // LANES
        # A token's columns must divide the 128 lanes, for the head masks and the rotations.
        if D % LANES != 0 or LANES % (H * pieces) != 0:
            return cls(Form.HEADS, H, D, dtype)
        return cls(form, H, D, dtype, pieces)

    @property
    def packing(self) -> int:
        """Elements in the 32 bits of a lane of a sublane; in the form TOKENS, heads of a token."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def reason(self) -> str | None:
        """Why it cannot be read in place, or None: a clause."""
        if self.packing < 4 or self.form is not Form.TOKENS:
            return None
        if self.strided and jnp.dtype(self.dtype) != jnp.int8:
            return f"its kernels read all heads of {self.dtype} together, and here they cannot"
        if self.pieces > 1 and (self.heads % SUBLANES or self.heads % (4 * SUBLANES) == 0):
            # XLA keeps the bytes of 4 or 32 heads together, which are no rows of 128 lanes.
            return (
                f"XLA would copy the cache, of {self.heads} heads of {self.head_dim} in "
                f"{self.dtype} for each position"
            )
        return None

    @functools.cached_property
    def interleaved(self) -> bool:
        """Whether the heads of a token are beside each other in the columns of the logits."""
        return self.form is Form.TOKENS and not self.strided

    @functools.cached_property
    def rows_per_token(self) -> int:
        """Rows of the view that one token has in the form TOKENS."""
        return self.heads * self.pieces

    @functools.cached_property
    def columns(self) -> int:
        """Columns of the logits that one token has."""
        return self.rows_per_token if self.interleaved else 1

    @functools.cached_property
    def stacked(self) -> int:
        """Pieces whose products are rows of their own."""
        return self.pieces if self.interleaved else 1

    @property
    def stride(self) -> int:
        """Sublanes from one token of a head to the next, where strided."""
        return self.rows_per_token // self.packing

    @property
    def _group(self) -> int:
        """The heads of one register."""
        return min(self.heads, SUBLANES)

    def place(self, piece: int, head: int) -> int:
        """Which of the rows of a token, in the form TOKENS."""
        group, place = divmod(head, self._group)
        return (group * self.pieces + piece) * self._group + place

    def by_head(self) -> Self:
        """The same cache, of which each head is read by itself.

        Strided loads are of 128 lanes; XLA copies caches with other rows, which in the form TOKENS
        are caches of less than 192 positions.
        """
        if self.form is not Form.TOKENS:
            return self
        if self.rows_per_token == 1 or self.head_dim % LANES:
            return dataclasses.replace(self, form=Form.HEADS, pieces=1)
        return dataclasses.replace(self, pieces=self.head_dim // LANES, strided=True)

    @property
    def lanes(self) -> int:
        """Lanes of a row in the form TOKENS."""
        return self.head_dim // self.pieces

    def view(self, x: jax.Array) -> jax.Array:
        """[B, S, H, D] in physical order: a bitcast."""
        B, S, H, _ = x.shape
        if self.form is Form.HEADS:
            return x.transpose(0, 2, 1, 3)
        if self.form is Form.SEQUENCE:
            return x.transpose(0, 2, 3, 1)
        if self.pieces > 1:
            x = x.reshape(B, S, H // self._group, self._group, self.pieces, self.lanes)
            x = x.transpose(0, 1, 2, 4, 3, 5)
        return x.reshape(B, S * self.rows_per_token, self.lanes)

    def unview(self, x: jax.Array, S: int) -> jax.Array:
        """The inverse of `view`, of S tokens."""
        if self.form is Form.HEADS:
            return x.transpose(0, 2, 1, 3)
        if self.form is Form.SEQUENCE:
            return x.transpose(0, 3, 1, 2)
        B, H = x.shape[0], self.heads
        if self.pieces > 1:
            x = x.reshape(B, S, H // self._group, self.pieces, self._group, self.lanes)
            x = x.transpose(0, 1, 2, 4, 3, 5)
        return x.reshape(B, S, H, self.head_dim)

    def block_shape(self, T: int) -> tuple[int, ...]:
        """The shape of a block of T tokens of one row of the view."""
        if self.form is Form.HEADS:
            return (1, self.heads, T, self.head_dim)
        if self.form is Form.SEQUENCE:
            return (1, self.heads, self.head_dim, T)
        return (1, T * self.rows_per_token, self.lanes)

    def tokens_at(self, i: jax.Array, T: int) -> tuple[Any, ...]:
        """The index of the i-th T tokens of a block, without its first dimension of 1."""
        if self.form is Form.TOKENS:
            rows = T * self.rows_per_token
            return (pl.ds(pl.multiple_of(i * rows, rows), rows),)
        at = tokens_in_lanes(i, T)
        return (slice(None), *at) if self.form is Form.SEQUENCE else at

    def block_index(self, row: jax.Array, block: jax.Array) -> tuple[jax.Array | int, ...]:
        """The index of the block-th block of a row of the view."""
        if self.form is Form.HEADS:
            return (row, 0, block, 0)
        if self.form is Form.SEQUENCE:
            return (row, 0, 0, block)
        return (row, block, 0)

    def block_bytes(self, T: int, dtype: DTypeLike | None = None) -> int:
        """Bytes of a block of T tokens in VMEM, and of its DMA; in another dtype if given."""
        size = jnp.dtype(self.dtype if dtype is None else dtype).itemsize
        if self.form is Form.SEQUENCE:
            return self.heads * round_up(self.head_dim, SUBLANES) * T * size
        return self.heads * T * round_up(self.head_dim, LANES) * size


def tokens_in_lanes(i: jax.Array, T: int) -> tuple[Any, ...]:
    """The index of the i-th T tokens of an array [heads, tokens] or [heads, tokens, D]."""
    return (slice(None), pl.ds(pl.multiple_of(i * T, T), T))


def alike(x: CacheForm, y: CacheForm) -> bool:
    """Whether logits have the same columns."""
    return (x.interleaved, x.columns) == (y.interleaved, y.columns)
