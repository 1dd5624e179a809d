"""Files that are either whole or absent: written under a temporary name, flushed to disk, then renamed."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mt_core.errors import MtError, suggest_file

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp"
"""Suffix of everything unfinished; left-overs with it can be deleted at any time."""


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in place of a directory into an `MtError` that names `path`."""
    try:
        yield
    except OSError as err:
        if err.errno in FULL:
            raise describe_full_disk(str(path)) from err
        if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MtError(str(path), "cannot be written", f"check its permissions ({err.strerror})") from err
        if err.errno in (errno.ENOTDIR, errno.EEXIST):
            raise MtError(str(path), "a part of this path is a file, not a directory", "choose another path") from err
        if err.errno in (errno.EISDIR, errno.ENAMETOOLONG):
            raise MtError(str(path), f"cannot be written ({err.strerror})", "choose another path") from err
        raise


def describe_full_disk(where: str) -> MtError:
    """The error of a disk without room."""
    return MtError(where, "the disk is full", "free some space and run again; nothing was committed")


def describe_file_error(err: OSError) -> MtError | None:
    """An error of the file system as one of the user's; None if it names no file, so that it may be a defect of mt."""
    if err.errno in FULL:
        return describe_full_disk(os.fsdecode(err.filename or "disk"))
    if not isinstance(err.filename, str | bytes) or err.errno is None:
        return None
    where, actual = os.fsdecode(err.filename), f"cannot be read or written ({err.strerror})"
    return MtError(where, actual, "check that it exists, that it is of the right kind, and its permissions")


def open_to_read(path: Path) -> IO[bytes]:
    """The file's bytes; an `MtError` if it cannot be read."""
    try:
        return path.open("rb")
    except OSError as err:
        hint = suggest_file(path) if isinstance(err, FileNotFoundError) else "check what it is, and its permissions"
        raise MtError(str(path), f"cannot be read ({err.strerror})", hint) from err


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under `path` only when the block ends well."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with disk_errors(path):
        try:
            with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path for the block to create; what is there moves to `path`, which must not exist, if it ends well.

    What killed processes left of the same path is removed first.
    """
    if path.exists():
        raise MtError(str(path), "already exists", "choose another directory or remove it")
    room = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with disk_errors(path):
        _remove_leftovers(path)
        try:
            room.mkdir(parents=True)
            with _locked(room):
                yield room / path.name
                (room / path.name).rename(path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove rooms of this path whose process is gone, here and, by the lock it held, on any other host."""
    name = re.compile(re.escape(path.name) + r"\.(\d+)" + re.escape(TEMPORARY))
    for room in path.parent.iterdir() if path.parent.is_dir() else ():
        if (process := name.fullmatch(room.name)) and room.is_dir() and not _is_alive(int(process[1])):
            with _locked(room) as alone:
                if alone:
                    shutil.rmtree(room, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process != os.getpid()  # this process has not begun yet: an earlier one had its number


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the kernel's lock of a directory, which ends with this process; False if another process holds it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    except OSError:  # a file system without locks
        alone = True
    try:
        yield alone
    finally:
        os.close(handle)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `path` when the block ends well; `path` must not exist."""
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
