"""Draws the pictures of the operation and of the forms of caches, as SVG.

    python docs/drawings.py

writes `docs/drawings/*.svg` anew; tests/test_docs.py fails where a file differs from its drawing.
Each drawing is a white card with its own background, so that it can be read on any page. Text has
15 units where a drawing is 460 wide: a phone shows that as 11 pixels.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from xml.sax.saxutils import escape

FOLDER = pathlib.Path(__file__).resolve().parent / "drawings"
WIDTH = 460

INK, QUIET, LINE = "#1f2328", "#59636e", "#8c959f"
USED, TOUCHED, UNTOUCHED = "#2563eb", "#bfd4fb", "#e7eaee"
QUERY, OUT = "#c2410c", "#15803d"
HEADS = ("#2563eb", "#0d9488")
ROWS = ("#7c3aed", "#c2410c")
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


class Drawing:
    """A card to draw on; x goes to the right and y goes down."""

    def __init__(self, title: str, height: float) -> None:
        self._title, self._height, self._parts = title, height, list[str]()

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none"
    ) -> None:
        """A filled box with its upper left corner at (x, y)."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        fill: str = INK,
        size: float = 15,
        code: bool = False,
        bold: bool = False,
    ) -> None:
        """A line of text whose baseline is at y."""
        font = MONO if code else SANS
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}" '
            f'font-family="{font}"{weight}>{escape(text)}</text>'
        )

    def line(self, points: Iterable[tuple[float, float]], color: str = LINE) -> None:
        """A line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        )

    def arrow(self, points: Sequence[tuple[float, float]], color: str = LINE) -> None:
        """A line through points with a head at its end; its last piece is straight."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        u, v = (x1 - x0) / length, (y1 - y0) / length
        back_x, back_y = x1 - 7 * u, y1 - 7 * v
        self.line([*points[:-1], (back_x, back_y)], color)
        head = ((x1, y1), (back_x - 4 * v, back_y + 4 * u), (back_x + 4 * v, back_y - 4 * u))
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in head)
        self._parts.append(f'<polygon points="{path}" fill="{color}"/>')

    def svg(self) -> str:
        """The file."""
        card = (
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self._height - 1:g}" rx="10" '
            'fill="#ffffff" stroke="#d0d7de"/>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height:g}" '
            f'width="{1.2 * WIDTH:g}" height="{1.2 * self._height:g}" role="img">'
        )
        return "\n".join(
            (head, f"<title>{escape(self._title)}</title>", card, *self._parts, "</svg>", "")
        )


