"""A process that has imported torch and all of mt, and forks itself into the commands that tests start.

A command that imports torch takes three to six seconds of CPU time before it does anything; forked from here, it takes
hundredths. One server runs beside each process of pytest's, for as long as that lives; `processes.py` sends it what
`subprocess` would execute, `mt` does so for scripts. The server imports, and computes nothing: at a fork it has one
thread and no state that a fresh interpreter would not have after the same imports. Workers of pytest-xdist are forks
too, each with a server forked from it, so that a run of the suite imports everything once.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import marshal
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from preloaded import processes

PACKAGES = ("mt_core", "mt_data", "mt_models", "mt_ckpt", "mt_eval", "mt_cli")
OTHERS = (
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.utils.checkpoint",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "pytest",
)
"""What commands, ranks and tests import beyond what mt imports at the top of a module: half of the seconds of a command
that compiles, or verifies against transformers, and every optimizer of torch's imports `torch._dynamo`."""
FORGOTTEN = ("huggingface_hub", "transformers")
"""Libraries that read variables `HF_…` while they are imported: a command with other ones imports them again."""
ADOPT, REPORT = "adopt", "report"
"""What the client is: an ancestor of this process that becomes the parent of the command, or one that is told its
process id, and later how it ended, and whose end kills it."""
MADV_COLLAPSE, HUGE_PAGE = 25, 2 << 20
FAR = 500
"""File descriptors from here on are free while a process sorts those that it was sent."""


def serve(listener: socket.socket, lifeline: int) -> None:
    """Fork a command for every connection, until the process at the other end of `lifeline` is gone.

    Returns in no child.
    """
    while True:
        ready, _, _ = select.select([listener, lifeline], [], [], 1.0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that watch over commands of REPORT
                pass
        except ChildProcessError:
            pass
        if lifeline in ready:
            os._exit(0)
        if listener in ready:
            connection, _ = listener.accept()
            try:
                request, fds = receive(connection)
                _fork_command(listener, connection, request, fds)
                for fd in fds:
                    os.close(fd)
            except OSError:
                pass  # the client is gone
            connection.close()


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, which comes with its length in front, and the descriptors sent along."""
    head, fds, _, _ = socket.recv_fds(connection, 4, 32)
    (left,) = struct.unpack("I", head)
    parts = []
    while left:
        parts.append(connection.recv(left))
        if not parts[-1]:
            raise OSError("the client is gone")
        left -= len(parts[-1])
    return marshal.loads(b"".join(parts)), fds


def _fork_command(listener: socket.socket, connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    """A child between this process and the command: it ends at once (ADOPT), or watches over it (REPORT)."""
    start_read, start_write = os.pipe()  # the command starts when it has the parent that it is to have
    pid_read, pid_write = os.pipe()
    between = os.fork()
    if not between:
        try:
            command = os.fork()
            if not command:
                listener.detach(), connection.detach()  # the numbers are closed below; no object may close them later
                os.close(start_write)
                os.read(start_read, 1)
                run_as(request, fds)
            os.write(pid_write, struct.pack("I", command))
            if request["mode"] == REPORT:
                os.close(start_write)
                _watch(command, connection)
        finally:
            os._exit(0)
    os.close(start_read), os.close(pid_write)
    pid = os.read(pid_read, 4)
    os.close(pid_read)
    if request["mode"] == ADOPT:
        os.waitpid(between, 0)
    os.close(start_write)
    connection.sendall(pid)


def _watch(command: int, connection: socket.socket) -> None:
    """Send how the command ended; end it when the client does."""

    ended = os.pidfd_open(command)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(command, signal.SIGKILL)
    _, status = os.waitpid(command, 0)
    connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))


def run_as(request: dict[str, Any], fds: Sequence[int]) -> NoReturn:
    """Become, in this fresh child, the process that executing the request's words would be, and end as it would."""
    if request["new_session"]:
        os.setsid()
    elif request["mode"] == REPORT:
        os.setpgid(0, 0)  # signals reach it through the client alone, so once
    _take_descriptors(dict(zip(request["targets"], fds, strict=True)))
    if request["worker"]:
        processes.start_server(_fork_server)
    _reset_signals()
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    _reset_interpreter(request["words"][0])
    _end_with(request["words"])


def _fork_server(listener: socket.socket, lifeline: int) -> Callable[[], object]:
    """Fork a server of this fresh process's own, which shares nothing with it but standard error."""
    pid = os.fork()
    if not pid:
        _take_descriptors(
            {fd: fd for fd in (2, listener.fileno(), lifeline)} | {0: os.open(os.devnull, os.O_RDWR), 1: 2}
        )
        serve(listener, lifeline)
    return partial(os.waitpid, pid, 0)


def _take_descriptors(wanted: dict[int, int]) -> None:
    """Let descriptors have the numbers wanted (number → descriptor), and close all others."""
    far = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, FAR) for number, fd in wanted.items()}
    for number, fd in far.items():
        os.dup2(fd, number)
    low = 3
    for number in [*sorted(number for number in far if number > 2), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(low, number)
        low = number + 1


def _reset_signals() -> None:
    """As Python starts: in the background, a shell has it ignore SIGINT, which no test expects."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _reset_interpreter(first_path: str) -> None:
    """Streams, paths and random states of a fresh interpreter; `first_path` comes first in `sys.path`."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    direct = bool(os.environ.get("PYTHONUNBUFFERED"))
    for name, fd, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        raw = io.FileIO(fd, "w", closefd=False)
        buffer: Any = raw if direct else io.BufferedWriter(raw)
        live = os.isatty(fd) or fd == 2
        setattr(sys, name, io.TextIOWrapper(buffer, "utf-8", errors, line_buffering=live, write_through=direct))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first_path, *added, *(path for path in BASE_PATH if path not in added)]
    for path in [path for path, finder in sys.path_importer_cache.items() if finder is None]:
        del sys.path_importer_cache[path]  # it may be there by now; finders see by themselves what a folder got
    if any(name.startswith("HF_") and value != BASE_ENVIRONMENT.get(name) for name, value in os.environ.items()):
        for module in [name for name in sys.modules if name.partition(".")[0] in FORGOTTEN]:
            del sys.modules[module]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    processes.install(processes.fork_here)  # those that it starts, such as ranks, are forks of itself


