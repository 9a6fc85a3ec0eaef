"""examples/train.py: training through the primitive, the command; examples/decode.py."""

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

pytest.importorskip("tqdm", reason="examples need the extra: pip install -e '.[examples]'")

import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train.py"
MODEL = train.Model(layers=2, width=16, query_heads=4, kv_heads=2, head_dim=8, hidden=32, window=24)
TEXT = np.frombuffer(b"a small text, to be read again\n" * 200, np.uint8)


def _params() -> Any:
    return train.init(jax.random.key(0), MODEL)


def test_gradients_are_those_of_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = jnp.asarray(TEXT[:82].reshape(2, 41), jnp.int32)

    def gradient() -> Any:
        return jax.jit(jax.grad(lambda p: train.cross_entropy(p, tokens, model=MODEL)))(_params())

    got = gradient()
    monkeypatch.setattr(train, "ragged", train.dense)
    want = gradient()
    # Sums of 80 tokens' terms in float32, through two layers.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, want)


def test_training_goes_through_the_primitives() -> None:
    tokens = jnp.zeros((2, 41), jnp.int32)
    loss = jax.value_and_grad(lambda p: train.cross_entropy(p, tokens, model=MODEL))
    jaxpr = str(jax.make_jaxpr(loss)(_params()))
    assert jaxpr.count("= ragged_attention[") == MODEL.layers
    assert jaxpr.count("= ragged_attention_vjp[") == MODEL.layers


def test_training_learns() -> None:
    _, losses = train.train(TEXT, MODEL, steps=40, batch=4, length=32, seed=0)
    assert abs(losses[0] - np.log(256)) < 1  # knows nothing
    assert losses[-1] < 0.6 * losses[0]


def _run(script: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(script), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.full
def test_command(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT.tobytes() * 2)
    run = _run(SCRIPT, f"--text={text}", "--steps=2", "--batch=1")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # no bar where there is no terminal
    assert "step 2 of 2, loss " in run.stdout
    losses = re.search(r"cross entropy (\S+) nats a byte at first, (\S+) on text", run.stdout)
    assert losses is not None
    assert 0 < float(losses[2]) < float(losses[1])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "flag --steps=0"),
        ("--seed=few", "flag --seed=few"),
        ("--text=/nowhere/text", "--text: a file that can be read; got /nowhere/text"),
        (f"--text={ROOT / 'pyproject.toml'}", "--text: at least 8224 bytes; got"),
        ("word", "only flags are taken; got word."),
    ],
)
def test_bad_arguments(argument: str, message: str) -> None:
    run = _run(SCRIPT, argument)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_decode() -> None:
    run = _run(ROOT / "examples" / "decode.py")
    assert run.returncode == 0, run.stderr
    assert "step 31" in run.stdout
    assert "rows hold [  35 2032   72  532   32 1232   39  122]" in run.stdout
