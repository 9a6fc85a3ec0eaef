"""The conformance suite on a lowering of one's own, as docs/add_a_lowering.md says to run it."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
WRONG = """
from examples.lowering import LongestWindow


class Wrong(LongestWindow):
    def forward(self, operands, params, device_kind):
        results = super().forward(operands, params, device_kind)
        return results._replace(max_logits=results.max_logits + 0.01)


LOWERING = Wrong()
"""


def _conformance(lowering: str, folder: pathlib.Path) -> tuple[int, str]:
    """The exit status and output of the command in the page, on a few cases."""
    command = ["pytest", "tests/test_conformance.py", f"--lowering={lowering}"]
    few = ["-q", "-p", "no:cacheprovider", "-k", "test_values and (queries_gap or bfloat16)"]
    run = subprocess.run(
        [sys.executable, "-m", *command, *few],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return run.returncode, run.stdout + run.stderr


def test_example_passes(tmp_path: pathlib.Path) -> None:
    status, output = _conformance("examples.lowering:LOWERING", tmp_path)
    assert status == 0, output
    assert "forward: took 1 programs" in output
    assert "refused 3 programs: it takes float32, and this is bfloat16" in output


@pytest.mark.full
def test_wrong_lowering_fails(tmp_path: pathlib.Path) -> None:
    (tmp_path / "wrong_lowering.py").write_text(WRONG)
    status, output = _conformance("wrong_lowering:LOWERING", tmp_path)
    assert status == 1, output
    assert "max_logits" in output
    # Only the cases that it refuses pass: the reference runs them.
    assert "1 failed, 3 passed" in output
