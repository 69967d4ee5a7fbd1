"""Encoded images in Parquet: one file, or the files of a folder read as one table."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.split import DIGEST_LENGTH, Labels, Source, build_source, choose_splits, unknown

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_CACHE_BYTES = 256 << 20


class _File(NamedTuple):
    """A Parquet file as it was when the source was opened: a file replaced since then is another one."""

    path: str
    size: int
    modified_ns: int


class _Cache:
    """The row groups read last in this process, up to `_CACHE_BYTES` (but at least one)."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[_File, int, str], pa.Array] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def column(self, file: _File, group: int, column: str) -> pa.Array:
        """One column of one row group."""
        with self._lock:
            key = (file, group, column)
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            values = _read_group(file, group, column)
            self._groups[key] = values
            self._bytes += values.nbytes
            while self._bytes > _CACHE_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
            return values


_cache = _Cache()


@lru_cache(maxsize=64)
def _footer(file: _File) -> pq.FileMetaData:
    import pyarrow.parquet as pq

    return pq.read_metadata(file.path)


def _read_group(file: _File, group: int, column: str) -> pa.Array:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path, metadata=_footer(file)) as table:
            values = table.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
    except pa.ArrowException as error:
        raise OSError(f"{file.path}, row group {group}: {error}") from error
    return values.field(0) if pa.types.is_struct(values.type) else values


class Table:
    """A `Reader` of some rows of a Parquet table.

    Row groups are its unit of reading: small ones (some MB) suit a random order of samples, and neighbouring rows asked
    for one after the other cost one read.
    """

    def __init__(
        self, root: str, files: Sequence[str], groups: NDArray[np.int64], column: str, rows: NDArray[np.int64]
    ) -> None:
        stats = [os.stat(os.path.join(root, name)) for name in files]
        self._files = tuple(
            _File(os.path.join(root, name), stat.st_size, stat.st_mtime_ns)
            for name, stat in zip(files, stats, strict=True)
        )
        self._names, self._column, self._rows = tuple(files), column, rows
        self._groups = groups  # [num_groups, 3]: file, group within the file, first row of the table

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, index: int) -> tuple[int, int, int]:
        """File, row group within it, row within that."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(self._rows[index])
        file, group, first = self._groups[np.searchsorted(self._groups[:, 2], row, side="right") - 1]
        return int(file), int(group), row - int(first)

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        file, group, row = self._place(index)
        value: bytes | None = _cache.column(self._files[file], group, self._column)[row].as_py()
        return value or b""

    def name(self, index: int) -> str:
        file, group, row = self._place(index)
        return f"{self._names[file]}, row {row} of row group {group}"

    def units(self) -> NDArray[np.int64]:
        of_row = np.searchsorted(self._groups[:, 2], self._rows, side="right")
        return np.flatnonzero(np.diff(of_row, prepend=-1))


def open_parquet(config: DataConfig, root: Path, names: Sequence[str]) -> Source:
    """The source of the Parquet files `names` (relative to `root`), read as one table in that order.

    Splits are the values of `data.split_column`; without that column, the part of the file names before `-00000-of-`
    where all have one. Labels are whole numbers or text; a split with a missing one (null or negative) has none.

    Raises:
        ConfigError: A file that is not Parquet, or a column or split that is not there or of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema: pa.Schema | None = None
    groups: list[tuple[int, int, int]] = []
    file_rows: list[int] = []
    image_column = ""
    for number, name in enumerate(names):
        try:
            with pq.ParquetFile(root / name) as file:
                footer, this_schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data.source = {config.source}: {name} is not readable as Parquet: {error}") from error
        image_column = _image_column(config, this_schema, name)
        if schema is None:
            schema = this_schema
        elif not {config.label_column, config.split_column} & set(schema.names) <= set(this_schema.names):
            raise ConfigError(f"data.source = {config.source}: {name} lacks columns that {names[0]} has")
        start = sum(file_rows)
        for group in range(footer.num_row_groups):
            groups.append((number, group, start))
            start += footer.row_group(group).num_rows
        file_rows.append(footer.num_rows)
    assert schema is not None
    if not sum(file_rows):
        raise ConfigError(f"data.source = {config.source}: no rows")

    def read(column: str) -> pa.ChunkedArray:
        parts = [pq.read_table(root / name, columns=[column], partitioning=None).column(0) for name in names]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks])

    labels = read(config.label_column) if _has(config, "label_column", schema) else None
    rows = _split_rows(config, schema, names, file_rows, read)
    table = np.array(groups, dtype=np.int64)
    parts: list[tuple[Table, Labels] | None] = [
        None
        if part is None
        else (Table(os.fspath(root), names, table, image_column, part), _labels(config, labels, part))
        for part in rows
    ]
    location = os.fspath(root / names[0]) if Path(config.source).is_file() else os.fspath(root)
    return build_source("parquet", location, parts, partial(_digest, os.fspath(root), tuple(names)))


