"""Folders of files, on this machine or wherever pyarrow or fsspec reach. Imports pyarrow only for the latter.

A `Folder` is what readers read from: it lists its files, and opens one by its name relative to the folder. It pickles
as its address, and connects in the process that reads.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit

from dino_core.config import ConfigError
from orchestrator.data.patterns import is_pattern, select
from orchestrator.data.urls import SCHEME, limit_retries, no_such_scheme, split_query
from orchestrator.data.urls import is_url as is_url
from orchestrator.data.urls import refuse_secrets as refuse_secrets

if TYPE_CHECKING:
    import pyarrow.fs as pafs

_SAFE = "/%:@!$&'()*+,;=[]"
_NATIVE = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
"""Schemes that pyarrow opens itself; all others are fsspec's."""
_OPENING_RETRIES_S, _READING_RETRIES_S = 5, 60
"""How long Google's client tries again, by itself 15 minutes and in silence. Whoever has just typed an address waits at
the screen; a run that reads for days should outlast a short failure, and asks again itself."""


class FileStat(NamedTuple):
    """What tells one version of a file from another."""

    size: int
    """Bytes."""
    modified_ns: int
    """Time of the last change, nanoseconds; 0 where the storage does not say."""


Listing = dict[str, FileStat | None]
"""Files by name, sorted by the bytes of it. None where a listing does not tell, and a call for each file would."""


