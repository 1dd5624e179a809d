"""`mt serve` as a process, for tests of what only a whole server shows."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 300
"""For anything that a test waits for."""


@dataclass
class ServeProcess:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    ready: str
    """The line that says where it listens, and what stands before it."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code after a signal, and what it printed after the address."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, errors

    def read_memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


@contextmanager
def start_server(checkpoint: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[ServeProcess]:
    """A server on a free port, which is killed if the test does not end it."""
    words = [sys.executable, "-m", "mt_cli", "serve", str(checkpoint), "--port", "0", *options]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r" at http://[^:]+:(\d+) ", line):
                yield ServeProcess(process, int(match[1]), "".join(lines))
                break
        else:
            raise AssertionError(f"the server did not start: {''.join(lines)}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(LIMIT_S)
        process.stderr.close()


def run_client(address: str, prompts: str, *options: str, env: dict[str, str] | None = None):
    """`mt serve-client` with prompts on stdin."""
    words: Sequence[str] = [sys.executable, "-m", "mt_cli", "serve-client", address, *options]
    return subprocess.run(words, input=prompts, capture_output=True, text=True, timeout=LIMIT_S, env=env)


def wait_for_end(process: subprocess.Popen[str]) -> int:
    """Exit code of a process that ends itself."""
    end = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    return process.wait(1)
