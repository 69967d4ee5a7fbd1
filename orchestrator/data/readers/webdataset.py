"""WebDataset: tar files whose members of the same key (`0001.jpg`, `0001.cls`, `0001.json`) are one sample.

Members are found by an index of each shard, so any image can be read by itself. The index is made by a walk over the
headers, for which a remote shard is read through once; it is kept on disk under the shard's name, size and age. Only
images, .cls and .json are ever read: .pkl, .pyd and .pt are not, and links and names that lead out of a folder mean
nothing, since no member is extracted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers.shard_names import check_complete
from orchestrator.data.readers.tar_index import Choice, Shard, ShardIndex, index_shard
from orchestrator.data.readers.text_labels import are_numbers, choose_labels
from orchestrator.data.split import DIGEST_LENGTH, Labels, Source, build_source, choose_splits, unknown
from orchestrator.data.storage import Folder, LocalFolder

_STRETCH_BYTES = 8 << 20
_STRETCH_IMAGES = 64
_CACHE_BYTES = 256 << 20
_TOUCHED = 1024
_THREADS = 8
_OPEN_SHARDS = 64


class _OpenShard:
    """A shard that this process reads from; closed when the last thread is done with it."""

    def __init__(self, shard: Shard) -> None:
        self._file = shard.folder.open(shard.name)
        self._descriptor = self._file.fileno() if isinstance(shard.folder, LocalFolder) else None
        self._lock = threading.Lock()
        size = self._file.seek(0, os.SEEK_END)
        is_as_old = self._descriptor is None or os.fstat(self._descriptor).st_mtime_ns == shard.modified_ns
        if size != shard.size or not is_as_old:
            raise OSError(errno.ESTALE, f"{shard.folder.address}/{shard.name} has changed since the run began")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises OSError."""
        if self._descriptor is not None:
            data = os.pread(self._descriptor, size, offset)
        else:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(size)
        if len(data) != size:
            raise OSError(errno.EIO, f"{len(data)} bytes where {size} were asked for")
        return data


_open_shard = lru_cache(maxsize=_OPEN_SHARDS)(_OpenShard)


class _Cache:
    """Stretches of remote shards read last in this process, up to `_CACHE_BYTES` (but at least one).

    A stretch is fetched when a second of its images is wanted soon after a first: in a random order over a large set
    the first is all that is ever wanted.
    """

    def __init__(self) -> None:
        self._stretches: OrderedDict[tuple[Shard, int], Future[bytes]] = OrderedDict()
        self._touched: OrderedDict[tuple[Shard, int], None] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, shard: Shard, offset: int, fetch: Callable[[], bytes]) -> bytes | None:
        """The stretch at `offset`; None if it is not worth its reading yet. Threads that want the same wait for one."""
        key = (shard, offset)
        with self._lock:
            stretch = self._stretches.get(key)
            if stretch is not None:
                self._stretches.move_to_end(key)
            elif key not in self._touched:
                self._touched[key] = None
                if len(self._touched) > _TOUCHED:
                    self._touched.popitem(last=False)
                return None
            else:
                promise = self._stretches[key] = Future[bytes]()
        if stretch is not None:
            return stretch.result()
        try:
            data = fetch()
        except BaseException as error:
            with self._lock:
                del self._stretches[key]
            promise.set_exception(error)
            raise
        promise.set_result(data)
        with self._lock:
            self._bytes += len(data)
            while self._bytes > _CACHE_BYTES and len(self._stretches) > 1:
                oldest = next(iter(self._stretches))
                if not self._stretches[oldest].done():
                    break  # on its way; whoever fetches it makes room
                self._bytes -= len(self._stretches.pop(oldest).result())
        return data


_cache = _Cache()


