"""Trains a small language model through ragged attention.

    python examples/train.py [--text FILE] [--steps N] [--seed N]

The model is a byte-level transformer of about a million parameters with grouped-query attention
over a sliding window: one window for each token. Forward and backward go through
`jax_ragged.ragged_attention`, whose gradients cost the windows too. The text is the repository's
own sources and documents unless --text names another.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from absl import app, flags
from tqdm import tqdm

import jax_ragged

Params = dict[str, Any]
Bytes = npt.NDArray[np.uint8]
# (query [B, Q, Hq, D], key and value [B, S, Hkv, D], lengths and starts [B, Q]) to [B, Q, Hq, D]
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

END = 0  # the byte between two files


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of the model; `window` is how many positions a token attends to, its own too."""

    layers: int = 4
    width: int = 128
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 512
    window: int = 128


# Two attentions; the tests compare the gradients through both.


def ragged(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, starts: jax.Array
) -> jax.Array:
    """Reads the windows."""
    scale = query.shape[-1] ** -0.5
    return jax_ragged.ragged_attention(query, key, value, lengths, starts, softmax_scale=scale).out


def dense(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, starts: jax.Array
) -> jax.Array:
    """Reads the whole cache and masks."""
    position = jnp.arange(key.shape[1])
    mask = (position >= starts[..., None]) & (position < lengths[..., None])
    out: jax.Array = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    return out


# The model.


def init(rng: jax.Array, model: Model) -> Params:
    """Normal weights of variance 1 / fan-in; the last of each residual branch start smaller."""
    keys = iter(jax.random.split(rng, 1 + 7 * model.layers))

    def weight(*shape: int, fan_in: int, gain: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape) * (gain / float(np.sqrt(fan_in)))

    E, F, D = model.width, model.hidden, model.head_dim
    gain = (2 * model.layers) ** -0.5
    layers = [
        {
            "attention_norm": jnp.ones(E),
            "query": weight(E, model.query_heads, D, fan_in=E),
            "key": weight(E, model.kv_heads, D, fan_in=E),
            "value": weight(E, model.kv_heads, D, fan_in=E),
            "out": weight(model.query_heads, D, E, fan_in=model.query_heads * D, gain=gain),
            "hidden_norm": jnp.ones(E),
            "gate": weight(E, F, fan_in=E),
            "up": weight(E, F, fan_in=E),
            "down": weight(F, E, fan_in=F, gain=gain),
        }
        for _ in range(model.layers)
    ]
    return {"bytes": weight(256, E, fan_in=E), "layers": layers, "norm": jnp.ones(E)}


def normalise(x: jax.Array, weight: jax.Array) -> jax.Array:
    """RMS norm over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """RoPE of x [B, T, H, D] at positions [B, T]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)
    angle = positions[..., None, None] * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def transformer(
    params: Params, tokens: jax.Array, *, model: Model, attention: Attention
) -> jax.Array:
    """Logits [B, T, 256] of tokens [B, T]; token t attends to its window."""
    lengths = jnp.broadcast_to(jnp.arange(1, tokens.shape[1] + 1), tokens.shape)
    # A product and not a look-up: the gradient of a look-up is a scatter, on CPUs one long loop.
    x = jax.nn.one_hot(tokens, 256) @ params["bytes"] * params["norm"].shape[0] ** 0.5
    for layer in params["layers"]:
        h = normalise(x, layer["attention_norm"])
        query, key, value = (
            jnp.einsum("bte,ehd->bthd", h, layer[name]) for name in ("query", "key", "value")
        )
        query, key = rotate(query, lengths - 1), rotate(key, lengths - 1)
        attended = attention(query, key, value, lengths, lengths - model.window)
        x += jnp.einsum("bthd,hde->bte", attended, layer["out"])
        h = normalise(x, layer["hidden_norm"])
        x += (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    logits: jax.Array = normalise(x, params["norm"]) @ params["bytes"].T
    return logits


# Training.


def cross_entropy(params: Params, tokens: jax.Array, *, model: Model) -> jax.Array:
    """Mean nats for each byte of tokens [B, T + 1] after the first."""
    logits = transformer(params, tokens[:, :-1], model=model, attention=ragged)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("params", "moments"))
