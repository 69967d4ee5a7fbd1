"""Encoded images in the rows of files, read as one table: what Parquet and Arrow have in common."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers.columns import Columns, Features, choose_columns, labels_of, schema_features, split_rows
from orchestrator.data.readers.shard_names import check_complete
from orchestrator.data.split import DIGEST_LENGTH, DamagedRecord, Labels, Source, build_source
from orchestrator.data.storage import Folder, LocalFolder, Place

if TYPE_CHECKING:
    import pyarrow as pa

_CACHE_BYTES = 256 << 20
_THREADS = 16
_S = TypeVar("_S")
_T = TypeVar("_T")


class File(NamedTuple):
    """A file as it was when the source was opened: one that is replaced since then is another one."""

    folder: Folder
    name: str
    size: int
    modified_ns: int


class Head(NamedTuple):
    """What a file says of itself."""

    schema: pa.Schema
    group_rows: list[int]
    """Rows of each row group or record batch."""
    fingerprint: bytes
    """The part that holds the places and sizes of everything in the file."""


class Format(NamedTuple):
    """How to read one kind of file. Pickles by the names of its functions."""

    kind: str
    """`parquet` or `arrow`."""
    label: str
    """For people, `Parquet`."""
    unit: str
    """What is read as a whole: `row group` or `record batch`."""
    head: Callable[[File], Head]
    columns: Callable[[File, list[str]], pa.Table]
    """Some columns, all rows."""
    group: Callable[[File, int, str, str | None], pa.Array]
    """One column (or a field of it) of one row group or batch."""


@lru_cache(maxsize=256)
def kept_open(file: File) -> Any:
    """A file of a service, a pyarrow NativeFile: opening it costs a request. Threads may share it, by `read_at` alone,
    as Parquet and Arrow do; whoever seeks, does so before it is shared."""
    return file.folder.open(file.name)


class GroupCache:
    """The row groups read last in this process, up to `_CACHE_BYTES` (but at least one).

    Who asks for a group that another thread is reading waits for it; who asks for another group does not.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[File, int, str, str | None], pa.Array] = OrderedDict()
        self._reading: dict[tuple[File, int, str, str | None], threading.Lock] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, format: Format, file: File, group: int, column: str, field: str | None) -> pa.Array:
        """One column (or a field of it) of one row group. Raises OSError."""
        key = (file, group, column, field)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                if key in self._groups:
                    return self._groups[key]
            try:
                values = _read_group(format, *key)
                self._keep(key, values)
                return values
            finally:
                with self._lock:
                    self._reading.pop(key, None)

    def _keep(self, key: tuple[File, int, str, str | None], values: pa.Array) -> None:
        with self._lock:
            if key not in self._groups:
                self._groups[key] = values
                self._bytes += values.nbytes
            while self._bytes > _CACHE_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes


_cache = GroupCache()


def _read_group(format: Format, file: File, group: int, column: str, field: str | None) -> pa.Array:
    import pyarrow as pa

    try:
        return format.group(file, group, column, field)
    except (OSError, pa.ArrowException) as error:
        message = f"{file.folder.address}/{file.name}, {format.unit} {group}: {error}"
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, message) from error
        # Without a number it is damage, by which name pyarrow may call it; or what a service answered.
        is_local = isinstance(file.folder, LocalFolder) and (
            isinstance(error, pa.ArrowException) or type(error) is OSError
        )
        raise (DamagedRecord if is_local else ConnectionError)(message) from error


class Table:
    """A `Reader` of some rows of a table.

    Row groups or record batches are its unit of reading: small ones (some MB) suit a random order of samples, and
    neighbouring rows asked for one after the other cost one read. An image that a struct names by `path` instead of
    holding its `bytes` is read from there, relative to the folder of the source.
    """

    def __init__(
        self,
        format: Format,
        folder: Folder,
        files: tuple[File, ...],
        groups: NDArray[np.int64],
        columns: Columns,
        rows: NDArray[np.int64],
    ) -> None:
        self._format, self._folder, self._files = format, folder, files
        self._groups = groups  # [num_groups, 3]: file, group within the file, first row of the table
        self._column, self._fields, self._rows = columns.image, columns.fields, rows

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

        def value(field: str | None) -> bytes | str | None:
            return _cache.get(self._format, self._files[file], group, self._column, field)[row].as_py()

        data = value("bytes" if self._fields else None)
        if not data and "path" in self._fields:
            path = value("path")
            if path:
                return self._folder.read(str(path))
        assert not isinstance(data, str)
        return data or b""

    def name(self, index: int) -> str:
        file, group, row = self._place(index)
        return f"{self._files[file].name}, row {row} of {self._format.unit} {group}"

    def units(self) -> NDArray[np.int64]:
        of_row = np.searchsorted(self._groups[:, 2], self._rows, side="right")
        return np.flatnonzero(np.diff(of_row, prepend=-1))


