"""What MkDocs does to the pages on their way into the site.

The links of pages are relative paths in the repository, so that they work on GitHub. The site has
the pages of `docs/`, and it gets a page for every other file that a link leads to: `README.md` is
its front page, and a source file is shown as code. A notebook becomes a page of its cells.
"""

import json
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Pages that stand outside of docs/, and their places in the site.
OUTSIDE = {
    "README.md": "index.md",
    "BUILD.md": "building.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])|(?<=\bsrc=\")([^\"]+)(?=\")")


def site_path(file: str) -> str:
    """The place in the site of a file of the repository."""
    if file in OUTSIDE:
        return OUTSIDE[file]
    if file.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", file.removeprefix("docs/"))
    return f"source/{file}.md"


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site is made of, if it is not a source file."""
    outside = {place: file for file, place in OUTSIDE.items()}
    return outside.get(page, f"docs/{page}")


def _outside_of_fences(text: str, change: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, change(text[end:])])


def _target(page: str, link: str) -> str | None:
    """The file of the repository that a link of a page leads to, if there is such a file."""
    folder = posixpath.dirname(repository_path(page))
    target = posixpath.normpath(posixpath.join(folder, link))
    return target if (ROOT / target).is_file() else None


def with_site_links(text: str, page: str) -> str:
    """The text of a page of the site, with its links to files of the repository turned."""
    here = posixpath.dirname(page) or "."

    def turned(match: re.Match[str]) -> str:
        target = _target(page, match[0])
        return match[0] if target is None else posixpath.relpath(site_path(target), here)

    return _outside_of_fences(text, lambda part: _LINK.sub(turned, part))


def linked_sources(text: str, page: str) -> set[str]:
    """The files that the links of a page lead to and that are neither pages nor in docs/."""
    targets = {_target(page, match[0]) for match in _LINK.finditer(_FENCE.sub("", text))}
    return {x for x in targets if x is not None and site_path(x).startswith("source/")}


def source_page(file: str) -> str:
    """A page that shows a source file, which the search leaves out."""
    language = {".py": "python", ".toml": "toml"}.get(pathlib.Path(file).suffix, "text")
    code = (ROOT / file).read_text()
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {pathlib.Path(file).name}\n\n`{file}`\n\n"
    return f"{head}````{language}\n{code}````\n"


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook as a page: text, code, and the text that the code printed."""
    pieces = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            pieces.append(source)
            continue
        pieces.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
        if printed:
            pieces.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(pieces) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand outside of docs/: MkDocs calls this with the files of docs/."""
    from mkdocs.structure.files import File

    def add(place: str, text: str) -> None:
        files.append(File.generated(config, place, content=text))

    for file, place in OUTSIDE.items():
        add(place, (ROOT / file).read_text())
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = notebook_page(json.loads(file.content_string))
            add(site_path(f"docs/{file.src_uri}"), text)
    sources: set[str] = set()
    pages: Iterable[Any] = files.documentation_pages()
    for file in pages:
        sources |= linked_sources(file.content_string, file.src_uri)
    for source in sorted(sources):
        add(site_path(source), source_page(source))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of a page: MkDocs calls this before it renders the page."""
    place = page.file.src_uri
    return markdown if place.startswith("source/") else with_site_links(markdown, place)
