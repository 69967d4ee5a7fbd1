"""A list of image files: text with one path per line, or columns (CSV, TSV) with a header line."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers.folder import IMAGE_SUFFIXES, Files
from orchestrator.data.readers.text_labels import are_numbers, choose_labels
from orchestrator.data.split import (
    DIGEST_LENGTH,
    Labels,
    Source,
    SplitRows,
    build_source,
    choose_splits,
    split_by_code,
    unknown,
)
from orchestrator.data.storage import Folder, LocalFolder, RemoteFolder, locate

LIST_SUFFIXES = frozenset((".txt", ".csv", ".tsv"))

_PATH_COLUMNS = ("image", "path", "file", "file_name", "filename", "filepath")
_CHECKED_LOCALLY = 100
_CHECKED_REMOTELY = 10  # each is a request
_HERE = "this machine"
_STORAGE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://[^/]*")
_OPTIONS = re.compile(r"\?[A-Za-z_][\w.-]*=.*")


@dataclass(frozen=True)
class _List:
    """What a list says."""

    paths: Sequence[str]
    lines: Sequence[int]
    """Where each path stands in the list, from 1."""
    values: dict[str, Sequence[str]] = field(default_factory=dict)
    """The label and the split column, where they are there."""


def open_list(config: DataConfig, folder: Folder, name: str) -> Source:
    """The source of the images that the list `name` of `folder` names, in its order; one named twice counts twice.

    Paths are relative to the folder of the list, absolute, or URLs. Nothing is read into their folders: labels and
    splits come from the columns that `data.label_column` and `data.split_column` name, in which an empty cell means
    none. Labels are whole numbers, if all of them are, or text.

    Raises:
        ConfigError: A list that cannot be read or is empty, a column or split that is not there, paths of different
            storages, or none of the first images there.
    """
    try:
        content = folder.read(name)
    except OSError as error:
        raise ConfigError(f"data.source = {config.source}: cannot be read: {error}") from error
    suffix = os.path.splitext(name)[1].lower()
    text = _decode(config, content)
    found = _read_lines(text) if suffix == ".txt" else _read_columns(config, text, "\t" if suffix == ".tsv" else ",")
    if not found.paths:
        raise ConfigError(f"data.source = {config.source}: the list names no images")
    base, paths = _place(config, folder, found)
    _check_some_exist(config, base, paths, found.lines)
    rows = _split_rows(config, found)
    labels = found.values.get(config.label_column)
    codes, names = _encode(labels) if labels is not None else (None, [])
    numbers = are_numbers(names)
    parts: list[tuple[Files, Labels] | None] = [
        None
        if part is None
        else (
            Files(base, paths if len(part) == len(paths) else [paths[row] for row in part.tolist()]),
            None if codes is None else choose_labels(names, codes[part], numbers=numbers),
        )
        for part in (rows.train, rows.test)
    ]
    content_hash = hashlib.sha256(content).digest()
    digest = partial(_digest, content_hash, base, paths)
    is_remote = isinstance(base, RemoteFolder)
    location = f"{folder.address}/{name}"
    return build_source("list", location, parts, digest, is_remote=is_remote, unused=rows.unused)


def _decode(config: DataConfig, content: bytes) -> str:
    if b"\0" in content or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"data.source = {config.source}: not a text in UTF-8 (is it UTF-16?)")
    # As the names of files, which may be of any bytes, not of UTF-8 alone.
    return os.fsdecode(content.removeprefix(b"\xef\xbb\xbf"))


def _read_lines(text: str) -> _List:
    paths, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        path = line.removesuffix("\r")
        if path.strip() and not path.startswith("#"):
            paths.append(path)
            lines.append(number)
    return _List(paths, lines)


def _read_columns(config: DataConfig, text: str, delimiter: str) -> _List:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        column = _path_column(config, header)
        wanted = [key for key in ("label_column", "split_column") if _has(config, key, header)]
        places = [header.index(getattr(config, key)) for key in wanted]
        paths: list[str] = []
        lines: list[int] = []
        cells: list[list[str]] = [[] for _ in places]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header) or not row[column]:
                short = f"{len(row)} cells where the header has {len(header)}"
                problem = "no path" if len(row) == len(header) else short
                raise ConfigError(f"data.source = {config.source}: line {reader.line_num}: {problem}")
            paths.append(row[column])
            lines.append(reader.line_num)
            for cell, place in zip(cells, places, strict=True):
                cell.append(row[place])
    except csv.Error as error:
        raise ConfigError(f"data.source = {config.source}: line {reader.line_num}: {error}") from error
    values: dict[str, Sequence[str]] = {getattr(config, key): cell for key, cell in zip(wanted, cells, strict=True)}
    return _List(paths, lines, values)


def _path_column(config: DataConfig, header: Sequence[str]) -> int:
    if config.image_column in header:
        return header.index(config.image_column)
    if config.image_column == DataConfig.image_column:
        for column in _PATH_COLUMNS:
            if column in header:
                return header.index(column)
    error = unknown("data.image_column", config.image_column, header, f"column in {config.source}")
    if any(os.path.splitext(cell)[1].lower() in IMAGE_SUFFIXES for cell in header):
        raise ConfigError(f"{error}; the first line must name the columns")
    raise error


def _has(config: DataConfig, key: str, header: Sequence[str]) -> bool:
    """Whether the column that `key` names is there. A name that is not the default must be."""
    column = getattr(config, key)
    if column not in header and column != getattr(DataConfig, key):
        raise unknown(f"data.{key}", column, header, f"column in {config.source}")
    return column in header


def _place(config: DataConfig, folder: Folder, found: _List) -> tuple[Folder, Sequence[str]]:
    """The folder that the images are read from, and their paths relative to it (or absolute, on this machine)."""
    own = _storage(folder.address)
    first: tuple[str, str, int] | None = None
    for path, line in zip(found.paths, found.lines, strict=True):
        here = _HERE if path.startswith("/") else own
        storage = _storage(path) if "://" in path else here
        if first is None:
            first = storage, path, line
        elif storage != first[0]:
            raise ConfigError(
                f"data.source = {config.source}: line {first[2]} ({first[1]}) is of {first[0]}, "
                f"line {line} ({path}) of {storage}; a list takes one storage"
            )
    assert first is not None
    if first[0] != _HERE:
        return _place_remote(config, folder, first[0], found.paths)
    local = folder if isinstance(folder, LocalFolder) else LocalFolder("/")
    return local, [unquote(path[len("file://") :]) if path.startswith("file://") else path for path in found.paths]


def _storage(address: str) -> str:
    """Scheme and host of a URL."""
    match = _STORAGE.match(address)
    return match[0] if match and match[1] != "file" else _HERE


def _place_remote(
    config: DataConfig, folder: Folder, storage: str, paths: Sequence[str]
) -> tuple[Folder, Sequence[str]]:
    """The deepest folder of a storage that holds all `paths`, and these relative to it."""
    own = folder.address[len(storage) :].strip("/") if _storage(folder.address) == storage else None
    start = len(storage) + 1
    names = [posixpath.normpath(path[start:] if "://" in path else f"{own}/{path}".lstrip("/")) for path in paths]
    if any(name.startswith("../") for name in names):
        raise ConfigError(f"data.source = {config.source}: some paths lead out of {storage} (..)")
    if own is not None and all(name.startswith(f"{own}/" if own else "") for name in names):
        return folder, [name[len(own) + bool(own) :] for name in names]
    common = posixpath.commonprefix([min(names), max(names)]).rpartition("/")[0]
    options = _OPTIONS.search(folder.url) if own is not None and isinstance(folder, RemoteFolder) else None
    base, file = locate("data.source", f"{storage}/{common}".rstrip("/") + (options[0] if options else ""))
    return base if file is None else base.below(file), [name[len(common) + bool(common) :] for name in names]


def _check_some_exist(config: DataConfig, folder: Folder, paths: Sequence[str], lines: Sequence[int]) -> None:
    checked = paths[: _CHECKED_LOCALLY if isinstance(folder, LocalFolder) else _CHECKED_REMOTELY]
    for path in checked:
        try:
            folder.stat(path)
        except OSError:
            continue
        return
    many = f"nor are the {len(checked) - 1} after it" if len(checked) > 1 else "it is the only one"
    first = posixpath.join(folder.address, paths[0])
    raise ConfigError(f"data.source = {config.source}: line {lines[0]}: {first} is not there, {many}")


def _split_rows(config: DataConfig, found: _List) -> SplitRows:
    """The rows by split."""
    values = found.values.get(config.split_column)
    if values is None:
        if (config.train_split, config.test_split) != (DataConfig.train_split, DataConfig.test_split):
            choose_splits(config, (), f"split: the list has no column {config.split_column}")
        return SplitRows(np.arange(len(found.paths), dtype=np.int64), None, {})
    codes, names = _encode(values)
    return split_by_code(config, codes, names, f"value in column {config.split_column}")


def _encode(values: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """The place of each value among the different ones (-1: empty), and these."""
    names = sorted(set(values) - {""})
    place = {name: number for number, name in enumerate(names)} | {"": -1}
    return np.fromiter((place[value] for value in values), np.int64, len(values)), names


def hash_files(folder: Folder, names: Iterable[str]) -> bytes:
    """A hash of the names and sizes of files. One that has gone by now counts as empty."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = folder.stat(name).size
        except OSError:
            size = 0
        digest.update(b"%s\0%d\n" % (os.fsencode(name), size))
    return digest.digest()


def _digest(content_hash: bytes, folder: Folder, paths: Sequence[str]) -> str:
    """Of the list, and of the sizes of files on this machine; asking a service for each would take hours."""
    files = hash_files(folder, paths) if isinstance(folder, LocalFolder) else b""
    return hashlib.sha256(content_hash + files).hexdigest()[:DIGEST_LENGTH]
