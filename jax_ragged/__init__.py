"""Ragged attention for decoding, as a primitive of JAX."""

from jax_ragged._attention import (
    RaggedAttention,
    ragged_attention,
    reference_ragged_attention,
)
from jax_ragged.lowering.params import DEFAULT_MASK_VALUE

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MASK_VALUE",
    "RaggedAttention",
    "__version__",
    "ragged_attention",
    "reference_ragged_attention",
]
