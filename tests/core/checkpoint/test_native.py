"""The native format: committed last, checked on reading, readable by PyTorch's DCP, nothing pickled."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from mt_core.checkpoint import native
from mt_core.errors import MtError

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3.0, dtype=torch.float64),
    "c": torch.ones(2).bfloat16(),
}


@pytest.fixture
def step(tmp_path):
    path = native.step_directory(tmp_path / "run", 7)
    tokenizer = tmp_path / "vocab.json"
    tokenizer.write_text("{}")
    meta = {"step": 7, "samples": 70, "tokens": 700, "config": {}}
    native.write(path, {"model": TENSORS.items()}, meta, [tokenizer])
    return path


def test_what_is_written_is_read_back_bit_for_bit(step):
    found = dict(native.stream(step))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())
    assert native.read_meta(step)["samples"] == 70
    assert [f.name for f in native.tokenizer_files(step)] == ["vocab.json"]


def test_pytorch_s_distributed_checkpoint_reads_it(step):
    into = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    reader = HuggingFaceStorageReader(str(step / "model"))
    state_dict_loader.load(into, storage_reader=reader, no_dist=True)
    assert all(torch.equal(into[n], t) for n, t in TENSORS.items())


def test_a_run_directory_resolves_to_its_latest_committed_step(step):
    later = native.step_directory(step.parent, 9)
    native.write(later, {"model": TENSORS.items()}, {"step": 9})
    assert native.resolve(step.parent) == later
    (later / native.COMMITTED).unlink()
    assert native.resolve(step.parent) == step


def test_a_step_without_its_mark_is_refused(step):
    (step / native.COMMITTED).unlink()
    with pytest.raises(MtError, match="no COMMITTED mark"):
        native.resolve(step)
    with pytest.raises(MtError, match=r"no committed checkpoint \(unfinished: step-00000007\)"):
        native.resolve(step.parent)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(MtError, match="no checkpoint; give a run directory"):
        native.resolve(tmp_path)


def test_missing_and_truncated_shards_are_all_named(step):
    shard = next((step / "model").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    (step / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(MtError) as caught:
        native.read_meta(step)
    assert f"{shard}: {shard.stat().st_size} bytes; it was written with {shard.stat().st_size + 1}" in str(caught.value)
    assert "vocab.json: missing" in str(caught.value)


def test_a_step_whose_meta_is_lost_is_refused(step):
    (step / native.META).unlink()
    with pytest.raises(MtError, match=r"meta.json: missing; restore it, or use another step"):
        dict(native.stream(step))


def test_meta_that_is_damaged_or_newer_is_refused(step):
    meta = json.loads((step / native.META).read_text())
    (step / native.META).write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(MtError, match="format 99; this version reads formats 1 and 2: update mt"):
        native.read_meta(step)
    (step / native.META).write_text("{")
    with pytest.raises(MtError, match="not JSON"):
        native.read_meta(step)


def test_an_unfinished_step_is_written_again(step):
    (step / native.COMMITTED).unlink()
    native.write(step, {"model": TENSORS.items()}, {"step": 7})
    assert native.resolve(step) == step


def test_a_committed_step_is_never_overwritten(step):
    with pytest.raises(MtError, match="already exists"):
        native.write(step, {"model": TENSORS.items()}, {"step": 7})


def test_a_tensor_that_fails_midway_leaves_no_step(tmp_path):
    def tensors():
        yield "a", torch.zeros(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        native.write(tmp_path / "step-00000001", {"model": tensors()}, {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_newest(step):
    for number in (8, 9):
        native.write(native.step_directory(step.parent, number), {"model": TENSORS.items()}, {"step": number})
    native.prune(step.parent, 2)
    assert [p.name for p in native.steps(step.parent)] == ["step-00000008", "step-00000009"]


def test_a_step_that_is_read_is_not_pruned(step):
    native.write(native.step_directory(step.parent, 8), {"model": TENSORS.items()}, {"step": 8})
    read = native.stream(step)
    next(read)
    native.prune(step.parent, 1)
    assert step in native.steps(step.parent)
    assert len(list(read)) == len(TENSORS) - 1
    native.prune(step.parent, 1)
    assert step not in native.steps(step.parent)


def test_a_step_that_was_pruned_before_it_is_read_is_told(step):
    (step / native.COMMITTED).unlink()
    with pytest.raises(MtError, match="step-00000007: is no longer there: it was pruned; use a later step"):
        dict(native.stream(step))


def test_a_checkpoint_of_format_1_is_read(tmp_path):
    step = native.step_directory(tmp_path, 3)
    (step / "model").mkdir(parents=True)
    shard = step / "model" / "shard-00001.safetensors"
    record = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in TENSORS.items()}
    save_file(TENSORS, shard, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(record)})
    files = {"model/shard-00001.safetensors": shard.stat().st_size}
    (step / native.META).write_text(json.dumps({"format": 1, "step": 3, "files": files}))
    (step / native.COMMITTED).touch()
    found = dict(native.stream(native.resolve(tmp_path)))
    assert all(torch.equal(found[n], t) for n, t in TENSORS.items())


def test_a_full_disk_leaves_the_last_checkpoint_and_one_clear_line(small_disk):
    native.write(native.step_directory(small_disk, 1), {"model": [("a", torch.zeros(1000))]}, {"step": 1})
    big = [("a", torch.zeros(5_000_000))]
    with pytest.raises(MtError, match="the disk is full; free some space"):
        native.write(native.step_directory(small_disk, 2), {"model": big}, {"step": 2})
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    assert native.resolve(small_disk).name == "step-00000001"
