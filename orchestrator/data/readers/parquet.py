"""Encoded images in Parquet files. Imports pyarrow inside functions only."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import IO, TYPE_CHECKING

from orchestrator.config import DataConfig
from orchestrator.data.readers.table import File, Format, Head, kept_open, open_table
from orchestrator.data.split import Source
from orchestrator.data.storage import LocalFolder, Place

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_TAIL = 64 << 10
"""Bytes at the end of a file that are read at once: most footers are shorter."""


def open_parquet(config: DataConfig, place: Place) -> Source:
    """The source of the Parquet files of `place`; see `table.open_table`."""
    return open_table(config, FORMAT, place)


def read_head(file: File) -> Head:
    """Schema, row groups and footer. Raises ArrowException or OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer, metadata = _footer(file)
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    with pq.ParquetFile(pa.BufferReader(footer), metadata=metadata) as tail:
        return Head(tail.schema_arrow, groups, footer[:-8])


def _read_footer(file: IO[bytes], size: int) -> bytes:
    """The end of the file from the footer on: by itself a Parquet file whose row groups are elsewhere."""
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= size and tail[-4:] == b"PAR1":
        file.seek(size - length)
        return file.read(length)
    return tail[-length:]


@lru_cache(maxsize=256)
def _footer(file: File) -> tuple[bytes, pq.FileMetaData]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(file.folder, LocalFolder):
        with file.folder.open(file.name) as opened:
            footer = _read_footer(opened, file.size)
    else:
        footer = _read_footer(kept_open(file), file.size)
    return footer, pq.read_metadata(pa.BufferReader(footer))


def _open(file: File) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    if isinstance(file.folder, LocalFolder):
        return pq.ParquetFile(os.path.join(file.folder.root, file.name), metadata=_footer(file)[1])
    return pq.ParquetFile(kept_open(file), metadata=_footer(file)[1], pre_buffer=True)


def read_columns(file: File, names: list[str]) -> pa.Table:
    """Some columns. Raises ArrowException or OSError."""
    with _open(file) as table:
        return table.read(columns=names, use_threads=False).select(names)


def read_group(file: File, group: int, column: str, field: str | None) -> pa.Array:
    """One column of one row group, by one request. Raises ArrowException or OSError."""
    import pyarrow as pa

    column = f"{column}.{field}" if field else column
    with _open(file) as table:
        values = table.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
    return values.flatten()[0] if pa.types.is_struct(values.type) else values


FORMAT = Format("parquet", "Parquet", "row group", read_head, read_columns, read_group)
