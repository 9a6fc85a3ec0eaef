"""README and docs: their code runs and prints what they say, links and quotations are right."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re
import textwrap
import tomllib
from typing import Any, NamedTuple

import pytest

import jax_ragged
from benchmarks import sweeps
from cases import tiered
from jax_ragged import primitives
from jax_ragged.lowering import dispatch

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("docs/**/*.ipynb")),
]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# An HTML comment before a block says why it is not run, for instance that it needs a TPU, or names
# the code in the repository that it quotes.
NOT_RUN = re.compile(r"<!-- (?:not run|quoted): .+? -->\s*\Z")
# One at the top of a page names the packages of extras without which the page is not run.
NEEDS = re.compile(r"\A<!-- needs: (.+?) -->")


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _text(page: pathlib.Path) -> str:
    """The page in Markdown: of a notebook, the page that the site shows."""
    text = page.read_text()
    if page.suffix != ".ipynb":
        return text
    made: str = _script("hooks").notebook_page(json.loads(text))
    return made


class Block(NamedTuple):
    """A block of code; `printed` is the block of text right after it, if there is one."""

    line: int
    code: str
    printed: str | None


def _blocks(text: str) -> list[Block]:
    found = list(FENCE.finditer(text))
    blocks = []
    for i, match in enumerate(found):
        if match[2] != "python" or NOT_RUN.search(text[: match.start()]):
            continue
        printed = None
        if i + 1 < len(found) and found[i + 1][2] == "text":
            between = text[match.end() : found[i + 1].start()]
            printed = None if between.strip() else textwrap.dedent(found[i + 1][3])
        line = text[: match.start()].count("\n") + 2
        blocks.append(Block(line, textwrap.dedent(match[3]), printed))
    return blocks


def _prose(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _id(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


# BUILD.md's code is for the TPU compiler and wants a process of its own: test_tpu_* compile so.
RUN = [page for page in PAGES if page.name != "BUILD.md" and _blocks(_text(page))]
FIRST = [page for page in RUN if page.stem in ("README", "first_step", "caches")]


@pytest.mark.optimized
@pytest.mark.parametrize("page", tiered(RUN, FIRST), ids=_id)
def test_code_runs_and_prints_what_the_page_says(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = NEEDS.search(page.read_text())
    for package in needed[1].split() if needed else ():
        pytest.importorskip(package, reason=f"{_id(page)} needs {package}, of an extra")
    monkeypatch.chdir(tmp_path)
    # A page may register a lowering, which is not for the tests that follow.
    monkeypatch.setattr(dispatch, "_LOWERINGS", dict(dispatch._LOWERINGS))
    namespace: dict[str, object] = {"__name__": "page"}
    for block in _blocks(_text(page)):
        # Blank lines in front, so that a traceback has the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, page, "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.printed is not None:
            assert printed.getvalue().split() == block.printed.split(), f"{_id(page)}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_quotations_are_the_code(page: pathlib.Path) -> None:
    text = _text(page)
    assert text == _script("quotes").with_quotations(text), "python docs/quotes.py writes them anew"


def test_quotation_has_decorators_and_comments(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotes = _script("quotes")
    monkeypatch.setattr(quotes, "ROOT", tmp_path)
    code = "# Why.\n@f\ndef g():\n    # And how.\n    def h():\n        pass\n\nx = 1\ny = 2\n"
    (tmp_path / "m.py").write_text(code)
    assert quotes.quotation("m.py", "g") == code[: code.index("\nx")]
    assert quotes.quotation("m.py", "g.h") == "# And how.\ndef h():\n    pass\n"
    assert quotes.quotation("m.py", "x") == "x = 1\n"
    assert quotes.quotation("m.py", "x...") == "x = 1\ny = 2\n"
    written = quotes.with_quotations("<!-- quoted: m.py y -->\n```python\nz\n```\nend\n")
    assert written == "<!-- quoted: m.py y -->\n```python\ny = 2\n```\nend\n"
    with pytest.raises(ValueError, match="does not define z"):
        quotes.quotation("m.py", "z")


def test_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = {f"jax_ragged.{name}" for name in jax_ragged.__all__}
    of_primitives = set(primitives.__all__) - set(jax_ragged.__all__)
    public |= {f"jax_ragged.primitives.{name}" for name in of_primitives}
    types = ("Operands", "Residuals", "ByOperand", "ByResult")
    public |= {f"jax_ragged.lowering.contract.{name}" for name in types}
    public.add("jax_ragged.lowering.params.RaggedAttentionParams")
    assert shown == public


def test_site_turns_links() -> None:
    hooks = _script("hooks")
    for page, link, wanted in (
        ("index.md", "docs/caches.md#pages", "caches.md#pages"),
        ("index.md", "LICENSE", "source/LICENSE.md"),
        ("caches.md", "costs.md", "costs.md"),
        ("caches.md", "drawings/dense.svg", "drawings/dense.svg"),
        ("architecture.md", "../BUILD.md", "building.md"),
        ("contributing.md", "docs/notebook.ipynb", "notebook.md"),
        ("measurements/cpu.md", "../../README.md", "../index.md"),
        ("measurements/cpu.md", "../../tests/oracle.py", "../source/tests/oracle.py.md"),
        ("caches.md", "https://keepachangelog.com", "https://keepachangelog.com"),
        ("caches.md", "#pages", "#pages"),
    ):
        text = f"A [link]({link})."
        assert hooks.with_site_links(text, page) == f"A [link]({wanted})."
        code = f"```text\n{text}\n```"
        assert hooks.with_site_links(code, page) == code
    assert hooks.with_site_links('<img src="docs/cpu.png">', "index.md") == '<img src="cpu.png">'
    assert hooks.linked_sources("[a](../tests/oracle.py) [b](../BUILD.md)", "caches.md") == {
        "tests/oracle.py"
    }


def test_site_has_every_page() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^ +- .*: (\S+\.md)$", config, re.MULTILINE))
    hooks = _script("hooks")
    assert listed == {hooks.site_path(_id(page)) for page in PAGES}


def test_drawings_are_those_of_the_script() -> None:
    drawings = _script("drawings")
    wanted = drawings.files()
    assert set(wanted) == set(drawings.FOLDER.iterdir())
    for path, text in wanted.items():
        assert path.read_text() == text, "python docs/drawings.py writes them anew"


def test_picture_of_cpus_has_tables_on_the_page() -> None:
    page = (ROOT / "docs" / "measurements" / "cpu.md").read_text()
    title, (shares, sizes) = sweeps.read(page)
    assert title.startswith("B8 Hq32 Hkv8 D128 float32; jax ")
    assert list(shares.x) == [1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1]
    assert list(sizes.x) == [256, 512, 1024, 2048, 4096]
    assert all(len(ms) == 5 for ms in sizes.ms.values())
    with pytest.raises(ValueError, match="a page with a heading 'Sweeps: "):
        sweeps.read("# Nothing\n")


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_resolve(page: pathlib.Path) -> None:
    broken = []
    prose = _prose(_text(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="(.+?)"', prose):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in _anchors(_text(file))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_files_named_in_a_page_exist(page: pathlib.Path) -> None:
    named = re.findall(
        r"\b((?:docs|tests|benchmarks|examples|jax_ragged|primitives|lowering)/[\w./-]+\.\w+)",
        _text(page),
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_architecture_names_what_stands_in_the_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    diagrams = "".join(match[3] for match in FENCE.finditer(text))
    named = re.findall(r"(\S+/\S+\.py) +(\w+)$", diagrams, re.MULTILINE)
    assert len(named) > 20
    absent = [(file, name) for file, name in named if name not in (ROOT / file).read_text()]
    assert not absent


@pytest.mark.parametrize(("row", "platform"), [("CPU", "cpu"), ("TPU", "tpu"), ("Hopper", "cuda")])
def test_table_of_platforms_says_what_has_a_kernel(row: str, platform: str) -> None:
    cells = re.search(rf"^\|[^|]*{row} \|(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert cells is not None
    said = [cell.strip() for cell in cells[1].split("|")[:3]]
    lowering = dispatch.lowering_for(platform)
    own = [f in vars(type(lowering)) for f in ("forward", "jvp", "vjp")]
    have = ["kernel" if kernel else "reference" for kernel in own]
    assert said == have


def test_commands_ask_for_extras_that_exist() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        asked = re.search(r"'\.\[(.*?)\]'", command)
        assert asked is not None
        assert set(asked[1].split(",")) <= set(extras)


def test_page_of_the_tests_itself_is_read() -> None:
    text = (
        "```python\nprint(1)\n```\n\n```text\n1\n```\n<!-- not run: no TPU -->\n```python\nx\n```\n"
    )
    assert _blocks(text) == [Block(2, "print(1)\n", "1\n")]
    assert _anchors("# A `b`, c-d\n```\n# no\n```\n") == {"a-b-c-d"}


def test_prose_names_things() -> None:
    """Nouns in place of "what" and "that of": at most one each in 1,000 words of the pages."""
    text = "\n".join(_prose(_text(page)) for page in PAGES)
    words = len(re.findall(r"[A-Za-z']+", text))
    for habit in (r"\bwhat\b", r"\b(?:that|those) of\b"):
        found = re.findall(rf".*{habit}.*", text, re.IGNORECASE)
        assert len(found) <= words / 1000, "\n".join(found)
