"""A file of `torch.save` written as its tensors come: each goes to disk at once, the pickle that names them last."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROTOCOL = 2
"""torch.save's; weights-only readers know no later one."""


class TorchWriter:
    """Puts tensors into a file; `close` writes the object that holds their placeholders."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = torch._C.PyTorchFileWriter(str(path))
        self.keys: dict[int, str] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Write a tensor; returns what stands for it in the object given to `close`, which takes no memory."""
        own = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        placeholder = torch.empty(own.shape, dtype=own.dtype)
        key = self.keys[placeholder.untyped_storage()._cdata] = str(len(self.keys))
        storage: Any = own.untyped_storage()
        self.file.write_record(f"data/{key}", storage, own.nbytes)
        return placeholder

    def close(self, value: Any) -> None:
        """Write `value`, whose tensors are all placeholders, and finish the file."""
        content = io.BytesIO()
        _Pickler(content, self.keys).dump(value)
        for name, record in (("data.pkl", content.getvalue()), ("byteorder", sys.byteorder.encode())):
            self.file.write_record(name, record, len(record))
        self.file.write_end_of_file()


class _Pickler(pickle.Pickler):
    """Refers to a storage by the name of its record, as torch.save does."""

    def __init__(self, file: io.BytesIO, keys: dict[int, str]) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.keys = keys

    def persistent_id(self, obj: Any) -> Any:
        """The tuple by which torch.load finds a storage; None for what is pickled as it is."""
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        storage = obj._untyped_storage
        kind = getattr(torch, obj._pickle_storage_type())
        return "storage", kind, self.keys[storage._cdata], "cpu", storage.nbytes() // obj._element_size()