def _has(config: DataConfig, key: str, schema: pa.Schema) -> bool:
    """Whether the column that `key` names is there. A name that is not the default must be."""
    column = getattr(config, key)
    if column in schema.names:
        return True
    if column != getattr(DataConfig, key):
        raise unknown(f"data.{key}", column, schema.names, f"column in {config.source}")
    return False


def _image_column(config: DataConfig, schema: pa.Schema, name: str) -> str:
    """The column to read, a struct's field included."""
    import pyarrow as pa

    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)

    column = config.image_column
    if column not in schema.names:
        raise unknown("data.image_column", column, schema.names, f"column in {name}")
    kind = schema.field(column).type
    if is_bytes(kind):
        return column
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type):
        return f"{column}.bytes"
    raise ConfigError(
        f"data.image_column = {column}: must hold encoded images (bytes, or a struct with a field `bytes`), not {kind}"
    )


def _split_rows(
    config: DataConfig, schema: pa.Schema, names: Sequence[str], file_rows: Sequence[int], read: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """The rows of the training and of the test split."""
    total = sum(file_rows)
    if _has(config, "split_column", schema):
        codes = read(config.split_column).cast("string").combine_chunks().dictionary_encode()
        values = [str(value) for value in codes.dictionary.to_pylist()]
        of_row = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        what = f"value in column {config.split_column}"
    else:
        prefixes = [re.match(r"(.+?)-\d+-of-\d+", os.path.basename(name)) for name in names]
        asked = config.train_split != DataConfig.train_split or config.test_split != DataConfig.test_split
        if not asked and not all(prefixes):
            return np.arange(total, dtype=np.int64), None
        file_splits = [match[1] if match else "" for match in prefixes]
        values = sorted(set(file_splits) - {""})
        of_row = np.repeat([values.index(split) if split else -1 for split in file_splits], file_rows)
        what = "split by file name, and no column " + config.split_column
    train, test = choose_splits(config, values, what)
    train_rows = np.flatnonzero(of_row == values.index(train))
    return train_rows, None if test is None else np.flatnonzero(of_row == values.index(test))


def _labels(config: DataConfig, column: pa.ChunkedArray | None, rows: NDArray[np.int64]) -> Labels:
    import pyarrow as pa

    if column is None:
        return None
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind)):
        raise ConfigError(
            f"data.label_column = {config.label_column}: must hold whole numbers or text, not {column.type}"
        )
    labels = column.take(pa.array(rows)).to_pylist()
    missing = any(label is None or (not is_text and label < 0) for label in labels)
    return None if missing else labels


def _digest(root: str, names: Sequence[str]) -> str:
    """Hash of the names, sizes and footers: these hold the place and size of every column chunk."""
    digest = hashlib.sha256()
    for name in names:
        with open(os.path.join(root, name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size - 8)
            footer = int.from_bytes(file.read(4), "little")
            file.seek(size - 8 - footer)
            digest.update(b"%s\0%d\0" % (os.fsencode(name), size))
            digest.update(file.read(footer))
    return digest.hexdigest()[:DIGEST_LENGTH]