@dataclass(frozen=True)
class StoredTable:
    """Files of one format, read as one table in their order."""

    config: DataConfig
    format: Format
    folder: Folder
    files: tuple[File, ...]
    heads: tuple[Head, ...]
    columns: Columns

    @classmethod
    def open(cls, config: DataConfig, format: Format, place: Place, features: Features | None = None) -> StoredTable:
        """Read what the files of `place` say of themselves. `features`, if given, replaces what is in their schemas.

        Raises:
            ConfigError: A file of another format, no rows, or columns that are not there or not the same in all.
        """
        files, heads = zip(*_in_threads(partial(_head, config, format, place), list(place.files)), strict=True)
        first = heads[0].schema
        columns = choose_columns(config, first, schema_features(first) if features is None else features, files[0].name)
        used = {name for name in (columns.image, columns.label, columns.split) if name}
        for file, head in zip(files, heads, strict=True):
            if not used <= set(head.schema.names):
                raise ConfigError(f"data.source = {config.source}: {file.name} lacks columns that {files[0].name} has")
            differs = next((name for name in used if head.schema.field(name).type != first.field(name).type), None)
            if differs:
                raise ConfigError(
                    f"data.source = {config.source}: column {differs} of {file.name} is "
                    f"{head.schema.field(differs).type}, but {first.field(differs).type} in {files[0].name}"
                )
        table = cls(config, format, place.folder, files, heads, columns)
        if not sum(table.file_rows):
            raise ConfigError(f"data.source = {config.source}: no rows")
        return table

    @property
    def file_rows(self) -> list[int]:
        """Rows of each file."""
        return [sum(head.group_rows) for head in self.heads]

    def read(self, names: Iterable[str | None]) -> dict[str, pa.ChunkedArray]:
        """Whole columns; None among the names is none.

        Raises:
            ConfigError: They cannot be read.
        """
        import pyarrow as pa

        wanted = [name for name in names if name]
        if not wanted:
            return {}
        try:
            parts = _in_threads(lambda file: self.format.columns(file, wanted), self.files)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"data.source = {self.config.source}: columns {wanted} cannot be read: {error}"
            ) from error
        whole = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
        return {name: whole.column(name) for name in wanted}

    def part(self, rows: NDArray[np.int64], labels: pa.ChunkedArray | None) -> tuple[Table, Labels]:
        """A reader of some rows, in that order, and their labels."""
        groups = [(number, group) for number, head in enumerate(self.heads) for group in range(len(head.group_rows))]
        sizes = [size for head in self.heads for size in head.group_rows]
        places = np.column_stack([np.array(groups, dtype=np.int64), np.cumsum([0, *sizes[:-1]], dtype=np.int64)])
        table = Table(self.format, self.folder, self.files, places[np.array(sizes) > 0], self.columns, rows)
        return table, labels_of(self.columns, labels, rows)

    def fingerprint(self) -> bytes:
        """The names, the sizes, and what the files say of themselves: the place and size of everything in them."""
        heads = zip(self.files, self.heads, strict=True)
        return b"".join(b"%s\0%d\0%s" % (os.fsencode(file.name), file.size, head.fingerprint) for file, head in heads)


def digest(*content: bytes) -> str:
    """The fingerprint of a source."""
    return hashlib.sha256(b"".join(content)).hexdigest()[:DIGEST_LENGTH]


def open_table(config: DataConfig, format: Format, place: Place) -> Source:
    """The source of the files of `place`, read as one table in that order.

    Splits are the values of `data.split_column`; without that column, the part of the file names before `-00000-of-`
    where all have one. Labels are whole numbers or text; a split with a missing one (null or negative) has none. What
    Hugging Face `datasets` says of the columns is used, see `choose_columns`.

    Raises:
        ConfigError: A file that is not of this format, one that is missing from a numbered set, or a column or split
            that is not there or of another type.
    """
    check_complete(config, place.files)
    table = StoredTable.open(config, format, place)
    columns = table.columns
    read = table.read((columns.label, columns.split))
    split = partial(read.__getitem__, columns.split) if columns.split else None
    labels = read.get(columns.label) if columns.label else None
    rows = split_rows(config, split, [file.name for file in table.files], table.file_rows)
    parts = [None if part is None else table.part(part, labels) for part in (rows.train, rows.test)]
    compute_digest = partial(str, digest(table.fingerprint()))
    return build_source(
        format.kind,
        place.address,
        parts,
        compute_digest,
        columns.class_names,
        unused=rows.unused,
        remarks=columns.remarks,
    )


def _head(config: DataConfig, format: Format, place: Place, name: str) -> tuple[File, Head]:
    import pyarrow as pa

    try:
        file = File(place.folder, name, *(place.files[name] or place.folder.stat(name)))
        return file, format.head(file)
    except (pa.ArrowException, OSError) as error:
        message = f"data.source = {config.source}: {name} is not readable as {format.label}: {error}"
        raise ConfigError(message) from error


def _in_threads(function: Callable[[_S], _T], items: Sequence[_S]) -> list[_T]:
    """In the order of the items. Most of the time is spent waiting for a service or a disc."""
    if len(items) == 1:
        return [function(items[0])]
    with ThreadPoolExecutor(min(_THREADS, len(items)), "files") as pool:
        return list(pool.map(function, items))
