"""Keeps the code that pages quote equal to the code in the repository.

A page marks a quotation with a comment and a block of code behind it:

    <!-- quoted: primitives/_primitive.py batch_rule.rule -->

The name leads to a function, a class or an assignment, nested ones behind a dot. With `...` at
its end, the quotation goes on to the end of the file. Comments right above belong to it.

    python docs/quotes.py

writes all quotations anew; tests/test_docs.py fails where one differs from the code.
"""

import ast
import pathlib
import re
import textwrap
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
_QUOTATION = re.compile(
    r"^<!-- quoted: (?P<file>\S+) (?P<name>\S+) -->$(?:\n```python\n.*?^```$)?",
    re.MULTILINE | re.DOTALL,
)


def _statements(scope: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node


def _definition(scope: ast.AST, name: str) -> ast.stmt | None:
    outer, _, inner = name.partition(".")
    node = dict(_statements(scope)).get(outer)
    return node if node is None or not inner else _definition(node, inner)


def quotation(file: str, name: str) -> str:
    """The lines of a file that define a name, without their common indentation.

    Raises:
      ValueError: if the file does not define it.
    """
    source = (ROOT / file).read_text()
    node = _definition(ast.parse(source), name.removesuffix("..."))
    if node is None:
        raise ValueError(f"{file} does not define {name}")
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    lines = source.splitlines(keepends=True)
    first = min([node.lineno, *(x.lineno for x in decorators)]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    last = len(lines) if name.endswith("...") else node.end_lineno
    return textwrap.dedent("".join(lines[first:last]))


def with_quotations(page: str) -> str:
    """The text of a page with every quotation as the code is now."""

    def written(match: re.Match[str]) -> str:
        code = quotation(match["file"], match["name"])
        return f"<!-- quoted: {match['file']} {match['name']} -->\n```python\n{code}```"

    return _QUOTATION.sub(written, page)


def main() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        page.write_text(with_quotations(page.read_text()))


if __name__ == "__main__":
    main()
