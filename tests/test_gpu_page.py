"""The page and the picture of `python -m benchmarks.gpu`: what it saves is what it draws."""

import pathlib

import pytest

from benchmarks import gpu_page
from benchmarks.gpu_tables import Table

TABLE = Table(
    "Decode",
    "A note.",
    ("case", "floor", "ours alone"),
    [("B1 S8", "1.5", "3.0"), ("B2 S8", "", "2")],
)


@pytest.fixture
def page(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    file = tmp_path / "gpu.md"
    file.write_text(gpu_page.PAGE.read_text())
    monkeypatch.setattr(gpu_page, "PAGE", file)
    monkeypatch.setattr(gpu_page, "PICTURE", tmp_path / "gpu.png")
    return file


def test_a_table_replaces_its_section_alone(page: pathlib.Path) -> None:
    before = page.read_text()
    gpu_page.save(TABLE, "jax 1.2.3")
    after = page.read_text()
    start, end = (before.index(f"### {title}\n") for title in ("Decode", "Causal forward"))
    section = after[start : len(after) - len(before) + end]
    assert after == before[:start] + section + before[end:]
    assert section.startswith("### Decode\n\nA note.\n\n| case ")
    assert section.endswith("\n\njax 1.2.3\n\n")
    gpu_page.save(TABLE, "jax 1.2.3")
    assert page.read_text() == after


def test_a_section_that_is_not_there(page: pathlib.Path) -> None:
    page.write_text("# Measurements\n")
    with pytest.raises(ValueError, match="0 sections 'Decode'"):
        gpu_page.save(TABLE, "jax 1.2.3")


def test_the_page_has_what_the_picture_shows(page: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    gpu_page.plot()
    assert gpu_page.PICTURE.read_bytes().startswith(b"\x89PNG")
    gpu_page.save(TABLE, "jax 1.2.3")
    with pytest.raises(KeyError, match="cuDNN alone"):
        gpu_page.plot()
