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

Header = dict[str, dict[str, Any]]
"""Name of a tensor → dtype, shape, and where in the file's data it begins and ends."""


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous CPU tensors; a full disk is an `OSError`, as in every other write."""
    text = header_text(build_header(tensors), metadata or {})
    with file.open("wb", buffering=0) as out:
        write_all(out, memoryview(text))
        write_tensors(out, tensors)
        os.fsync(out.fileno())


def build_header(tensors: Mapping[str, Tensor], offset: int = 0) -> Header:
    """What a file's header says of tensors that `write_tensors` writes; `offset` bytes of others come before."""
    header: Header = {}
    for name, tensor in _ordered(tensors):
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.nbytes],
        }
    return header


def header_text(header: Header, metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The beginning of a file up to its first tensor: `room` bytes where given, or as many as it takes."""
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **header}).encode()
    text += b" " * (room - 8 - len(text) if room else -len(text) % 8)
    assert not room or len(text) + 8 == room, "the header outgrew its room"
    return len(text).to_bytes(8, "little") + text


def write_tensors(out: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous CPU tensors from their memory, in the order that `build_header` tells."""
    for _, tensor in _ordered(tensors):
        write_all(out, _memory(tensor))


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The widest numbers first, so that every tensor is aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))


def _memory(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous(), "its memory is written as it lies"
    assert tensor.device.type == "cpu", "its memory is written as it lies"
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_all(out: Any, data: memoryview) -> None:
    """Write all of it: one call of the kernel may take less."""
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
