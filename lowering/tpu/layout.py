"""How a cache lies in memory on a TPU, and the view of it that costs nothing.

XLA lays an array [B, S, H, D] out with the least padding to tiles of 128 lanes and 8 sublanes. A
kernel that asks for another order makes XLA copy the whole cache at every call; a transpose or
reshape to the physical order is a bitcast.
"""

import dataclasses
import enum
from typing import Self

import jax
import jax.numpy as jnp
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
    """H as XLA pads it in the sublanes: small powers of two have tiles of their own."""
    least = 4 // jnp.dtype(dtype).itemsize
    return H if H in (1, 2, 4) and H >= least else round_up(H, SUBLANES)


def physical_form(S: int, H: int, D: int, dtype: DTypeLike) -> Form:
    """The order that XLA chooses for an argument [B, S, H, D]: the least padded, ties in order."""
    padded = {
        Form.TOKENS: S * _second_minor(H, dtype) * round_up(D, LANES),
        Form.HEADS: H * round_up(S, SUBLANES) * round_up(D, LANES),
        Form.SEQUENCE: H * round_up(D, SUBLANES) * round_up(S, LANES),
    }
    return min(padded, key=lambda form: padded[form])


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """A cache as the kernels see it.

    In the form TOKENS the kernel sees rows [B, S * H, D], a row for each (token, head); or, if D
    is a multiple of 128 and H less than 8, [B, S * tiles * H, 128], a row for each
    (token, tile of 128 lanes, head). In the others [B, H, S, D] and [B, H, D, S].

    Attributes:
      form: the physical order.
      heads: H.
      head_dim: D.
      tiles: into how many rows the lanes of one head of one token are cut, in the form TOKENS.
    """

    form: Form
    heads: int
    head_dim: int
    tiles: int = 1

    @classmethod
    def of(cls, S: int, H: int, D: int, dtype: DTypeLike) -> Self:
        """The layout of [B, S, H, D]."""
        form = physical_form(S, H, D, dtype)
        if form is not Form.TOKENS or H % SUBLANES == 0:
            return cls(form, H, D)
        tiles = D // LANES
        # A token's columns must divide the 128 lanes, for the head masks and the rotations.
        if D % LANES != 0 or LANES % (H * tiles) != 0:
            return cls(Form.HEADS, H, D)
        return cls(form, H, D, tiles)

    @property
    def interleaved(self) -> bool:
        """Whether the heads of a token are beside each other in the columns of the logits."""
        return self.form is Form.TOKENS

    @property
    def columns(self) -> int:
        """Columns of the logits that one token has."""
        return self.heads * self.tiles if self.interleaved else 1

    @property
    def lanes(self) -> int:
        """Lanes of a row in the form TOKENS."""
        return self.head_dim // self.tiles

    def view(self, x: jax.Array) -> jax.Array:
        """[B, S, H, D] in physical order: a bitcast."""
        B, S, H, _ = x.shape
        if self.form is Form.HEADS:
            return x.transpose(0, 2, 1, 3)
        if self.form is Form.SEQUENCE:
            return x.transpose(0, 2, 3, 1)
        if self.tiles > 1:
            x = x.reshape(B, S, H, self.tiles, self.lanes).transpose(0, 1, 3, 2, 4)
        return x.reshape(B, S * self.columns, self.lanes)

    def block_shape(self, T: int) -> tuple[int, ...]:
        """The shape of a block of T tokens of one row of the view."""
        if self.form is Form.HEADS:
            return (1, self.heads, T, self.head_dim)
        if self.form is Form.SEQUENCE:
            return (1, self.heads, self.head_dim, T)
        return (1, T * self.columns, self.lanes)

    def block_index(self, row: jax.Array, block: jax.Array) -> tuple[jax.Array | int, ...]:
        """The index of the block-th block of a row of the view."""
        if self.form is Form.HEADS:
            return (row, 0, block, 0)
        if self.form is Form.SEQUENCE:
            return (row, 0, 0, block)
        return (row, block, 0)

    def block_bytes(self, T: int, dtype: DTypeLike) -> int:
        """What a block of T tokens takes in VMEM, and what its DMA moves."""
        size = jnp.dtype(dtype).itemsize
        if self.form is Form.SEQUENCE:
            return self.heads * round_up(self.head_dim, SUBLANES) * T * size
        return self.heads * T * round_up(self.head_dim, LANES) * size
