"""Meta's consolidated files: as many as there were tensor ranks, each with that rank's share of every tensor."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.errors import MtError, Problem, raise_if

FILES = ("consolidated.*.pth", "consolidated*.safetensors")
Shard = Mapping[str, Tensor]
"""What one file holds."""


def open_shards(path: Path) -> list[Shard]:
    """The files' tensors, memory-mapped, by rank; `MtError` if files are missing or do not go together."""
    shards = [_opened(file) for file in shard_files(path)]
    raise_if(_unlike(shards, str(path)))
    return shards


def shard_files(path: Path) -> list[Path]:
    """The consolidated files in the order of their ranks; all from 0 to the last must be there."""
    kinds = [files for pattern in FILES if (files := sorted(path.glob(pattern)))]
    if not kinds:
        raise MtError(str(path), f"holds no {' or '.join(FILES)}", "copy them from where the checkpoint came from")
    if len(kinds) > 1:
        names = ", ".join(file.name for files in kinds for file in files)
        raise MtError(str(path), f"holds its weights twice ({names})", "remove either kind")
    numbers = [int(number[1]) if (number := re.search(r"\.(\d+)\.", file.name)) else 0 for file in kinds[0]]
    raise_if(
        Problem(str(kinds[0][0].with_name(f"consolidated.{n:02d}{kinds[0][0].suffix}")), "missing", "copy it")
        for n in range(max(numbers))
        if n not in numbers
    )
    return kinds[0]


def _opened(file: Path) -> Shard:
    """A file's tensors, memory-mapped."""
    if file.suffix == ".pth":
        contents: Any = safe_unpickle.read(file)
        if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
            raise MtError(str(file), "does not hold tensors by name", "give Meta's own files")
        return contents
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as err:
        raise MtError(str(file), f"truncated or not safetensors ({err})", "copy it again") from None


def _unlike(shards: Sequence[Shard], where: str) -> Iterator[Problem]:
    """Files that do not go together."""
    first = {name: tensor.shape for name, tensor in shards[0].items()}
    for number, shard in enumerate(shards):
        for name in sorted(first.keys() ^ shard.keys()):
            difference = f"file {number} {'lacks' if name in first else 'alone has'} {name}"
            yield Problem(where, difference, "copy the files of one model")
        for name in first.keys() & shard.keys():
            if shard[name].shape != first[name]:
                difference = f"{name} has shape {tuple(first[name])} in file 0, {tuple(shard[name].shape)} in {number}"
                yield Problem(where, difference, "copy the files of one model")
