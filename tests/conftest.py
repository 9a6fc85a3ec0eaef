"""Set-up of all tests: devices, hypothesis, and what a test file may ask for."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

# Before JAX starts a backend. Without this, a machine that has libtpu (a test extra, for its
# compiler) but no TPU would look for one.
os.environ.setdefault("JAX_PLATFORMS", "" if shutil.which("nvidia-smi") else "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Several test processes compile for TPUs at once; libtpu's lock guards a TPU, and there is none.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Hypothesis warns, here an error, when pytest sees its folder in the checkout.
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis")
)

import hypothesis
import jax
import pytest

# Eight CPU devices stand for a mesh; what is not sharded runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture
def fast_compile() -> Iterator[None]:
    """XLA without its expensive optimisations: most of a small test's time, none of its point."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lowering",
        metavar="MODULE:ATTRIBUTE",
        help="a lowering of your own, to run tests/test_conformance.py on, and on no other",
    )


_OWN = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--lowering"):
        import lowerings

        config.stash[_OWN] = lowerings.use_only(name)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says for which calls the tests ran on a lowering of one's own, and not on the reference."""
    if _OWN in config.stash:
        terminalreporter.section(f"programs of {config.getoption('--lowering')}")
        for line in config.stash[_OWN].report():
            terminalreporter.line(line)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test with 64-bit types."""
    with jax.enable_x64(True):
        yield
