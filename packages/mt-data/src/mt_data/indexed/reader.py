"""`IndexedReader`: random access to the sequences of a `.bin`/`.idx` pair, memory-mapped (docs/specs/data.md §1.5)."""

from pathlib import Path
from typing import Any

import numpy as np

from mt_core.errors import MtError, raise_if
from mt_data.config.paths import find_missing_files
from mt_data.indexed.format import DOCUMENT, LENGTH, POINTER, Header, read_header


class IndexedReader:
    """The sequences of the pair at `prefix`. Opening reads the header; tokens are read when asked for."""

    dtype: np.dtype
    """Type of the token ids on disk."""
    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]."""
    pointers: np.ndarray
    """Byte offset of each sequence in the `.bin`, int64 [S]."""
    documents: np.ndarray
    """Document bounds, int64 [D + 1]: document d owns the sequences from documents[d] up to documents[d + 1]."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        raise_if(find_missing_files(self.prefix, self.prefix))
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        header = read_header(self.idx_path)
        self.dtype = header.dtype
        idx = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        self.lengths = idx[header.lengths_offset : header.pointers_offset].view(LENGTH)
        self.pointers = idx[header.pointers_offset : header.documents_offset].view(POINTER)
        self.documents = idx[header.documents_offset : header.size].view(DOCUMENT)
        self._check(header)
        empty = self.bin_path.stat().st_size == 0  # nothing cannot be mapped
        self._tokens = np.zeros(0, self.dtype) if empty else np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def _check(self, header: Header) -> None:
        if not len(self.documents) or self.documents[-1] != header.sequences:
            raise MtError(
                str(self.idx_path), f"documents do not end at its {header.sequences} sequences", "preprocess it again"
            )
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if header.sequences else 0
        size = self.bin_path.stat().st_size
        if size < expected:
            raise MtError(
                str(self.bin_path),
                f"is truncated: {size} bytes, {self.idx_path} promises {expected}",
                "copy or preprocess it again",
            )
        if size > expected:
            raise MtError(
                str(self.bin_path),
                f"does not belong to {self.idx_path}: {size} bytes where it promises {expected}",
                "preprocess it again",
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def document_count(self) -> int:
        """Documents, empty ones included."""
        return len(self.documents) - 1

    @property
    def token_count(self) -> int:
        """Tokens of all sequences."""
        return len(self._tokens)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence, or to its end: a view of the file, not a copy."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        stop = int(self.lengths[index]) if length is None else offset + length
        assert 0 <= offset <= stop <= self.lengths[index], "a slice stays inside its sequence"
        return self._tokens[start + offset : start + stop]

    def __reduce__(self) -> tuple[Any, ...]:
        """Loader processes open the files again instead of receiving their bytes."""
        return IndexedReader, (self.prefix,)
