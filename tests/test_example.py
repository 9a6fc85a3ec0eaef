"""examples/serve.py: training through the primitive, continuous batching, the command."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import tiered

pytest.importorskip("matplotlib", reason="examples need the extra: pip install -e '.[examples]'")
pytest.importorskip("tqdm", reason="examples need the extra: pip install -e '.[examples]'")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "serve.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


serve = _load()
MODEL = serve.Model(layers=2, width=16, query_heads=4, kv_heads=2, head_dim=8, hidden=32, window=24)
TEXT = np.frombuffer(b"a small text, to be read again\n" * 200, np.uint8)


def _params() -> Any:
    return serve.init(jax.random.key(0), MODEL)


def _served(slots: int, attention: Any = serve.ragged, count: int = 7) -> tuple[Any, Any]:
    engine = serve.Engine(MODEL, attention, slots, 80, 16, 0.7)
    requests = serve.make_requests(TEXT, count, prompt=16, limit=64, seed=1)
    return requests, serve.serve(engine, _params(), requests, jax.random.key(2))


def test_gradients_are_those_of_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = jnp.asarray(TEXT[:82].reshape(2, 41), jnp.int32)

    def gradient() -> Any:
        return jax.jit(jax.grad(lambda p: serve.cross_entropy(p, tokens, model=MODEL)))(_params())

    got = gradient()
    monkeypatch.setattr(serve, "ragged", serve.dense)
    want = gradient()
    # Sums of 80 tokens' terms in float32, through two layers.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, want)


def test_training_goes_through_the_primitives() -> None:
    tokens = jnp.zeros((2, 41), jnp.int32)
    loss = jax.value_and_grad(lambda p: serve.cross_entropy(p, tokens, model=MODEL))
    jaxpr = str(jax.make_jaxpr(loss)(_params()))
    assert jaxpr.count("= ragged_attention[") == MODEL.layers
    assert jaxpr.count("= ragged_attention_vjp[") == MODEL.layers


def test_training_learns() -> None:
    _, losses = serve.train(TEXT, MODEL, steps=40, batch=4, length=32, seed=0)
    assert abs(losses[0] - np.log(256)) < 1  # knows nothing
    assert losses[-1] < 0.6 * losses[0]


def test_a_slot_is_refilled_as_soon_as_its_sequence_ends() -> None:
    requests, log = _served(slots=3)
    held = np.array(log.held)
    assert held.shape == (len(log.step_seconds), 3)
    # A slot that is idle once stays idle: there was nothing left to fill it with.
    assert not np.any(np.diff((held > 0).astype(int), axis=0) > 0)
    # The prefill gives the first token of a request, and each step one for each slot in use.
    assert (held > 0).sum() == log.generated - len(requests)
    assert log.generated == sum(len(r.tokens) - r.prompt for r in requests)
    assert len({r.prompt for r in requests}) > 2


def test_every_request_is_served_to_its_end() -> None:
    requests, _ = _served(slots=3)
    for request in requests:
        generated = request.tokens[request.prompt :]
        assert len(generated) == request.limit or generated[-1] == serve.END
        assert serve.END not in generated[:-1]
        assert request.prompt + request.limit <= 80


@pytest.mark.parametrize("slots", [1, 9])
def test_the_text_does_not_depend_on_the_slots(slots: int) -> None:
    wanted, _ = _served(slots=3)
    requests, _ = _served(slots=slots)
    assert [r.tokens for r in requests] == [r.tokens for r in wanted]


def test_recomputation_agrees_and_would_tell() -> None:
    requests, _ = _served(slots=3)
    # Logits of unit scale in float32.
    assert serve.recomputation_error(_params(), requests, MODEL) < 1e-5
    other = serve.dataclasses.replace(MODEL, window=MODEL.window - 1)
    assert serve.recomputation_error(_params(), requests, other) > 1e-3


def test_the_cache_is_donated_to_both_programs() -> None:
    engine = serve.Engine(MODEL, serve.ragged, 2, 80, 16, 0.7)
    rng, one, cache = jax.random.key(0), np.int32(1), engine.empty_cache()
    prompt = np.zeros(16, np.int32)
    filled, _, _ = engine.prefill(_params(), cache, rng, prompt, one, one, one)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))
    slots = np.ones(2, np.int32)
    engine.decode(_params(), filled, rng, slots, slots, slots)
    assert all(x.is_deleted() for x in jax.tree.leaves(filled))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command(tmp_path: pathlib.Path) -> None:
    text, picture = tmp_path / "text", tmp_path / "serve.png"
    text.write_bytes(TEXT.tobytes() * 2)
    run = _run(
        f"--text={text}",
        f"--plot={picture}",
        *("--steps=2", "--batch=1", "--requests=3", "--slots=2", "--length=128"),
    )
    assert run.returncode == 0, run.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "train: 100%" in run.stderr
    assert "serve, ragged:" in run.stderr
    assert run.stdout.count("--- request") == 3
    error = re.search(r"full recomputation with dense attention: (\S+)", run.stdout)
    assert error is not None
    assert float(error[1]) < 1e-4
    assert len(re.findall(r"(ragged|dense): .* tokens/s", run.stdout)) == 2


_BAD = [
    ("--steps=0", "flag --steps=0"),
    ("--slots=few", "flag --slots=few"),
    ("--length=100", "flag --length=100"),
    ("--text=/nowhere/text", "--text: a file that can be read; got /nowhere/text"),
    (f"--text={ROOT / 'pyproject.toml'}", "--text: at least 8224 bytes; got"),
    ("--plot=/nowhere/serve.png", "--plot: a path in a folder that exists"),
    ("word", "only flags are taken; got word."),
]


@pytest.mark.parametrize(("argument", "message"), tiered(_BAD, _BAD[3:4]))
def test_bad_arguments(argument: str, message: str) -> None:
    run = _run(argument)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