def train_step(
    params: Params, moments: Any, tokens: jax.Array, step: jax.Array, rate: jax.Array, model: Model
) -> tuple[Params, Any, jax.Array]:
    """One step of Adam on a gradient clipped to norm 1; step counts from 1."""
    loss, gradient = jax.value_and_grad(cross_entropy)(params, tokens, model=model)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g / jnp.maximum(norm, 1), gradient)
    beta1, beta2 = 0.9, 0.98
    first = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments[0], gradient)
    second = jax.tree.map(lambda m, g: beta2 * m + (1 - beta2) * g * g, moments[1], gradient)

    def moved(x: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return x - rate * (m / (1 - beta1**step)) / (jnp.sqrt(v / (1 - beta2**step)) + 1e-8)

    return jax.tree.map(moved, params, first, second), (first, second), loss


def learning_rate(step: int, steps: int, peak: float = 4e-3) -> float:
    """Rises over a twentieth of the steps, then falls as a cosine to a tenth."""
    warm = min(1.0, step / (steps / 20))
    return float(peak * warm * (0.55 + 0.45 * np.cos(np.pi * step / steps)))


def train(
    text: Bytes, model: Model, *, steps: int, batch: int, length: int, seed: int
) -> tuple[Params, list[float]]:
    """Returns the trained parameters and the loss of every step."""
    random = np.random.default_rng(seed)
    params = init(jax.random.key(seed), model)
    moments = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    losses: list[float] = []
    # A bar on a terminal; in a log, ten lines.
    with tqdm(range(1, steps + 1), desc="train", unit="step", disable=None) as progress:
        for step in progress:
            at = random.integers(len(text) - length, size=batch)
            tokens = np.stack([text[i : i + length + 1] for i in at]).astype(np.int32)
            rate = learning_rate(step, steps)
            params, moments, loss = train_step(
                params, moments, tokens, jnp.float32(step), jnp.float32(rate), model
            )
            losses.append(float(loss))
            recent = f"{np.mean(losses[-20:]):.3f}"
            progress.set_postfix(loss=recent, refresh=False)
            if progress.disable and step % -(-steps // 10) == 0:
                print(f"step {step} of {steps}, loss {recent}", flush=True)
    return params, losses


def held_out_loss(params: Params, text: Bytes, model: Model, length: int) -> float:
    """Mean nats for each byte of a text that was not trained on, in pieces of one length."""
    pieces = text[: len(text) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    loss = jax.jit(functools.partial(cross_entropy, model=model))
    return float(np.mean([loss(params, piece[None].astype(np.int32)) for piece in pieces[:32]]))


# The command.


def repository_text() -> Bytes:
    """The sources and documents of this repository, in an arbitrary but fixed order."""
    root = pathlib.Path(__file__).resolve().parent.parent
    folders = ("jax_ragged", "primitives", "lowering", "tests", "benchmarks", "examples")
    found = [file for folder in folders for file in root.glob(f"{folder}/**/*.py")]
    found += [*root.glob("*.md"), *root.glob("docs/*.md")]
    files = sorted({file.resolve() for file in found})
    order = np.random.default_rng(0).permutation(len(files))
    text = b"".join(files[i].read_bytes() + bytes([END]) for i in order)
    return np.frombuffer(text, np.uint8)


def read_text(path: str | None, least: int) -> Bytes:
    """The bytes to train on: of a file, or of the repository."""
    if path is None:
        text = repository_text()
    else:
        try:
            text = np.frombuffer(pathlib.Path(path).read_bytes(), np.uint8)
        except OSError as error:
            raise app.UsageError(
                f"--text: a file that can be read; got {path}: {error.strerror}."
            ) from None
    if len(text) < least:
        source = "the repository's sources" if path is None else path
        raise app.UsageError(
            f"--text: at least {least} bytes; got {len(text)} from {source}. Pass a longer text."
        )
    return text


def define_flags() -> None:
    flags.DEFINE_integer("steps", 250, "Steps of training.", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "Pieces of text in a step of training.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of weights and pieces.", lower_bound=0)
    flags.DEFINE_string("text", None, "File to train on; without it, this repository.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"only flags are taken; got {' '.join(argv[1:])}.")
    options = flags.FLAGS
    model, piece = Model(), 256
    text = read_text(options.text, least=32 * (piece + 1))
    held_out = text[-(len(text) // 16) :]
    text = text[: -len(held_out)]

    print(f"{len(text):,} bytes to train on, {len(held_out):,} held out; {jax.devices()[0]}")
    params, losses = train(
        text, model, steps=options.steps, batch=options.batch, length=piece, seed=options.seed
    )
    size = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{size:,} parameters; cross entropy {losses[0]:.2f} nats a byte at first, "
        f"{held_out_loss(params, held_out, model, piece):.2f} on text not seen"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
