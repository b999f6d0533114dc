"""Draws docs/how_it_works.svg, one round of tree speculation. Run `make picture`; nothing but
Python is needed.
"""

from __future__ import annotations

from pathlib import Path

INK, SOFT, LINE = "#1f2933", "#5f6c7b", "#c5ced8"
DRAFT, LOOKUP, ACCEPT, BONUS = "#3b82c4", "#d98324", "#2e9e5b", "#7c4dbe"
PALE = {DRAFT: "#e6f0fa", LOOKUP: "#fdf0e0", ACCEPT: "#e2f5e9", BONUS: "#efe7fb", SOFT: "#eef1f5"}
WIDTH, HEIGHT, PANEL, MARGIN = 1200, 418, 282, 18

# Node 0 is the root, the last token of the text; each entry is (token, parent, column, row, who
# drafted it).
NODES = [
    ("cat", -1, 0, 1.0, SOFT),
    ("sat", 0, 1, 0.5, LOOKUP),
    ("is", 0, 1, 2.5, DRAFT),
    ("on", 1, 2, 0.0, LOOKUP),
    ("down", 1, 2, 1.2, DRAFT),
    ("a", 2, 2, 2.5, DRAFT),
    ("the", 3, 3, 0.0, LOOKUP),
    ("my", 3, 3, 1.2, DRAFT),
]
PATH = [0, 1, 3, 6]
BONUS_TOKEN = "sofa"


def ancestors(node: int) -> set[int]:
    """The node itself and everything above it."""
    seen = set()
    while node >= 0:
        seen.add(node)
        node = NODES[node][1]
    return seen


