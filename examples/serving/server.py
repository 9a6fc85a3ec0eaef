"""Continuous batching: prompts enter free slots in chunks, and all slots take steps together."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from serving.model import Attention, copy_page, empty_cache, ragged, step
from serving.pages import Pages
from serving.weights import Model


@dataclasses.dataclass
class Request:
    """A prompt to answer with at most `limit` tokens, and what came of it.

    Attributes:
      number: its place in the queue; its random numbers come from it.
      question: the text that it was made of.
      prompt: its tokens.
      limit: the most tokens of its answer.
      keep: whether the logits are kept.
      answer: the tokens of the answer, with the one that ended it.
      logits: [V] for each token of the answer, where kept.
      ended: whether the answer is complete.
    """

    number: int
    question: str
    prompt: list[int]
    limit: int
    keep: bool = False
    answer: list[int] = dataclasses.field(default_factory=list)
    logits: list[npt.NDArray[Any]] = dataclasses.field(default_factory=list)
    ended: bool = False

    @property
    def positions(self) -> int:
        """How many positions its cache grows to: the last token is never written."""
        return len(self.prompt) + self.limit - 1


@dataclasses.dataclass
class Slot:
    """A request under way, its pages, and how many of its tokens the cache holds."""

    request: Request
    pages: list[int]
    shared: int
    held: int


@dataclasses.dataclass
class Log:
    """What a run did: tokens held by each slot, and of these shared, [steps, slots]; times."""

    held: list[list[int]] = dataclasses.field(default_factory=list)
    shared: list[list[int]] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    prefilled: int = 0
    reused: int = 0
    copied: int = 0
    generated: int = 0
    waits: int = 0
    most_pages: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds


@functools.partial(jax.jit, static_argnames="temperature")
def choose(
    logits: jax.Array, numbers: jax.Array, counts: jax.Array, seed: jax.Array, temperature: float
) -> jax.Array:
    """A token [B] for logits [B, V], the same in whatever slot and beside whatever requests.

    numbers and counts [B] are those of the requests and of their tokens so far.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)

    def noise(number: jax.Array, count: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), count)
        return jax.random.gumbel(own, logits.shape[1:])

    return jnp.argmax(logits + temperature * jax.vmap(noise)(numbers, counts), axis=-1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to serve: see the options of examples/serve.py, which have the same names."""

    slots: int = 8
    length: int = 1024
    pages: int = 256
    page_size: int = 16
    chunk: int = 64
    cache: str = "float32"
    temperature: float = 0.0
    seed: int = 0
    attention: Attention = ragged


class Server:
    """The slots, the pages and the cache of a run."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.pages = Pages(settings.pages, settings.page_size)
        self.cache = empty_cache(model.config, settings.pages, settings.page_size, settings.cache)
        self.slots: list[Slot | None] = [None] * settings.slots
        self.log = Log()
        # An entry behind a row's pages is in no window, so it may be anything.
        self.table = np.full((settings.slots, self.pages.needed(settings.length)), -1, np.int32)

    def run(
        self, requests: Sequence[Request], on_token: Callable[[Request], object] = lambda _: None
    ) -> Log:
        """Answers all requests, in order of arrival, each in the first free slot.

        In every turn the prompt that is entering, if there is one, advances by a chunk, and the
        slots with an answer under way by a token. `on_token` is called after each token.

        A request enters when the pages for its longest answer are free, so that none stops half
        way. Prompts enter one after another: the pages of one are filled before the next looks
        for pages to share.

        Raises:
          ValueError: for a request that would never fit, before any is answered.
        """
        for request in requests:
            self._check(request)
        waiting = collections.deque(requests)
        entering: int | None = None
        begin = time.perf_counter()
        while waiting or any(self.slots):
            if entering is None and waiting:
                entering = self._admit(waiting)
            if entering is not None and self._prefill(entering, on_token):
                entering = None
            self._decode(entering, on_token)
        self.log.seconds += time.perf_counter() - begin
        self.log.most_pages = self.pages.most_used
        return self.log

    def _check(self, request: Request) -> None:
        size, positions = f"a prompt of {len(request.prompt)} tokens", request.positions
        if positions > self.settings.length:
            raise ValueError(
                f"{size} and {request.limit} of its answer must fit in the {self.settings.length} "
                "positions of a slot. Pass a larger --length or fewer --tokens."
            )
        if self.pages.needed(positions) > self.pages.count:
            raise ValueError(
                f"{size} and {request.limit} of its answer must fit in all {self.pages.count} "
                f"pages of {self.pages.size} positions. Pass more --pages or fewer --tokens."
            )

    def _admit(self, waiting: collections.deque[Request]) -> int | None:
        """Gives the next request a slot, if one and the pages are free."""
        if None not in self.slots:
            return None
        request = waiting[0]
        taken = self.pages.take(request.prompt, request.positions)
        if taken is None:
            self.log.waits += 1
            return None
        pages, shared = taken.pages, taken.shared
        index = self.slots.index(None)
        self.slots[index] = Slot(request, pages, shared, shared + taken.copied)
        self.table[index] = -1
        self.table[index, : len(pages)] = pages
        self.log.reused += shared
        self.log.copied += taken.copied
        if taken.source is not None:
            self.copy(taken.source, pages[self.pages.needed(shared)])
        waiting.popleft()
        return index

    def copy(self, source: int, target: int) -> None:
        """Copies a page of all layers."""
        layers = self.model.config.layers
        self.cache = copy_page(self.cache, np.int32(source), np.int32(target), layers=layers)

    def _prefill(self, index: int, on_token: Callable[[Request], object]) -> bool:
        """Enters a chunk of a prompt; says whether it was the last, and takes a token then."""
        slot = self.slots[index]
        assert slot is not None
        prompt = slot.request.prompt
        chunk = prompt[slot.held : slot.held + self.settings.chunk]
        tokens = np.zeros((1, self.settings.chunk), np.int32)
        tokens[0, : len(chunk)] = chunk
        logits = self._step(tokens, [slot.held], [len(chunk)], self.table[index : index + 1])
        slot.held += len(chunk)
        self.log.prefilled += len(chunk)
        if slot.held < len(prompt):
            return False
        self.pages.publish(prompt, slot.pages)
        self._take(logits, [index], on_token)
        return True

    def _decode(self, entering: int | None, on_token: Callable[[Request], object]) -> None:
        """Takes a token in each slot with an answer under way."""
        n = self.settings.slots
        tokens, first, counts = np.zeros((n, 1), np.int32), [0] * n, [0] * n
        for i, slot in enumerate(self.slots):
            if slot is not None and i != entering:
                tokens[i, 0], first[i], counts[i] = slot.request.answer[-1], slot.held, 1
        if not any(counts):
            return
        started = time.perf_counter()
        logits = jax.block_until_ready(self._step(tokens, first, counts, self.table))
        self.log.step_seconds.append(time.perf_counter() - started)
        for slot, count in zip(self.slots, counts, strict=True):
            if slot is not None:
                slot.held += count
        self.log.held.append([0 if slot is None else slot.held for slot in self.slots])
        self.log.shared.append([0 if slot is None else slot.shared for slot in self.slots])
        self._take(logits, [i if counts[i] else None for i in range(n)], on_token)

    def _step(
        self,
        tokens: npt.NDArray[Any],
        first: Sequence[int],
        counts: Sequence[int],
        table: npt.NDArray[Any],
    ) -> jax.Array:
        """Runs the model; logits [B, V]."""
        logits: jax.Array
        self.cache, logits = step(
            self.model.weights,
            self.cache,
            tokens,
            np.array(first, np.int32),
            np.array(counts, np.int32),
            table,
            config=self.model.config,
            dtype=self.settings.cache,
            attention=self.settings.attention,
        )
        return logits

    def _take(
        self,
        logits: jax.Array,
        indices: Sequence[int | None],
        on_token: Callable[[Request], object],
    ) -> None:
        """Chooses a token of each row of logits for the slot in indices; frees slots that end."""
        slots = [None if index is None else self.slots[index] for index in indices]
        numbers, counts = (
            np.array([0 if slot is None else of(slot.request) for slot in slots], np.int32)
            for of in (lambda r: r.number, lambda r: len(r.answer))
        )
        seed = np.uint32(self.settings.seed)
        chosen = np.asarray(choose(logits, numbers, counts, seed, self.settings.temperature))
        for row, (index, slot) in enumerate(zip(indices, slots, strict=True)):
            if slot is None or index is None:
                continue
            request = slot.request
            token = int(chosen[row])
            if request.keep:
                request.logits.append(np.asarray(logits[row]))
            request.answer.append(token)
            ends = token in self.model.text.ends
            request.ended = ends or len(request.answer) == request.limit
            self.log.generated += 1
            if request.ended:
                self.pages.release(slot.pages)
                self.slots[index] = None
            on_token(request)
