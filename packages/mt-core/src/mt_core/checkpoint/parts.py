"""One part (`model` or `optim`) of a checkpoint: a directory of safetensors files that PyTorch's DCP can read.

Each file's header carries DCP's sharding record, so `torch.distributed.checkpoint` reshards it on load, while every
safetensors reader sees plain tensors. Nothing is pickled.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mt_core.errors import MtError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}

SHARD_BYTES = 2 << 30
"""A file is closed when it reaches this size, which also bounds the memory of a streamed write."""


def write_part(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors, one at a time from the iterable, into `directory`; names must be unique."""
    directory.mkdir(parents=True)
    pending: dict[str, Tensor] = {}
    shard, size, seen = 1, 0, set()
    for name, tensor in tensors:
        assert name not in seen, f"{name} written twice"
        seen.add(name)
        pending[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            _write_file(directory, shard, pending)
            pending, shard, size = {}, shard + 1, 0
    if pending or shard == 1:
        _write_file(directory, shard, pending)


def _write_file(directory: Path, shard: int, tensors: Mapping[str, Tensor]) -> None:
    record = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    metadata = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(record)}
    write_safetensors(directory / f"shard-{shard:05d}.safetensors", tensors, metadata)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file of CPU tensors; a full disk is an `OSError`, as in every other write."""
    try:
        save_file(dict(tensors), file, {"format": "pt", **(metadata or {})})
    except SafetensorError as err:
        if found := re.search(r"os error (\d+)", str(err)):
            raise OSError(int(found[1]), str(err)) from err
        raise


def stream_part(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one at a time, memory-mapped."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, tensors.get_tensor(name)


def empty_tensors(directory: Path) -> dict[str, Tensor]:
    """Uninitialised tensors with the names, shapes and dtypes that the files' headers give."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()])
    return found


def load_part(directory: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the given tensors in place, through DCP; one `MtError` if names or shapes differ from the files'."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    check_names(directory, {name: tuple(t.shape) for name, t in into.items()})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(into), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


def check_names(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse, naming everything at once, files whose tensors are not exactly the expected ones."""
    found = {name: tuple(tensor.shape) for name, tensor in empty_tensors(directory).items()}
    wrong = [f"{name} missing" for name in expected if name not in found]
    wrong += [f"{name} unexpected" for name in found if name not in expected]
    wrong += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        raise MtError(str(directory), f"does not fit this model: {'; '.join(wrong)}", "use the run's own configuration")
