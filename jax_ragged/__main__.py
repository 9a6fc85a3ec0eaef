"""Reports on jax_ragged and this machine: versions, jaxprs, a check and a timing table.

python -m jax_ragged [--notiming] [--batch B] [--length S] [--dtype bfloat16] ...
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from absl import app, flags, logging

import jax_ragged

Array = npt.NDArray[Any]
Function = Callable[..., Any]


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _shapes(*arrays: jax.Array) -> str:
    return ", ".join(jax.typeof(x).str_short() for x in arrays)


# Versions, devices, and the lowering that runs here.


@contextlib.contextmanager
def _without_native_messages() -> Iterator[None]:
    """Holds back what native code writes to stderr, and writes it all if the body raises.

    libtpu writes a stack of messages where it is installed and finds no TPU, and JAX then goes on
    with another backend. Warnings and logs of Python come through: they have a copy of stderr.
    """
    handler = logging.get_absl_handler().python_handler
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "w", buffering=1) as stderr:
        former, handler.stream, sys.stderr = (handler.stream, sys.stderr), stderr, stderr
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            shutil.copyfileobj(held, stderr.buffer)
            raise
        finally:
            os.dup2(stderr.fileno(), 2)
            handler.stream, sys.stderr = former


def _chosen(function: Function, *operands: jax.Array) -> list[str]:
    """The scopes that the lowering of each ragged operation leaves in a program."""
    program = jax.jit(function).lower(*operands).as_text(debug_info=True)
    return sorted(
        set(re.findall(r"ragged_attention_(?:forward|jvp|vjp)_[a-z]+(?:_kernel)?", program))
    )


def _report_versions() -> None:
    _heading("Versions and devices")
    print(f"jax_ragged {jax_ragged.__version__}, Python {platform.python_version()}")
    print(
        ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy")
        )
    )
    with _without_native_messages():
        devices = jax.devices()
    for device in devices:
        print(f"{device.platform} device {device.id}: {device.device_kind}")


# Jaxprs of a small case.


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax_ragged.ragged_attention(query, key, value, lengths, softmax_scale=0.25).out


def _gradient(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
    return jax.grad(lambda q: _attend(q, key, value, lengths).sum())(query)


def _report_jaxprs() -> None:
    query, key, lengths = jnp.ones((2, 4, 16)), jnp.ones((2, 32, 2, 16)), jnp.array([5, 32])
    beams = jnp.ones((3, 2, 4, 16))
    over_queries = jax.vmap(_attend, in_axes=(0, None, None, None))
    for title, function, operands in (
        ("A call", _attend, (query, key, key, lengths)),
        (
            "The same, mapped over three queries that share the cache",
            over_queries,
            (beams, key, key, lengths),
        ),
        ("The gradient with respect to the query", _gradient, (query, key, key, lengths)),
    ):
        _heading(title)
        print(jax.make_jaxpr(function)(*operands))
        print(f"runs here as: {', '.join(_chosen(function, *operands))}")


# The check: one row and query head after the other, in float64.


def _definition(
    query: Array, key: Array, value: Array, lengths: Array, starts: Array, cap: float, scale: float
) -> tuple[Array, ...]:
    """Results, and the gradients of sum(sin(out)) with respect to query, key and value.

    For one query q with keys k [T, D] and values v [T, Dv], the gradient starts from
    o_bar = cos(o):

        s = k q    z = cap tanh(scale s / cap)    p = exp(z - max z) / l    o = p v
        z_bar = p <o_bar, v - o>    s_bar = scale (1 - (z / cap)^2) z_bar    v_bar = p o_bar

    where l is the sum of `exp(z - max z)`.
    """
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    (B, Hq, _), (_, S, Hkv, Dv) = query.shape, value.shape
    out, m, denominator = np.zeros((B, Hq, Dv)), np.zeros((B, Hq)), np.zeros((B, Hq))
    m[:] = jax_ragged.DEFAULT_MASK_VALUE
    query_bar, key_bar, value_bar = (np.zeros_like(x) for x in (query, key, value))
    for b, h in np.ndindex(B, Hq):
        window = slice(max(starts[b], 0), min(lengths[b], S))
        if window.start >= window.stop:
            continue
        q, k, v = query[b, h], key[b, window, h // (Hq // Hkv)], value[b, window, h // (Hq // Hkv)]
        z = cap * np.tanh(scale * (k @ q) / cap)
        m[b, h] = np.max(z)
        p = np.exp(z - m[b, h])
        denominator[b, h] = p.sum()
        p /= denominator[b, h]
        out[b, h] = o = p @ v
        o_bar = np.cos(o)
        s_bar = scale * (1 - (z / cap) ** 2) * p * ((v - o) @ o_bar)
        query_bar[b, h] = s_bar @ k
        key_bar[b, window, h // (Hq // Hkv)] += np.outer(s_bar, q)
        value_bar[b, window, h // (Hq // Hkv)] += np.outer(p, o_bar)
    return out, m, denominator, query_bar, key_bar, value_bar


def _check(seed: int) -> bool:
    """Compares values and gradients in float32 with float64, prints, and returns if all agree."""
    random = np.random.default_rng(seed)
    B, S, Hq, Hkv, D, Dv, cap, scale = 6, 200, 8, 2, 32, 16, 20.0, 32**-0.5
    query, key, value = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((B, Hq, D), (B, S, Hkv, D), (B, S, Hkv, Dv))
    )
    lengths = np.array([0, 1, 37, 150, S, S + 9], np.int32)
    starts = np.array([-3, 0, 37, 20, 0, 150], np.int32)
    for b in range(B):  # NaN wherever nothing may be read
        key[b, : max(starts[b], 0)] = value[b, : max(starts[b], 0)] = np.nan
        key[b, lengths[b] :] = value[b, lengths[b] :] = np.nan

    windows = (jnp.asarray(lengths), jnp.asarray(starts))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return jax_ragged.ragged_attention(
            query, key, value, *windows, softmax_scale=scale, logits_soft_cap=cap
        )

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sin(attend(*operands).out).sum()

    operands = tuple(map(jnp.asarray, (query, key, value)))
    got = (*jax.jit(attend)(*operands), *jax.jit(jax.grad(loss, (0, 1, 2)))(*operands))
    want = _definition(query, key, value, lengths, starts, cap, scale)
    names = ("out", "max_logits", "denominator", "gradient of query", "of key", "of value")
    # float32 rounds each product and sum to 6e-8; a few hundred of them of unit scale add up.
    # An accelerator's own exp and dots are no worse than 1e-4 at full precision.
    tolerance = 1e-5 if jax.default_backend() == "cpu" else 1e-4
    agree = True
    for name, g, w in zip(names, got, want, strict=True):
        used = w != jax_ragged.DEFAULT_MASK_VALUE
        error = float(np.abs(np.asarray(g) - w)[used].max() / np.abs(w[used]).max())
        agree &= error <= tolerance
        print(f"{name:>18}: {error:.1e} {'' if error <= tolerance else 'FAILED'}")
    print("all agree" if agree else f"some differ by more than {tolerance}")
    return agree


# The timing table.


def _seconds(
    functions: dict[str, Function], operands: Sequence[jax.Array], repeats: int
) -> dict[str, float]:
    """Median time of each function's call, taken in turn after a call that compiles."""
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*operands))
            if repeat > 0:
                taken[name].append(time.perf_counter() - begin)
    return {name: float(np.median(times)) for name, times in taken.items()}


