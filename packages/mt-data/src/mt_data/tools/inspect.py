"""What is in a `.bin`/`.idx` pair: the figures and documents that `mt data inspect` prints."""

import numpy as np

from mt_core.errors import MtError
from mt_data.indexed.reader import IndexedReader


def summarize_index(reader: IndexedReader) -> dict[str, str]:
    """Name and value of each line of the table."""
    lengths = reader.lengths
    empty = int((np.diff(reader.documents) == 0).sum())
    rows = {
        "dtype": reader.dtype.name,
        "documents": f"{reader.document_count:,} ({empty:,} empty)",
        "sequences": f"{len(reader):,}",
        "tokens": f"{reader.token_count:,}",
    }
    if len(reader):
        rows["length"] = f"{lengths.min():,} min, {lengths.mean():,.1f} mean, {lengths.max():,} max"
    rows[".bin"] = f"{reader.bin_path.stat().st_size:,} bytes"
    rows[".idx"] = f"{reader.idx_path.stat().st_size:,} bytes"
    return rows


def read_document(reader: IndexedReader, number: int) -> list[int]:
    """Token ids of a document, its sequences one after the other."""
    if not 0 <= number < reader.document_count:
        raise MtError("--document", f"{number}", f"0 to {reader.document_count - 1}, the documents of {reader.prefix}")
    sequences = range(int(reader.documents[number]), int(reader.documents[number + 1]))
    return [token for sequence in sequences for token in reader.get(sequence).tolist()]
