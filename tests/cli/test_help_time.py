"""`mt --help` takes hardly longer than what it cannot do without."""

import os
import sys

FLOOR = "import importlib.metadata, pluggy, typer, typer.main, rich"
"""What every command imports before it can print a help page."""
LIMIT = 1.5
"""How often the floor's processor time `mt --help` may take. One import of torch would be ten times the floor."""
RUNS = 5


def processor_seconds(*words: object) -> float:
    """CPU time of a process; unlike the time on the clock, hardly longer on a machine that others use too."""
    program, *more = map(str, words)
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(program, [program, *more], os.environ, file_actions=silent)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_help_takes_hardly_longer_than_importing_typer(mt_executable):
    """Both are the best of several runs, taken in turn under the same load; bench/command_line.py has seconds."""
    runs = [
        (processor_seconds(mt_executable, "--help"), processor_seconds(sys.executable, "-c", FLOOR))
        for _ in range(RUNS)
    ]
    mt, floor = map(min, zip(*runs, strict=True))
    assert mt <= LIMIT * floor, f"mt --help {mt:.3f} s, importing what it needs {floor:.3f} s"
