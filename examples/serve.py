"""Trains a small language model through ragged attention, then serves it by continuous batching.

    python examples/serve.py [--text FILE] [--steps N] [--slots N] [--requests N] [--seed N]

The model is a byte-level transformer of about a million parameters with grouped-query attention
over a sliding window. `jax_ragged.ragged_attention` does all of its attention: in training (one
window for each token), in the prefill of a prompt, and in decoding, where every slot of a batch
has a window of its own and is given the next prompt as soon as its sequence ends. The text is the
repository's own sources and documents unless --text names another.
"""

import collections
import dataclasses
import functools
import pathlib
import time
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
Cache = tuple[tuple[jax.Array, jax.Array], ...]
Bytes = npt.NDArray[np.uint8]
# (query [B, Q, Hq, D], key and value [B, S, Hkv, D], lengths and starts [B, Q]) to [B, Q, Hq, D]
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

END = 0  # the byte between two files, at which a sequence ends


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


# The two attentions that are compared; the model does not know which it runs.


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
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Logits [B, T, 256] for tokens and positions [B, T].

    `attend(layer, query, key, value)` is the attention of a layer, with whatever cache it has.
    """
    # A product and not a look-up: the gradient of a look-up is a scatter, on CPUs one long loop.
    x = jax.nn.one_hot(tokens, 256) @ params["bytes"] * params["norm"].shape[0] ** 0.5
    for i, layer in enumerate(params["layers"]):
        h = normalise(x, layer["attention_norm"])
        query, key, value = (
            jnp.einsum("bte,ehd->bthd", h, layer[name]) for name in ("query", "key", "value")
        )
        attended = attend(i, rotate(query, positions), rotate(key, positions), value)
        x += jnp.einsum("bthd,hde->bte", attended, layer["out"])
        h = normalise(x, layer["hidden_norm"])
        x += (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    logits: jax.Array = normalise(x, params["norm"]) @ params["bytes"].T
    return logits


def whole_sequence(
    params: Params, tokens: jax.Array, *, model: Model, attention: Attention
) -> jax.Array:
    """Logits [B, T, 256] of tokens [B, T] without a cache: token t attends to its window."""
    lengths = jnp.broadcast_to(jnp.arange(1, tokens.shape[1] + 1), tokens.shape)

    def attend(_: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key, value, lengths, lengths - model.window)

    return transformer(params, tokens, lengths - 1, attend)


# Training.


def cross_entropy(params: Params, tokens: jax.Array, *, model: Model) -> jax.Array:
    """Mean nats for each byte of tokens [B, T + 1] after the first."""
    logits = whole_sequence(params, tokens[:, :-1], model=model, attention=ragged)
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
    with tqdm(range(1, steps + 1), desc="train", unit="step") as progress:
        for step in progress:
            at = random.integers(len(text) - length, size=batch)
            tokens = np.stack([text[i : i + length + 1] for i in at]).astype(np.int32)
            rate = learning_rate(step, steps)
            params, moments, loss = train_step(
                params, moments, tokens, jnp.float32(step), jnp.float32(rate), model
            )
            losses.append(float(loss))
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
    return params, losses


def held_out_loss(params: Params, text: Bytes, model: Model, length: int) -> float:
    """Mean nats for each byte of a text that was not trained on, in pieces of one length."""
    pieces = text[: len(text) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    loss = jax.jit(functools.partial(cross_entropy, model=model))
    return float(np.mean([loss(params, piece[None].astype(np.int32)) for piece in pieces[:32]]))


# Serving.


@dataclasses.dataclass
class Request:
    """A sequence that is served: `tokens` is its prompt, then what was generated.

    `sampled_from` holds, for each generated token, an array of logits and the row in it.
    """

    number: int
    prompt: int
    limit: int
    tokens: list[int]
    sampled_from: list[tuple[jax.Array, int]] = dataclasses.field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.tokens) >= self.prompt + self.limit or self.tokens[-1] == END

    def take(self, token: int, logits: jax.Array, row: int) -> None:
        """Appends a sampled token."""
        self.tokens.append(token)
        self.sampled_from.append((logits, row))


def sample(
    rng: jax.Array, logits: jax.Array, numbers: jax.Array, positions: jax.Array, temperature: float
) -> jax.Array:
    """A token [N] for logits [N, 256], the same in whatever slot and beside whatever requests."""

    def noise(number: jax.Array, position: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(rng, number), position)
        return jax.random.gumbel(own, logits.shape[1:])

    return jnp.argmax(logits + temperature * jax.vmap(noise)(numbers, positions), axis=-1)


@dataclasses.dataclass(frozen=True)
class Engine:
    """The two programs of a server: a prompt enters a slot, all slots take a step.

    A cache holds key and value [slots, length, Hkv, D] for each layer; both programs are given
    the only copy and return it, changed in place. Prompts are padded to `prompt` bytes.
    """

    model: Model
    attention: Attention
    slots: int
    length: int
    prompt: int
    temperature: float

    def empty_cache(self) -> Cache:
        shape = (self.slots, self.length, self.model.kv_heads, self.model.head_dim)
        return tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.model.layers))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def prefill(
        self,
        params: Params,
        cache: Cache,
        rng: jax.Array,
        prompt: jax.Array,
        size: jax.Array,
        slot: jax.Array,
        number: jax.Array,
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Fills a slot from a prompt [P], of which `size` bytes count; samples what follows."""
        position = jnp.arange(prompt.shape[0])[None]
        lengths = jnp.where(position < size, position + 1, 0)
        filled = list(cache)

        def attend(i: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            at = (slot, 0, 0, 0)
            keys, values = filled[i]
            filled[i] = (
                jax.lax.dynamic_update_slice(keys, key, at),
                jax.lax.dynamic_update_slice(values, value, at),
            )
            return self.attention(query, key, value, lengths, lengths - self.model.window)

        logits = transformer(params, prompt[None], position, attend)[:, size - 1]
        token = sample(rng, logits, number[None], size[None], self.temperature)
        return tuple(filled), token, logits

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def decode(
        self,
        params: Params,
        cache: Cache,
        rng: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        numbers: jax.Array,
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Takes the last token of every slot [slots], at its position, to the next.

        An idle slot has position `length`: it writes nowhere and its window is empty.
        """
        lengths = jnp.where(positions < self.length, positions + 1, 0)[:, None]
        row = jnp.arange(self.slots)
        filled = list(cache)

        def attend(i: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            keys, values = filled[i]
            filled[i] = keys, values = (
                keys.at[row, positions].set(key[:, 0], mode="drop"),
                values.at[row, positions].set(value[:, 0], mode="drop"),
            )
            return self.attention(query, keys, values, lengths, lengths - self.model.window)

        logits = transformer(params, tokens[:, None], positions[:, None], attend)[:, 0]
        token = sample(rng, logits, numbers, positions + 1, self.temperature)
        return tuple(filled), token, logits


@dataclasses.dataclass
class Log:
    """What a run of the server did: tokens held by each slot [steps, slots], and times."""

    held: list[list[int]]
    step_seconds: list[float]
    generated: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds


def serve(
    engine: Engine,
    params: Params,
    requests: Sequence[Request],
    rng: jax.Array,
    label: str | None = None,
) -> Log:
    """Serves the requests to their ends, in order of arrival, each in the first free slot."""
    waiting = collections.deque(requests)
    slots: list[Request | None] = [None] * engine.slots
    cache = engine.empty_cache()
    log = Log([], [], 0, 0.0)
    begin = time.perf_counter()
    total = sum(request.limit for request in requests)
    with tqdm(total=total, desc=label, unit="token", disable=label is None) as progress:
        while waiting or any(slots):
            for slot in range(engine.slots):
                while slots[slot] is None and waiting:
                    request = waiting.popleft()
                    prompt = np.zeros(engine.prompt, np.int32)
                    prompt[: request.prompt] = request.tokens
                    where = (np.int32(request.prompt), np.int32(slot), np.int32(request.number))
                    cache, token, logits = engine.prefill(params, cache, rng, prompt, *where)
                    request.take(int(token[0]), logits, 0)
                    slots[slot] = None if request.ended else request
            tokens, positions, numbers = np.zeros((3, engine.slots), np.int32)
            positions[:] = engine.length
            for slot, held in enumerate(slots):
                if held is not None:
                    tokens[slot], positions[slot] = held.tokens[-1], len(held.tokens) - 1
                    numbers[slot] = held.number
            started = time.perf_counter()
            cache, token, logits = engine.decode(params, cache, rng, tokens, positions, numbers)
            sampled = np.asarray(token)
            log.step_seconds.append(time.perf_counter() - started)
            log.held.append([0 if held is None else len(held.tokens) for held in slots])
            for slot, held in enumerate(slots):
                if held is not None:
                    held.take(int(sampled[slot]), logits, slot)
                    slots[slot] = None if held.ended else held
            done = sum(len(r.tokens) - r.prompt for r in requests)
            progress.update(done - log.generated)
            log.generated = done
    log.seconds = time.perf_counter() - begin
    return log


def make_requests(text: Bytes, count: int, *, prompt: int, limit: int, seed: int) -> list[Request]:
    """Prompts that begin a line of the text, and limits; most are short, a few are long."""
    random = np.random.default_rng(seed)
    begins = np.flatnonzero(text[: len(text) - prompt] == ord("\n")) + 1
    if not len(begins):
        begins = np.arange(1)
    requests = []
    for number in range(count):
        at = random.choice(begins)
        size = int(random.integers(prompt // 8, prompt + 1))
        most = int(np.exp(random.uniform(np.log(limit / 16), np.log(limit))))
        tokens = text[at : at + size].tolist()
        requests.append(Request(number, size, most, tokens))
    return requests


def recomputation_error(params: Params, requests: Sequence[Request], model: Model) -> float:
    """The largest difference of the logits sampled from to those of the whole text at once.

    The latter come from the dense attention, without a cache.
    """
    longest = max(len(request.tokens) for request in requests)
    logits_of = jax.jit(functools.partial(whole_sequence, model=model, attention=dense))
    errors = []
    for request in tqdm(requests, desc="recompute", unit="request", mininterval=0.5):
        tokens = np.zeros((1, longest), np.int32)
        tokens[0, : len(request.tokens)] = request.tokens
        want = np.asarray(logits_of(params, tokens))[0, request.prompt - 1 :]
        got = np.stack([np.asarray(logits)[row] for logits, row in request.sampled_from])
        errors.append(np.abs(got - want[: len(got)]).max())
    return float(max(errors))


# What is shown.


def show_texts(requests: Sequence[Request], count: int) -> None:
    for request in requests[:count]:
        prompt, rest = (
            bytes(part).decode("utf-8", "replace")
            for part in (request.tokens[: request.prompt], request.tokens[request.prompt :])
        )
        print(f"\n--- request {request.number}: {request.prompt} bytes of prompt, then generated")
        print(f"{prompt}\u2502{rest}")


def plot(path: pathlib.Path, logs: dict[str, Log], engine: Engine) -> None:
    """Saves a picture of what every slot held at each step, and of how long the steps took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    draw_slots(above, np.array(logs["ragged"].held).T, engine)
    draw_times(below, logs)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_slots(axes: Any, held: npt.NDArray[Any], engine: Engine) -> None:
    """Draws how much of its cache each slot fills and attends to: held [slots, steps]."""
    slots, steps = held.shape
    parts: list[Any] = []
    for slot, tokens in enumerate(held):
        older = np.maximum(tokens - engine.model.window, 0)
        base = slots - 1 - slot
        low, high = (base + 0.9 * x / engine.length for x in (older, tokens))
        fill = functools.partial(axes.fill_between, range(steps), step="mid", linewidth=0)
        free = axes.axhspan(base, base + 0.9, color="0.95")
        parts = [fill(low, high, color="tab:blue"), fill(base, low, color="0.7"), free]
    axes.legend(parts, ["window", "older", "free"], loc="upper right", ncols=3, frameon=False)
    axes.set(
        title="What each slot of the cache holds; it is refilled when its sequence ends",
        ylabel=f"slot, of {engine.length} positions",
        yticks=[slots - 0.55 - slot for slot in range(slots)],
        yticklabels=range(slots),
        ylim=(-0.1, 1.13 * slots),
        xlim=(0, steps - 1),
    )


def draw_times(axes: Any, logs: dict[str, Log]) -> None:
    """Draws the time of each step and its running median."""
    for (name, log), colour in zip(logs.items(), ("tab:blue", "tab:orange"), strict=True):
        milliseconds = 1e3 * np.array(log.step_seconds)
        axes.plot(milliseconds, ".", color=colour, markersize=2, alpha=0.3)
        label = f"{name} attention, median {np.median(milliseconds):.2f} ms"
        axes.plot(running_median(milliseconds), color=colour, label=label)
    slowest = max(np.percentile(log.step_seconds, 97) for log in logs.values())
    axes.set(xlabel="decode step", ylabel="time of a step (ms)", ylim=(0, 1.3e3 * slowest))
    axes.legend(loc="upper right", ncols=2, frameon=False)


def running_median(x: npt.NDArray[Any], width: int = 15) -> npt.NDArray[Any]:
    padded = np.pad(x, width // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=-1))


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
    flags.DEFINE_integer("slots", 8, "Sequences that are decoded at once.", lower_bound=1)
    flags.DEFINE_integer("requests", 32, "Prompts in the queue.", lower_bound=1)
    flags.DEFINE_integer(
        "length", 1024, "Positions of a slot's cache: prompt and generated text.", lower_bound=128
    )
    flags.DEFINE_float("temperature", 0.7, "Of sampling; 0 takes the likeliest.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of weights, pieces, prompts and sampling.", lower_bound=0)
    flags.DEFINE_string("text", None, "File to train on; without it, this repository.")
    flags.DEFINE_string("plot", "serve.png", "Picture to write: slots and times of the steps.")
    flags.DEFINE_integer("show", 4, "How many of the texts to print.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"only flags are taken; got {' '.join(argv[1:])}.")
    options = flags.FLAGS
    picture = pathlib.Path(options.plot)
    if not picture.parent.is_dir():
        raise app.UsageError(f"--plot: a path in a folder that exists; got {picture}.")
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

    prompt = 64
    rng = jax.random.key(options.seed)
    logs, served = {}, {}
    for name, attention in (("ragged", ragged), ("dense", dense)):
        engine = Engine(
            model, attention, options.slots, options.length, prompt, options.temperature
        )
        queue = functools.partial(make_requests, held_out, prompt=prompt, seed=options.seed)
        serve(engine, params, queue(1, limit=16), rng)  # compiles
        requests = queue(options.requests, limit=options.length - prompt)
        logs[name] = serve(engine, params, requests, rng, label=f"serve, {name}")
        served[name] = requests
    show_texts(served["ragged"], options.show)
    error = recomputation_error(params, served["ragged"], model)
    report(logs, served, error)
    plot(picture, logs, engine)
    print(f"picture: {picture}")


def report(logs: dict[str, Log], served: dict[str, list[Request]], error: float) -> None:
    same = sum(a.tokens == b.tokens for a, b in zip(served["ragged"], served["dense"], strict=True))
    print(f"\nlargest difference of logits to full recomputation with dense attention: {error:.1e}")
    print(f"requests with the same text from both attentions: {same} of {len(served['ragged'])}")
    for name, log in logs.items():
        milliseconds = 1e3 * float(np.median(log.step_seconds))
        print(
            f"{name:>7}: {log.generated:6,} tokens in {log.seconds:6.2f} s, "
            f"{log.tokens_per_second:7,.0f} tokens/s, median step {milliseconds:.2f} ms"
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)
