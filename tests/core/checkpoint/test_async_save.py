"""Saves behind the training's back: one in flight, failures told, and a kill at any moment costs no commit."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from mt_core.checkpoint import native
from mt_core.checkpoint.async_save import AsyncWriter, HostCopier
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.errors import MtError


def parts(value: float, rank: int = 0, size: int = 1000):
    """One tensor a part, filled with `value`."""
    return {part: [(f"{rank}.weight", torch.full((size,), float(value)))] for part in ("model", "optim")}


def finish(writer: AsyncWriter):
    """Poll as a training loop does."""
    while (saved := writer.poll()) is None:
        time.sleep(0.001)
    return saved


def check(run, step=None):
    """The latest checkpoint is whole, all its numbers are the step's; returns the step."""
    found = native.resolve(run)
    number = native.read_meta(found)["step"]
    assert step in (None, number)
    for part in ("model", "optim"):
        assert all((value == number).all() for _, value in native.stream(found, part))
    return number


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    writer, weight = AsyncWriter(tmp_path), torch.full((100, 100), 3.0)
    assert writer.save(3, {"model": [("w", weight.t())], "optim": []}, {"step": 3}) is None
    weight.fill_(4)  # the next step of training
    saved = finish(writer)
    assert (saved.step, saved.path) == (3, native.step_directory(tmp_path, 3))
    assert saved.total_bytes == saved.rank_bytes > 40_000
    assert min(saved.pause_s, saved.write_s, saved.commit_s) > 0
    check(tmp_path, 3)
    assert writer.poll() is None
    assert writer.wait() is None


def test_a_checkpoint_is_committed_when_every_rank_has_written(tmp_path):
    first, second = (AsyncWriter(tmp_path, Ranks(rank, 2, "s")) for rank in (0, 1))
    first.save(1, parts(1, 0), {"step": 1})
    time.sleep(0.1)
    assert first.poll() is None
    assert native.steps(tmp_path) == []
    second.save(1, parts(1, 1), {})
    assert finish(first).total_bytes > finish(second).rank_bytes
    check(tmp_path, 1)


def test_a_second_save_waits_for_the_first_and_says_so(tmp_path, capsys):
    first, second = (AsyncWriter(tmp_path, Ranks(rank, 2, "s")) for rank in (0, 1))
    first.save(1, parts(1, 0), {"step": 1})
    late = threading.Timer(0.2, second.save, (1, parts(1, 1), {}))
    late.start()
    assert first.save(2, parts(2, 0), {"step": 2}).step == 1
    late.join()
    check(tmp_path, 1)
    assert second.save(2, parts(2, 1), {}).step == 1
    assert capsys.readouterr().err == "mt: the checkpoint of step 1 is still being written; step 2 waits for it\n"
    assert first.wait().waited_s >= 0.1
    second.wait()
    check(tmp_path, 2)


