"""Every citation of a specification names a file and a section that exist, in one form."""

import re
from functools import cache
from pathlib import Path

from docs.pages import ROOT

FOLDERS = ("packages", "tests", "docs", "bench", "tools", "examples")
SUFFIXES = {".py", ".md", ".toml"}
CITATION = re.compile(r"(docs/specs/[\w-]+\.md)((?:(?:,| and| to)? §\d+(?:\.\d+)*)*)")
"""A file, and sections of it: `docs/specs/data.md §4.1 to §4.4, §4.12`."""
ELSEWHERE = re.compile(r"arXiv:[\d.]+,? §\d+(?:\.\d+)*")


def texts() -> dict[Path, str]:
    """Every text of the repository with runs of white space made one space, since citations may be wrapped."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return {path: " ".join(path.read_text("utf-8").split()) for path in files if path.name != Path(__file__).name}


@cache
def sections(file: str) -> set[str]:
    return set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", (ROOT / file).read_text("utf-8"), re.M))


def cited(text: str) -> list[tuple[str, str]]:
    pairs = [(file, re.findall(r"§([\d.]*\d)", rest)) for file, rest in CITATION.findall(text)]
    return [(file, section) for file, numbers in pairs for section in numbers or [""]]


def test_every_citation_resolves():
    citations = [(path, *citation) for path, text in texts().items() for citation in cited(text)]
    assert len(citations) > 100
    assert [
        f"{path.relative_to(ROOT)}: {file} §{section}"
        for path, file, section in citations
        if not (ROOT / file).is_file() or (section and section not in sections(file))
    ] == []


def test_no_section_is_named_without_its_file():
    bare = {path.relative_to(ROOT): ELSEWHERE.sub("", CITATION.sub("", text)) for path, text in texts().items()}
    named = {path: re.findall(r".{20}§\d", text) for path, text in bare.items() if path.parts[:2] != ("docs", "specs")}
    assert {path: citations for path, citations in named.items() if citations} == {}
