"""SVG as text: boxes, words and a page that can be read on light and on dark."""

from collections.abc import Iterable
from html import escape

from mt_core.planning.svg import COLOURS, STYLE

WIDTH = 960
RANKS = [COLOURS[name] for name in ("weights", "gradients", "master weights", "moments", "activations", "logits")] + [
    COLOURS["buffers"],
    COLOURS["recompute"],
]
"""Colours, one for each of the first eight ranks."""
SHARED = COLOURS["reserved"]
"""The colour of what several ranks have alike."""


def box(x: float, y: float, width: float, height: float, *, colour: str, tooltip: str = "") -> str:
    """Return a filled rectangle; browsers show `tooltip` under the pointer."""
    title = f"<title>{escape(tooltip)}</title>" if tooltip else ""
    return f'<rect {_position(x, y)} width="{width:.1f}" height="{height:.1f}" fill="{colour}">{title}</rect>'


def outline(x: float, y: float, width: float, height: float, *, dashed: bool = False) -> str:
    """Return an empty rectangle."""
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<rect class="line" {_position(x, y)} width="{width:.1f}" height="{height:.1f}" fill="none"{dashes}/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    """Return a line of text, `y` its base line; kind "inside" is for coloured ground, "title" large."""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} {_position(x, y)} text-anchor="{anchor}">{escape(words)}</text>'


def labelled_box(x: float, y: float, width: float, height: float, *, colour: str, label: str) -> str:
    """Return a filled rectangle with its label in the middle."""
    middle = text(x + width / 2, y + height / 2 + 4, label, anchor="middle", kind="inside")
    return box(x, y, width, height, colour=colour) + middle


def legend(entries: Iterable[tuple[str, str]], x: float, y: float, *, apart: float = 120) -> list[str]:
    """Return colours and what they mean, in a row."""
    shapes = []
    for index, (colour, words) in enumerate(entries):
        left = x + index * apart
        shapes += [box(left, y, 14, 14, colour=colour), text(left + 20, y + 12, words)]
    return shapes


def document(heading: str, body: Iterable[str], height: float) -> str:
    """Return a whole file."""
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>\n<title>{escape(heading)}</title>\n{STYLE}'
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return "\n".join([head, ground, text(24, 28, heading, kind="title"), *body, "</svg>\n"])


def _position(x: float, y: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}"'
