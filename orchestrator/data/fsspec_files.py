"""fsspec's file systems as pyarrow's, with one kind of error. Imports pyarrow."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileType, FSSpecHandler

_CLIENTS = (
    ("aiohttp", "ClientError"),
    ("httpx", "HTTPError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
)
"""The exceptions of the libraries that fsspec's file systems are made of, which are not OSErrors."""


def _errors() -> tuple[type[Exception], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _CLIENTS if module in sys.modules]
    return ValueError, RuntimeError, LookupError, EOFError, *loaded


@contextmanager
def os_errors() -> Iterator[None]:
    """Whatever a service or its client raises leaves as an OSError, ConnectionError."""
    try:
        yield
    except _errors() as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _failure(error: FileNotFoundError) -> str | None:
    """Why a service could not be asked, where its client took that for an answer, as that of http does."""
    aiohttp = sys.modules.get("aiohttp")
    kinds: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    if aiohttp is not None:
        kinds += (aiohttp.ClientConnectionError,)
    found: str | None = None
    cause: BaseException | None = error
    while cause is not None:  # the innermost says it best
        if isinstance(cause, socket.gaierror):
            found = f"unknown host ({cause.strerror})"
        elif isinstance(cause, ConnectionRefusedError):
            found = "connection refused"
        elif isinstance(cause, kinds):
            found = f"no connection: {cause or type(cause).__name__}"
        elif aiohttp is not None and isinstance(cause, aiohttp.ClientResponseError) and cause.status >= 500:
            found = f"the server failed: {cause.status} {cause.message}"
        cause = cause.__cause__ or cause.__context__
    return found


class Handler(FSSpecHandler):  # type: ignore[misc]
    """What pyarrow's `PyFileSystem` asks for files of an fsspec file system; raises OSError only."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        """A file that can be read at any place."""
        with os_errors():
            return pa.PythonFile(_File(self.fs.open(path, mode="rb")), mode="r")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """Type, size and age of files."""
        with os_errors():
            return [self._file_info(path) for path in paths]

    def _file_info(self, path: str) -> FileInfo:
        try:
            return self._create_file_info(path, self.fs.info(path))
        except FileNotFoundError as error:
            failure = _failure(error)
            if failure is None:
                return FileInfo(path, FileType.NotFound)
            raise OSError(failure) from error

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """Those of all files in a folder."""
        with os_errors():
            return super().get_file_info_selector(selector)


class _File:
    """An fsspec file whose errors are OSErrors."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        with os_errors():
            return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
