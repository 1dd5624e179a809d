"""Directories of safetensors files as Hugging Face writes them: one file, or shards with an index.

Files are memory-mapped and tensors come one at a time. Pickled weights are never opened.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mt_core.checkpoint.page_cache import drop_pages
from mt_core.errors import MtError, Problem, raise_if

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = "model-*-of-*.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """What a file's header says about one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name of the number format in safetensors: F32, BF16, …"""


class SafetensorsDir:
    """The tensors of a directory; whatever is wrong with its files is one `MtError` at construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise MtError(str(path), "no such directory", "give a directory that holds config.json and safetensors")
        self.files, named = _layout(path)
        self._entries: dict[Path, list[Entry]] = {}
        raise_if([*self._read_headers(), *self._lacking(named), *self._extra(named)])

    def _read_headers(self) -> Iterator[Problem]:
        for file in self.files:
            if not file.is_file():
                yield Problem(str(file), "missing", f"{INDEX} names it: copy it from where the checkpoint came from")
                continue
            try:
                self._entries[file] = _entries(file)
            except (SafetensorError, OSError) as err:
                yield Problem(str(file), f"truncated or not safetensors ({err})", "copy it again")

    def _lacking(self, named: Mapping[str, str]) -> Iterator[Problem]:
        for name, file in named.items():
            entries = self._entries.get(self.path / file)
            if entries is not None and all(entry.name != name for entry in entries):
                yield Problem(
                    str(self.path / file), f"has no tensor {name}", f"{INDEX} says that it has: copy both again"
                )

    def _extra(self, named: Mapping[str, str]) -> Iterator[Problem]:
        for file in sorted(self.path.glob(NUMBERED)) if named else ():
            if file.name not in named.values():
                yield Problem(str(file), f"{INDEX} does not name it", "copy both again, or remove it")

    def entries(self) -> Iterator[Entry]:
        """Name, shape and dtype of every tensor, from the headers alone."""
        for entries in self._entries.values():
            yield from entries

    def headers(self) -> Iterator[tuple[str, Tensor]]:
        """Like `tensors`, on the meta device: shapes without data."""
        for entry in self.entries():
            yield entry.name, torch.empty(entry.shape, device="meta")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and memory-mapped tensor, one at a time; each leaves memory when the next one is asked for."""
        for file, entries in self._entries.items():
            used: list[Tensor] = []
            with safe_open(file, "pt") as opened:
                for entry in entries:
                    used.append(opened.get_tensor(entry.name))
                    yield entry.name, used[-1]
                    drop_pages(*used)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a missing or malformed file is an `MtError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise MtError(str(path), "missing", "copy it from where the checkpoint came from") from err
    except ValueError as err:
        raise MtError(str(path), f"not JSON ({err})", "copy it again") from err
    if not isinstance(value, dict):
        raise MtError(str(path), "not a JSON object", "copy it again")
    return value


def _entries(file: Path) -> list[Entry]:
    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return [Entry(name, tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()]


def _layout(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and for shards which file the index says holds each tensor."""
    if (path / SINGLE).exists():
        return [path / SINGLE], {}
    if not (path / INDEX).exists():
        raise _no_weights(path)
    named = read_json(path / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise MtError(str(path / INDEX), "has no weight_map", "copy it again")
    raise_if(
        Problem(str(path / INDEX), f"puts {name} into {file!r}", "a plain file name beside the index")
        for name, file in named.items()
        if not isinstance(file, str) or Path(file).name != file
    )
    return [path / file for file in sorted(set(named.values()))], named


def _no_weights(path: Path) -> MtError:
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        problem = f"only pickled weights ({', '.join(pickled)}), which can run code when read and are not opened"
        return MtError(str(path), problem, "save it as safetensors: model.save_pretrained(directory) in transformers")
    return MtError(str(path), f"holds neither {SINGLE} nor {INDEX}", "give a directory in Hugging Face format")
