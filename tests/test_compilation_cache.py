"""No second trace, lowering or compilation: eager, jitted, in one program, in another process."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax import monitoring

from cases import SMALL
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.primitives import ragged_attention_p
from programs import op, pullback

OPERANDS, BARS = SMALL.operands(), SMALL.cotangents()


@pytest.fixture
def work() -> Iterator[list[str]]:
    """The traces, lowerings and compilations that a test causes."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield events
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "run",
    [
        lambda: op(SMALL)(*OPERANDS),
        lambda: pullback(op(SMALL))(OPERANDS, BARS),
        lambda: jax.vmap(op(SMALL), (0, None, None, None, None))(
            OPERANDS.query[None], *OPERANDS[1:]
        ),
    ],
    ids=["call", "grad", "vmap"],
)
def test_second_eager_call_compiles_nothing(run: Callable[[], Any], work: list[str]) -> None:
    jax.clear_caches()
    run()
    assert any("backend_compile" in event for event in work)
    work.clear()
    run()
    assert not [event for event in work if "backend_compile" in event or "to_mlir" in event]


def test_calls_of_one_program_share_a_function() -> None:
    def run(query: Any) -> Any:
        return [op(SMALL)(query + i, *OPERANDS[1:])[0] for i in range(3)]

    text = jax.jit(run).lower(OPERANDS.query).as_text()
    assert text.count("func.func private @ragged_attention") == 1
    assert text.count("call @ragged_attention") == 3


_PROGRAM = """
import json
import sys

import jax
import numpy as np
from jax import monitoring
from jax_ragged import ragged_attention

events = []
monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = np.ones((2, 64, 2, 8), np.float32)


@jax.jit
def gradients(query, cache, lengths):
    out = lambda q, kv: ragged_attention(q, kv, kv, lengths, block_size=16).out.sum()
    return jax.grad(out, (0, 1))(query, cache)


gradients(x[:, 0], x, np.array([64, 3], np.int32))
names = ("/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses")
json.dump([events.count(name) for name in names], sys.stdout)
"""


def test_another_process_compiles_nothing(tmp_path: Path) -> None:
    """The parts of a program's key in the persistent cache are the same in every process."""

    def hits_and_misses() -> Any:
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", _PROGRAM]
        return json.loads(subprocess.check_output(command, env=env, text=True))

    hits, misses = hits_and_misses()
    assert hits == 0
    assert misses > 0
    assert hits_and_misses() == [misses, 0]


def test_clear_caches_forgets_eager_calls() -> None:
    """Nothing of ours keeps an equation's parameters alive."""
    query, key, value, lengths, starts = map(jax.numpy.asarray, OPERANDS)
    params = RaggedAttentionParams(softmax_scale=0.625)
    alive = weakref.ref(params)
    ragged_attention_p.bind(query, key, value, lengths, starts, params=params)
    del params
    jax.clear_caches()
    gc.collect()
    assert alive() is None
