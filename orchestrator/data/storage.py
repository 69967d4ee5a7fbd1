"""Folders of files, on this machine or wherever pyarrow or fsspec reach. Imports pyarrow only for the latter.

A `Folder` is what readers read from: it lists its files, and opens one by its name relative to the folder. It pickles
as its address, and connects in the process that reads.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from dino_core.config import ConfigError

if TYPE_CHECKING:
    import pyarrow.fs as pafs

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NATIVE = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
"""Schemes that pyarrow opens itself; all others are fsspec's."""


class FileStat(NamedTuple):
    """What tells one version of a file from another."""

    size: int
    """Bytes."""
    modified_ns: int
    """Time of the last change, nanoseconds; 0 where the storage does not say."""


class Folder(Protocol):
    """Files below one place, named by their paths relative to it, with `/`. Cheap to pickle."""

    @property
    def address(self) -> str:
        """The folder, for people and for records: without passwords."""

    def files(self) -> list[str]:
        """The names of all files below, sorted by their bytes; hidden ones (a part that begins with a dot) left out.

        Raises OSError if it cannot be listed.
        """

    def stat(self, name: str) -> FileStat:
        """Size and age of a file. Raises FileNotFoundError if it is not there."""

    def open(self, name: str) -> IO[bytes]:
        """A file for reading, seekable. Raises OSError."""

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises OSError."""

    def below(self, name: str) -> Folder:
        """A folder in this folder."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder that the operating system opens; `root` is absolute."""

    root: str

    @property
    def address(self) -> str:
        """The path."""
        return self.root

    def files(self) -> list[str]:
        """Links are followed, except one that leads back to a folder above it."""
        names: list[str] = []

        def visit(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:
                return
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        visit(entry.path, f"{prefix}{entry.name}/", above | {here})
                    else:
                        names.append(prefix + entry.name)

        visit(self.root, "", frozenset())
        return sorted(names, key=os.fsencode)

    def stat(self, name: str) -> FileStat:
        """See `Folder`."""
        status = os.stat(os.path.join(self.root, name))
        return FileStat(status.st_size, status.st_mtime_ns)

    def open(self, name: str) -> IO[bytes]:
        """See `Folder`."""
        return open(os.path.join(self.root, name), "rb")

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with self.open(name) as file:
            return file.read()

    def below(self, name: str) -> LocalFolder:
        """See `Folder`."""
        return LocalFolder(os.path.join(self.root, name))


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a storage service. `url` may carry a password, which `address` leaves out."""

    url: str

    @property
    def address(self) -> str:
        """The URL without user, password, query and fragment."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def files(self) -> list[str]:
        """See `Folder`. Asks the service for the whole listing at once."""
        import pyarrow.fs as pafs

        filesystem, root = _connect(self.url)
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        start = len(root.rstrip("/")) + 1
        names = (info.path[start:] for info in found if info.type == pafs.FileType.File)
        return sorted((n for n in names if not any(p.startswith(".") for p in n.split("/"))), key=os.fsencode)

    def stat(self, name: str) -> FileStat:
        """See `Folder`."""
        import pyarrow.fs as pafs

        filesystem, path = self._path(name)
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.address}/{name}: no such file")
        return FileStat(info.size, info.mtime_ns or 0)

    def open(self, name: str) -> IO[bytes]:
        """See `Folder`."""
        filesystem, path = self._path(name)
        file: Any = filesystem.open_input_file(path)  # pyarrow's file: a binary file in all but its declared type
        return file

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with self.open(name) as file:
            return file.read()

    def below(self, name: str) -> RemoteFolder:
        """See `Folder`."""
        parts = urlsplit(self.url)
        return RemoteFolder(parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl())

    def _path(self, name: str) -> tuple[pafs.FileSystem, str]:
        filesystem, root = _connect(self.url)
        return filesystem, f"{root.rstrip('/')}/{name}"


def is_url(address: str) -> bool:
    """Whether it names a place by its scheme (`s3://...`) rather than by a path."""
    return _SCHEME.match(address) is not None


def locate(key: str, address: str) -> tuple[Folder, str | None]:
    """The folder that `address` (a path or URL) names and None; or, if it names a file, its folder and its name.

    Raises:
        ConfigError: Nothing there, no such scheme, a package that is missing, or a service that does not answer.
            Names `key`.
    """
    scheme = _SCHEME.match(address)
    if scheme is None or scheme[1] == "file":
        path = Path(unquote(urlsplit(address).path) if scheme else address).expanduser()
        if not path.exists():
            raise ConfigError(f"{key} = {address}: no such file or folder{_nearest(path)}")
        path = path.absolute()  # whatever the working directory of the process that will read
        return (LocalFolder(os.fspath(path.parent)), path.name) if path.is_file() else (LocalFolder(str(path)), None)
    folder = RemoteFolder(address)
    try:
        kind = _kind(address)
    except ImportError as error:
        raise ConfigError(f"{key} = {folder.address}: needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} = {folder.address}: cannot be opened: {_without(address, error)}") from error
    if kind == "folder":
        return folder, None
    if kind == "file":
        parts = urlsplit(address)
        parent, _, name = parts.path.rpartition("/")
        return RemoteFolder(parts._replace(path=parent).geturl()), unquote(name)
    raise ConfigError(f"{key} = {folder.address}: no such file or folder")


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    near = difflib.get_close_matches(path.name, os.listdir(parent), n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def _kind(url: str) -> str | None:
    import pyarrow.fs as pafs

    filesystem, path = _connect(url)
    kind = filesystem.get_file_info(path).type
    return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(kind)


@lru_cache(maxsize=16)
def _connect(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URL and the path within it.

    Raises:
        ValueError: No such scheme, or an option that it does not know.
        ImportError: fsspec's package for it is not installed.
    """
    import pyarrow.fs as pafs

    scheme = urlsplit(url).scheme
    if scheme in _NATIVE:
        return pafs.FileSystem.from_uri(url)
    import fsspec

    known: Iterable[str] = fsspec.available_protocols()
    if scheme not in known:
        names = sorted({*_NATIVE, "file", *known})
        near = difflib.get_close_matches(scheme, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no such scheme as {scheme}://; there are {', '.join(names)}{hint}")
    filesystem, path = fsspec.core.url_to_fs(url)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _without(url: str, error: Exception) -> str:
    """The message of an error, without the passwords that the URL holds."""
    parts = urlsplit(url)
    message = str(error)
    for secret in filter(None, (parts.query, parts.netloc.rpartition("@")[0], parts.password)):
        message = message.replace(secret, "***")
    return message
