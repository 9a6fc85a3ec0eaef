"""Imports: no Pallas until it is needed, one way between the folders, one name each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "lowering": ("jax_ragged.lowering",),
    "primitives": ("jax_ragged.lowering", "jax_ragged.primitives"),
}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_import_is_light() -> None:
    # JAX itself imports stubs under jax._src.pallas; the package itself is slow.
    done = _python("import jax_ragged, sys; print('jax.experimental.pallas' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("folder", BELOW)
def test_imports_run_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.split(".")[0] == "jax_ragged":
                    assert name.startswith(BELOW[folder]), f"{path} imports {name}"


@pytest.mark.parametrize("folder", BELOW)
def test_folder_has_one_name(folder: str) -> None:
    done = _python(f"import {folder}")
    assert f"import jax_ragged.{folder} instead" in done.stderr


def test_imported_again() -> None:
    """A second import, of some modules or of all, still exports, and reads old programs."""
    done = _python(
        """
import importlib, sys
import jax, jax.numpy as jnp
import jax_ragged

operands = jnp.ones((1, 1, 4)), jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)), jnp.array([2])

def serialized():
    return jax.export.export(jax.jit(jax_ragged.ragged_attention))(*operands).serialize()

def denominator(program):
    return jax.export.deserialize(program).call(*operands).denominator.item()

old = serialized()
importlib.reload(jax_ragged._attention)
importlib.reload(jax_ragged)
print(denominator(old), denominator(serialized()))
for name in [x for x in sys.modules if x.split(".")[0] == "jax_ragged"]:
    del sys.modules[name]
import jax_ragged
print(denominator(old), denominator(serialized()))
"""
    )
    assert done.stdout.split() == ["2.0"] * 4, done.stderr
