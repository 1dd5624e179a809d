"""The page on architecture draws the packages, their imports and their rooms as they are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.pages import DOCS, ROOT

TEXT = (DOCS / "explanation" / "architecture.md").read_text("utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^([│├└─ ]*)(\S+)(?: +(.*))?$")
PACKAGES = sorted(path.name.replace("-", "_") for path in (ROOT / "packages").iterdir())


def branches(block: str) -> Iterator[tuple[list[str], str]]:
    """Every line of a drawn tree: the names from the root to it, and its text."""
    path: list[str] = []
    for line in block.splitlines():
        drawing, name, text = LINE.match(line).groups()
        path = [*path[: len(drawing) // 3], name]
        yield path, text or ""


def source(package: str) -> Path:
    return ROOT / "packages" / package.replace("_", "-") / "src" / package


def trees() -> dict[str, list[str]]:
    """The paths that are drawn for each package, relative to it."""
    drawn = [[path for path, _ in branches(block)] for block in BLOCKS if re.match(r"mt_\w+/$", block.split("\n")[0])]
    return {paths[0][0].rstrip("/"): ["".join(path[1:]) for path in paths[1:]] for paths in drawn}


def test_the_graph_of_imports_is_the_drawn_one():
    drawn = {}
    for path, text in branches(BLOCKS[0]):
        _, _, others = text.partition("also imports ")
        drawn[path[-1]] = {*path[:-1], *filter(None, others.split(", "))}
    assert drawn == {package.replace("_", "-"): imported_packages(package) for package in PACKAGES}


def imported_packages(package: str) -> set[str]:
    """Names of our other packages that one imports, anywhere in its files."""
    nodes = [node for file in source(package).rglob("*.py") for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {top.replace("_", "-") for module in modules if (top := module.partition(".")[0]) in PACKAGES} - {
        package.replace("_", "-")
    }


def test_every_package_has_a_tree():
    assert sorted(trees()) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_of_the_first_level_is_drawn(package):
    rooms = {f"{path.name}/" for path in source(package).iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {path for path in trees()[package] if path.count("/") == 1}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_drawn_room_exists(package):
    assert [path for path in trees()[package] if not (source(package) / path / "__init__.py").is_file()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_drawn_room_has_a_line_of_text(package):
    (block,) = [block for block in BLOCKS if block.startswith(f"{package}/\n")]
    assert [path[-1] for path, text in branches(block) if len(path) > 1 and not text] == []


def test_every_file_of_the_table_of_things_exists():
    table = TEXT.partition("## Where to find a thing")[2]
    paths = re.findall(r"`(mt_\w+/[^`]*)`", table)
    assert len(paths) > 30
    assert [path for path in paths if not (source(path.partition("/")[0]).parent / path).exists()] == []
