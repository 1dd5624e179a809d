"""A file of `torch.save` written as its tensors come: each goes to disk at once, the pickle that names them last."""

import io
import mmap
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mt_ckpt.megatron.torch_format.zip_archive import TorchZip

PROTOCOL = 2
"""torch.save's; weights-only readers know no later one."""


class TorchWriter:
    """Puts tensors into a file; `close` writes the object that holds their placeholders, and its own small tensors."""

    def __init__(self, target: Path | IO[bytes]) -> None:
        """`target`: a file to make, or an open unbuffered one to which another is appended."""
        self.own = isinstance(target, Path)
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            target = target.open("wb", buffering=0)
        self.file, self.zip = target, TorchZip(target)
        self.start = self.zip.start
        self.keys: dict[int, str] = {}

    def add(self, *blocks: Tensor) -> Tensor:
        """Write a tensor, given whole or in blocks of its rows.

        Returns what stands for it in the object given to `close`, which takes no memory.
        """
        shape = sum(len(block) for block in blocks) if blocks[0].dim() else None
        placeholder = _untouched(blocks[0], (shape, *blocks[0].shape[1:]) if shape is not None else ())
        self._write(placeholder.untyped_storage(), [block.detach().to("cpu") for block in blocks])
        return placeholder

    def close(self, value: Any) -> int:
        """Write `value`, whose large tensors are placeholders, and finish the file; returns the bytes of it all."""
        content = io.BytesIO()
        _Pickler(content, self._key).dump(value)
        self.zip.write("data.pkl", content.getvalue())
        self.zip.write("byteorder", sys.byteorder.encode())
        size = self.zip.close()
        if self.own:
            self.file.close()
        return size

    def _key(self, storage: torch.UntypedStorage) -> str:
        if storage._cdata not in self.keys:
            self._write(storage, [torch.empty(0, dtype=torch.uint8).set_(storage)])
        return self.keys[storage._cdata]

    def _write(self, storage: torch.UntypedStorage, blocks: list[Tensor]) -> None:
        key = self.keys[storage._cdata] = str(len(self.keys))
        self.zip.write_tensor(f"data/{key}", blocks)


def _untouched(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor in pages of its own that nobody touches, so that they take no memory; torch.empty may use old ones."""
    size = torch.Size(shape).numel() * like.itemsize
    if not size:
        return torch.empty(shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Refers to a storage by the name of its record, as torch.save does."""

    def __init__(self, file: io.BytesIO, key: Callable[[torch.UntypedStorage], str]) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.key = key

    def persistent_id(self, obj: Any) -> Any:
        """The tuple by which torch.load finds a storage; None for what is pickled as it is."""
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        storage = obj._untyped_storage
        kind = getattr(torch, obj._pickle_storage_type())
        return "storage", kind, self.key(storage), "cpu", storage.nbytes() // obj._element_size()
