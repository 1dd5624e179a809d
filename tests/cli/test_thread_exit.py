"""The threads of a run at the end of its process, on every way out: an interpreter that ends beside them aborts."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mt_core.checkpoint import native

SCRIPT = '''
"""Runs each case in a fork, so that torch is imported once, and prints how it ended."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from mt_core.checkpoint import async_save
from mt_core.checkpoint.step_writer import WriteResult, write
from mt_data.batching.loading import read_ahead

torch.set_num_threads(1)


def use_torch(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.ones(200, 200) @ torch.ones(200, 200)


class SlowlyFreed(WriteResult):
    """Keeps the thread inside torch after it has reported, as freeing large copies does."""

    def __del__(self):
        use_torch(0.5)


def write_slowly(*args, **options):
    done = write(*args, **options)
    return SlowlyFreed(done.rank_bytes, done.total_bytes, done.write_s, done.commit_s)


async_save.write = write_slowly


def save(case):
    writer = async_save.AsyncWriter(Path(sys.argv[1]) / case)
    writer.save(1, {"model": [("w", torch.ones(3))], "optim": []}, {"step": 1})
    return writer


def end(case):
    save(case).wait()


def fail(case):
    save(case)
    raise RuntimeError("in the loop")


def leave(case):
    save(case)
    sys.exit(3)


def interrupt(case):
    save(case)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def prefetch(case):
    global batches  # as a traceback holds it
    batches = read_ahead(iter(lambda: use_torch(0.2), 1), 2)
    next(batches)


codes = {}
for case in (end, fail, leave, interrupt, prefetch):
    if (pid := os.fork()) == 0:
        case(case.__name__)
        break
    codes[case.__name__] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
else:
    print(json.dumps(codes))
'''


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Where the cases saved, and their exit codes."""
    folder = tmp_path_factory.mktemp("cases")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=120)
    assert "terminate called" not in done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code"), [("end", 0), ("fail", 1), ("leave", 3), ("interrupt", -signal.SIGINT), ("prefetch", 0)]
)
def test_a_process_ends_with_its_own_code_and_not_by_abort(ended, case, code):
    folder, codes = ended
    assert codes[case] == code
    assert case == "prefetch" or native.steps(folder / case), "what was being saved is committed"
