"""Articles of a Wikipedia dump that WikiExtractor has taken apart, as records {"id", "url", "title", "text"}.

It writes a folder of files, `AA/wiki_00` and so on, with a JSON object a line (`--json`) or `<doc …>` blocks.
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mt_core.errors import MtError, Problem, suggest_file
from mt_data.corpus.records import Record, read_record, to_line
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.text_io.lines import read_chunks

DOC_TAG = re.compile(r"<doc (?P<attributes>.*)>$")
ATTRIBUTE = re.compile(r'(\w+)="(.*?)"(?= \w+="|$)')
LEFTOVER_TAG = re.compile(
    r"</?(?:br|ref|nowiki|templatestyles|small|sub|sup|span|div|references)\b[^<>]*>", re.IGNORECASE
)
BLANK_LINES = re.compile(r"\s*\n\s*\n\s*")
KEYS = ("id", "url", "title")


def extract_articles(inputs: Sequence[Path], output: Path, *, min_characters: int = 1) -> dict[str, int]:
    """Write the articles of files and folders, in the order of their names."""
    files = list_dump_files(inputs)
    step = CorpusStep("wikipedia", output, tuple(files), {"min_characters": min_characters})
    return run_step(step, files, ArticleReader(min_characters))


def list_dump_files(inputs: Sequence[Path]) -> list[Path]:
    """The files themselves and all files below the folders, sorted by path."""
    if missing := [path for path in inputs if not path.exists()]:
        raise MtError.from_problems(
            Problem(str(path), "no such file or folder", suggest_file(path)) for path in missing
        )
    paths = [file for path in inputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in paths if file.is_file()]
    if not files:
        raise MtError(" ".join(map(str, inputs)), "holds no files", "the folder that WikiExtractor wrote")
    return files


@dataclass(frozen=True, slots=True)
class ArticleReader:
    """The articles of one file, cleaned."""

    min_characters: int
    """Shorter texts, such as redirects, are left out."""

    def __call__(self, path: Path) -> StepOutput:
        """Lines of records."""
        produced, out = StepOutput(), []
        for article in _parse_articles(path):
            text = clean_article(article["text"], article["title"])
            kept = len(text) >= self.min_characters
            produced.counts.update(("articles", "kept" if kept else "too short"))
            if kept:
                out.append({**{key: str(article.get(key, "")) for key in KEYS}, "text": text})
        produced.counts["written"] = len(out)
        produced.data = b"".join(map(to_line, out))
        return produced


def clean_article(text: str, title: str) -> str:
    """Text without the repeated title, left-over tags and entities, its paragraphs one blank line apart."""
    text = LEFTOVER_TAG.sub("", html.unescape(text)).strip()
    text = text.removeprefix(f"{title}\n\n") if title else text
    return BLANK_LINES.sub("\n\n", text).strip()


def _parse_articles(path: Path) -> Iterator[Record]:
    """The articles of a file, in either form."""
    opened: tuple[int, Record] | None = None
    body: list[str] = []
    for number, line in _read_lines(path):
        where = f"{path}:{number}"
        if opened is None and line.startswith("{"):
            record = read_record(line.encode(), ("text", "title"), where)
            assert record is not None
            yield record
        elif opened is None and (match := DOC_TAG.match(line)):
            opened, body = (number, _parse_attributes(match["attributes"], where)), []
        elif opened is not None and line == "</doc>":
            yield {**opened[1], "text": "\n".join(body)}
            opened = None
        elif opened is not None:
            body.append(line)
        elif line:
            raise MtError(
                where, f"is neither JSON nor inside a <doc>: {line[:40]!r}", "a file that WikiExtractor wrote"
            )
    if opened is not None:
        raise MtError(f"{path}:{opened[0]}", "has a <doc> that does not end", "extract the dump again")


def _parse_attributes(text: str, where: str) -> Record:
    attributes = {name: html.unescape(value) for name, value in ATTRIBUTE.findall(text)}
    if "title" not in attributes:
        raise MtError(where, "has a <doc> without a title", "a file that WikiExtractor wrote")
    return attributes


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    for chunk in read_chunks(path):
        for number, line in enumerate(chunk.lines, start=chunk.first):
            yield number, line.decode(errors="replace").rstrip("\r")
