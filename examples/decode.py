"""The whole idea in 60 lines: one attention layer, a cache, a loop that decodes.

    python examples/decode.py

Every row of the batch has a sequence of its own length. A step writes one token's key and value
into the cache of each row and attends to the tokens that the row holds, not to the whole cache.
"""

import functools
import time

import jax
import jax.numpy as jnp

from jax_ragged import ragged_attention

B, S, H, K, D, E = 8, 4096, 8, 2, 64, 256  # rows, positions, query and key heads, their size, width


def make_weights(rng: jax.Array) -> dict[str, jax.Array]:
    shapes = {"query": (E, H, D), "key": (E, K, D), "value": (E, K, D), "out": (H, D, E)}
    keys = jax.random.split(rng, len(shapes))
    return {
        name: jax.random.normal(key, shape) * E**-0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@functools.partial(jax.jit, donate_argnames=("keys", "values"))
def decode_step(
    weights: dict[str, jax.Array], x: jax.Array, keys: jax.Array, values: jax.Array, held: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, E] of the new tokens; keys and values [B, S, K, D], of which held [B] are filled."""
    query, key, value = (
        jnp.einsum("be,ehd->bhd", x, weights[name]) for name in ("query", "key", "value")
    )
    row = jnp.arange(B)
    keys, values = keys.at[row, held].set(key), values.at[row, held].set(value)
    attended = ragged_attention(query, keys, values, held + 1, softmax_scale=D**-0.5).out
    return jnp.einsum("bhd,hde->be", attended, weights["out"]), keys, values


def main(steps: int = 32) -> None:
    weights = make_weights(jax.random.key(0))
    keys, values = jnp.zeros((2, B, S, K, D))
    held = jnp.array([3, 2000, 40, 500, 0, 1200, 7, 90])  # one long row does not slow the others
    x = jax.random.normal(jax.random.key(1), (B, E))
    for i in range(steps):
        begin = time.perf_counter()
        x, keys, values = jax.block_until_ready(decode_step(weights, x, keys, values, held))
        held = held + 1
        if i in (0, 1, steps - 1):
            milliseconds = 1e3 * (time.perf_counter() - begin)
            print(
                f"step {i:2}: {milliseconds:8.2f} ms, rows hold {held}, |x| {jnp.abs(x).max():.2e}"
            )


if __name__ == "__main__":
    main()
