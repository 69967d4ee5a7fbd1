"""A new folder of files, on this machine or behind a URL, that is either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from dino_core.config import ConfigError
from orchestrator.data.storage import RemoteFolder, connect, is_url, refuse_secrets
from orchestrator.errors import RunFailed


class Destination(Protocol):
    """A folder that is being written."""

    @property
    def address(self) -> str:
        """The finished folder, without passwords."""

    @property
    def free_bytes(self) -> int | None:
        """Room that is left; None where nobody can say."""

    @property
    def scratch(self) -> Path | None:
        """A local folder on the same disk that goes with the unfinished one; None if the folder is not local."""

    def open(self, name: str) -> IO[bytes]:
        """A new file, for writing. Raises OSError."""

    def publish(self) -> None:
        """Make the folder final."""

    def discard(self) -> None:
        """Remove everything written."""


class _LocalDestination:
    """Written as `.NAME.partial` beside the folder and renamed when whole."""

    def __init__(self, dest: str, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self.scratch = self._partial / ".scratch"
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"DEST = {dest}: is there already and not empty; name a new folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"DEST = {dest}: {path.parent} cannot be made: {error.strerror}") from error
        try:
            self._partial.mkdir()
        except FileExistsError:
            raise ConfigError(
                f"DEST = {dest}: another conversion writes it, or was killed while it did; in the latter case remove "
                f"{self._partial}"
            ) from None
        except OSError as error:
            raise ConfigError(f"DEST = {dest}: cannot be written: {error.strerror}") from error

    @property
    def address(self) -> str:
        return os.fspath(self._path)

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self._partial).free

    def open(self, name: str) -> IO[bytes]:
        return open(self._partial / name, "xb")

    def publish(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in [*self._partial.iterdir(), self._partial]:
            _to_disk(path)
        os.rename(self._partial, self._path)
        _to_disk(self._path.parent)

    def discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Flush a file or folder, lest a crash of the machine leave a whole folder of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RemoteDestination:
    """Written in place: storage services cannot rename. The last file written says that the others are whole."""

    scratch = None
    free_bytes = None

    def __init__(self, url: str) -> None:
        import pyarrow.fs as pafs

        refuse_secrets("DEST", url)
        self.address = RemoteFolder(url).address
        self._written: list[str] = []
        try:
            self._filesystem, root = connect(url)
            self._root = root.rstrip("/")
            kind = self._filesystem.get_file_info(self._root).type
            full = kind == pafs.FileType.Directory and bool(
                self._filesystem.get_file_info(pafs.FileSelector(self._root, recursive=True))
            )
            if full or kind == pafs.FileType.File:
                raise ConfigError(f"DEST = {self.address}: is there already and not empty; name a new folder")
            self._filesystem.create_dir(self._root, recursive=True)
        except ImportError as error:
            raise ConfigError(f"DEST = {self.address}: needs a package that is not installed: {error}") from error
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(f"DEST = {self.address}: cannot be written: {error}") from error

    def open(self, name: str) -> IO[bytes]:
        path = f"{self._root}/{name}"
        self._written.append(path)
        file: Any = self._filesystem.open_output_stream(path)  # a binary file in all but its declared type
        return file

    def publish(self) -> None:
        pass

    def discard(self) -> None:
        for path in self._written:
            with suppress(OSError):  # it was perhaps never begun
                self._filesystem.delete_file(path)


def local_path(dest: str) -> Path | None:
    """The absolute path that a path or file:// URL names; None for any other URL."""
    if not is_url(dest):
        return Path(os.path.abspath(os.path.expanduser(dest)))
    parts = urlsplit(dest)
    return Path(os.path.abspath(unquote(parts.path))) if parts.scheme.lower() == "file" else None


@contextmanager
def new_folder(dest: str) -> Generator[Destination]:
    """The folder that `dest` (a path or URL) names: published at the end, discarded if anything is raised inside.

    Raises:
        ConfigError: It is there already and not empty, or cannot be made.
        RunFailed: A file in it could not be written, such as for want of space.
    """
    path = local_path(dest)
    folder: Destination = _RemoteDestination(dest) if path is None else _LocalDestination(dest, path)
    try:
        yield folder
        folder.publish()
    except OSError as error:
        folder.discard()
        why = error.strerror or error
        raise RunFailed(f"{folder.address}: cannot be written: {why}; nothing was kept") from error
    except BaseException:
        folder.discard()
        raise