class Folder(Protocol):
    """Files below one place, named by their paths relative to it, with `/`. Cheap to pickle."""

    @property
    def address(self) -> str:
        """The folder, for people and for records: without passwords."""

    def files(self) -> list[str]:
        """The names of all files below, sorted by their bytes; hidden ones (a part that begins with a dot) left out.

        Raises OSError if it cannot be listed.
        """

    def listing(self, recursive: bool = True) -> Listing:
        """`files`, or those of this folder alone, with what the listing itself tells of them."""

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
        """See `Folder`."""
        return list(self.listing())

    def listing(self, recursive: bool = True) -> Listing:
        """Links are followed, except one that leads back to a folder above it.

        What leads nowhere (a link to itself, a sub-folder that went meanwhile) is listed as a file, which then cannot
        be read. A sub-folder that may not be entered is an error: its images would be missing without a word.
        """
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
                    if not _is_folder(entry):
                        names.append(prefix + entry.name)
                    elif recursive:
                        try:
                            visit(entry.path, f"{prefix}{entry.name}/", above | {here})
                        except (FileNotFoundError, NotADirectoryError):  # it has gone meanwhile
                            names.append(prefix + entry.name)

        visit(self.root, "", frozenset())
        return dict.fromkeys(sorted(names, key=os.fsencode))

    def stat(self, name: str) -> FileStat:
        """See `Folder`."""
        path = os.path.join(self.root, name)
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise FileNotFoundError(errno.ENOENT, "a link that leads to itself", path) from error
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a storage service: `inner`, a path as its files have it, below `url`."""

    url: str
    """With the options that say how to reach the service; special characters encoded where the service wants it."""
    inner: str = ""

    @property
    def address(self) -> str:
        """The URL without password and query."""
        plain = split_query(self.url)[0]
        scheme, _, rest = plain.partition("://")
        authority, slash, path = rest.partition("/")
        user, at, host = authority.rpartition("@")
        shown = f"{scheme}://{host if ':' in user else user + at + host}{slash}{path}"
        return self._join(shown.removesuffix("/") if path else shown, self.inner)

    def files(self) -> list[str]:
        """See `Folder`. One request per thousand files or so."""
        return list(self.listing())

    def listing(self, recursive: bool = True) -> Listing:
        """See `Folder`. Tells sizes and ages without further requests."""
        import pyarrow.fs as pafs

        filesystem, path = self._connect()
        start = len(path) + 1
        found = {
            info.path[start:]: FileStat(info.size or 0, info.mtime_ns or 0)
            for info in filesystem.get_file_info(pafs.FileSelector(path or "/", recursive=recursive))
            if info.type == pafs.FileType.File
        }
        shown = (name for name in found if not any(part.startswith(".") for part in name.split("/")))
        return {name: found[name] for name in sorted(shown, key=os.fsencode)}

    def stat(self, name: str) -> FileStat:
        """See `Folder`."""
        import pyarrow.fs as pafs

        filesystem, path = self._connect()
        info = filesystem.get_file_info(f"{path}/{name}")
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.address}/{name}: no such file")
        return FileStat(info.size or 0, info.mtime_ns or 0)

    def open(self, name: str) -> IO[bytes]:
        """See `Folder`."""
        filesystem, path = self._connect()
        try:
            file: Any = filesystem.open_input_file(f"{path}/{name}")
        except OSError as error:
            if error.errno is None and type(error) is OSError:
                self.stat(name)  # says by its type that the file is not there, where the service's error does not
            raise
        return file  # a binary file in all but its declared type

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with self.open(name) as file:
            return file.read()

    def below(self, name: str) -> RemoteFolder:
        """See `Folder`."""
        return RemoteFolder(self.url, self._join(self.inner, name))

    def _connect(self) -> tuple[pafs.FileSystem, str]:
        """The service, and what it calls this folder."""
        filesystem, path = connect(self.url)
        return filesystem, f"{path}/{self.inner}" if self.inner else path

    @staticmethod
    def _join(folder: str, name: str) -> str:
        return f"{folder}/{name}" if folder and name else folder or name


class Place(NamedTuple):
    """What an address names: a file, the files of a folder, or those that match a pattern."""

    folder: Folder
    files: Listing
    """Not empty, unless a folder is."""
    address: str
    """As given, absolute and without the query."""
    is_file: bool
    """It is one file, named as such."""


def find(key: str, address: str) -> Place:
    """The files that `address` names: a path or URL, whose last part may be a pattern (see `patterns`).

    Raises:
        ConfigError: As `locate` does; a folder that cannot be listed; or a pattern that matches nothing. Names `key`.
    """
    parent, name, query = _last_part(address)
    try:
        matching = is_pattern(name)
        if matching and not is_url(address) and os.path.lexists(os.path.expanduser(address)):
            matching = False  # a file of that very name
        folder, file = locate(key, f"{parent}{query}" if matching else address)
        if file is not None and not matching:
            return Place(folder, {file: None}, f"{folder.address}/{file}", True)
        if file is not None:
            raise ConfigError(f"{key} = {address}: {parent} is a file, not a folder")
        listing = folder.listing(recursive=not matching)
        if not matching:
            return Place(folder, listing, folder.address, False)
        chosen = {file: listing[file] for file in select(name, listing)}
    except OSError as error:
        raise ConfigError(f"{key} = {address}: cannot be listed: {_innermost(str(error))}") from error
    except ConfigError as error:
        if is_pattern(parent):
            raise ConfigError(f"{error}; only the last part of an address may be a pattern") from None
        raise
    except ValueError as error:
        raise ConfigError(f"{key} = {address}: {error}") from error
    return Place(folder, chosen, f"{folder.address}/{name}", False)


def _last_part(address: str) -> tuple[str, str, str]:
    """The folder of an address, its last part, and its query with the question mark."""
    if not is_url(address):
        parent, name = os.path.split(address)
        return parent or ".", name, ""
    plain, query = split_query(address)
    start = plain.index("://") + 3
    parent, _, name = plain[start:].rpartition("/")
    return plain[:start] + parent, name, query


def locate(key: str, address: str) -> tuple[Folder, str | None]:
    """The folder that `address` (a path or URL) names and None; or, if it names a file, its folder and its name.

    Services get their credentials as their own tools do: from the environment (`AWS_ACCESS_KEY_ID`, `HF_TOKEN`, ...) or
    files such as `~/.aws/credentials`; for fsspec's file systems also `FSSPEC_SFTP_PASSWORD` and its like. S3 of
    another provider is `AWS_ENDPOINT_URL=http://host:port`, or the address
    `s3://bucket/folder?endpoint_override=http://host:port&region=...`.

    Raises:
        ConfigError: Nothing there, no such scheme, a package that is missing, a password in the address (a run records
            it for all to read), or a service that does not answer. Names `key`.
    """
    if "://" in address:  # in a path too: it may be one of fsspec's chains of URLs, and messages repeat it
        refuse_secrets(key, address)
    scheme = SCHEME.match(address)
    if scheme is None or scheme[1] == "file":
        return _locate_local(key, address, scheme is not None)
    plain, query = split_query(address)
    shown = plain.removesuffix("/")
    try:
        filesystem, path = connect(limit_retries(address, _OPENING_RETRIES_S))
        kind = filesystem.get_file_info(path or "/").type.name
    except ImportError as error:
        raise ConfigError(f"{key} = {shown}: needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} = {shown}: cannot be opened: {_innermost(str(error))}") from error
    if kind == "Directory":
        return RemoteFolder(address), None
    if kind == "File":
        parent, _, _ = _last_part(address)
        return RemoteFolder(f"{parent}{query}"), path.rpartition("/")[2]
    raise ConfigError(f"{key} = {shown}: no such file or folder, or it may not be seen with these credentials")


def _locate_local(key: str, address: str, is_file_url: bool) -> tuple[LocalFolder, str | None]:
    if is_file_url:
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{key} = {address}: after file:// comes an absolute path, so file:///...")
        path = Path(unquote(parts.path))
    else:
        path = Path(address).expanduser()
    try:
        if not path.exists():
            raise ConfigError(f"{key} = {address}: no such file or folder{_nearest(path)}")
    except OSError as error:
        raise ConfigError(f"{key} = {address}: cannot be opened: {error}") from error
    path = path.absolute()  # whatever the working directory of the process that will read
    if path.is_file():
        return LocalFolder(os.fspath(path.parent)), path.name
    if not path.is_dir():
        raise ConfigError(f"{key} = {address}: is neither a file nor a folder")
    return LocalFolder(os.fspath(path)), None


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    near = difflib.get_close_matches(path.name, os.listdir(parent), n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def _innermost(message: str) -> str:
    """The first line of a message; of one of Google's client, which wraps causes in each other, the innermost cause."""
    line = message.partition("\n")[0]
    if not line.startswith("google::cloud::Status("):
        return line
    cause = re.split(r"last message of |error message was: ", line.partition(" error_info=")[0])[-1]
    if "OAuth2" in line:
        cause += (
            "; no credentials could be had: GOOGLE_APPLICATION_CREDENTIALS names a file with some, and "
            "gs://anonymous@bucket/... reads a public bucket without"
        )
    return cause


@lru_cache(maxsize=16)
def connect(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URL and the path within it, without a slash at its end.

    Raises:
        ValueError: No such scheme, or an option that it does not know.
        ImportError: fsspec's package for it is not installed.
    """
    import pyarrow.fs as pafs

    scheme = url.partition("://")[0]
    if scheme in _NATIVE:
        plain, query = split_query(limit_retries(url, _READING_RETRIES_S))
        # What is no part of any URL is part of a name; what is already encoded stays.
        filesystem, path = pafs.FileSystem.from_uri(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", quote(plain, _SAFE)) + query)
        return filesystem, path.rstrip("/")
    import fsspec

    from orchestrator.data.fsspec_files import Handler, os_errors

    known: Iterable[str] = fsspec.available_protocols()
    if scheme not in known:
        raise ValueError(no_such_scheme(scheme, {*_NATIVE, "file", *known}))
    with os_errors():
        filesystem, path = fsspec.core.url_to_fs(url)
    return pafs.PyFileSystem(Handler(filesystem)), path.rstrip("/")
