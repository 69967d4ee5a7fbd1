"""The regular files of a tar archive: where each lies. Nothing is ever extracted.

Reads ustar, GNU and pax headers (long names, sizes past 8 GiB), as the `pax` and `tar` pages of POSIX and GNU tell.
Python's own `tarfile` needs several times as long per member, and takes an archive that is cut short for a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_TAIL = 64 << 10
_MAX_EXTENSION = 1 << 20
_REGULAR = frozenset(b"07\0")
_WITHOUT_BODY = frozenset(b"123456")  # links, devices, folders, pipes
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarError(ValueError):
    """An archive that is not whole or not a tar; the message says what and at which byte."""


class Member(NamedTuple):
    """A regular file of an archive."""

    name: bytes
    offset: int
    """First byte of its content."""
    size: int


class Window:
    """A file read forwards through a buffer: small pieces cost no system call or request each."""

    def __init__(self, file: IO[bytes], buffer_bytes: int) -> None:
        self._file, self._buffer_bytes = file, buffer_bytes
        self._start, self._data = 0, b""
        self.size = file.seek(0, 2)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset`; fewer than `size` only at the end. Raises OSError."""
        first = offset - self._start
        if first < 0 or first + size > len(self._data):
            self._file.seek(offset)
            self._start, self._data = offset, self._read(max(size, self._buffer_bytes))
            first = 0
        return self._data[first : first + size]

    def _read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def walk(window: Window) -> Iterator[Member]:
    """The regular files of an archive, in its order.

    Raises:
        TarError: Not a tar, compressed, damaged, cut short, several archives in one file, or with sparse files.
        OSError: It cannot be read.
    """
    offset = 0
    name: bytes | None = None  # of the next member, where a header before it says so
    size: int | None = None
    while True:
        block = window.read(offset, _BLOCK)
        if block == _ZEROS:
            _check_end(window, offset)
            return
        header_offset = offset
        kind, body = _parse(block, offset)
        offset += _BLOCK
        if kind in b"Lx":
            if offset + body > window.size or body > _MAX_EXTENSION:
                raise TarError(_cut(header_offset, window.size))
            data = window.read(offset, body)
            if kind == ord("L"):
                name = data.partition(b"\0")[0]
            else:
                pax = _pax(data, header_offset)
                name, size = pax.get(b"path", name), int(pax[b"size"]) if b"size" in pax else size
            offset += _padded(body)
            continue
        if kind in b"gK":
            offset += _padded(body)
            continue
        if kind == ord("S"):
            raise TarError(f"byte {header_offset}: a sparse file; write the archive without --sparse")
        body = body if size is None else size
        name = _name(block) if name is None else name
        if kind in _REGULAR and not name.endswith(b"/"):
            if offset + body > window.size:
                raise TarError(_cut(header_offset, window.size))
            yield Member(name, offset, body)
        offset += 0 if kind in _WITHOUT_BODY else _padded(body)
        name = size = None


def _parse(block: bytes, offset: int) -> tuple[int, int]:
    """The type and the size of the body that a header tells."""
    if len(block) < _BLOCK:
        if not offset:
            raise TarError("not a tar archive: shorter than one header")
        raise TarError(f"cut short: it ends at byte {offset + len(block)} without an end mark")
    try:
        check, size = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        check, size = -1, 0
    total = sum(block) - sum(block[148:156]) + 8 * 32
    # Some old programs added the bytes as signed ones.
    if size < 0 or (check != total and check != total - 256 * sum(byte > 127 for byte in block)):
        if offset:
            raise TarError(f"damaged: no header at byte {offset}")
        for magic, compression in _COMPRESSIONS.items():
            if block.startswith(magic):
                raise TarError(
                    f"compressed ({compression}): images are compressed already, and single ones cannot be "
                    "read from a compressed archive; unpack it to a plain .tar"
                )
        raise TarError("not a tar archive")
    return block[156], size


def _number(data: bytes) -> int:
    """Octal text, or big-endian after a byte that marks it so."""
    if data[0] in (0x80, 0xFF):
        return int.from_bytes(data[1:], "big", signed=data[0] == 0xFF)
    return int(data.partition(b"\0")[0].strip() or b"0", 8)


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(data: bytes, offset: int) -> dict[bytes, bytes]:
    """Records `length key=value newline`."""
    records: dict[bytes, bytes] = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise TarError(f"damaged: no pax records at byte {offset}")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        data = data[int(length) :]
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise TarError(f"byte {offset}: a sparse file; write the archive without --sparse")
    if not records.get(b"size", b"0").isdigit():
        raise TarError(f"damaged: no pax records at byte {offset}")
    return records


def _check_end(window: Window, offset: int) -> None:
    """What follows the end mark may be zeros only: `cat` of archives would else lose all but the first."""
    if window.read(offset, _TAIL).strip(b"\0"):
        raise TarError(f"more than one archive in the file: data follows the end mark at byte {offset}; pack it anew")


def _cut(offset: int, size: int) -> str:
    return f"cut short: the member at byte {offset} reaches past the end at byte {size}"


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
