"""Docstrings stand alone in an editor's hover, and names are words of the field (docs/decisions/names.md)."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docs.pages import ROOT

ROOMS = sorted([*(ROOT / "packages").glob("*"), ROOT / "tools", ROOT / "examples"])
"""Each package with its files, and what is run from a checkout."""
FRAGMENT = re.compile(r"(Of|The same|The reverse|As|Its)\b")
"""Openings that make sense only beside the text above."""
VAGUE = {"found", "told", "held"}
"""Names of variables, parameters and keywords that do not say what the value is."""


@cache
def parse(room: Path) -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text("utf-8")) for file in sorted(room.rglob("*.py"))}


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that stand alone: of modules, classes, functions, and below attributes and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def names(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Names that a module gives to variables, parameters and keywords, where it gives them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node, node.arg
        elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
            yield node, node.name


def locate(room: Path, file: Path, nodes: list[ast.AST]) -> list[str]:
    return [f"{file.relative_to(room)}:{node.lineno}" for node in nodes]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_no_docstring_opens_as_a_fragment(room):
    fragments = [
        line
        for file, tree in parse(room).items()
        for line in locate(room, file, [text for text in docstrings(tree) if FRAGMENT.match(text.value.strip())])
    ]
    assert fragments == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_no_variable_has_a_name_that_says_nothing(room):
    vague = [
        line
        for file, tree in parse(room).items()
        for line in locate(room, file, [node for node, name in names(tree) if name in VAGUE])
    ]
    assert vague == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_no_function_is_named_by_a_preposition(room):
    """A function is a verb and its object: `get_scaler`, not `scaler_of` or `of_scaler`."""
    functions = [
        f"{file.relative_to(room)}:{node.lineno} {node.name}"
        for file, tree in parse(room).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and re.match(r"of_|.*_of$", node.name)
    ]
    assert functions == []


def test_the_rules_are_broken_by_what_they_describe():
    tree = ast.parse(
        'def lr_of(*, held):\n    """Of a step."""\n    for found in held:\n        told = f(held=found)\n'
    )
    assert [text.value for text in docstrings(tree) if FRAGMENT.match(text.value)] == ["Of a step."]
    assert sorted(name for _, name in names(tree) if name in VAGUE) == ["found", "held", "held", "told"]
