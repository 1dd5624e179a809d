"""What every command that opens a file or directory must survive, and what it must say then: one line, no traceback.

    for name, path in bad_files(tmp_path, corpus):
        assert_one_clean_line(run_mt("data", "check", path), name)

`run_mt` runs a command in this process, without root's right to read and write everything: a file without permissions
is refused as it is to a user. The disk that is full is the fixture `small_disk`, after `fill_disk`.
"""

import contextlib
import ctypes
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from mt_cli.main import main

DIGITS = 5_000
"""More than Python reads of an integer: 4,300."""
OVERRIDES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root ignores permissions."""
VERSION_3 = 0x20080522
"""Of the structures that capget and capset take: a header, and two sets of three words."""


@dataclass(frozen=True)
class Result:
    """What a command did; the names are those of `subprocess.CompletedProcess`."""

    args: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


def run_mt(*args: object) -> Result:
    """`mt ARGS`, in this process; an exception that escapes is the traceback that a user would see."""
    words, out, err, code = tuple(map(str, args)), io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["mt", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        permissions_count(),
    ):
        try:
            main()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return Result(words, code, out.getvalue(), err.getvalue())


def assert_one_clean_line(result: object, name: str = "", *, may_succeed: bool = False) -> None:
    """The command failed with exit code 1 or 2 and said so in one line; a usage error may have its usage above.

    `result` is that of `run_mt`, `subprocess.run` or Typer's runner; with `may_succeed`, a success is right too. Notes
    and warnings may come before the line.
    """
    code = getattr(result, "returncode", getattr(result, "exit_code", None))
    stdout, stderr = (str(getattr(result, stream)) for stream in ("stdout", "stderr"))
    shown = f"{name}: {getattr(result, 'args', '')} → {code}\n{stdout}{stderr}"
    assert "Traceback (most recent call last)" not in stdout + stderr, shown
    assert "\x1b" not in stdout + stderr, shown
    if may_succeed and code == 0:
        return
    assert code in (1, 2), shown
    lines = [line for line in stderr.splitlines() if not line.startswith(("note:", "warning:", "Usage:", "Try '"))]
    assert len({line for line in lines if line}) == 1, shown


def bad_files(tmp_path: Path, example: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of each bad variant of a file that is right; all bear its name, each in a folder of its own."""
    for name, spoil in _file_faults(example).items():
        path = _make_room(tmp_path, example, name)
        path.parent.mkdir(parents=True)
        shutil.copyfile(example, path)
        with _spoilt(path, spoil):
            yield f"{name}: {example.name}", path


def bad_directories(tmp_path: Path, example: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of each bad variant of a directory: itself, and with each of its files as `bad_files` has it."""
    for name, spoil in DIRECTORIES.items():
        path = shutil.copytree(example, _make_room(tmp_path, example, name))
        with _spoilt(path, spoil):
            yield f"{name}: {example.name}", path
    for file in sorted(file.relative_to(example) for file in example.rglob("*") if file.is_file()):
        for name, spoil in _file_faults(file).items():
            path = shutil.copytree(example, _make_room(tmp_path, example, f"{name} {file}"))
            with _spoilt(path / file, spoil):
                yield f"{name}: {example.name}/{file}", path


def fill_disk(folder: Path, *, left: int = 0) -> None:
    """Fill the file system of a folder but for so many bytes."""
    with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    if left:
        os.truncate(folder / "filling", (folder / "filling").stat().st_size - left)


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """Give up, in this thread and while the block runs, root's power over permissions; nobody else has any."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() or libc.capget(header, sets):
        yield
        return
    before = sets[0]
    sets[0] = before & ~OVERRIDES
    libc.capset(header, sets)
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(header, sets)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _make_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _forbid(path: Path) -> None:
    path.chmod(0)


def _spoil_encoding(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :])


def _add_member(text: str) -> Callable[[Path], None]:
    """Add a member that nobody asked for, with this JSON as its value, to the last object of the file."""

    def spoil(path: Path) -> None:
        lines = path.read_text("utf-8").splitlines() if path.suffix != ".json" else [path.read_text("utf-8")]
        last = json.loads(lines[-1])
        if isinstance(last, dict):
            lines[-1] = json.dumps(last | {"unheard_of": None})[: -len("null}")] + text + "}"
        else:
            lines[-1] = f"[{text}]"
        path.write_text("\n".join(lines) + "\n")

    return spoil


def _make_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file\n")


def _make_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _file_faults(file: Path) -> dict[str, Callable[[Path], None]]:
    return FILES | (JSON if file.suffix in (".json", ".jsonl", ".ndjson") else {})


def _make_room(tmp_path: Path, example: Path, name: str) -> Path:
    """Where a bad variant goes: under the example's name, in an empty folder that does not exist yet."""
    folder = tmp_path / f"bad-{example.name}" / name.replace(" ", "-").replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    return folder / example.name


@contextlib.contextmanager
def _spoilt(path: Path, spoil: Callable[[Path], None]) -> Iterator[None]:
    spoil(path)
    yield
    if path.exists():
        path.chmod(0o700)  # so that pytest can remove it


FILES: dict[str, Callable[[Path], None]] = {
    "missing": _remove,
    "empty": _empty,
    "directory for a file": _make_directory,
    "truncated": _truncate,
    "not UTF-8": _spoil_encoding,
    "no permission": _forbid,
}
JSON: dict[str, Callable[[Path], None]] = {
    "lone surrogate": _add_member('"\\ud800"'),
    "huge integer": _add_member("9" * DIGITS),
}
DIRECTORIES: dict[str, Callable[[Path], None]] = {
    "missing": shutil.rmtree,
    "empty": _make_empty,
    "file for a directory": _make_file,
    "no permission": _forbid,
}
