"""A training step of the model of examples/serve.py on a GPU, with kernels in both directions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ragged import ragged_attention
from lowerings import gpus
from programs import emitted
from serving.model import Config, Layer, Weights, block, logits_of

# The heads of SmolLM2-135M, in fewer and narrower layers.
CONFIG = Config(
    layers=2,
    width=192,
    hidden=256,
    query_heads=9,
    key_heads=3,
    head_dim=64,
    vocabulary=128,
    epsilon=1e-5,
)
ROWS, TOKENS = 4, 512
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _weights() -> Weights:
    rng = np.random.default_rng(0)
    L, E, F, D = CONFIG.layers, CONFIG.width, CONFIG.hidden, CONFIG.head_dim
    queries, keys = CONFIG.query_heads * D, CONFIG.key_heads * D

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, shape[-2] ** -0.5, shape), jnp.float32)

    layers = Layer(
        attention_norm=jnp.ones((L, E)),
        query=weight(L, E, queries),
        key=weight(L, E, keys),
        value=weight(L, E, keys),
        out=weight(L, queries, E),
        hidden_norm=jnp.ones((L, E)),
        gate=weight(L, E, F),
        up=weight(L, E, F),
        down=weight(L, F, E),
    )
    embedding = jnp.asarray(rng.normal(0, 1, (CONFIG.vocabulary, E)), jnp.float32)
    frequencies = jnp.asarray(1e4 ** -np.linspace(0, 1, D // 2, endpoint=False), jnp.float32)
    return Weights(embedding, layers, jnp.ones(E), weight(CONFIG.vocabulary, E), frequencies)


def _tokens() -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, CONFIG.vocabulary, (ROWS, TOKENS + 1)), jnp.int32)


def _kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention by the kernels, which take 16 bits."""
    ends = jnp.broadcast_to(jnp.arange(1, TOKENS + 1), query.shape[:2])
    q, k, v = (x.astype(jnp.bfloat16) for x in (query, key, value))
    scale = CONFIG.head_dim**-0.5
    out = ragged_attention(q, k, v, ends, softmax_scale=scale, implementation="kernel").out
    return out.astype(query.dtype)


def _dense(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    out: jax.Array = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return out


def _loss(attend: Attend, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Mean nats for each token after the first."""
    positions = jnp.arange(TOKENS)[None]

    def body(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        return block(x, layer, attend, positions, weights.frequencies, CONFIG), None

    x, _ = jax.lax.scan(body, weights.embedding[tokens[:, :-1]], weights.layers)
    logits = logits_of(x, weights, CONFIG)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def _train_step(
    weights: Weights, tokens: jax.Array, attend: Attend = _kernel
) -> tuple[Weights, jax.Array]:
    """One step of gradient descent on all weights."""
    loss, gradient = jax.value_and_grad(functools.partial(_loss, attend))(weights, tokens)
    return jax.tree.map(lambda x, g: x - 0.1 * g, weights, gradient), loss


def test_step_lowers_to_kernels_both_ways() -> None:
    """The scan over layers has the forward's kernel, its transpose those of the gradients."""
    traced = jax.jit(_train_step).trace(_weights(), _tokens())
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    # The forward's, that of the gradient of query, and that of those of key and value.
    assert text.count("@mosaic_gpu_v2") == 3
    for direction in ("forward", "vjp"):
        assert f"ragged_attention_{direction}_cuda_kernel" in text
        assert f"ragged_attention_{direction}_reference" not in text
    logits = ROWS * CONFIG.query_heads * TOKENS**2
    products = emitted(text, "dot_general")
    assert products
    assert [line for size, line in products if size >= logits] == []


@pytest.mark.gpu
@pytest.mark.optimized
def test_training_on_a_gpu() -> None:
    """The step holds the kernels, its gradient is that of dense attention, and it learns."""
    with jax.default_device(gpus()[0]):
        weights, tokens = _weights(), _tokens()
        step = jax.jit(_train_step).lower(weights, tokens).compile()
        text = str(step.as_text())
        assert text.count('custom_call_target="mosaic_gpu_v2"') >= 3
        for direction in ("forward", "vjp"):
            assert f"ragged_attention_{direction}_cuda_kernel" in text
            assert f"ragged_attention_{direction}_reference" not in text
        gradients: list[Any] = [
            jax.jit(jax.grad(functools.partial(_loss, attend)))(weights, tokens)
            for attend in (_kernel, _dense)
        ]
        for got, want in zip(*map(jax.tree.leaves, gradients), strict=True):
            # Query, key, value and weights of the attention are rounded to 8 bits of mantissa.
            error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
            assert error < 2e-2
        losses = []
        for _ in range(5):
            weights, loss = step(weights, tokens)
            losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