def text(
    x: float,
    y: float,
    content: str,
    size: int = 13,
    fill: str = INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    style = f'font-size="{size}" fill="{fill}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{content}</text>'


def box(
    x: float,
    y: float,
    w: float,
    h: float,
    fill: str,
    stroke: str,
    radius: float = 6,
    width: float = 1.4,
) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"'
    return f'<rect {place} fill="{fill}" stroke="{stroke}" stroke-width="{width:g}"/>'


def token(x: float, y: float, label: str, colour: str, faded: bool = False) -> str:
    """A token's box, 52 wide, its middle left at (x, y)."""
    parts = box(x, y - 13, 52, 26, PALE[colour], colour) + text(
        x + 26, y + 4.5, label, 13, INK, 600, "middle"
    )
    return f'<g opacity="0.3">{parts}</g>' if faded else parts


def place(node: int, left: float, top: float) -> tuple[float, float]:
    _, _, column, row, _ = NODES[node]
    return left + 68 * column, top + 40 * row


def tree(left: float, top: float, path: list[int] | None = None) -> str:
    """The drafted tree; with a path, that path in the colour of acceptance and the rest faded."""
    parts = []
    for node, (_, parent, *_) in enumerate(NODES):
        if parent < 0:
            continue
        (x0, y0), (x1, y1) = place(parent, left, top), place(node, left, top)
        kept = path is not None and node in path
        colour = ACCEPT if kept else LINE
        bend = f"M{x0 + 52:g},{y0:g} C{x0 + 62:g},{y0:g} {x1 - 10:g},{y1:g} {x1:g},{y1:g}"
        parts.append(
            f'<path d="{bend}" fill="none" stroke="{colour}" '
            f'stroke-width="{2.4 if kept else 1.6}"/>'
        )
    for node, (label, _, _, _, colour) in enumerate(NODES):
        x, y = place(node, left, top)
        if path is None:
            parts.append(token(x, y, label, colour))
        elif node == 0:
            parts.append(token(x, y, label, SOFT))
        else:
            parts.append(
                token(x, y, label, ACCEPT if node in path else colour, faded=node not in path)
            )
    return "".join(parts)


def panel(index: int, title: str, caption: list[str]) -> tuple[str, float]:
    """Frame, number, title and caption of a panel; also its left edge."""
    left = MARGIN + index * (PANEL + 12)
    parts = [
        box(left, 66, PANEL, 334, "#ffffff", LINE, 10, 1),
        f'<circle cx="{left + 24}" cy="92" r="12" fill="{INK}"/>',
        text(left + 24, 96.5, str(index + 1), 13, "#ffffff", 700, "middle"),
        text(left + 44, 97, title, 16, INK, 700),
    ]
    parts += [
        text(left + 14, 330 + 18 * number, line, 12, SOFT) for number, line in enumerate(caption)
    ]
    return "".join(parts), left


def grow() -> str:
    frame, left = panel(
        0,
        "Grow a tree",
        [
            "Lookup in the text so far and a small",
            "draft model propose continuations.",
            "They merge into one tree, grown by one",
            "draft forward per level.",
        ],
    )
    legend = (
        box(left + 14, 262, 12, 12, PALE[LOOKUP], LOOKUP, 3)
        + text(left + 32, 272.5, "from lookup", 12, SOFT)
        + box(left + 124, 262, 12, 12, PALE[DRAFT], DRAFT, 3)
        + text(left + 142, 272.5, "from the draft model", 12, SOFT)
    )
    return frame + tree(left + 12, 140) + legend


def verify() -> str:
    frame, left = panel(
        1,
        "Verify it in one forward",
        [
            "The target reads all nodes at once. Each",
            "sees the text and its own ancestors,",
            "never its siblings: as if each branch",
            "stood alone.",
        ],
    )
    cell, x0, y0 = 18, left + 112, 134
    parts = [
        box(left + 60, y0, 46, cell * len(NODES), PALE[ACCEPT], ACCEPT, 3, 1),
        text(left + 83, y0 - 8, "the text", 12, SOFT, 400, "middle"),
        text(x0 + cell * len(NODES) / 2, y0 - 8, "the nodes", 12, SOFT, 400, "middle"),
        text(left + 83, y0 + 4 * cell + 4, "all", 12, ACCEPT, 600, "middle"),
    ]
    for row, (label, *_) in enumerate(NODES):
        parts.append(text(left + 52, y0 + cell * row + 13.5, label, 12, INK, 500, "end"))
        for column in range(len(NODES)):
            sees = column in ancestors(row)
            fill, stroke = (PALE[ACCEPT], ACCEPT) if sees else ("#ffffff", LINE)
            parts.append(box(x0 + cell * column, y0 + cell * row, cell, cell, fill, stroke, 2, 0.8))
            if sees:
                parts.append(
                    f'<circle cx="{x0 + cell * (column + 0.5):g}" '
                    f'cy="{y0 + cell * (row + 0.5):g}" r="3.4" fill="{ACCEPT}"/>'
                )
    parts.append(text(left + 14, 304, "who may look at whom: the attention mask", 12, SOFT))
    return frame + "".join(parts)


def accept() -> str:
    frame, left = panel(
        2,
        "Accept a path",
        [
            "Follow the target's own choices from the",
            "root for as long as they are in the tree.",
            "Its choice after that comes for free:",
            "3 drafted tokens + 1 bonus token.",
        ],
    )
    x, y = place(PATH[-1], left + 12, 140)
    end = y + 152
    drop = f'<path d="M{x + 52:g},{y:g} C{x + 64:g},{y:g} {x + 62:g},{y + 20:g} '
    drop += f"{x + 62:g},{y + 40:g} L{x + 62:g},{end - 40:g} "
    drop += f'C{x + 62:g},{end - 20:g} {x + 64:g},{end:g} {x + 53:g},{end:g}" '
    drop += f'fill="none" stroke="{BONUS}" stroke-width="2" stroke-dasharray="4 4"/>'
    bonus = token(x, end, BONUS_TOKEN, BONUS) + text(
        x - 8, end + 4.5, "bonus token", 12, BONUS, 600, "end"
    )
    return frame + tree(left + 12, 140, PATH) + drop + bonus


def commit() -> str:
    frame, left = panel(
        3,
        "Commit and go on",
        [
            "The accepted path's cache rows move up",
            "to the text's. The others will be",
            "overwritten. The bonus token is the",
            "root of the next round.",
        ],
    )
    size, x0, top, low = 27, left + 14, 150, 236
    parts = [
        text(x0, top - 12, "cache rows after verifying", 12, SOFT),
        text(x0, low + 48, "cache rows after the commit", 12, SOFT),
    ]
    for row in (top, low):
        parts += [box(x0 + 14 * n, row, 14, 28, PALE[SOFT], LINE, 2, 1) for n in range(2)]
    start = x0 + 28
    for node, (label, *_) in enumerate(NODES):
        kept = node in PATH
        x = start + size * node
        fill, stroke = (PALE[ACCEPT], ACCEPT) if kept else ("#ffffff", LINE)
        parts.append(box(x, top, size, 28, fill, stroke, 3, 1.2))
        parts.append(
            text(x + size / 2, top + 18, label, 8, INK if kept else "#a0aab5", 600, "middle")
        )
    for slot, node in enumerate(PATH):
        x_from, x_to = start + size * (node + 0.5), start + size * (slot + 0.5)
        bend = (
            f"M{x_from:g},{top + 29} C{x_from:g},{top + 58} {x_to:g},{low - 30} {x_to:g},{low - 5}"
        )
        parts.append(
            f'<path d="{bend}" fill="none" stroke="{ACCEPT}" stroke-width="1.8" '
            'marker-end="url(#arrow)"/>'
        )
        parts.append(box(x_to - size / 2, low, size, 28, PALE[ACCEPT], ACCEPT, 3, 1.2))
        parts.append(text(x_to, low + 18, NODES[node][0], 9, INK, 600, "middle"))
    x = start + size * len(PATH)
    parts.append(box(x + 6, low - 2, 44, 32, PALE[BONUS], BONUS, 5, 1.6))
    parts.append(text(x + 28, low + 18, BONUS_TOKEN, 11, INK, 600, "middle"))
    parts.append(text(x + 56, low + 18, "next root", 12, BONUS, 600))
    return frame + "".join(parts)


def picture() -> str:
    """The whole drawing."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" '
        'font-family="Inter, Segoe UI, Helvetica, Arial, sans-serif" '
        'aria-label="One round of tree speculation: grow a tree of drafts, verify it in one '
        'forward, accept a path, commit it">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" '
        'markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{ACCEPT}"/></marker></defs>'
    )
    title = text(
        MARGIN + 2,
        42,
        "One round: four tokens for one forward of the target, "
        "and exactly the tokens it would have written",
        19,
        INK,
        700,
    )
    body = "".join((grow(), verify(), accept(), commit()))
    whole = f"{head}{box(0, 0, WIDTH, HEIGHT, '#f7f9fb', '#f7f9fb', 12)}{title}{body}</svg>\n"
    return whole.replace("><", ">\n<")


if __name__ == "__main__":
    Path(__file__).with_name("how_it_works.svg").write_text(picture(), encoding="utf-8")
