"""The unfinished output of a job: append-only files that can be cut back to where a journal last saw them.

For each key and partition there are the tokens, the length of every sequence and the sequences of every document.
`seal` makes a `.bin` and an `.idx` of them, still in the job's own folder.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from mt_core.files import disk_errors
from mt_data.indexed.writer import IndexContents, write_index
from mt_data.preprocess.encoding import EncodedKey

BLOCK_ENTRIES = 1 << 20
COUNT = np.dtype("<i4")
FILE_KINDS = ("tokens", "lengths", "counts")


class OutputFiles:
    """The files of one key; document n goes to partition n modulo `partitions`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, partitions: int = 1) -> None:
        self._folder, self._name, self._dtype, self._partitions = folder, name, dtype, partitions
        self._files: dict[str, IO[bytes]] = {}

    def open(self, sizes: Mapping[str, int]) -> None:
        """Begin, or go on at given sizes in bytes; whatever was written after they were taken is cut off."""
        with disk_errors(self._folder):
            for partition in range(self._partitions):
                for what in FILE_KINDS:
                    name = f"{self._name}.{partition}.{what}"
                    file = (self._folder / name).open("ab")
                    self._files[name] = file
                    file.truncate(sizes.get(name, 0))

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the files hold at least what they should."""
        files = [path for what in FILE_KINDS for path in self._paths(what)]
        paths = [(path, sizes.get(path.name)) for path in files]
        return all(size is not None and path.is_file() and path.stat().st_size >= size for path, size in paths)

    def add(self, encoded: EncodedKey, first_document: int) -> None:
        """Append documents; `first_document` is the number of the first."""
        for partition, part in enumerate(_deal_documents(encoded, first_document, self._partitions)):
            for what, values in (("tokens", part.tokens), ("lengths", part.lengths), ("counts", part.sequences)):
                with disk_errors(self._folder):
                    dtype = self._dtype if what == "tokens" else COUNT
                    self._files[f"{self._name}.{partition}.{what}"].write(values.astype(dtype, copy=False).tobytes())

    def commit(self) -> dict[str, int]:
        """Put everything on the disk and return the sizes."""
        with disk_errors(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Close the files, whatever becomes of what is still buffered."""
        files, self._files = self._files, {}
        for file in files.values():
            with suppress(OSError):  # a full disk has been reported already
                file.close()

    def seal(self) -> None:
        """Write the `.idx`, and the `.bin` where several partitions become one; what they are made from stays."""
        with disk_errors(self._folder):
            with self.sealed_idx.open("wb") as file:
                write_index(file, self._index())
                os.fsync(file.fileno())
            if self._partitions > 1:
                with self.sealed_bin.open("wb") as file:
                    for path in self._paths("tokens"):
                        with path.open("rb") as part:
                            shutil.copyfileobj(part, file, BLOCK_ENTRIES)
                    os.fsync(file.fileno())

    @property
    def sealed_idx(self) -> Path:
        """The finished `.idx`."""
        return self._folder / f"{self._name}.idx"

    @property
    def sealed_bin(self) -> Path:
        """The finished `.bin`; of a single partition its tokens are that already."""
        return self._folder / f"{self._name}.bin" if self._partitions > 1 else self._paths("tokens")[0]

    def _index(self) -> IndexContents:
        lengths, counts = self._paths("lengths"), self._paths("counts")
        return IndexContents(
            self._dtype,
            _count_entries(lengths),
            _count_entries(counts),
            partial(_read_blocks, lengths),
            partial(_read_blocks, counts),
        )

    def _paths(self, what: str) -> list[Path]:
        return [self._folder / f"{self._name}.{partition}.{what}" for partition in range(self._partitions)]


def _count_entries(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths) // COUNT.itemsize


def _read_blocks(paths: list[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(BLOCK_ENTRIES * COUNT.itemsize):
                yield np.frombuffer(data, COUNT)


def _deal_documents(encoded: EncodedKey, first: int, partitions: int) -> Iterator[EncodedKey]:
    """The documents of each partition: numbered from `first`, dealt out in turn (docs/specs/data.md §2.3)."""
    if partitions == 1:
        yield encoded
        return
    owner = (np.arange(len(encoded.sequences)) + first) % partitions
    sequence_owner = np.repeat(owner, encoded.sequences)
    token_owner = np.repeat(sequence_owner, encoded.lengths)
    for partition in range(partitions):
        yield EncodedKey(
            encoded.tokens[token_owner == partition],
            encoded.lengths[sequence_owner == partition],
            encoded.sequences[owner == partition],
        )
