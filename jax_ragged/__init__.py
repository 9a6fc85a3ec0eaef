"""Ragged attention for decoding, as a primitive of JAX."""

from jax_ragged._attention import (
    RaggedAttention,
    ragged_attention,
    reference_ragged_attention,
)
from jax_ragged._costs import Costs, EquationCost, costs
from jax_ragged._merge import merge_partials
from jax_ragged.lowering.params import DEFAULT_MASK_VALUE

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MASK_VALUE",
    "Costs",
    "EquationCost",
    "RaggedAttention",
    "__version__",
    "costs",
    "merge_partials",
    "ragged_attention",
    "reference_ragged_attention",
]
