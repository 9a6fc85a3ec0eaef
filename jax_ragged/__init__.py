"""Ragged attention for decoding, as a JAX primitive."""

from jax_ragged._attention import ragged_attention, reference_ragged_attention
from jax_ragged._caches import quantize_cache
from jax_ragged._check_windows import check_windows
from jax_ragged._costs import Costs, EquationCost, costs
from jax_ragged._merge import merge_partials
from jax_ragged._results import RaggedAttention
from jax_ragged._windows import Windows, windows_from_mask
from jax_ragged.lowering.contract import Lowering, Unsupported
from jax_ragged.lowering.params import DEFAULT_MASK_VALUE
from jax_ragged.primitives import register_lowering

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MASK_VALUE",
    "Costs",
    "EquationCost",
    "Lowering",
    "RaggedAttention",
    "Unsupported",
    "Windows",
    "__version__",
    "check_windows",
    "costs",
    "merge_partials",
    "quantize_cache",
    "ragged_attention",
    "reference_ragged_attention",
    "register_lowering",
    "windows_from_mask",
]
