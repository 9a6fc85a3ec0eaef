"""The package list equals the folders on disk; what the project says of itself agrees."""

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import jax_ragged

ROOT = Path(__file__).parent.parent


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_are_the_folders() -> None:
    setuptools = _pyproject()["tool"]["setuptools"]
    found = {}
    for top in ("jax_ragged", "lowering", "primitives"):
        for path in (ROOT / top).rglob("__init__.py"):
            folder = path.parent.relative_to(ROOT).as_posix()
            if not folder.startswith(("jax_ragged/lowering", "jax_ragged/primitives")):
                name = folder.replace("/", ".")
                found[name if top == "jax_ragged" else f"jax_ragged.{name}"] = folder
    assert set(setuptools["packages"]) == set(found)
    # A mapped folder carries those below it.
    mapped = {"jax_ragged.lowering": "lowering", "jax_ragged.primitives": "primitives"}
    assert setuptools["package-dir"] == mapped


def test_links_make_the_tree_equal_to_the_package() -> None:
    for name in ("lowering", "primitives"):
        link = ROOT / "jax_ragged" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
    assert (ROOT / "jax_ragged" / "py.typed").is_file()


def test_version_is_said_once() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    said = re.search(r'^version: "(.*)"$', citation, re.MULTILINE)
    assert said is not None
    assert said[1] == jax_ragged.__version__ == _pyproject()["project"]["version"]
    date = re.search(r"^date-released: (.*)$", citation, re.MULTILINE)
    assert date is not None
    assert f"## {said[1]} - {date[1]}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_extras_of_accelerators_are_those_of_jax() -> None:
    of_jax = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    assert of_jax is not None
    extras = _pyproject()["project"]["optional-dependencies"]
    for name in ("cuda", "cuda12", "cuda13", "tpu"):
        (requirement,) = extras[name]
        assert requirement.startswith(f"jax[{name}]>=")
        assert name in of_jax
