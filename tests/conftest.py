"""Set-up of all tests: devices, the two tiers, hypothesis, and fixtures for test files.

Without options pytest runs the default tier: in minutes, with every rule, every lowering and every
generation of TPU in it. `--full` adds the tests marked `full`: the matrices, and tests that
take long for the little that they add.
"""

import functools
import itertools
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
import jax.numpy as jnp
import pytest

import lowerings
import programs

# ejkernel, which a test imports, turns JAX's persistent cache on for the whole process. It would
# keep programs for TPUs, which nothing can load where there is no TPU, and JAX warns of those.
jax.config.update("jax_enable_compilation_cache", False)
# Eight CPU devices stand for a mesh; programs without sharding run on the first.
jax.config.update("jax_num_cpu_devices", 8)

# A failure prints a line, @reproduce_failure(...), that repeats it in either profile.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("random", deadline=None, database=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of this suite."""
    parser.addoption(
        "--full", action="store_true", help="run the full tier: the tests marked `full` too"
    )
    parser.addoption(
        "--lowering",
        metavar="MODULE:ATTRIBUTE",
        help="a lowering of your own, to run tests/test_conformance.py on, and on no other",
    )


_OWN = pytest.StashKey[Any]()
_TESTS = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Draws new examples in the full tier, and the same in every run of the default one."""
    hypothesis.settings.load_profile("random" if config.getoption("--full") else "deterministic")
    if name := config.getoption("--lowering"):
        config.stash[_OWN] = lowerings.use_only(name)


def pytest_report_header(config: pytest.Config) -> str:
    """Says which tier runs."""
    return f"tier: {'full' if config.getoption('--full') else 'default (--full runs the rest)'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of the other tier, and those that need more GPUs than there are."""
    here = len(lowerings.gpus())

    def runs(item: pytest.Item) -> bool:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            return False
        return all(here >= (mark.args or (1,))[0] for mark in item.iter_markers("gpu"))

    kept = [item for item in items if runs(item)]
    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = kept


@pytest.fixture(autouse=True)
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA without its expensive optimisations, for all tests but those marked `optimized`.

    They are most of a small test's time, and none of its point.
    """
    with programs.optimisations(request.node.get_closest_marker("optimized") is not None):
        yield
    # Linux maps a process's memory in at most 65,530 pieces, and XLA aborts where a program gets
    # none: the programs of some 1,500 tests have too many.
    if next(_TESTS) % 100 == 0:
        jax.clear_caches()


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


@pytest.fixture
def products_of_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces matrix products of an operand in registers, which JAX's GPU interpreter lacks."""
    # Pallas, for the tests that need it.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jax_ragged.lowering.gpu import teams, tile

    def product(a: Any, b: Any) -> jax.Array:
        factors = [x[...].astype("float32") for x in (a, b)]
        plgpu.commit_smem()  # The hardware's product reads as the copy engine writes.
        return jnp.dot(*factors)

    def add_product(total: jax.Array, p: jax.Array, ref: Any) -> jax.Array:
        return total + product(p, ref)

    own = tile.product

    def products(
        shape: Any, *terms: Any, meanwhile: Any = lambda: None, **options: Any
    ) -> tuple[jax.Array, Any]:
        if not any(isinstance(a, jax.Array) for a, _ in terms):
            return own(shape, *terms, meanwhile=meanwhile, **options)
        total = functools.reduce(jnp.add, (product(*x) for x in terms))
        return total, meanwhile()

    monkeypatch.setattr(tile, "product", products)
    monkeypatch.setattr(teams, "_add_product", add_product)
