"""Ragged attention on CPUs: loops over the blocks that the windows touch, in plain jax.lax."""

from typing import Any

from jax_ragged.lowering.cpu.derivatives import jvp, vjp
from jax_ragged.lowering.cpu.forward import forward

__all__ = ["forward", "jvp", "unsupported", "vjp"]


def unsupported(
    operation: str, query: Any, key: Any, value: Any, params: Any, device_kind: str | None
) -> str | None:
    """Why a call is left to the reference, or None."""
    del operation, params, device_kind
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not all(isinstance(size, int) for size in x.shape):
            return f"its blocks need sizes known while tracing; {name} has shape {x.shape}"
    return None