class Tars:
    """A `Reader` of the images of some shards. It pickles as a few arrays."""

    def __init__(self, shards: Sequence[Shard], indexes: Sequence[ShardIndex]) -> None:
        self._shards = tuple(shards)
        counts = [len(index.offsets) for index in indexes]
        self._starts = np.cumsum([0, *counts], dtype=np.int64)  # [num_shards + 1] first image of each
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._names = np.concatenate([index.names for index in indexes])
        name_starts = np.cumsum([0, *(len(index.names) for index in indexes)], dtype=np.int64)
        ends = [index.ends + start for index, start in zip(indexes, name_starts[:-1], strict=True)]
        self._ends = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
        self._units = _stretches(np.repeat(np.arange(len(counts)), counts), self._offsets)
        self._is_local = isinstance(shards[0].folder, LocalFolder)

    def __len__(self) -> int:
        return len(self._offsets)

    def _place(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._shards[int(np.searchsorted(self._starts, index, side="right")) - 1]

    def read(self, index: int) -> bytes:
        shard = self._place(index)
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        if self._is_local:
            return _open_shard(shard).read(offset, size)
        number = int(np.searchsorted(self._units, index, side="right"))
        first = int(self._units[number - 1])
        last = (int(self._units[number]) if number < len(self._units) else len(self)) - 1
        start, stop = int(self._offsets[first]), int(self._offsets[last] + self._sizes[last])
        stretch = _cache.get(shard, start, lambda: _open_shard(shard).read(start, stop - start))
        if stretch is None:
            return _open_shard(shard).read(offset, size)
        return stretch[offset - start : offset - start + size]

    def name(self, index: int) -> str:
        shard = self._place(index)
        return f"{shard.name}:{os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]].tobytes())}"

    def units(self) -> NDArray[np.int64]:
        """Of a local shard too, each of whose images is read by itself: neighbours on a disk or a network mount."""
        return self._units

    def fingerprint(self) -> bytes:
        """A hash of the names and sizes of the shards and of the names and places of the images."""
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(b"%s\0%d\n" % (os.fsencode(shard.name), shard.size))
        for array in (self._starts, self._offsets, self._sizes, self._ends, self._names):
            digest.update(array.tobytes())
        return digest.digest()


def _stretches(shards: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """First image of each stretch: of one shard, of one piece of `_STRETCH_BYTES` of it, and `_STRETCH_IMAGES` long."""
    starts = np.diff(shards, prepend=-1).astype(bool) | np.diff(offsets // _STRETCH_BYTES, prepend=-1).astype(bool)
    firsts = np.flatnonzero(starts)
    rank = np.arange(len(offsets)) - np.repeat(firsts, np.diff(firsts, append=len(offsets)))
    return np.flatnonzero(rank % _STRETCH_IMAGES == 0)


def open_tars(config: DataConfig, folder: Folder, names: Sequence[str]) -> Source:
    """The source of the shards `names` (not empty, of `folder`), in that order.

    An image is the member whose extension, which is all that follows the first dot of its name, is
    `data.image_column`, or by default that of an image format; a sample has at most one. Its label is the text of its
    .cls, or the field `data.label_column` of its .json (only that, if it is not the default). A source without any
    takes the last folder in the names of the members for labels, if all have one and there are at least two.

    Splits are the folders of the shards, or the last word before the number in their names (`cc3m-train-0001.tar`),
    where all shards have one, there are several, and one is `data.train_split` or `data.test_split`. Otherwise, unless
    a split was asked for, all shards are training data.

    Raises:
        ConfigError: A shard that is damaged, cut short, compressed or missing from a numbered set, no images, or a
            label or split that is not there.
    """
    check_complete(config, names)
    train, test, unused = _split_shards(config, names)
    opened = _open_all(config, folder, [*train, *test])
    shards, indexes = [shard for shard, _ in opened], [index for _, index in opened]
    if not any(len(index.offsets) for index in indexes[: len(train)]):
        raise _no_images(config, indexes)
    label_names, codes, numbers = _encode_labels(config, indexes)
    parts: list[tuple[Tars, Labels] | None] = []
    for part in (slice(0, len(train)), slice(len(train), None)):
        if not any(len(index.offsets) for index in indexes[part]):
            parts.append(None)
            continue
        labels = choose_labels(label_names, np.concatenate(codes[part]), numbers=numbers)
        parts.append((Tars(shards[part], indexes[part]), labels))
    location = f"{folder.address}/{names[0]}" if len(names) == 1 else folder.address
    digest = partial(_digest, [part[0] for part in parts if part])
    return build_source("webdataset", location, parts, digest, unused=dict.fromkeys(unused))


def _split_shards(config: DataConfig, names: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """The shards of the training and of the test split, and the names of other splits."""
    asked = (config.train_split, config.test_split) != (DataConfig.train_split, DataConfig.test_split)
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    prefixes = [_prefix(name) for name in names]
    words = [match[0] if (match := re.search(r"[A-Za-z]+$", prefix)) else "" for prefix in prefixes]
    for splits in (folders, prefixes, words):
        found = set(splits) - {""}
        if found & {config.train_split, config.test_split} and (asked or ("" not in splits and len(found) > 1)):
            train, test = choose_splits(config, found, "split of the shards")
            pairs = list(zip(names, splits, strict=True))
            of_train, of_test = ([name for name, split in pairs if split == wanted] for wanted in (train, test))
            return of_train, of_test, sorted({*splits} - {train, test})
    if asked:
        choose_splits(config, {*folders, *words} - {""}, "split of the shards, by folder or name")
    return names, (), ()


def _prefix(name: str) -> str:
    """What comes before the number in the name of a shard."""
    stem = os.path.basename(name).removesuffix(".tar")
    counted = re.match(r"(.+?)[-_.]\d+-of-\d+", stem)
    return counted[1] if counted else re.sub(r"[-_.]*\d+$", "", stem)


def _open_all(config: DataConfig, folder: Folder, names: Sequence[str]) -> list[tuple[Shard, ShardIndex]]:
    is_default = config.image_column == DataConfig.image_column
    choice = Choice(None if is_default else config.image_column.lower().removeprefix("."), config.label_column)

    def open_one(name: str) -> tuple[Shard, ShardIndex]:
        try:
            shard = Shard(folder, name, *folder.stat(name))
            return shard, index_shard(shard, choice)
        except OSError as error:
            raise ConfigError(f"data.source = {config.source}: {name} cannot be read: {error}") from error

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tar index") as pool:
        return list(pool.map(open_one, names))


def _no_images(config: DataConfig, indexes: Sequence[ShardIndex]) -> ConfigError:
    others = {extension for index in indexes for extension in index.other_extensions()}
    if config.image_column != DataConfig.image_column:
        return unknown("data.image_column", config.image_column, others, f"extension of members in {config.source}")
    listed = (
        f"; their members are .{', .'.join(sorted(others))}: set data.image_column to one of these" if others else ""
    )
    return ConfigError(f"data.source = {config.source}: no images in the shards{listed}")


def _encode_labels(
    config: DataConfig, indexes: Sequence[ShardIndex]
) -> tuple[list[str], list[NDArray[np.int64]], bool]:
    """The names of the labels, for each shard the places of those of its images, and whether they are numbers."""
    found = [index.label_names() for index in indexes]
    codes = [index.codes for index in indexes]
    names = sorted({name for part in found for name in part})
    numbers = are_numbers(names)
    if not names:
        if config.label_column != DataConfig.label_column:
            raise ConfigError(f"data.label_column = {config.label_column}: no .json in the shards has such a field")
        folders = [[name.rpartition("/")[0].rpartition("/")[2] for name in index.members()] for index in indexes]
        names = sorted({name for part in folders for name in part})
        if "" in names or len(names) < 2:
            return [], codes, False
        found, numbers = folders, False
        codes = [np.arange(len(part)) for part in folders]
    place = {name: number for number, name in enumerate(names)}
    merged = [np.array([*(place[name] for name in part), -1], dtype=np.int64) for part in found]  # code -1 is the last
    return names, [table[code] for table, code in zip(merged, codes, strict=True)], numbers


def _digest(readers: Sequence[Tars]) -> str:
    return hashlib.sha256(b"".join(reader.fingerprint() for reader in readers)).hexdigest()[:DIGEST_LENGTH]
