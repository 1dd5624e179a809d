"""Files appear whole or not at all."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from mt_core.errors import MtError
from mt_core.files import atomic_directory, atomic_file, atomic_path, describe_file_error, disk_errors, open_to_read


def test_a_file_appears_when_the_block_ends(tmp_path):
    with atomic_file(tmp_path / "a", "w") as file:
        file.write("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a", "w") as file:
        file.write("new")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_never_overwritten(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(MtError, match="already exists"), atomic_directory(tmp_path / "d"):
        pass


def test_what_a_block_makes_appears_when_it_ends(tmp_path):
    with atomic_path(tmp_path / "d") as made:
        made.mkdir()
        assert not (tmp_path / "d").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_what_a_killed_process_left_is_removed_but_not_what_another_writes(tmp_path):
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    for name in (f"d.{dead}.tmp", f"d.{os.getppid()}.tmp", f"other.{dead}.tmp", "d.9.more.tmp"):
        (tmp_path / name / "x").mkdir(parents=True)
    with atomic_path(tmp_path / "d") as made:
        made.mkdir()
    left = ["d", f"d.{os.getppid()}.tmp", "d.9.more.tmp", f"other.{dead}.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(left)


def test_a_leftover_that_another_host_holds_stays(tmp_path):
    (room := tmp_path / "d.99999999999.tmp").mkdir()  # no process of this host
    handle = os.open(room, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with atomic_path(tmp_path / "d") as made:
        made.mkdir()
    assert room.exists()
    os.close(handle)
    with atomic_path(tmp_path / "e") as made:
        made.mkdir()
    assert room.exists()  # of another path


def test_a_full_disk_is_one_clear_error(tmp_path):
    full = "/dev/full"
    with (
        pytest.raises(MtError, match="the disk is full"),
        atomic_file(tmp_path / "a") as _,
        open(full, "wb", 0) as disk,
    ):
        disk.write(b"x")


def test_a_missing_permission_is_one_clear_error(tmp_path):
    with pytest.raises(MtError, match="cannot be written"), atomic_file(tmp_path / "a"):
        raise PermissionError(13, "Permission denied")


def test_a_file_in_place_of_a_directory_is_one_clear_error(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(MtError, match="a part of this path is a file"), atomic_directory(tmp_path / "a" / "b"):
        pass


def test_an_error_of_the_file_system_is_the_users_if_it_names_a_file(tmp_path):
    def explain(err: OSError) -> str:
        return str(describe_file_error(err))

    hint = "check that it exists, that it is of the right kind, and its permissions"
    assert explain(PermissionError(errno.EACCES, "Permission denied", "a.txt")) == (
        f"a.txt: cannot be read or written (Permission denied); {hint}"
    )
    assert explain(NotADirectoryError(errno.ENOTDIR, "Not a directory", b"\xff")).startswith("\udcff: cannot be read")
    assert explain(OSError(errno.ENOSPC, "No space left on device")).startswith("disk: the disk is full; free some")
    assert describe_file_error(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert describe_file_error(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    with pytest.raises(
        MtError, match=r"a\.txt: cannot be read \(No such file or directory\); nothing in .* has a name"
    ):
        open_to_read(tmp_path / "a.txt")
    with pytest.raises(MtError, match=r"cannot be read \(Is a directory\); check what it is, and its permissions"):
        open_to_read(tmp_path)
    with (
        pytest.raises(MtError, match=r"cannot be written \(Is a directory\); choose another path"),
        disk_errors(tmp_path),
    ):
        tmp_path.open("w")


def test_a_rank_ends_with_one_line_over_a_file_that_cannot_be_read(tmp_path):
    code = (
        "from mt_core.distributed.environment import get_rank_info\n"
        "from mt_core.distributed.rank_process import end_with\n"
        f"end_with(lambda: open({str(tmp_path / 'absent')!r}), get_rank_info())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mt: {tmp_path / 'absent'}: cannot be read or written (No such file or directory); ")
    assert done.stderr.count("\n") == 1