def test_the_newest_are_kept(tmp_path):
    writer = AsyncWriter(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.save(step, parts(step), {"step": step})
        writer.wait()
    assert [p.name for p in native.steps(tmp_path)] == ["step-00000002", "step-00000003"]


def test_the_tokenizer_travels(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    writer = AsyncWriter(tmp_path / "run", tokenizer_files=[tmp_path / "vocab.json"])
    writer.save(1, parts(1), {"step": 1})
    assert [f.name for f in native.tokenizer_files(writer.wait().path)] == ["vocab.json"]


def test_a_step_that_is_committed_is_not_saved_again(tmp_path):
    writer = AsyncWriter(tmp_path)
    writer.save(1, parts(1), {"step": 1})
    writer.wait()
    with pytest.raises(MtError, match="step-00000001: already exists"):
        writer.save(1, parts(1), {"step": 1})


def test_a_full_disk_in_the_background_is_told_at_a_later_step(small_disk):
    writer = AsyncWriter(small_disk)
    writer.save(1, parts(1), {"step": 1})
    writer.wait()
    writer.save(2, parts(2, size=3_000_000), {"step": 2})
    with pytest.raises(MtError, match="step-00000002: the disk is full; free some space and run again; nothing was"):
        finish(writer)
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    check(small_disk, 1)
    writer.save(3, parts(3), {"step": 3})  # there is room again
    writer.wait()
    check(small_disk, 3)


def train(run, rank, size, session):
    """Steps without end from the last committed one, each saved while the next is computed."""
    torch.set_num_threads(1)
    writer = AsyncWriter(run, Ranks(rank, size, session), keep=2)
    step = check(run) if native.steps(run) else 0
    while True:
        step += 1
        writer.save(step, parts(step, rank, 500_000), {"step": step})


def begun(run):
    return list(run.glob(".step-*"))


def written(run):
    return list(run.glob(".step-*/*/*.safetensors"))


def committed(run):
    return native.steps(run)


def test_ranks_killed_at_any_moment_leave_the_last_checkpoint_whole(tmp_path):
    """Killed in a save that has begun, in one with files, and between saves, each time going on from the last."""
    context = multiprocessing.get_context("forkserver")
    reached = 0
    for session, moment in enumerate((begun, written, committed)):
        ranks = [context.Process(target=train, args=(tmp_path, rank, 2, str(session))) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        wait_for_a_step_after(tmp_path, reached)
        stop_while(moment, tmp_path, ranks)
        for rank in ranks if session % 2 else reversed(ranks):
            rank.kill()
        for rank in ranks:
            rank.join()
        assert moment(tmp_path)
        now = check(tmp_path)
        assert now > reached
        reached = now


def stop_while(moment, run, ranks):
    """Stop all ranks when `moment` is there, and still is when they have stopped."""
    deadline = time.monotonic() + 60
    while True:
        while not moment(run):
            assert time.monotonic() < deadline, f"never {moment.__name__}"
        for rank in ranks:
            os.kill(rank.pid, signal.SIGSTOP)
        time.sleep(0.01)
        if moment(run):
            return
        for rank in ranks:
            os.kill(rank.pid, signal.SIGCONT)


def wait_for_a_step_after(run, step):
    """Until a later checkpoint is committed."""
    deadline = time.monotonic() + 60
    while not any(int(path.name[5:]) > step for path in native.steps(run)):
        assert time.monotonic() < deadline, f"no checkpoint after step {step}"
        time.sleep(0.002)


def test_a_process_that_ends_without_waiting_does_not_hang(tmp_path):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=leave_at_once, args=(tmp_path,))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 0
    assert native.steps(tmp_path) == []


def leave_at_once(run):
    """Save as one of two ranks, of which the other never comes."""
    AsyncWriter(run, Ranks(0, 2)).save(1, parts(1), {"step": 1})
    sys.exit(0)


@pytest.mark.gpu
def test_copies_from_a_gpu_are_those_of_the_moment_they_were_asked_for(tmp_path):
    writer, weight = AsyncWriter(tmp_path), torch.zeros(4096, 4096, device="cuda")
    for step in (1, 2, 3):
        weight.fill_(step)
        views = [("w", weight), ("t", weight.t()[:7]), ("half", weight[:5].bfloat16())]
        writer.save(step, {"model": views, "optim": [("s", weight[0, 0])]}, {"step": step})
        weight.fill_(-1)  # the next step of training
        assert writer.wait().pause_s > 0
        check(tmp_path, step)


@pytest.mark.gpu
def test_page_locked_memory_is_used_again_by_the_next_save():
    copies, tensors = HostCopier(), [(f"{n}", torch.ones(1000 + n, device="cuda")) for n in range(5)]
    copies.pinned.reserve(1 << 20)
    first, second = (copies.take({"model": tensors}).parts["model"] for _ in range(2))
    assert [t.data_ptr() for _, t in first] == [t.data_ptr() for _, t in second]
    assert all(t.is_pinned() for _, t in first)
    assert len(copies.pinned.slabs) == 1
