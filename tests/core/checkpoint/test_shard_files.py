"""Parts of a checkpoint: files of whole tensors, opened lazily, read slice by slice, told apart when damaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from mt_core.checkpoint import shard_files as parts
from mt_core.checkpoint.gather import assign_writers
from mt_core.checkpoint.safetensors_io import DTYPES, write_safetensors
from mt_core.errors import MtError

TENSORS = {
    "a.weight": torch.arange(24.0).view(4, 6),
    "b": torch.tensor(3.0, dtype=torch.float64),
    "c": torch.ones(3).bfloat16(),
    "d": torch.zeros(0, 2),
}


@pytest.fixture
def part(tmp_path):
    """Two ranks' files of one part."""
    names = list(TENSORS)
    for rank, share in enumerate((names[:1], names[1:])):
        parts.write_part(tmp_path / "model", [(n, TENSORS[n]) for n in share], f"rank-{rank:05d}-of-00002")
    return tmp_path / "model"


def test_every_tensor_is_found_over_all_files(part):
    assert [f.name for f in sorted(part.iterdir())] == [f"rank-0000{r}-of-00002-00001.safetensors" for r in (0, 1)]
    found = parts.open_part(part)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert found[name].nbytes == tensor.nbytes
        assert torch.equal(found[name][...], tensor)


def test_a_slice_of_a_stored_tensor_is_that_of_the_tensor(part):
    stored = parts.open_part(part)["a.weight"]
    for box in ((slice(1, 3), slice(2, 4)), (slice(None), slice(4, 6)), slice(2, 4), (3,)):
        assert torch.equal(stored[box], TENSORS["a.weight"][box])


def test_a_slice_is_read_without_the_rest_of_the_file(tmp_path):
    megabytes = torch.zeros(64, 1 << 18)
    parts.write_part(tmp_path, [("a", megabytes)])
    stored = parts.open_part(tmp_path)["a"]
    before = mapped_kib()
    assert stored[3:5].sum() == 0
    assert mapped_kib() - before < 8 * 1024
    stored[...].sum()
    assert mapped_kib() - before > 60 * 1024


def mapped_kib() -> int:
    """Resident memory of this process that files back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_pytorch_s_distributed_checkpoint_reads_and_reshards_several_ranks_files(part):
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        into = {
            "a.weight": DTensor.from_local(torch.zeros(4, 6), mesh, [Shard(1)]),
            "c": torch.zeros(3).bfloat16(),
        }
        state_dict_loader.load(into, storage_reader=HuggingFaceStorageReader(str(part)))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(into["a.weight"].to_local(), TENSORS["a.weight"])
    assert torch.equal(into["c"], TENSORS["c"])


def test_other_programs_read_the_files_with_every_dtype(tmp_path):
    tensors = {name: torch.arange(3).to(dtype) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"made": "here"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_whoever_may_read_other_files_may_read_these(tmp_path):
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_large_parts_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SHARD_BYTES", 16)
    assert sorted(parts.write_part(tmp_path / "model", TENSORS.items())) == list(TENSORS)
    assert len(list((tmp_path / "model").iterdir())) == 2
    stored = parts.check_names(tmp_path / "model", {name: tuple(t.shape) for name, t in TENSORS.items()})
    assert all(torch.equal(stored[name][...], t) for name, t in TENSORS.items())


def test_other_names_and_shapes_are_all_told(part):
    with pytest.raises(MtError) as caught:
        parts.check_names(part, {"a.weight": (6, 4), "b": (), "c": (3,), "e": (1,)})
    for expected in ("e missing", "d unexpected", "a.weight has shape [4, 6], expected [6, 4]"):
        assert expected in str(caught.value)


def test_a_tensor_in_two_files_is_refused(part):
    parts.write_part(part, [("b", TENSORS["b"])], "rank-00002-of-00002")
    with pytest.raises(MtError, match=r"rank-00002.*: b is also in rank-00001-of-00002-00001.safetensors; keep one"):
        parts.open_part(part)


def test_a_truncated_file_is_told_by_name(part):
    file = sorted(part.iterdir())[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MtError, match=f"{file.name}: not a whole safetensors file .*; restore it, or use another step"):
        parts.open_part(part)


def test_owners_write_about_equal_bytes():
    nbytes = {f"layers.{n}.{kind}": size for n in range(8) for kind, size in (("q", 16), ("k", 4), ("gate", 56))}
    nbytes["embed"] = 500
    writers = assign_writers(nbytes, lambda name: range(4))
    loads = [sum(nbytes[name] for name, owner in writers.items() if owner == rank) for rank in range(4)]
    assert max(loads) == 500  # the embedding alone
    assert max(sorted(loads)[:3]) - min(loads) <= 8
    assert writers == assign_writers(dict(reversed(nbytes.items())), lambda name: range(4))


def test_an_owner_is_one_of_the_tensor_s_ranks():
    stages = {"layers.0.q": (0, 1), "layers.1.q": (2, 3), "layers.1.k": (2, 3)}
    writers = assign_writers(dict.fromkeys(stages, 8), stages.__getitem__)
    assert writers == {"layers.0.q": 0, "layers.1.k": 2, "layers.1.q": 3}