def _timing(options: Any) -> None:
    B, S, D = options.batch, options.length, options.head_dim
    Hq, Hkv = options.query_heads, options.kv_heads
    random = np.random.default_rng(options.seed)
    query, key, value = (
        jnp.asarray(random.normal(size=shape), options.dtype)
        for shape in ((B, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D))
    )
    lengths = jnp.asarray(random.integers(1, S + 1, size=B), jnp.int32)
    scale = D**-0.5

    def ragged(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
        return jax_ragged.ragged_attention(query, key, value, lengths, softmax_scale=scale).out

    def dense(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
        return jax_ragged.reference_ragged_attention(
            query, key, value, lengths, softmax_scale=scale
        ).out

    def of_jax(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
        return jax.nn.dot_product_attention(
            query[:, None], key, value, scale=scale, key_value_seq_lengths=lengths
        )

    operands = (query, key, value, lengths)
    times = _seconds(
        {
            "ragged_attention": ragged,
            "reference_ragged_attention": dense,
            "jax.nn.dot_product_attention": of_jax,
        },
        operands,
        options.repeats,
    )
    valid = int(lengths.sum()) * Hkv * 2 * D * key.dtype.itemsize
    _heading("Time of a call")
    print(f"query, key, value, lengths: {_shapes(*operands)}")
    print(f"windows: {int(lengths.sum()):,} of {B * S:,} positions, {valid / 1e6:,.0f} MB")
    print(f"{'':28} {'ms':>9} {'GB/s of windows':>16} {'ratio':>6}")
    for name, seconds in times.items():
        ratio = seconds / times["ragged_attention"]
        bar = "#" * max(1, round(24 * seconds / max(times.values())))
        print(f"{name:28} {1e3 * seconds:9.3f} {valid / seconds / 1e9:16.2f} {ratio:6.2f} {bar}")


def _define_flags() -> None:
    flags.DEFINE_bool("timing", True, "Print the timing table.")
    flags.DEFINE_integer("batch", 8, "Rows of the timed batch.", lower_bound=1)
    flags.DEFINE_integer("length", 2048, "Positions S of the timed cache.", lower_bound=1)
    flags.DEFINE_integer("query_heads", 32, "Query heads of the timed case.", lower_bound=1)
    flags.DEFINE_integer("kv_heads", 8, "Key/value heads of the timed case.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 128, "Head dimension of the timed case.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16", "float16"], "Dtype of the timed case."
    )
    flags.DEFINE_integer("repeats", 7, "Timed calls of each function.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the random numbers.", lower_bound=0)


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"only flags are taken; got {' '.join(argv[1:])}.")
    options = flags.FLAGS
    if not options["verbosity"].present:  # app.run logs what JAX tells developers
        logging.set_verbosity(logging.WARNING)
    if options.query_heads % options.kv_heads != 0:
        raise app.UsageError(
            "--query_heads: a multiple of --kv_heads; "
            f"got {options.query_heads} for {options.kv_heads}."
        )
    _report_versions()
    _report_jaxprs()
    _heading("Largest error against float64, relative to the largest value")
    agree = _check(options.seed)
    if options.timing:
        _timing(options)
    return 0 if agree else 1


if __name__ == "__main__":
    _define_flags()
    app.run(main)
