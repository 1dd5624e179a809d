"""Reads a Markdown page as the steps that a reader takes: files to write, commands to run.

- ```` ```LANG title="FILE" ```` is a file, written before what follows it;
- ```` ```bash ```` is a script, run with `set -euo pipefail`;
- ```` ```console ```` is a session: after each `$ command`, its output, where `...` stands for any part of a line, and
  alone for any lines;
- `<!-- test: NAME … -->` names files that the page goes on from: those that tutorials/first-model.md makes; with
  `ROLE=NAME`, one that takes a role of `test_doc_commands.ROLES`;
- `<!-- exit: N -->` before a block says that its command fails with this code.

Blocks in other languages are only read. Lines that install (make, pip, uv) are tested by the README's own commands.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATORS = ROOT / "tools" / "docs"
"""Scripts that write pages and figures, which import each other by name."""
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("packages/*/README.md"), *ROOT.glob("README.md")])

FENCE = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$"
    r"|^<!-- (?P<key>test|exit): (?P<value>.*?) -->$",
    re.MULTILINE | re.DOTALL,
)
INSTALLS = re.compile(r"^(make|pip install|python -m pip install|uv) ?\b.*$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A file to write (`title`), or a command with the output that the page shows, if it shows any."""

    body: str
    title: str = ""
    output: str | None = None
    code: int = 0


@dataclass(frozen=True)
class Page:
    """What a page asks for, in order."""

    given: tuple[tuple[str, ...], ...]
    """Role, or nothing, and name of each file."""
    steps: tuple[Step, ...]


def read(path: Path) -> Page:
    """The page at `path`."""
    given: list[tuple[str, ...]] = []
    steps: list[Step] = []
    code = 0
    for found in FENCE.finditer(path.read_text("utf-8")):
        if found["key"] == "test":
            given += [tuple(name.rpartition("=")[::2]) for name in found["value"].split()]
        elif found["key"] == "exit":
            code = int(found["value"])
        else:
            steps += _block(found["language"], found["title"], found["body"], code)
            code = 0
    return Page(tuple(given), tuple(steps))


def _block(language: str, title: str | None, body: str, code: int) -> list[Step]:
    if title:
        return [Step(body, title=title)]
    if language == "bash":
        script = INSTALLS.sub("", body)
        return [Step(script, code=code)] if script.strip() else []
    if language == "console":
        return [Step(*part.split("\n", 1)[:1], output=part.split("\n", 1)[1], code=code) for part in _sessions(body)]
    return []


def _sessions(body: str) -> list[str]:
    before, *sessions = re.split(r"^\$ ", body, flags=re.MULTILINE)
    assert not before.strip(), f"output before the first command: {before}"
    return sessions


def matches(shown: str, printed: str) -> bool:
    """Whether a command printed what the page shows."""
    lines = (".*".join(map(re.escape, line.split("..."))) + r"\n" for line in shown.splitlines())
    pattern = "".join(r"(?:.*\n)*" if line == r".*\n" else line for line in lines)
    return re.fullmatch(pattern, printed) is not None
