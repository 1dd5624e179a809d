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

from mt_ckpt.megatron.torch_zip import TorchZip

PROTOCOL = 2
"""torch.save's; weights-only readers know no later one."""


class TorchWriter:
    """Puts tensors into a file; `close` writes the object that holds their placeholders, and its own small tensors."""

    def __init__(self, target: Path | IO[bytes]) -> None:
        """`target`: a file to make, or an open one to which another is appended."""
        self.own = isinstance(target, Path)
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            target = target.open("wb")
        self.file, self.zip = target, TorchZip(target)
        self.keys: dict[int, str] = {}

    def add(self, tensor: Tensor, *, flat: bool = False) -> Tensor:
        """Write a tensor; returns what stands for it in the object given to `close`, which takes no memory.

        With `flat`, its first two dims are stored as one.
        """
        placeholder = _untouched(tensor).flatten(0, 1) if flat else _untouched(tensor)
        key = self.keys[placeholder.untyped_storage()._cdata] = str(len(self.keys))
        self.zip.write(f"data/{key}", tensor.detach().to("cpu"))
        return placeholder

    def close(self, value: Any) -> None:
        """Write `value`, whose large tensors are placeholders, and finish the file."""
        content = io.BytesIO()
        _Pickler(content, self._key).dump(value)
        self.zip.write("data.pkl", content.getvalue())
        self.zip.write("byteorder", sys.byteorder.encode())
        self.zip.close()
        if self.own:
            self.file.close()

    def _key(self, storage: torch.UntypedStorage) -> str:
        if storage._cdata not in self.keys:
            key = self.keys[storage._cdata] = str(len(self.keys))
            self.zip.write(f"data/{key}", torch.empty(0, dtype=torch.uint8).set_(storage))
        return self.keys[storage._cdata]


def _untouched(like: Tensor) -> Tensor:
    """A tensor in pages of its own that nobody touches, so that they take no memory; torch.empty may use old ones."""
    if not like.nbytes:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, like.nbytes), dtype=like.dtype).view(like.shape)


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
