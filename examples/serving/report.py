"""What a run was worth: text as it comes, speed beside dense attention, bytes, and errors."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from serving.model import dense, empty_cache, step, whole_sequence
from serving.server import Log, Request, Server, Settings
from serving.weights import Model

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


class Stream:
    """Prints answers as they come: the first that is not complete live, then the next.

    What the others have so far is printed when it is their turn.
    """

    def __init__(self, model: Model, requests: Sequence[Request], started: float) -> None:
        self._text, self._requests, self._started = model.text, requests, started
        self._front, self._printed = 0, 0

    def __call__(self, _: Request) -> None:
        while self._front < len(self._requests) and self._requests[self._front].answer:
            request = self._requests[self._front]
            if not self._printed:
                self._print_head(request)
            # A character whose bytes are not all there ends in the sign for that: wait for more.
            text = "\n" + self._text.decode(request.answer)
            text = text if request.ended else text.removesuffix("\ufffd")
            print(text[self._printed :], end="", flush=True)
            self._printed = len(text)
            if not request.ended:
                return
            print(flush=True)
            self._front, self._printed = self._front + 1, 0

    def _print_head(self, request: Request) -> None:
        seconds = time.perf_counter() - self._started
        done = sum(r.ended for r in self._requests)
        print(
            f"\n[{request.number + 1} of {len(self._requests)}; {done} complete after "
            f"{seconds:.0f} s] {_shortened(request.question)}",
            end="",
        )


def _shortened(text: str, width: int = 70) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}... ({len(text):,} characters)"


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[Request], object]]:
    """A bar of tokens on a terminal; in a log, one line."""
    if not sys.stderr.isatty():
        print(f"{label} ...", flush=True)
        yield lambda _: None
        return
    with tqdm(total=total, desc=label, unit="token", leave=False) as bar:
        yield lambda _: bar.update()


def run_dense(model: Model, settings: Settings, requests: Sequence[Request]) -> Log:
    """The same loop with dense attention, on one page of the whole length for each slot."""
    whole = dataclasses.replace(
        settings,
        attention=dense,
        pages=settings.slots,
        page_size=settings.length,
        cache="float32",
    )
    warm(model, whole)
    again = [Request(r.number, r.question, r.prompt, r.limit) for r in requests]
    with progress(sum(len(r.answer) for r in requests), "the same with dense attention") as advance:
        return Server(model, whole).run(again, advance)


def warm(model: Model, settings: Settings) -> None:
    """Compiles the programs of a run."""
    server = Server(model, settings)
    server.run([Request(0, "", [0], 2)])
    server.copy(0, 0)


def recomputed(model: Model, requests: Sequence[Request]) -> list[npt.NDArray[Any]]:
    """Logits [answer, V] for each request, from its whole text at once, without a cache."""
    longest = max(len(r.prompt) + len(r.answer) for r in requests)
    logits = []
    for request in requests:
        tokens = np.zeros(longest, np.int32)
        text = request.prompt + request.answer
        tokens[: len(text)] = text
        of_all = whole_sequence(model.weights, tokens, config=model.config)
        begin = len(request.prompt) - 1
        logits.append(np.asarray(of_all[begin : begin + len(request.answer)]))
    return logits


def through_cache(
    model: Model, settings: Settings, requests: Sequence[Request], dtype: str
) -> list[npt.NDArray[Any]]:
    """The same logits with all keys and values through pages of dtype, each text as one chunk."""
    longest = max(len(r.prompt) + len(r.answer) for r in requests)
    pages = -(-longest // settings.page_size)
    table = np.arange(pages, dtype=np.int32)[None]
    logits = []
    for request in requests:
        text = request.prompt + request.answer
        tokens = np.zeros((1, longest), np.int32)
        tokens[0, : len(text)] = text
        _, of_all = step(
            model.weights,
            empty_cache(model.config, pages, settings.page_size, dtype),
            tokens,
            np.zeros(1, np.int32),
            np.array([len(text)], np.int32),
            table,
            config=model.config,
            dtype=dtype,
            every=True,
        )
        begin = len(request.prompt) - 1
        logits.append(np.asarray(of_all[0, begin : begin + len(request.answer)]))
    return logits


def moved(got: Sequence[npt.NDArray[Any]], want: Sequence[npt.NDArray[Any]]) -> tuple[float, float]:
    """The largest difference of logits, and the share of likeliest tokens that are the same."""
    a, b = np.concatenate(got), np.concatenate(want)
    return float(np.abs(a - b).max()), float(np.mean(a.argmax(axis=-1) == b.argmax(axis=-1)))


def bytes_per_token(model: Model, dtype: str) -> int:
    """Bytes of keys, values and scales for one token in all layers."""
    itemsize = jnp.dtype(dtype).itemsize
    scale = 4 if itemsize == 1 else 0
    config = model.config
    return 2 * config.layers * config.key_heads * (config.head_dim * itemsize + scale)


def report(
    model: Model,
    settings: Settings,
    requests: Sequence[Request],
    log: Log,
    picture: pathlib.Path,
) -> None:
    """Measures and prints all that the docstring of examples/serve.py promises."""
    checked = [r for r in requests if r.keep]
    print(f"\n{len(requests)} answers in {log.seconds:.1f} s")
    total = log.prefilled + log.reused + log.copied
    print(
        f"prompts: {total:,} tokens, of which {log.reused:,} were found in shared pages and "
        f"{log.copied:,} in copied ones; {log.waits} turns waited for free pages"
    )
    other = run_dense(model, settings, requests)
    _print_speed(model, settings, log, other)
    _print_memory(model, settings, log)
    wanted = recomputed(model, checked)
    error, _ = moved([np.stack(r.logits) for r in checked], wanted)
    largest = max(np.abs(w).max() for w in wanted)
    print(
        f"\nlargest difference of logits to full recomputation: {error:.1e} ({settings.cache} "
        f"cache, {len(checked)} answers, logits up to {largest:.0f})"
    )
    _print_dtypes(model, settings, checked, wanted)
    plot(picture, settings, {"ragged": log, "dense": other})
    print(f"\npicture: {picture}")


def _print_speed(model: Model, settings: Settings, ragged: Log, dense: Log) -> None:
    print()
    lengths = float(np.mean(np.sum(ragged.held, axis=1)))
    reads = {
        "ragged": lengths * bytes_per_token(model, settings.cache),
        "dense": settings.slots * settings.length * bytes_per_token(model, "float32"),
    }
    for name, log in (("ragged", ragged), ("dense", dense)):
        milliseconds = 1e3 * float(np.median(log.step_seconds))
        print(
            f"{name:>7}: {log.generated:,} tokens in {log.seconds:.1f} s with the prompts, "
            f"{log.tokens_per_second:.1f} tokens/s, median step {milliseconds:.1f} ms, "
            f"{reads[name] / 1e6:.1f} MB of cache read a step"
        )


def _print_memory(model: Model, settings: Settings, log: Log) -> None:
    own, wide = (bytes_per_token(model, dtype) for dtype in (settings.cache, "float32"))
    whole = settings.slots * settings.length
    paged = log.most_pages * settings.page_size
    narrow = "" if settings.cache == "float32" else f", {paged * own / 1e6:.0f} in {settings.cache}"
    print(
        f"\ncache: {settings.slots} slots of {settings.length} positions would be "
        f"{whole * wide / 1e6:.0f} MB in float32; the {log.most_pages} pages of "
        f"{settings.page_size} that were in use at most are {paged * wide / 1e6:.0f} MB{narrow}"
    )


def _print_dtypes(
    model: Model,
    settings: Settings,
    checked: Sequence[Request],
    wanted: Sequence[npt.NDArray[Any]],
) -> None:
    """What each dtype of the cache costs, for the same answers."""
    print(f"{'cache':>14}  bytes a token  logits moved by at most  same likeliest token")
    for dtype in DTYPES:
        error, agree = moved(through_cache(model, settings, checked, dtype), wanted)
        size = bytes_per_token(model, dtype)
        print(f"{dtype:>14}  {size:>13,}  {error:>23.1e}  {agree:>20.1%}", flush=True)


def plot(path: pathlib.Path, settings: Settings, logs: dict[str, Log]) -> None:
    """Saves a picture of what every slot held at each step, and of how long the steps took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    _draw_slots(above, logs["ragged"], settings)
    _draw_times(below, logs)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_slots(axes: Any, log: Log, settings: Settings) -> None:
    """Draws the tokens that each slot holds, those in shared pages apart."""
    held, shared = np.array(log.held).T, np.array(log.shared).T
    slots, steps = held.shape
    height = 0.9 / max(1, held.max())
    parts: list[Any] = []
    for slot in range(slots):
        base = slots - 1 - slot
        fill = functools.partial(axes.fill_between, range(steps), step="mid", linewidth=0)
        low, high = base + height * shared[slot], base + height * held[slot]
        free = axes.axhspan(base, base + 0.9, color="0.95")
        parts = [fill(low, high, color="tab:blue"), fill(base, low, color="tab:green"), free]
    names = ["tokens in its own pages", "in shared pages", "free"]
    axes.legend(parts, names, loc="upper right", ncols=3, frameon=False)
    axes.set(
        title="Tokens that each slot holds; it is given the next prompt when its answer ends",
        ylabel=f"slot; its height is {held.max()} of {settings.length} positions",
        yticks=[slots - 0.55 - slot for slot in range(slots)],
        yticklabels=range(slots),
        ylim=(-0.1, 1.13 * slots),
        xlim=(0, max(1, steps - 1)),
    )


def _draw_times(axes: Any, logs: dict[str, Log]) -> None:
    """Draws the time of each step and its running median."""
    for (name, log), colour in zip(logs.items(), ("tab:blue", "tab:orange"), strict=True):
        milliseconds = 1e3 * np.array(log.step_seconds)
        axes.plot(milliseconds, ".", color=colour, markersize=2, alpha=0.3)
        label = f"{name} attention, median {np.median(milliseconds):.1f} ms"
        axes.plot(_running_median(milliseconds), color=colour, label=label)
    slowest = max(np.percentile(log.step_seconds, 97) for log in logs.values())
    axes.set(xlabel="step", ylabel="time of a step (ms)", ylim=(0, 1.3e3 * slowest))
    axes.legend(loc="upper right", ncols=2, frameon=False)


def _running_median(x: npt.NDArray[Any], width: int = 15) -> npt.NDArray[Any]:
    padded = np.pad(x, width // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=-1))
