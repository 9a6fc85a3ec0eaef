"""The tables of `python -m benchmarks.gpu`, their page and its picture, without a GPU.

A stub gives times, and jax.nn stands for cuDNN.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import gpu, gpu_forms, gpu_page, gpu_peers
from benchmarks.gpu_decode import decode
from benchmarks.gpu_forms import pages, quantised
from benchmarks.gpu_profile import Timing
from benchmarks.gpu_table import Table, check_close, name
from benchmarks.measure import Candidate, Case
from jax_ragged import ragged_attention

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
    start, end = (before.index(f"### {title}\n") for title in ("Decode", "Pages in random order"))
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


CASE = Case("", B=4, S=512, Hq=8, Hkv=2, D=32, dtype="bfloat16")


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of ours that are 4 us, a loop of one call, and no cuDNN."""

    def timing(run: Callable[[], Any], calls: int) -> Timing:
        jax.block_until_ready(run())
        return Timing(call=6e-6, attention=4e-6, around=1e-6)

    def cudnn(q: Any, k: Any, v: Any, lengths: Any, scale: float) -> Any:
        out = jax.nn.dot_product_attention(
            q[:, None], k, v, scale=scale, key_value_seq_lengths=lengths
        )
        return out[:, 0]

    monkeypatch.setattr(Timing, "of", timing)
    monkeypatch.setattr(gpu_peers, "CALLS", 1)
    monkeypatch.setattr(gpu_peers, "cudnn_decode", cudnn)
    monkeypatch.setattr(gpu_peers, "flashinfer_version", lambda: None)
    monkeypatch.setattr(gpu_forms, "QUANTISED_GOALS", {(8, 2): 1.0})


class FlashInfer:
    """Stands for FlashInfer: ours, with a share added to its output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = 0.0
        self.seen: list[tuple[str, tuple[int, ...]]] = []
        monkeypatch.setattr(gpu_peers, "flashinfer_version", lambda: "0.0")
        monkeypatch.setattr(gpu_peers, "flashinfer_decode", self.decode)

    def decode(
        self, query: Any, pools: tuple[Any, Any], page_table: Any, lengths: Any, scale: float
    ) -> Candidate:
        self.seen.append((pools[0].dtype.name, pools[0].shape))
        out = ragged_attention(
            query, *pools, lengths, page_table=page_table, softmax_scale=scale
        ).out
        return Candidate(lambda: None, np.asarray(out, np.float32) * (1 + self.error))


@pytest.mark.usefixtures("stubs")
def test_decode() -> None:
    (row,) = decode([CASE], 1e12).rows
    floor = CASE.valid_bytes / 1e12
    assert row[:7] == (name(CASE), "0", f"{floor * 1e6:.1f}", "4.0", "6.0", "4.0", "6.0")
    assert row[7:] == ("", f"{floor / 4e-6:.2f}", "", "met")


@pytest.mark.usefixtures("stubs")
def test_pages() -> None:
    table = pages([CASE], 1e12)
    assert table.rows == [
        (name(CASE), page, "4.0", "4.0", "1.00", "", "", "met") for page in ("16", "64", "256")
    ]


@pytest.mark.usefixtures("stubs")
def test_quantised() -> None:
    forms = [row[1:3] for row in quantised([CASE], 1e12).rows]
    assert forms == [
        (dtype, scale) for dtype in ("int8", "float8_e4m3fn") for scale in ("head", "position")
    ]


@pytest.mark.usefixtures("stubs")
def test_flashinfer_reads_the_same_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer = FlashInfer(monkeypatch)
    tables = [table([CASE], 1e12) for table in (decode, pages, quantised)]
    pools = {page: (4 * 512 // page, page, 2, 32) for page in (16, 64, 256)}
    assert flashinfer.seen == [
        ("bfloat16", pools[16]),
        *(("bfloat16", pools[page]) for page in (16, 64, 256)),
        ("float8_e4m3fn", pools[16]),
    ]
    # A stub runs in no time, and so faster than ours.
    goals = [[row[-1] for row in table.rows] for table in tables]
    assert goals == [["missed"], ["missed"] * 3, ["met"] * 4]


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize("table", [decode, pages, quantised])
def test_a_wrong_peer_ends_the_run(
    table: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    FlashInfer(monkeypatch).error = 0.1
    with pytest.raises(
        RuntimeError, match=r"two results differ by 0\..* on B4 S512 8/2/32 uniform"
    ):
        table([CASE], 1e12)


def test_rows_are_compared_by_their_own_size() -> None:
    """A long row's output is small beside a short one's."""
    want = np.ones((4, 8, 32), np.float32) * np.array([100, 1, 1, 1])[:, None, None]
    got = want.copy()
    got[2, 3, 4] += 0.1
    with pytest.raises(RuntimeError, match=r"differ by 0\.1 "):
        check_close(CASE, got, want, 0.05)


def test_every_table_has_its_section() -> None:
    titles = {"Decode", "Pages in random order", "Quantised caches", "Decode derivatives"}
    titles |= {"Causal forward", "Causal gradient"}
    page = gpu_page.PAGE.read_text()
    assert len(gpu.TABLES) == len(titles)
    assert all(page.count(f"### {title}\n") == 1 for title in titles)


def test_cases_are_chosen_by_their_names() -> None:
    measurement = gpu.TABLES["decode"]
    assert [name(x) for x in measurement.named(["B16 S8192", "eighth"])] == [
        "B16 S8192 32/8/128 uniform",
        "B128 S2048 32/8/128 eighth",
    ]
    assert measurement.named([]) == list(measurement.cases)
