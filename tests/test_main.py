"""`python -m jax_ragged`: its report, and that its check can fail."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

import jax_ragged

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ("--batch=2", "--length=64", "--query_heads=4", "--kv_heads=2", "--repeats=1")


def _run(*arguments: str, platforms: str = "cpu") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "JAX_PLATFORMS": platforms, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def report() -> str:
    run = _run("-m", "jax_ragged", *SMALL)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_versions_and_devices(report: str) -> None:
    assert f"jax_ragged {jax_ragged.__version__}, Python 3." in report
    assert f"jax {jax.__version__}, jaxlib " in report
    assert "cpu device 0" in report


def test_jaxprs_of_call_vmap_and_grad(report: str) -> None:
    call, mapped, gradient = report.split("{ lambda ;")[1:]
    for jaxpr in (call, mapped, gradient):
        assert jaxpr.count("= ragged_attention[") == 1
    assert "f32[3,2,4,16] _:f32[3,2,4] _:f32[3,2,4] = ragged_attention[" in mapped
    assert "= ragged_attention_vjp[" in gradient
    assert "runs here as: ragged_attention_forward_" in call
    assert "ragged_attention_vjp_" in gradient.split("runs here as: ")[1]


def test_check_against_float64(report: str) -> None:
    assert "all agree" in report
    assert report.count("e-0") == 6  # errors of three results and three gradients
    assert "FAILED" not in report


def test_timing_table(report: str) -> None:
    names = ("ragged_attention", "reference_ragged_attention", "jax.nn.dot_product_attention")
    rows = [line.split() for line in report.splitlines() if line.endswith("#")]
    assert tuple(row[0] for row in rows) == names
    assert max(len(row[-1]) for row in rows) == 24  # the slowest has the longest bar


def test_check_fails_on_a_wrong_answer() -> None:
    # The window one position too short: still finite, still plausible.
    run = _run(
        "-c",
        "import runpy, sys, jax_ragged; right = jax_ragged.ragged_attention\n"
        "jax_ragged.ragged_attention = lambda q, k, v, lengths, *rest, **params: right(\n"
        "    q, k, v, lengths - 1, *rest, **params)\n"
        "sys.argv = ['jax_ragged', '--notiming']\n"
        "runpy.run_module('jax_ragged', run_name='__main__')\n",
    )
    assert run.returncode == 1, run.stderr
    assert "FAILED" in run.stdout
    assert "Time of a call" not in run.stdout


def test_stderr_is_empty_where_libtpu_finds_no_tpu() -> None:
    run = _run("-m", "jax_ragged", "--notiming", platforms="")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


# Held back: messages of native code, unless the body fails. Not held back: Python's own.
HELD = """
import os, sys
from absl import logging
from jax_ragged.__main__ import _without_native_messages
logging.use_absl_handler()
with _without_native_messages():
    os.write(2, b"native\\n")
    print("printed", file=sys.stderr)
    logging.warning("logged")
    {last}
"""


def test_only_messages_of_native_code_are_held_back() -> None:
    run = _run("-c", HELD.format(last="pass") + "print('after', file=sys.stderr)")
    assert "native" not in run.stderr
    assert [word in run.stderr for word in ("printed", "logged", "after")] == 3 * [True]


def test_messages_of_native_code_are_shown_on_failure() -> None:
    run = _run("-c", HELD.format(last="raise OSError('no backend')"))
    assert "native" in run.stderr
    assert "no backend" in run.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch=0", "flag --batch=0"),
        ("--dtype=int8", "flag --dtype=int8"),
        ("--kv_heads=3", "--query_heads: a multiple of --kv_heads; got 32 for 3."),
        ("word", "only flags are taken; got word."),
    ],
)
def test_bad_arguments(argument: str, message: str) -> None:
    run = _run("-m", "jax_ragged", argument)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
