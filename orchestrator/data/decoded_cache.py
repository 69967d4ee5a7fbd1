"""Decoded images kept on a machine's disk, for every process, epoch, trial and later run that reads the same source.

A cache is a folder with one LMDB environment: many processes and threads read it at once without waiting, one at a time
writes. It never fails a run and never keeps it waiting. Images are written by a thread, which drops what comes in
faster than the disk takes it: a later epoch offers it again. What cannot be read is decoded.

No death of a process and no crash of the machine damages it: data reach the disk before the page that refers to them
(LMDB with `sync` and without `metasync`). Against what the disk itself loses each image has a checksum, and a cache
that is damaged all the same is removed and begun anew. The folder may be deleted at any time.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import stat
import struct
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.images import BadImage

logger = logging.getLogger(__name__)

_DATA = "data.mdb"  # LMDB's name for it
_HEADER = struct.Struct("<III")  # checksum of key, size and pixels; height; width

_MAX_READERS = 1024  # reads at the same moment, over all processes; a slot is 64 bytes
_QUEUE_BYTES = 16 << 20  # images that wait to be written, in each process
_BATCH_BYTES = 4 << 20  # that are worth a transaction, and so a flush of the disk
_BATCH_SECONDS = 1.0  # after which fewer are
_FREE_SHARE = 0.05  # of the disk is left to others; Ray, which keeps its files there too, stops writing at the same
_CLOSE_TIMEOUT_S = 5.0
_CHECKED_HITS = 8  # in each process

_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
    lmdb.BadTxnError,
)

Records = list[tuple[bytes, bytes]]
"""Keys and what is stored under them."""


class DecodedCache:
    """A cache as one process sees it; safe to use from several threads. `open_cache` makes it.

    Attributes:
        problem: Why nothing is read or written, or None.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.problem: str | None = None
        self._folder, self._limit = folder, limit_bytes
        self._env: lmdb.Environment | None = None
        self._file: tuple[int, int] | None = None  # device and inode of what is open
        self._hits = 0
        self._wrote = self._stopped = self._discarded = False
        self._changing = threading.Lock()
        self._writer = _Writer(self._write)
        try:
            self._open()
        except (OSError, lmdb.Error) as error:
            self._give_up_locked(str(error))

    def load(self, key: bytes, decode: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The image under a key, uint8 [height, width, 3], the caller's own; if it is not there, what `decode` gives,
        which is then kept unless it comes in faster than the disk takes it.

        The first that are there are decoded all the same: if one differs, the cache is removed and begun anew.
        """
        env = self._env
        if env is None:
            return decode()
        kept = self._get(env, key)
        if kept is None:
            image = decode()
            self._writer.offer(key, image)
            return image
        self._hits += 1
        if self._hits > _CHECKED_HITS:
            return kept
        try:
            image = decode()
        except BadImage:
            self._discard(env, "holds an image that cannot be read any more")
            raise
        if not np.array_equal(kept, image):
            self._discard(env, "holds an image that is another one by now")
        return image

    def close(self) -> None:
        """Write what waits, as far as some seconds allow. Nothing is kept afterwards."""
        self._writer.close()
        self._env = None

    def _get(self, env: lmdb.Environment, key: bytes) -> NDArray[np.uint8] | None:
        try:
            with env.begin(buffers=True) as txn:
                record = txn.get(key)
                if record is None:
                    return None
                image = _unpack(key, record)
        except lmdb.ReadersFullError:
            env.reader_check()  # processes that were killed while they read have left their slots
            return None
        except _DAMAGED as error:
            self._discard(env, f"is damaged ({error})")
            return None
        except lmdb.Error as error:
            self._give_up(env, str(error))
            return None
        if image is None:
            self._discard(env, "is damaged (an image differs from its checksum)")
        return image

    def _open(self) -> None:
        """Open the environment; it is made if it is not there, and made anew if it is damaged.

        Raises:
            OSError, lmdb.Error: It cannot be.
        """
        removed = None
        with _exclusive(self._folder):
            try:
                env = self._open_environment()
            except _DAMAGED as error:
                logger.warning(
                    "the cache of decoded images %s is damaged (%s): it is begun anew", self._folder, str(error)
                )
                removed = self._move_away()
                env = self._open_environment()
            self._file = _identity(self._folder)
        self._env = env
        if removed is not None:
            shutil.rmtree(removed, ignore_errors=True)

    def _open_environment(self) -> lmdb.Environment:
        make_private_folder(self._folder)
        env = lmdb.open(
            os.fspath(self._folder),
            map_size=self._limit,
            metasync=False,
            max_readers=_MAX_READERS,
            max_spare_txns=4,
            mode=0o600,
        )
        size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if os.stat(self._folder / _DATA).st_size < size:
            env.close()
            raise lmdb.CorruptedError("cut short")  # to touch what is not there would end the process
        env.reader_check()
        return env

    def _move_away(self) -> Path:
        removed = self._folder.with_name(f"{self._folder.name}.{uuid.uuid4().hex}.removed")
        self._folder.rename(removed)
        return removed

    def _discard(self, env: lmdb.Environment, why: str) -> None:
        """Remove what `env` has open and begin anew; the second time, give up. Other processes keep what they have."""
        with self._changing:
            if self._env is not env:
                return  # another thread was quicker
            if self._discarded:
                self._give_up_locked(f"again, it {why}")
                return
            logger.warning("the cache of decoded images %s %s: it is begun anew", self._folder, why)
            self._discarded, self._hits = True, 0
            self._env = None  # not closed: other threads may be reading; the last of them closes it
            try:
                with _exclusive(self._folder):
                    removed = self._move_away() if _identity(self._folder) == self._file else None
                self._open()
            except (OSError, lmdb.Error) as error:
                self._give_up_locked(str(error))
                return
        if removed is not None:
            shutil.rmtree(removed, ignore_errors=True)

    def _give_up(self, env: lmdb.Environment, why: str) -> None:
        with self._changing:
            if self._env is env:
                self._give_up_locked(why)

    def _give_up_locked(self, why: str) -> None:
        self._env, self.problem = None, why
        self._writer.stop()
        logger.warning("the cache of decoded images %s is no longer used: %s", self._folder, why)

    def _write(self, records: Records) -> None:
        """Called by the writer's thread only."""
        env = self._env
        if env is None or self._stopped:
            return
        try:
            self._check_free_space()
            with env.begin(write=True) as txn:
                for key, record in records:
                    txn.put(key, record, overwrite=False)
            self._wrote = True
        except lmdb.MapFullError:
            if len(records) > 1:
                self._write(records[: len(records) // 2])
                self._write(records[len(records) // 2 :])
                return
            # Every process finds it full; those that filled it say so.
            level = logging.WARNING if self._wrote else logging.DEBUG
            self._stop_writing(level, f"is full with {env.stat()['entries']} images")
        except _DAMAGED as error:
            self._discard(env, f"is damaged ({error})")
        except (OSError, lmdb.Error) as error:
            self._stop_writing(logging.WARNING, f"takes no more images: {error}")

    def _check_free_space(self) -> None:
        disk = shutil.disk_usage(self._folder / _DATA)  # fails if it was deleted: then it must not grow unseen
        if disk.free < _FREE_SHARE * disk.total:
            raise OSError(f"less than {_FREE_SHARE:.0%} of its disk is free")

    def _stop_writing(self, level: int, why: str) -> None:
        self._stopped = True
        self._writer.stop()
        logger.log(level, "the cache of decoded images %s %s", self._folder, why)


class _Writer:
    """Hands what is offered to `write`, some megabytes at a time, in a thread of its own."""

    def __init__(self, write: Callable[[Records], None]) -> None:
        self._closed = False
        self._write = write
        self._records: Records = []
        self._bytes = 0  # of what waits or is being written
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def _has_room(self, num_bytes: int) -> bool:
        return not self._closed and (not self._bytes or self._bytes + num_bytes <= _QUEUE_BYTES)

    def offer(self, key: bytes, image: NDArray[np.uint8]) -> None:
        """Take a copy of an image, or drop it if too many wait."""
        if not self._has_room(image.nbytes):
            return
        record = _pack(key, image)
        with self._changed:
            if not self._has_room(len(record)):
                return
            if self._thread is None:
                # A daemon: the disk may keep it waiting when the process is to end.
                self._thread = threading.Thread(target=self._run, name="decoded cache", daemon=True)
                self._thread.start()
            first = not self._records
            self._records.append((key, record))
            self._bytes += len(record)
            if first or self._bytes >= _BATCH_BYTES:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._records or self._closed)
                self._changed.wait_for(lambda: self._bytes >= _BATCH_BYTES or self._closed, timeout=_BATCH_SECONDS)
                records, self._records = self._records, []
            if not records:
                return
            self._write(records)
            with self._changed:
                self._bytes -= sum(len(record) for _, record in records)

    def stop(self) -> None:
        """Take nothing more and forget what waits."""
        with self._changed:
            self._closed = True
            self._records = []
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more; return when what waits is written, or after some seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user can read, where there is none.

    Raises:
        OSError: It cannot be made, or what is there is no folder or another user's.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{path} is a link, not a folder")
    if status.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this")


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Nobody else opens or removes the cache meanwhile. Held for milliseconds."""
    make_private_folder(folder.parent)
    with open(f"{folder}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a cache's file; None if there is none."""
    try:
        status = os.stat(folder / _DATA)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _pack(key: bytes, image: NDArray[np.uint8]) -> bytes:
    height, width = image.shape[:2]
    pixels = image.tobytes()
    return _HEADER.pack(_checksum(key, height, width, pixels), height, width) + pixels


def _unpack(key: bytes, record: memoryview) -> NDArray[np.uint8] | None:
    """The image, copied: the record is there as long as the transaction. None if it is not what was written."""
    if len(record) < _HEADER.size:
        return None
    checksum, height, width = _HEADER.unpack_from(record)
    pixels = np.frombuffer(record, np.uint8, offset=_HEADER.size)
    if len(pixels) != height * width * 3 or checksum != _checksum(key, height, width, pixels.data):
        return None
    return pixels.reshape(height, width, 3).copy()


def _checksum(key: bytes, height: int, width: int, pixels: bytes | memoryview) -> int:
    return zlib.crc32(pixels, zlib.crc32(struct.pack("<II", height, width), zlib.crc32(key)))


_caches: dict[tuple[int, Path], DecodedCache] = {}
_opening = threading.Lock()


def open_cache(folder: Path, limit_bytes: int) -> DecodedCache:
    """This process's view of the cache in `folder`, opened by the first call.

    Args:
        folder: Of this cache alone; its parent, too, must be this user's.
        limit_bytes: Largest size of its file. One that is larger already stays so, and takes no more.
    """
    # A process made by fork must neither use nor close what its parent has open.
    key = (os.getpid(), folder)
    cache = _caches.get(key)
    if cache is None:
        with _opening:
            cache = _caches.get(key)
            if cache is None:
                cache = _caches[key] = DecodedCache(folder, limit_bytes)
    return cache


def close_caches(folder: Path | None = None) -> None:
    """Write what waits in this process and close its caches, or one of them; `open_cache` opens them again."""
    with _opening:
        mine = [key for key in _caches if key[0] == os.getpid() and folder in (None, key[1])]
        caches = [_caches.pop(key) for key in mine]
    for cache in caches:
        cache.close()


def _forget_lock() -> None:
    global _opening
    _opening = threading.Lock()


atexit.register(close_caches)
os.register_at_fork(after_in_child=_forget_lock)
