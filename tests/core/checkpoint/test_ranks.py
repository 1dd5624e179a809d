"""Many ranks write one step directory through files alone: together, or not at all, and the failed rank is named."""

import json
import resource
import threading

import pytest
import torch

from mt_core.checkpoint import commit_protocol as protocol
from mt_core.checkpoint import native
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.checkpoint.step_writer import WriteResult, write
from mt_core.errors import MtError
from mt_core.verification.ranks import run_ranks


def tensor(rank: int, value: float = 0.0, size: int = 1000) -> list[tuple[str, torch.Tensor]]:
    """What rank `rank` owns."""
    return [(f"layers.{rank}.weight", torch.full((size,), rank + value))]


def write_as(axis, run, step, limit=None, timeout_s=30.0) -> WriteResult | str:
    """Write as one of an axis' ranks; `limit` is the largest file of the last rank."""
    if limit is not None and axis.rank == axis.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ranks = Ranks(axis.rank, axis.size, "one", timeout_s)
    parts = {"model": tensor(axis.rank, step), "optim": tensor(axis.rank, step, 100_000)}
    try:
        return write(native.step_directory(run, step), parts, {"step": step, "of": axis.rank}, ranks=ranks)
    except MtError as err:
        return str(err)


def write_alone(run, step):
    """One committed checkpoint of one rank."""
    native.write(native.step_directory(run, step), {"model": tensor(0, step)}, {"step": step})


def check(run, step):
    """The latest checkpoint is this step's, whole."""
    found = native.resolve(run)
    assert native.read_meta(found)["step"] == step
    for name, value in native.stream(found):
        assert torch.equal(value, torch.full_like(value, int(name.split(".")[1]) + step))


def test_four_ranks_write_one_checkpoint(tmp_path):
    written = run_ranks(4, write_as, tmp_path, 5)
    step = native.resolve(tmp_path)
    assert sorted(f.name for f in step.iterdir()) == ["COMMITTED", "meta.json", "model", "optim"]
    assert len(list((step / "model").iterdir())) == 4
    assert {name for name, _ in native.stream(step, "optim")} == {f"layers.{rank}.weight" for rank in range(4)}
    assert native.read_meta(step)["of"] == 0
    check(tmp_path, 5)
    assert all(w.rank_bytes > 404_000 and w.write_s > 0 for w in written)
    assert written[0].total_bytes == sum(w.rank_bytes for w in written)
    assert [p.name for p in tmp_path.iterdir()] == [step.name]


def test_a_rank_whose_disk_is_full_is_named_by_the_first(tmp_path):
    write_alone(tmp_path, 1)
    errors = run_ranks(3, write_as, tmp_path, 2, 4096 * 10)
    full = f"{native.step_directory(tmp_path, 2)} (rank 2 of 3): the disk is full; free some space and run again"
    assert full in errors[0]
    assert full in errors[2]
    assert "(rank 1 of 3): was given up because another rank failed; rank 0 says why" in errors[1]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    check(tmp_path, 1)


def in_threads(*calls):
    """Results of calls made at the same time, exceptions among them."""
    results = [None] * len(calls)

    def run(index, call):
        try:
            results[index] = call()
        except Exception as err:
            results[index] = err

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def failing():
    """A generator of tensors that breaks."""
    yield "a", torch.zeros(1)
    raise ZeroDivisionError("too bad")


