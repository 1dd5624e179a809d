"""Rows of a parquet file as pieces (extra `mt-data[parquet]`)."""

from collections.abc import Iterator
from typing import Any

from mt_core.errors import MtError
from mt_data.text_io.inputs import InputFile
from mt_data.preprocess.pieces import Piece, Position, Rows

PIECE_ROWS = 256


def row_pieces(number: int, file: InputFile, offset: int, keys: tuple[str, ...]) -> Iterator[Piece]:
    """The rows from `offset` on; each piece has its share of the file's bytes."""
    parquet = _open_parquet(file.path, keys)
    rows, at = parquet.metadata.num_rows, 0
    for group in range(parquet.metadata.num_row_groups):
        if (beyond := at + parquet.metadata.row_group(group).num_rows) <= offset:
            at = beyond
            continue
        for batch in parquet.iter_batches(PIECE_ROWS, row_groups=[group], columns=list(keys)):
            first, at = at, at + batch.num_rows
            if at > offset:
                share = file.size * at // rows - file.size * first // rows
                columns = {key: batch.column(key).to_pylist() for key in keys}
                after = Position(number, at) if at < rows else Position(number + 1)
                yield Piece(Rows(file, first + 1, columns), share, after)


def _open_parquet(path: str, keys: tuple[str, ...]) -> Any:
    """A `pyarrow.parquet.ParquetFile` with the keys; an `MtError` says what to install, or what is wrong with it."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as err:
        raise MtError(path, "needs pyarrow, which is not installed", "pip install 'mt-data[parquet]'") from err
    try:
        parquet = ParquetFile(path)
    except (ArrowException, OSError) as err:
        raise MtError(path, f"is not a readable parquet file ({' '.join(str(err).split())})", "write it again") from err
    if missing := set(keys) - set(parquet.schema_arrow.names):
        names = ", ".join(map(repr, parquet.schema_arrow.names))
        raise MtError(path, f"has no column {min(missing)!r}", f"--json-keys names columns of it: {names}")
    return parquet
