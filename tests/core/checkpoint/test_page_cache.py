"""Used tensors of a mapped file leave memory; everything else stays what it is."""

from pathlib import Path

import torch

from mt_core.checkpoint.page_cache import drop_pages
from mt_core.checkpoint.safetensors_io import open_safetensors, write_safetensors

SIZE = 4 << 20


def file_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def test_pages_of_a_file_leave_memory_and_come_again(tmp_path):
    names = ["a", "b", "c"]
    write_safetensors(tmp_path / "x", {name: torch.ones(SIZE) for name in names})
    opened = open_safetensors(tmp_path / "x")
    tensors = [opened.get_tensor(name) for name in names]
    assert sum(tensor.sum() for tensor in tensors) == 3 * SIZE
    before = file_pages()
    drop_pages(tensors[0], tensors[2])
    assert before - file_pages() > 11 * SIZE  # and so does what lies between
    assert tensors[1].sum() == SIZE


def test_other_memory_is_left_alone(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(SIZE), "empty": torch.ones(0)})
    opened = open_safetensors(tmp_path / "x")
    mine, mapped = torch.ones(SIZE), opened.get_tensor("a")
    drop_pages(mine)
    drop_pages(mapped, mine)
    drop_pages(mapped, opened.get_tensor("empty"))
    drop_pages(torch.ones(0))
    assert mine.sum() == mapped.sum() == SIZE
