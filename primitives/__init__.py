"""The three primitives: one file for each, with all of its rules."""

if __name__ != "jax_ragged.primitives":
    raise ImportError(
        f"this folder is the package jax_ragged.primitives, imported as {__name__}: "
        "import jax_ragged.primitives instead"
    )

from jax_ragged.primitives._primitive import register_lowering
from jax_ragged.primitives.ragged_attention import ragged_attention_p
from jax_ragged.primitives.ragged_attention_jvp import ragged_attention_jvp_p
from jax_ragged.primitives.ragged_attention_vjp import ragged_attention_vjp_p

__all__ = [
    "ragged_attention_jvp_p",
    "ragged_attention_p",
    "ragged_attention_vjp_p",
    "register_lowering",
]
