"""`subprocess` whose `mt` commands and pytest's workers are forks of a process that has imported torch: `server.py`.

`install` changes only how a process comes to be: `Popen` finds its own child with its own descriptors, process id,
signals and exit code. Left to a real interpreter are commands with an environment that is read while importing, or a
PYTHONPATH with a sitecustomize; any other option than those of the tests; and what runs inside `real_processes`.
"""

import atexit
import contextlib
import ctypes
import importlib
import marshal
import multiprocessing.util
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER = "import sys; sys.path.append({tests!r}); from preloaded.server import main; sys.path.pop(); main({fds})"
SCRIPT = Path(__file__).with_name("mt_script.py")
MT = Path(sys.executable).with_name("mt")
WORKER = [sys.executable, "-u", "-c", "import sys;exec(eval(sys.stdin.readline()))"]
"""What pytest-xdist starts a worker with."""
ADDRESS = "MT_TEST_SERVER"
"""Variable with the socket of the server, for the script `mt`."""
READ_AT_IMPORT = ("PYTHON", "LD_", "MKL_", "KMP_", "OPENBLAS_", "CUDA_", "TORCH_", "MALLOC_")
HARMLESS = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
PR_SET_CHILD_SUBREAPER = 36

Fork = Callable[[dict[str, Any], list[int]], int]
"""Starts a request's words as a child of this process with these descriptors; its process id."""

_real_only = threading.local()
_execute_child = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]
_spawn = multiprocessing.util.spawnv_passfds


@contextlib.contextmanager
def real_processes() -> Iterator[None]:
    """Here, every command of this thread is an interpreter of its own."""
    before = getattr(_real_only, "on", False)
    _real_only.on = True
    try:
        yield
    finally:
        _real_only.on = before


def install(fork: Fork) -> None:
    """Have `subprocess`, and the fork server of `multiprocessing`, start what can be forked by `fork`."""

    def execute_child(self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, *more: Any) -> None:
        pass_fds, cwd, env, _, _, shell, *pipes, _, gid, gids, uid, umask, new_session, group = more
        words = None if isinstance(args, str | bytes | os.PathLike) else [os.fspath(word) for word in args]
        usual = (executable, preexec_fn, close_fds, shell, gid, gids, uid, umask, group)
        plain = usual == (None, None, True, False, None, None, None, -1, -1)
        environment = dict(os.environ if env is None else env)
        if not (plain and words and forkable(words, environment)):
            _execute_child(self, args, executable, preexec_fn, close_fds, *more)
            return
        stdin, _, _, stdout, _, stderr = pipes
        standard = [own if fd == -1 else fd for own, fd in enumerate((stdin, stdout, stderr))]
        self.pid = fork(*request(words, environment, cwd, pass_fds, standard, new_session=new_session))
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def spawn(path: Any, words: Sequence[Any], fds: Sequence[int]) -> int:
        names = [os.fsdecode(word) for word in words]
        code = names.index("-c") if "-c" in names else 0
        if not code or "multiprocessing.forkserver" not in names[code + 1] or getattr(_real_only, "on", False):
            return _spawn(path, words, fds)
        return fork(*request([sys.executable, *names[code:]], dict(os.environ), None, fds, [0, 1, 2]))

    subprocess.Popen._execute_child = execute_child  # pyright: ignore[reportAttributeAccessIssue]
    multiprocessing.util.spawnv_passfds = spawn


def forkable(words: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a fork would do the same as `words` executed in `environment`."""
    if getattr(_real_only, "on", False):
        return False
    if words[0] != str(MT) and list(words[:3]) != [sys.executable, "-m", "mt_cli"] and list(words) != WORKER:
        return False
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    return _read_at_import(environment) == START and not any(
        Path(path, "sitecustomize.py").exists() for path in folders
    )


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: v for name, v in environment.items() if name.startswith(READ_AT_IMPORT) and name not in HARMLESS}


START = _read_at_import(os.environ)


def request(
    words: Sequence[str],
    environment: Mapping[str, str],
    cwd: Any,
    pass_fds: Sequence[int],
    standard: Sequence[int],
    *,
    new_session: bool = False,
) -> tuple[dict[str, Any], list[int]]:
    """What `server.run_as` takes: as words, what goes first into `sys.path` and then as after `python`."""
    folder = os.path.abspath(os.getcwd() if cwd is None else os.fspath(cwd))
    mask = os.umask(0)
    os.umask(mask)
    first, rest = (str(MT.parent), list(words)) if words[0] == str(MT) else ("", list(words[1:]))
    return {
        "mode": "adopt",
        "words": [folder if rest[0] == "-m" else first, *(rest[1:] if rest[0] == "-u" else rest)],
        "worker": list(words) == WORKER,
        "env": dict(environment),
        "cwd": folder,
        "umask": mask,
        "new_session": bool(new_session),
        "targets": [0, 1, 2, *pass_fds],
    }, [*standard, *pass_fds]


def fork_here(asked: dict[str, Any], fds: list[int]) -> int:
    """Fork this process, which a server made: for a command that another one starts."""
    server = importlib.import_module("preloaded.server")  # it imports this module
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork() or server.run_as(asked, fds)


_adopting = threading.Lock()


def fork_from_server(asked: dict[str, Any], fds: list[int]) -> int:
    """Have this process's server fork, and take its grandchild for a child."""
    with _adopting, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server_address())
        _set_subreaper(True)
        try:
            send(connection, asked, fds)
            answer = connection.recv(4)
        finally:
            _set_subreaper(False)
    if not answer:
        raise RuntimeError("the server that forks commands has ended; its standard error says why")
    return struct.unpack("I", answer)[0]


def send(connection: socket.socket, asked: dict[str, Any], fds: list[int]) -> None:
    """A request as `server.receive` reads it."""
    body = marshal.dumps(asked)
    socket.send_fds(connection, [struct.pack("I", len(body))], fds)
    connection.sendall(body)


def _set_subreaper(on: bool) -> None:
    """Whether descendants whose parent ends become children of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


_addresses: list[str] = []


def server_address() -> str:
    """The socket of this process's server, which the first that asks for it starts if the process came with none."""
    if not _addresses:
        start_server(_execute_server)
    return _addresses[0]


def start_server(start: Callable[[socket.socket, int], Callable[[], object]]) -> None:
    """Let `start` make a process that serves a socket until a pipe ends, as it does with this process."""
    folder = tempfile.mkdtemp(prefix="mt-tests-", dir="/tmp")  # the path of a socket has 107 bytes at most
    ours, theirs = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(128)
        wait = start(listener, ours)
    os.close(ours)
    _addresses.append(f"{folder}/socket")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(wait)  # so that its processor time is counted as this process's
    atexit.register(os.close, theirs)


def _execute_server(listener: socket.socket, lifeline: int) -> Callable[[], object]:
    code = SERVER.format(tests=str(Path(__file__).parents[1]), fds=f"{listener.fileno()}, {lifeline}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # no library starts threads while it is imported
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, pass_fds=(listener.fileno(), lifeline)).wait


def write_script(folder: Path) -> None:
    """An executable `mt` for scripts, which hands its command to this process's server."""
    script = folder / "mt"
    script.write_text(f"#!{sys.executable} -IS\n{SCRIPT.read_text()}")
    script.chmod(0o755)
