"""Start-up time of `mt --help` against an interpreter that does nothing, best of ten of each, in turn.

usage: command_line.py
"""

import subprocess
import sys
import time
from pathlib import Path

MT = str(Path(sys.executable).with_name("mt"))


def seconds(*command: str) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


pairs = [(seconds(MT, "--help"), seconds(sys.executable, "-c", "pass")) for _ in range(10)]
mt, nothing = (min(times) for times in zip(*pairs, strict=True))
print(f"mt --help {mt * 1e3:.0f} ms, python -c pass {nothing * 1e3:.0f} ms (best of {len(pairs)})")
