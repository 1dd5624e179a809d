"""Which files are read, in which order, and as what: names, directories and globs become a list of `InputFile`s.

Names keep the order in which they are given. A directory stands for every readable kind of file below it and a glob for
its matches, both sorted by path, so that the order never depends on the file system.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mt_core.errors import MtError, Problem, raise_if, suggest_file

Format = Literal["jsonl", "parquet", "text"]
InputFormat = Literal["auto", "jsonl", "parquet", "text"]

COMPRESSED = (".gz", ".zst", ".bz2")
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as it was when the job began."""

    path: str
    format: Format
    size: int
    modified_ns: int

    @property
    def compressed(self) -> bool:
        """Whether it can only be read from its beginning."""
        return self.path.endswith(COMPRESSED)


def find_inputs(inputs: Iterable[Path], format: InputFormat = "auto") -> list[InputFile]:
    """Every file that the names, directories and globs stand for; one `MtError` for all that is wrong with them."""
    assert format in get_args(InputFormat)
    files, problems = [], []
    for path in inputs:
        try:
            files += [_describe_file(file, format) for file in _expand_input(path, format)]
        except MtError as err:
            problems += err.problems
    raise_if(problems)
    return files


def guess_format(path: Path) -> Format | None:
    """What the name says: `.jsonl`, `.ndjson` and `.json` are JSON lines, `.txt` text; compression is seen through."""
    inner = Path(path.stem) if path.suffix in COMPRESSED else path
    return FORMATS.get(inner.suffix)


def _expand_input(path: Path, format: InputFormat) -> list[Path]:
    if path.is_dir():
        files = sorted(_walk_directory(path, format))
        what = "a file of a known kind" if format == "auto" else "a file"
        hint = f"files named {', '.join('*' + suffix for suffix in FORMATS)}, or say --input-format"
        if not files:
            raise MtError(str(path), f"is a directory without {what}", hint)
        return files
    if not path.exists() and glob.has_magic(str(path)):
        if not (files := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]):
            raise MtError(str(path), "matches no file", "quote it if the shell should leave it alone")
        return files
    if not path.is_file():
        raise MtError(str(path), "no such file", suggest_file(path))
    return [path]


def _walk_directory(directory: Path, format: InputFormat) -> Iterator[Path]:
    """Files of a directory and its subdirectories, without hidden ones; with `auto` only those of a known kind."""
    problems: list[Problem] = []

    def unreadable(err: OSError) -> None:
        problems.append(Problem(str(err.filename), f"cannot be read ({err.strerror})", "check its permissions"))

    for folder, folders, names in os.walk(directory, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        yield from (path for path in paths if path.is_file() and (format != "auto" or guess_format(path)))
    raise_if(problems)


def _describe_file(path: Path, format: InputFormat) -> InputFile:
    if not os.access(path, os.R_OK):
        raise MtError(str(path), "cannot be read (Permission denied)", "check its permissions")
    stat = path.stat()
    kind = (guess_format(path) or "jsonl") if format == "auto" else format
    if kind == "parquet" and path.suffix in COMPRESSED:
        raise MtError(str(path), "is a compressed parquet file", "decompress it; parquet compresses by itself")
    return InputFile(str(path), kind, stat.st_size, stat.st_mtime_ns)
