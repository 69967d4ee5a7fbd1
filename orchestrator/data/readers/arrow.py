"""Encoded images in Arrow IPC files, of both kinds: with a footer (.arrow, .feather), and streams. Imports pyarrow
inside functions only.

Local files are mapped, so that what is not compressed is read without a copy. A stream has no table of contents, so one
that a service holds would have to be fetched whole to know what is in it: these are refused. Of one
with a footer, a batch takes several requests, where a row group of Parquet takes one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestrator.config import DataConfig
from orchestrator.data.readers.table import File, Format, Head, kept_open, open_table
from orchestrator.data.split import Source
from orchestrator.data.storage import LocalFolder, Place

if TYPE_CHECKING:
    import pyarrow as pa

_MAGIC = b"ARROW1\0\0"
_RECORD_BATCH = 3
"""Of the kinds of messages in the format."""


def open_arrow(config: DataConfig, place: Place) -> Source:
    """The source of the Arrow files of `place`; see `table.open_table`."""
    return open_table(config, FORMAT, place)


def _open(file: File) -> pa.NativeFile:
    import pyarrow as pa

    if isinstance(file.folder, LocalFolder):
        return pa.memory_map(os.path.join(file.folder.root, file.name))
    return kept_open(file)


@lru_cache(maxsize=1024)
def _is_stream(file: File) -> bool:
    with file.folder.open(file.name) as opened:
        if opened.read(len(_MAGIC)) == _MAGIC:
            return False
    if isinstance(file.folder, LocalFolder):
        return True
    raise OSError(
        "it is an Arrow stream, which can be read in any order only from a local disc; copy it there, or store it as "
        "Parquet or as an Arrow file with a footer"
    )


def read_head(file: File) -> Head:
    """Schema, rows of each batch, and where everything is. Raises ArrowException or OSError."""
    import pyarrow as pa

    if _is_stream(file):
        whole = _mapped(file)
        metadata = [message.metadata.to_pybytes() for message in pa.MessageReader.open_stream(pa.BufferReader(whole))]
        found = [batch for message in metadata if (batch := _batch_header(message)) is not None]
        if any(compressed for _, compressed in found):
            raise OSError("a compressed stream cannot be read in any order; store it as an Arrow file with a footer")
        return Head(_schema(file), _plausible(file, [rows for rows, _ in found]), b"".join(metadata))
    opened = _open(file)
    length = _number("<i", opened.read_at(4, file.size - 10), 0)
    footer = opened.read_at(max(0, length), file.size - 10 - length)
    # Of each message, what follows the mark and the length.
    metadata = [opened.read_at(size - 8, offset + 8) for offset, size in _blocks(footer)]
    found = [batch for message in metadata if (batch := _batch_header(message)) is not None]
    if len(found) < len(metadata):
        raise OSError("its footer does not name its batches")
    return Head(_schema(file), _plausible(file, [rows for rows, _ in found]), b"".join([footer, *metadata]))


def _plausible(file: File, rows: list[int]) -> list[int]:
    if any(number < 0 for number in rows) or sum(rows) > file.size:
        raise OSError("its metadata are damaged: more rows than bytes")
    return rows


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where the value of a FlatBuffers table's field is, None if it has the default."""
    vtable = table - _number("<i", data, table)
    if 4 + 2 * number >= _number("<H", data, vtable):
        return None
    offset = _number("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else None


def _number(layout: str, data: bytes, place: int) -> int:
    try:
        return int(struct.unpack_from(layout, data, place)[0])
    except struct.error as error:
        raise OSError(f"its metadata are damaged: {error}") from error


def _batch_header(message: bytes) -> tuple[int, bool] | None:
    """The rows of a record batch and whether it is compressed, from the metadata of its message; None for others.

    pyarrow tells neither without reading the batch. Layout: Message.fbs of the Arrow format.
    """
    table = _number("<I", message, 0)
    kind, header = _field(message, table, 1), _field(message, table, 2)
    if kind is None or header is None or message[kind] != _RECORD_BATCH:
        return None
    batch = header + _number("<I", message, header)
    rows = _field(message, batch, 0)
    return (0 if rows is None else _number("<q", message, rows)), _field(message, batch, 3) is not None


def _blocks(footer: bytes) -> list[tuple[int, int]]:
    """Where the metadata of each record batch are in the file, and their length. Layout: File.fbs of the format."""
    vector = _field(footer, _number("<I", footer, 0), 3)
    if vector is None:
        return []
    start = vector + _number("<I", footer, vector)
    count = _number("<I", footer, start)
    places = [start + 4 + 24 * block for block in range(count)]
    return [(_number("<q", footer, place), _number("<i", footer, place + 8)) for place in places]


def _mapped(file: File) -> pa.Buffer:
    with _open(file) as mapped:
        return mapped.read_buffer()


def _reader(file: File, names: Sequence[str]) -> Any:
    """A reader of some columns, in the order of the schema."""
    import pyarrow as pa

    fields = sorted(_schema(file).get_field_index(name) for name in names)
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    if _is_stream(file):
        return pa.ipc.open_stream(pa.BufferReader(_mapped(file)), options=options)
    return pa.ipc.open_file(_open(file), options=options)


@lru_cache(maxsize=1024)
def _schema(file: File) -> pa.Schema:
    import pyarrow as pa

    if _is_stream(file):
        return pa.ipc.open_stream(pa.BufferReader(_mapped(file))).schema
    return pa.ipc.open_file(_open(file)).schema


def read_columns(file: File, names: list[str]) -> pa.Table:
    """Some columns. Raises ArrowException or OSError."""
    columns = _reader(file, names).read_all().select(names)
    columns.validate(full=True)
    return columns


@lru_cache(maxsize=256)
def _stream_batches(file: File, column: str) -> list[pa.RecordBatch]:
    return list(_reader(file, [column]))


def read_group(file: File, group: int, column: str, field: str | None) -> pa.Array:
    """One column of one batch. Raises ArrowException or OSError."""
    batch = _stream_batches(file, column)[group] if _is_stream(file) else _reader(file, [column]).get_batch(group)
    values = batch.column(0)
    values = values.flatten()[values.type.get_field_index(field)] if field else values
    values.validate(full=True)  # else damaged offsets would lead anywhere in memory
    return values


FORMAT = Format("arrow", "Arrow", "record batch", read_head, read_columns, read_group)
