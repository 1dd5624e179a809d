"""One safetensors file: written straight from the tensors' memory and flushed to disk, read through a memory map.

Written here and not by `safetensors.save_file`: that one renames a file which only its owner can read (mode 0600) over
whatever has the name, be it a device.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mt_core.errors import MtError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 64 << 20


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous CPU tensors; a full disk is an `OSError`, as in every other write."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        _write_all(out, memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            _write_all(out, _memory(tensor))
        os.fsync(out.fileno())


def _memory(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous(), "its memory is written as it lies"
    assert tensor.device.type == "cpu", "its memory is written as it lies"
    return tensor.view(-1).view(torch.uint8).numpy().data


def _write_all(out: Any, data: memoryview) -> None:
    while data:
        data = data[out.write(data[:_CHUNK_BYTES]) :]


def flush_to_disk(file: Path) -> None:
    """Make a file's bytes durable."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def open_safetensors(file: Path) -> Any:
    """The file, memory-mapped; an `MtError` if it is not a whole safetensors file. Holds no file descriptor."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as err:
        raise MtError(str(file), f"not a whole safetensors file ({err})", "restore it, or use another step") from err
