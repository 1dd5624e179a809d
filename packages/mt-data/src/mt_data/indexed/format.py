"""The layout of an `.idx` file: header, lengths, pointers and document bounds, little-endian.

Source: docs/specs/data.md §1.2.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mt_core.errors import MtError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, sequences, documents + 1."""

DTYPE_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
LENGTH, POINTER, DOCUMENT = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<i8")

LARGEST_UINT16_VOCABULARY = 65_499


@dataclass(frozen=True, slots=True)
class Header:
    """The first 34 bytes of an `.idx` file."""

    dtype: np.dtype
    sequences: int
    document_bounds: int
    """Entries of the document array: number of documents + 1."""

    def pack(self) -> bytes:
        """The header as bytes."""
        code = next(code for code, name in DTYPE_CODES.items() if np.dtype(name) == self.dtype)
        return HEADER.pack(MAGIC, VERSION, code, self.sequences, self.document_bounds)

    @property
    def lengths_offset(self) -> int:
        """Byte offset of the sequence lengths."""
        return HEADER.size

    @property
    def pointers_offset(self) -> int:
        """Byte offset of the sequences' offsets in the `.bin`."""
        return self.lengths_offset + LENGTH.itemsize * self.sequences

    @property
    def documents_offset(self) -> int:
        """Byte offset of the document bounds."""
        return self.pointers_offset + POINTER.itemsize * self.sequences

    @property
    def size(self) -> int:
        """Bytes of the whole file; a multimodal one has one more a sequence, which readers of text ignore."""
        return self.documents_offset + DOCUMENT.itemsize * self.document_bounds


def read_header(path: Path) -> Header:
    """The header of an `.idx` file; an `MtError` if the file is something else or shorter than it says."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise MtError(str(path), "is not an index of token ids (wrong magic)", "mt data preprocess writes one")
    _, version, code, sequences, document_bounds = HEADER.unpack(head)
    if version != VERSION:
        raise MtError(str(path), f"has version {version}", f"version {VERSION}")
    if code not in DTYPE_CODES:
        raise MtError(str(path), f"has dtype code {code}", f"codes {min(DTYPE_CODES)} to {max(DTYPE_CODES)}")
    header = Header(np.dtype(DTYPE_CODES[code]), sequences, document_bounds)
    if (size := path.stat().st_size) < header.size:
        raise MtError(
            str(path), f"is truncated: {size} bytes, its header promises {header.size}", "copy or preprocess it again"
        )
    return header


def choose_token_dtype(vocab_size: int | None) -> np.dtype:
    """The type that Megatron stores ids of a vocabulary in: uint16 below 65,500 ids, else int32."""
    small = vocab_size is not None and vocab_size <= LARGEST_UINT16_VOCABULARY
    return np.dtype("<u2" if small else "<i4")