def test_a_bug_on_another_rank_is_named_by_the_first_and_raised_there(tmp_path):
    path = native.step_directory(tmp_path, 2)
    first, second = in_threads(
        lambda: write(path, {"model": tensor(0)}, {}, ranks=Ranks(0, 2)),
        lambda: write(path, {"model": failing()}, {}, ranks=Ranks(1, 2)),
    )
    assert str(first) == f"{path} (rank 1 of 2): ZeroDivisionError: too bad; nothing was committed"
    assert isinstance(second, ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_first_rank_frees_the_others(tmp_path):
    path = native.step_directory(tmp_path, 2)
    both_write = threading.Barrier(2)

    def when_both_write(tensors):
        both_write.wait()
        yield from tensors

    first, second = in_threads(
        lambda: write(path, {"model": when_both_write(failing())}, {}, ranks=Ranks(0, 2)),
        lambda: write(path, {"model": when_both_write(tensor(1))}, {}, ranks=Ranks(1, 2)),
    )
    assert isinstance(first, ZeroDivisionError)
    assert str(second) == f"{path} (rank 1 of 2): was given up because another rank failed; rank 0 says why"
    assert list(tmp_path.iterdir()) == []


def test_the_first_rank_names_those_that_never_report(tmp_path):
    path = native.step_directory(tmp_path, 2)
    with pytest.raises(MtError, match=r"ranks that have not finished: 1, 2; nothing has been written for 0.2 s"):
        write(path, {"model": tensor(0)}, {}, ranks=Ranks(0, 3, timeout_s=0.2))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_finds_no_directory_says_what_to_check(tmp_path):
    path = native.step_directory(tmp_path, 2)
    with pytest.raises(MtError, match=r"\(rank 1 of 2\): rank 0 has not begun this checkpoint in 0.2 s; is rank 0"):
        write(path, {"model": tensor(1)}, {}, ranks=Ranks(1, 2, timeout_s=0.2))


def test_a_rank_does_not_wait_for_ever_for_the_commit(tmp_path):
    path = native.step_directory(tmp_path, 2)
    protocol.begin(path, Ranks(0, 2))
    with pytest.raises(MtError, match="rank 0 has not committed it, and nothing has been written for 0.2 s"):
        write(path, {"model": tensor(1)}, {}, ranks=Ranks(1, 2, timeout_s=0.2))


def test_a_rank_does_not_write_into_what_an_earlier_session_left(tmp_path):
    path = native.step_directory(tmp_path, 2)
    protocol.begin(path, Ranks(0, 2, "yesterday"))
    with pytest.raises(MtError, match="rank 0 has not begun"):
        write(path, {"model": tensor(1)}, {}, ranks=Ranks(1, 2, "today", timeout_s=0.2))


def begun(path):
    protocol.begin(path, Ranks())


def reported(path):
    temporary = protocol.begin(path, Ranks())
    (temporary / "model").mkdir()
    protocol.report_done(temporary, Ranks(), [], [])


def renamed(path):
    reported(path)
    protocol.temporary_directory(path).rename(path)


def described(path):
    write_alone(path.parent, 2)
    (path / native.COMMITTED).unlink()


@pytest.mark.parametrize("killed", [begun, reported, renamed, described])
def test_what_a_killed_run_left_is_no_checkpoint_and_is_cleared_by_the_next(tmp_path, killed):
    write_alone(tmp_path, 1)
    killed(native.step_directory(tmp_path, 2))
    (tmp_path / ".step-00000009.tmp").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    check(tmp_path, 1)
    run_ranks(2, write_as, tmp_path, 2)
    check(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_unfinished_directories_are_shown_when_there_is_no_checkpoint(tmp_path):
    begun(native.step_directory(tmp_path, 2))
    with pytest.raises(MtError, match=r"no committed checkpoint \(unfinished: .step-00000002.tmp\)"):
        native.resolve(tmp_path)


def test_a_tensor_with_two_owners_is_never_committed(tmp_path):
    path = native.step_directory(tmp_path, 2)
    first, _ = in_threads(
        lambda: write(path, {"model": tensor(0)}, {}, ranks=Ranks(0, 2)),
        lambda: write(path, {"model": tensor(0)}, {}, ranks=Ranks(1, 2)),
    )
    assert isinstance(first, AssertionError)
    assert "layers.0.weight" in str(first)
    assert list(tmp_path.iterdir()) == []


def test_all_files_are_listed_with_their_sizes(tmp_path):
    run_ranks(2, write_as, tmp_path, 5)
    step = native.resolve(tmp_path)
    listed = json.loads((step / native.META).read_text())["files"]
    sizes = {str(f.relative_to(step)): f.stat().st_size for f in step.glob("*/*")}
    assert listed == sizes
    assert "model/rank-00001-of-00002-00001.safetensors" in listed
