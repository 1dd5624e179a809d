"""How the rooms of mt-ckpt import each other, and those of its largest one, megatron."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mt_ckpt

SOURCE = Path(mt_ckpt.__path__[0])
MOST = {"": (11, 18), "megatron": (12, 40)}
"""Rooms of the package and of one of its folders: folders and modules of the first level, and arrows between them.

These numbers only fall.
"""


def imported_modules(file: Path) -> Iterator[str]:
    """Names of the modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_graph(folder: str) -> dict[str, set[str]]:
    """The rooms of a folder that each of its rooms imports."""
    root, prefix = SOURCE / folder, f"mt_ckpt.{folder}".rstrip(".") + "."
    graph: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        room = file.relative_to(root).parts[0].removesuffix(".py")
        if room != "__init__":
            modules = [name.removeprefix(prefix) for name in imported_modules(file) if name.startswith(prefix)]
            graph.setdefault(room, set()).update({name.partition(".")[0] for name in modules} - {room})
    return graph


@pytest.mark.parametrize("folder", MOST)
def test_rooms_and_the_arrows_between_them_do_not_multiply(folder):
    graph, (most_rooms, most_arrows) = room_graph(folder), MOST[folder]
    assert len(graph) <= most_rooms, sorted(graph)
    arrows = sorted((room, other) for room, others in graph.items() for other in others)
    assert len(arrows) <= most_arrows, arrows


@pytest.mark.parametrize(
    ("folder", "first", "last"), [("", "tensor_streams", "command"), ("megatron", "parameters", "training_state")]
)
def test_no_room_imports_itself_through_others(folder, first, last):
    order = list(TopologicalSorter(room_graph(folder)).static_order())
    assert order.index(first) < order.index(last)
