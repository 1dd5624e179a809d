"""Writing `.bin`/`.idx` pairs: `IndexedWriter` takes sequences, `write_index` makes an `.idx` from blocks of arrays.

A pair appears whole or not at all. `IndexedWriter` needs 4 bytes of memory a sequence and 8 bytes a document, whatever
their length; `write_index` needs constant memory, however many sequences there are (docs/specs/data.md §1.2).
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from mt_core.errors import MtError
from mt_core.files import TEMPORARY, disk_errors, sync_directory
from mt_data.indexed.format import DOCUMENT, LENGTH, POINTER, Header

BUFFER_BYTES = 1 << 20
ArrayBlocks = Callable[[], Iterable[np.ndarray]]
"""Gives the blocks of an array from the beginning; it may be called more than once."""


class IndexedWriter:
    """Appends documents under temporary names; `finish` renames the `.bin` first and the `.idx` last.

    As a context manager it finishes when the block ends well and leaves nothing behind when it does not.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.dtype = np.dtype(dtype)
        self._lengths, self._documents = array("i"), array("q", [0])
        self._open: IO[bytes] | None = None
        self._closed = False

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append one document for each length; one of length 0 is an empty document, without a sequence.

        Parameters: `tokens` int [sum(lengths)], the documents' ids one after the other; `lengths` int [documents].
        """
        bounds = np.cumsum(lengths > 0, dtype=np.int64) + len(self._lengths)
        self._append(tokens, lengths[lengths > 0])
        self._documents.frombytes(bounds.tobytes())

    def add_document(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append one document of several sequences, none of them empty."""
        self._append(tokens, lengths)
        self._documents.append(len(self._lengths))

    def _append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        assert int(lengths.sum()) == len(tokens), "lengths add up to the tokens"
        if len(tokens):
            self._check_range(int(tokens.min()), int(tokens.max()))
        with disk_errors(self.bin_path):
            self._file().write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def _file(self) -> IO[bytes]:
        """The temporary `.bin`, opened by the first write: whoever may interrupt that can already call `abort`."""
        assert not self._closed, "the writer is closed"
        if self._open is None:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._open = _temporary_path(self.bin_path).open("wb", buffering=BUFFER_BYTES)
        return self._open

    def _check_range(self, smallest: int, largest: int) -> None:
        limit = np.iinfo(self.dtype).max
        if smallest < 0 or largest > limit:
            raise MtError(
                str(self.bin_path),
                f"token id {largest if largest > limit else smallest} does not fit into {self.dtype.name}",
                f"ids 0 to {limit}; the tokenizer's vocab_size is too small for its ids",
            )

    def close(self) -> None:
        """Put everything on disk, still under temporary names, so that a full disk shows before any rename."""
        if not self._closed:
            with disk_errors(self.bin_path), self._file() as data:
                data.flush()
                os.fsync(data.fileno())
            self._open, self._closed = None, True
            with disk_errors(self.idx_path), _temporary_path(self.idx_path).open("wb") as idx:
                self._write_index(idx)
                idx.flush()
                os.fsync(idx.fileno())

    def finish(self) -> None:
        """Make the pair visible. An older pair of the same name is removed first, so the two never mix."""
        self.close()
        with disk_errors(self.idx_path):
            self.idx_path.unlink(missing_ok=True)
            _temporary_path(self.bin_path).replace(self.bin_path)
            _temporary_path(self.idx_path).replace(self.idx_path)
            sync_directory(self.idx_path.parent)

    def abort(self) -> None:
        """Remove everything written so far."""
        if self._open:
            raw, self._open = self._open, None
            with suppress(OSError):  # what is still buffered does not fit on the disk, and is not wanted
                raw.close()
        _temporary_path(self.bin_path).unlink(missing_ok=True)
        _temporary_path(self.idx_path).unlink(missing_ok=True)

    def _write_index(self, file: IO[bytes]) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), POINTER)
        np.cumsum(lengths[:-1], out=pointers[1:])
        pointers *= self.dtype.itemsize
        file.write(Header(self.dtype, len(lengths), len(self._documents)).pack())
        file.write(lengths.astype(LENGTH, copy=False).data)
        file.write(pointers.data)
        file.write(np.frombuffer(self._documents, np.int64).astype(DOCUMENT, copy=False).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")


@dataclass(frozen=True, slots=True)
class IndexContents:
    """What an `.idx` is made from."""

    dtype: np.dtype
    sequences: int
    documents: int
    lengths: ArrayBlocks
    """Tokens of each sequence."""
    sequence_counts: ArrayBlocks
    """Sequences of each document."""
    modes: ArrayBlocks | None = None
    """Mode of each sequence, in multimodal files."""


def write_index(file: IO[bytes], parts: IndexContents) -> None:
    """Write header, lengths, pointers, document bounds, and modes if there are any."""
    file.write(Header(parts.dtype, parts.sequences, parts.documents + 1).pack())
    for block in parts.lengths():
        file.write(block.astype(LENGTH, copy=False).tobytes())
    for block in _block_starts(parts.lengths()):
        file.write((block * parts.dtype.itemsize).astype(POINTER, copy=False).tobytes())
    file.write(np.zeros(1, DOCUMENT).tobytes())
    for block in _block_ends(parts.sequence_counts()):
        file.write(block.astype(DOCUMENT, copy=False).tobytes())
    for block in parts.modes() if parts.modes else ():
        file.write(block.astype(np.int8, copy=False).tobytes())


def _block_ends(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        ends = np.cumsum(block, dtype=np.int64) + total
        total = int(ends[-1]) if len(ends) else total
        yield ends


def _block_starts(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        ends = np.cumsum(block, dtype=np.int64) + total
        yield ends - block
        total = int(ends[-1]) if len(ends) else total
