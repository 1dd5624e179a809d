"""`mt` for scripts under test: has the server (`server.py`) run the command, with everything that this process has.

Starts in hundredths of a second, so it imports next to nothing. Signals go on to the command, and its end is this
process's end.
"""

import _socket
import marshal
import os
import signal
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

environment = dict(os.environ)
mask = os.umask(0)
os.umask(mask)
words = [os.path.dirname(sys.argv[0]), *sys.argv]
body = marshal.dumps(
    {
        "mode": "report",
        "words": words,
        "worker": False,
        "env": environment,
        "cwd": os.getcwd(),
        "umask": mask,
        "new_session": False,
        "targets": [0, 1, 2],
    }
)
server = _socket.socket(_socket.AF_UNIX)
server.connect(environment["MT_TEST_SERVER"])
handed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2))
length = len(body).to_bytes(4, sys.byteorder)
server.sendmsg([length], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, handed)])
server.sendall(body)
pid = int.from_bytes(server.recv(4), sys.byteorder)
for number in FORWARDED:
    signal.signal(number, lambda number, _frame: os.kill(pid, number))
code = int.from_bytes(server.recv(4), sys.byteorder, signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
