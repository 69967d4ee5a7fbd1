"""fsspec's file systems as pyarrow's, with one kind of error. Imports pyarrow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FSSpecHandler

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


class Handler(FSSpecHandler):  # type: ignore[misc]
    """What pyarrow's `PyFileSystem` asks for files of an fsspec file system; raises OSError only."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        """A file that can be read at any place."""
        with os_errors():
            return pa.PythonFile(_File(self.fs.open(path, mode="rb")), mode="r")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """Type, size and age of files."""
        with os_errors():
            return super().get_file_info(paths)

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
