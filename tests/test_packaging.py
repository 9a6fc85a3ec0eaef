"""The package list equals the folders on disk."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_packages_are_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
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
