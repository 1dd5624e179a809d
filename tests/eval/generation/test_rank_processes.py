"""`--nproc` on the commands: ranks are started, share the model, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from eval.serving.serve_process import LIMIT_S, start_server, wait_for_end
from mt_cli.main import app
from mt_core.errors import MtError

SHARED = ("--device", "cpu", "--nproc", "2")


def generate(checkpoint, output, *options):
    """What `mt generate` writes, as a process of its own."""
    words = [sys.executable, "-m", "mt_cli", "generate", str(checkpoint), "--output", str(output), "--prompt", "ab"]
    words += ["--prompt", "xyz", "--max-new-tokens", "8", "--seed", "1", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in output.read_text().splitlines()]


def ask(address):
    """A greedy completion of a server."""
    import http.client

    connection = http.client.HTTPConnection(address, timeout=LIMIT_S)
    body = {"prompt": "ab", "max_tokens": 8, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def list_children(pid):
    """Processes of `mt_eval.generation.ranks.worker` whose launcher a process is."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"MT_LAUNCHER={pid}".encode() in environment and b"ranks.worker" in command:
            children.append(int(folder.name))
    return children


def test_generate_writes_what_one_process_writes(checkpoint, tmp_path):
    expected = generate(checkpoint, tmp_path / "one.jsonl", "--device", "cpu")
    for layout in ((), ("--pipeline", "2")):
        assert generate(checkpoint, tmp_path / "two.jsonl", *SHARED, *layout) == expected


def test_the_server_answers_and_ends_with_all_ranks(checkpoint):
    with start_server(checkpoint, "--device", "cpu") as server:
        status, expected = ask(server.address)
        assert status == 200
    with start_server(checkpoint, *SHARED) as server:
        status, answer = ask(server.address)
        assert (status, answer["choices"]) == (200, expected["choices"])
        children = list_children(server.process.pid)
        assert server.end() == (0, "")
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()


def test_a_rank_that_dies_ends_all_with_a_message(checkpoint):
    with start_server(checkpoint, *SHARED) as server:
        (child,) = list_children(server.process.pid)
        os.kill(child, signal.SIGKILL)
        assert wait_for_end(server.process) != 0
        assert "rank 1 of 2: was ended by signal 9" in server.process.stderr.read()


def test_ranks_end_with_the_process_that_started_them(checkpoint):
    with start_server(checkpoint, *SHARED) as server:
        (child,) = list_children(server.process.pid)
        server.process.kill()
        deadline = time.monotonic() + LIMIT_S
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists()


def test_stages_that_do_not_divide_the_ranks_are_refused(checkpoint):
    result = CliRunner().invoke(app, ["generate", str(checkpoint), "--prompt", "a", "--nproc", "2", "--pipeline", "3"])
    assert isinstance(result.exception, MtError)
    assert str(result.exception) == "--pipeline: 3; a divisor of --nproc 2; the ranks of each stage share its matrices"