def operation() -> Drawing:
    """Four rows of a cache with their windows, and the blocks that a kernel reads."""
    drawing = Drawing("Each row of the cache has a window; blocks outside are not read", 348)
    windows = ((0, 3), (5, 14), (0, 0), (0, 16))
    positions, of_block, cell, gap, high = 16, 4, 14.5, 4.0, 24
    left = 106.0

    def at(position: int) -> float:
        return left + position * cell + position // of_block * gap

    end = at(positions - 1) + cell
    drawing.text((left + end) / 2, 29, "cache [B, S, Hkv, D]", anchor="middle", bold=True)
    drawing.text(left, 52, "t = 0", fill=QUIET, size=14)
    drawing.text(end, 52, "S", anchor="end", fill=QUIET, size=14)
    drawing.arrow(((left + 38, 47), (end - 14, 47)))
    drawing.text(70, 29, "query", anchor="middle", fill=QUERY, bold=True)
    drawing.text(end + 38, 29, "out", anchor="middle", fill=OUT, bold=True)
    for row, (start, stop) in enumerate(windows):
        y = 64.0 + row * 41 + (26 if row > 1 else 0)
        middle = y + high / 2
        blocks = {t // of_block for t in range(start, stop)}
        drawing.text(12, middle + 5, f"b = {row}", fill=QUIET, size=14)
        drawing.box(58, y, high, high, QUERY)
        drawing.arrow(((84, middle), (left - 3, middle)), QUERY)
        for t in range(positions):
            used = start <= t < stop
            fill = USED if used else TOUCHED if t // of_block in blocks else UNTOUCHED
            drawing.box(at(t), y, cell - 1.5, high, fill)
        drawing.arrow(((end + 3, middle), (end + 24, middle)), OUT)
        drawing.box(end + 26, y, high, high, OUT if stop > start else "#ffffff", OUT)
        if stop == start:
            drawing.text(end + 26 + high / 2, middle + 5, "0", anchor="middle", fill=OUT)
    below = 64 + 41 + high
    for position, name in ((5, "starts[1]"), (14, "lengths[1]")):
        drawing.line(((at(position) - 1, 64 + 38), (at(position) - 1, below + 6)), INK)
        anchor = "middle" if position == 5 else "end"
        x = at(position) if position == 5 else at(position) + 8
        drawing.text(x, below + 19, name, anchor=anchor, code=True, size=14)
    legend = (
        (USED, "in the window of the row"),
        (TOUCHED, "read with its block of T positions, not used"),
        (UNTOUCHED, "not read"),
    )
    for i, (fill, meaning) in enumerate(legend):
        y = 264.0 + i * 25
        drawing.box(58, y, 15, 15, fill)
        drawing.text(84, y + 13, meaning)
    return drawing


def _caption(drawing: Drawing, shape: str, meaning: str) -> None:
    drawing.text(16, 30, shape, code=True, bold=True)
    drawing.text(16, 52, meaning, fill=QUIET)


def _legend_of_heads(drawing: Drawing, y: float) -> None:
    for h, fill in enumerate(HEADS):
        drawing.box(66 + h * 110, y, 15, 15, fill)
        drawing.text(88 + h * 110, y + 13, f"head {h}")


def dense() -> Drawing:
    """Positions one after the other, all heads of a position together."""
    drawing = Drawing("Dense cache: the heads of a position lie together", 188)
    _caption(drawing, "key [B, S, Hkv, D]", "One box is the D numbers of a head at a position.")
    for row in range(2):
        y = 84.0 + row * 34
        drawing.text(16, y + 17, f"b = {row}", fill=QUIET, size=14)
        for t in range(8):
            for h in range(2):
                drawing.box(66 + t * 47 + h * 20, y, 19, 22, HEADS[h])
    for t in range(8):
        drawing.text(85.5 + t * 47, 79, str(t) if t < 7 else "S-1", anchor="middle", size=14)
    drawing.text(16, 79, "t =", fill=QUIET, size=14)
    _legend_of_heads(drawing, 156)
    return drawing


def heads_first() -> Drawing:
    """All positions of a head, then those of the next head."""
    drawing = Drawing("Heads first: the positions of a head lie together", 188)
    _caption(
        drawing, 'key [B, Hkv, S, D], cache_layout="BHSD"', "All positions of head 0, then head 1."
    )
    drawing.text(16, 79, "t =", fill=QUIET, size=14)
    for h in range(2):
        for t in range(8):
            x = 66 + h * 189 + t * 22
            drawing.text(
                x + 10, 79, str(t) if t < 7 else "S-1", anchor="middle", size=14 if t < 7 else 12
            )
            for row in range(2):
                drawing.box(x, 84 + row * 34, 21, 22, HEADS[h])
    for row in range(2):
        drawing.text(16, 101 + row * 34, f"b = {row}", fill=QUIET, size=14)
    _legend_of_heads(drawing, 156)
    return drawing


def pages() -> Drawing:
    """A table whose entries lead to the pages of a pool."""
    drawing = Drawing("Pages: a table says which page of the pool holds a row's positions", 300)
    _caption(drawing, "key [P, T, Hkv, D]", "The table leads to the pages of a pool, here T = 16.")
    table, lengths, pages = ((2, -1, -1, -1), (4, 1, 3, -1)), (5, 40), 5
    drawing.text(66, 84, "page_table [B, W]", code=True, size=14)
    drawing.text(302, 84, "lengths", code=True, size=14)
    wide, top, width = 54, 208.0, 76
    of_row = {page: row for row, entries in enumerate(table) for page in entries if page >= 0}
    for row, entries in enumerate(table):
        y = 94.0 + row * 32
        drawing.text(16, y + 18, f"b = {row}", fill=QUIET, size=14)
        for w, page in enumerate(entries):
            fill = ROWS[row] if page >= 0 else UNTOUCHED
            drawing.box(66 + w * wide, y, wide - 2, 26, fill)
            ink = "#ffffff" if page >= 0 else QUIET
            drawing.text(92 + w * wide, y + 18, str(page), anchor="middle", fill=ink)
        drawing.text(344, y + 18, str(lengths[row]), anchor="middle")
    held = {2: 5, 4: 16, 1: 16, 3: 8}
    drawing.text(16, top - 10, "pool", bold=True)
    for page in range(pages):
        x = 66 + page * width
        used = held.get(page, 0) / 16
        drawing.text(x + 36, top - 10, f"page {page}", anchor="middle", size=14)
        drawing.box(x, top, width - 6, 30, UNTOUCHED)
        if used:
            drawing.box(x, top, (width - 6) * used, 30, ROWS[of_row[page]])
        said = f"b = {of_row[page]}" if used else "free"
        drawing.text(x + 35, top + 47, said, anchor="middle", fill=QUIET, size=14)
    drawing.text(66, 284, "Grey is outside of every window; -1 is not used.", fill=QUIET)
    return drawing


def quantised() -> Drawing:
    """Narrow numbers with one scale for each position and head."""
    drawing = Drawing("Quantised cache: a scale for each position and head", 222)
    _caption(drawing, "key int8 [B, S, Hkv, D]", "One byte a number, one scale for D numbers.")
    drawing.text(16, 87, "t = 0", fill=QUIET, size=14)
    numbers = ((12, -127, 88, 3), (127, 40, -9, -66), (-5, 127, 71, 30))
    scales = ("0.021", "0.034", "0.018")
    for t, (values, scale) in enumerate(zip(numbers, scales, strict=True)):
        y = 70.0 + t * 34
        if t:
            drawing.text(43, y + 17, str(t), fill=QUIET, size=14)
        for d, number in enumerate(values):
            drawing.box(72 + d * 48, y, 46, 26, HEADS[0])
            drawing.text(95 + d * 48, y + 18, str(number), anchor="middle", fill="#ffffff")
        drawing.text(286, y + 18, "\u00d7", anchor="middle", size=17)
        drawing.box(306, y, 70, 26, QUERY)
        drawing.text(341, y + 18, scale, anchor="middle", fill="#ffffff")
    drawing.text(72, 196, "key", code=True)
    drawing.text(306, 196, "key_scale [B, S, Hkv]", code=True, size=11.5)
    return drawing


def stack() -> Drawing:
    """The caches of all layers in one array, read as pages of S positions."""
    drawing = Drawing("A stack of layers, read as one pool with a page for each row", 276)
    _caption(drawing, "keys [L, B, S, Hkv, D]", "Read as L * B pages of S positions; here layer 1.")
    for layer in range(3):
        chosen = layer == 1
        y = 70.0 + layer * 58
        drawing.text(16, y + 30, f"layer {layer}", fill=INK if chosen else QUIET, size=14)
        for row in range(2):
            drawing.box(78, y + row * 25, 190, 22, HEADS[0] if chosen else UNTOUCHED)
            ink = "#ffffff" if chosen else QUIET
            drawing.text(88, y + row * 25 + 16, f"b = {row}", fill=ink, size=14)
            page = 2 * layer + row
            drawing.text(258, y + row * 25 + 16, f"page {page}", anchor="end", fill=ink, size=14)
    drawing.text(306, 96, "page_table", code=True, size=14)
    drawing.text(306, 116, "[B, 1]", code=True, size=14)
    for row in range(2):
        y = 128 + row * 25
        drawing.box(318, y, 50, 22, HEADS[0])
        drawing.text(343, y + 16, str(2 + row), anchor="middle", fill="#ffffff", size=14)
        drawing.arrow(((316, y + 11), (272, y + 11)), INK)
    drawing.text(306, 200, "layer * B + b", code=True, size=14)
    drawing.text(78, 258, "No layer is sliced out of the stack.", fill=QUIET)
    return drawing


DRAWINGS: tuple[Callable[[], Drawing], ...] = (
    operation,
    dense,
    heads_first,
    pages,
    quantised,
    stack,
)


def files() -> dict[pathlib.Path, str]:
    """The path of each drawing and its text."""
    return {FOLDER / f"{draw.__name__}.svg": draw().svg() for draw in DRAWINGS}


def main() -> None:
    """Writes all drawings."""
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
