"""The glossary has one line for each term, and its terms in code are names in the packages."""

import ast
import re
from functools import cache

from docs.pages import DOCS, ROOT

ROW = re.compile(r"^\| (?!term \||--- )(.+?) \| (.+) \|$", re.MULTILINE)
CODE = re.compile(r"`(\w+)`")


def rows() -> list[tuple[str, str]]:
    return ROW.findall((DOCS / "reference" / "glossary.md").read_text("utf-8"))


@cache
def names() -> set[str]:
    """Every name and every string that is one word in the packages, and the names of their files and folders."""
    words: set[str] = set()
    for file in ROOT.glob("packages/*/src/**/*.py"):
        words.update(file.with_suffix("").parts[-3:])
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            fields = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            words.update(word for field in fields if " " not in field for word in field.split("."))
    return words


def test_each_term_has_one_row_which_is_a_sentence():
    terms = [term for row, _ in rows() for term in row.split(", ")]
    assert len(terms) > 60
    assert len(terms) == len(set(terms))
    assert [row for row, meaning in rows() if not (meaning.endswith(".") and re.match("[A-Z0-9`]", meaning))] == []


def test_every_term_in_code_exists_in_the_packages():
    terms = {name for row, meaning in rows() for name in CODE.findall(f"{row} {meaning}")}
    assert {"hidden_size", "segment_ids"} <= terms
    assert terms - names() == set()
