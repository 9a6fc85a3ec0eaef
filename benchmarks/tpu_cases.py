"""Programs for the TPU compiler, without a TPU: for the benchmark of schedules and for tests."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_ragged import ragged_attention
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.params import OPTIONAL, RaggedAttentionParams

# A topology of each generation, by which libtpu is told what to compile for.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Head counts, head dimension, queries of a row, and the form of the cache.

    Attributes:
      page: positions of a page, or None for a cache without a page table.
      dtype: of the cache; one byte for a cache with a scale for each token and head.
      layout: the order of its dimensions.
    """

    Hq: int
    Hkv: int
    D: int
    Q: int = 1
    page: int | None = None
    dtype: str = "bfloat16"
    layout: Literal["BSHD", "BHSD"] = "BSHD"

    def __str__(self) -> str:
        words = [f"{self.Hq}/{self.Hkv}/{self.D}"]
        words += [f"Q={self.Q}"] if self.Q > 1 else []
        words += [f"pages of {self.page}"] if self.page else []
        words += [x for x in (self.dtype, self.layout) if x not in ("bfloat16", "BSHD")]
        return " ".join(words)

    def operands(self, B: int, S: int, sharding: Any = None) -> Operands:
        """The folded operands of a call, with B rows of S positions."""

        def array(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        rows, size = (B, S) if self.page is None else (B * S // self.page, self.page)
        heads = (size, self.Hkv) if self.layout == "BSHD" else (self.Hkv, size)
        cache = array((rows, *heads, self.D), self.dtype)
        quantised = jnp.dtype(self.dtype).itemsize == 1
        scale = array((rows, *heads), jnp.float32) if quantised else None
        window = array((B, self.Q), jnp.int32)
        table = array((B, S // self.page), jnp.int32) if self.page else None
        query = array((B, self.Q, self.Hq, self.D), jnp.bfloat16)
        return Operands(query, cache, cache, window, window, table, scale, scale)

    def params(self, operands: Operands) -> RaggedAttentionParams:
        """The static parameters of a call with its operands."""
        optional = tuple(name for name in OPTIONAL if getattr(operands, name) is not None)
        return RaggedAttentionParams(cache_layout=self.layout, optional=optional)

    def call(self, operands: Operands) -> Any:
        """The call by the kernel."""
        arrays = {name: x for name, x in operands._asdict().items() if x is not None}
        return ragged_attention(**arrays, implementation="kernel", cache_layout=self.layout)


SCHEDULED = (
    Scheduled(32, 8, 128),
    Scheduled(64, 8, 128),
    Scheduled(32, 32, 128),
    Scheduled(16, 2, 256),
    Scheduled(8, 1, 128),
    Scheduled(64, 8, 64),
    Scheduled(32, 8, 128, Q=8),
    Scheduled(64, 8, 64, Q=8),
)

# The forms of caches of the first of them.
FORMS = (
    *(Scheduled(32, 8, 128, page=page) for page in (16, 64, 128, 256)),
    Scheduled(32, 8, 128, layout="BHSD"),
    Scheduled(32, 8, 128, page=16, layout="BHSD"),
    *(Scheduled(32, 8, 128, dtype=dtype) for dtype in ("int8", "float8_e4m3fn")),
    Scheduled(32, 8, 128, dtype="int8", layout="BHSD"),
    Scheduled(32, 8, 128, page=128, dtype="int8"),
    Scheduled(64, 8, 64, page=128),
    Scheduled(64, 8, 64, dtype="int8"),
    Scheduled(32, 32, 128, dtype="int8"),
)
