"""Writes the module that test_export reads with every supported JAX: run it with the oldest.

python tests/data/export_with_oldest_jax.py
"""

import pathlib

import jax
import numpy as np
from jax import export

from jax_ragged import RaggedAttention, ragged_attention

OLDEST = "0.10.2"
FILE = pathlib.Path(__file__).with_name(f"ragged_attention_jax_{OLDEST}.bin")


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array
) -> RaggedAttention:
    """The exported function: its static parameters are part of the module."""
    return ragged_attention(query, key, value, lengths, softmax_scale=0.5, logits_soft_cap=4.0)


def operands() -> tuple[np.ndarray, ...]:
    """Small operands with an empty window and one that is out of range."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((3, 4, 128), np.float32)
    key, value = (rng.standard_normal((3, 40, 2, 128), np.float32) for _ in range(2))
    return query, key, value, np.array([40, 0, 55], np.int32)


def main() -> None:
    """Exports for cpu, tpu and cuda, with the gradient."""
    if jax.__version__ != OLDEST:
        raise SystemExit(
            f"run this with jax {OLDEST}, the oldest supported; this is {jax.__version__}"
        )
    exported = export.export(jax.jit(attend), platforms=("cpu", "tpu", "cuda"))(*operands())
    FILE.write_bytes(bytes(exported.serialize(vjp_order=1)))
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