BASE_PATH: list[str] = []
"""`sys.path` of an interpreter without script and PYTHONPATH."""
BASE_ENVIRONMENT = dict(os.environ)


def _end_with(words: Sequence[str]) -> NoReturn:
    """Run `words`, the first of which went into `sys.path`, and end past the interpreter's tear-down, as it would."""
    code = 0
    try:
        _execute(words[1:])
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        code = (end.code or 0) if isinstance(end.code, int | None) else 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # Python's own
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _execute(words: Sequence[str]) -> None:
    kind, *rest = words
    main = sys.modules["__main__"] = ModuleType("__main__")
    if kind == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [kind, *rest]
        from mt_cli.main import main as run_mt

        sys.exit(run_mt())


def _import_without_plugins(name: str) -> None:
    """Import a module of mt; one that asks for plugins meanwhile is forgotten: which there are, each command finds."""
    from mt_core import plugins

    before = set(sys.modules)
    _import_if_installed(name)
    if plugins.manager.cache_info().currsize:
        plugins.manager.cache_clear()
        plugins.broken.clear()
        for module in sorted(sys.modules.keys() - before):
            if module.startswith("mt_"):
                del sys.modules[module]
                package, _, child = module.rpartition(".")
                if package in sys.modules:
                    vars(sys.modules[package]).pop(child, None)


def _collapse_pages() -> None:
    """Put the heap into huge pages, where Linux is 6.1 or later: a fork takes 20 ms of CPU time instead of 55."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, _, *name = line.split()
        if access == "rw-p" and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in addresses.split("-"))
            for page in range(-(-start // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE):
                madvise(page, HUGE_PAGE, MADV_COLLAPSE)  # only a hint


def _import_if_installed(name: str) -> None:
    """Import a module unless it needs a library that is not here: the command that needs it says so."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mt_"):
            raise


def main(listener: int, lifeline: int) -> None:
    """Import everything and serve the socket `listener` until `lifeline` closes; both are descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, whose end is this process's
    BASE_PATH[:] = sys.path[1:]
    sys.path.append(str(Path(__file__).parents[1]))
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                _import_without_plugins(module.name)
    for name in OTHERS:
        _import_if_installed(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"imports started threads, and a process that has some cannot be forked: {threads}"
    gc.freeze()  # collections touch no page that a child shares
    for each in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        each.atexit = False  # a third of a short command's time: it would take torch's libraries of operators apart
    _collapse_pages()
    serve(socket.socket(fileno=listener), lifeline)
