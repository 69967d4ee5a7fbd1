"""A tar archive as a folder of files: nothing is extracted, each file is read where it lies."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

from dino_core.config import ConfigError
from orchestrator.data.readers.tar_headers import Member, TarError, Window, walk
from orchestrator.data.storage import FileStat, Folder, Listing, Place

_BUFFER_BYTES = 64 << 10


@dataclass(frozen=True)
class TarFolder:
    """The regular files of an archive below `prefix`. A `Folder`; pickles as where the archive is."""

    folder: Folder
    archive: str
    """Its name in `folder`."""
    prefix: str = ""
    """Empty, or ends with `/`."""

    @property
    def address(self) -> str:
        """Path or URL of the archive, and of the folder in it."""
        return f"{self.folder.address}/{self.archive}/{self.prefix}".rstrip("/")

    def files(self) -> list[str]:
        """See `Folder`."""
        return list(self.listing())

    def listing(self, recursive: bool = True) -> Listing:
        """See `Folder`."""
        below = {
            name.removeprefix(self.prefix): FileStat(member.size, 0)
            for name, member in self._members().items()
            if name.startswith(self.prefix)
        }
        return {
            name: stat
            for name, stat in sorted(below.items(), key=lambda item: item[0].encode())
            if (recursive or "/" not in name) and not any(part.startswith(".") for part in name.split("/"))
        }

    def stat(self, name: str) -> FileStat:
        """See `Folder`."""
        return FileStat(self._member(name).size, 0)

    def open(self, name: str) -> IO[bytes]:
        """See `Folder`."""
        return io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        member = self._member(name)
        with self.folder.open(self.archive) as file:
            file.seek(member.offset)
            return file.read(member.size)

    def below(self, name: str) -> TarFolder:
        """See `Folder`."""
        return TarFolder(self.folder, self.archive, f"{self.prefix}{name}/")

    def _members(self) -> dict[str, Member]:
        return _members_of(self.folder, self.archive)  # type: ignore[arg-type]  # folders are frozen dataclasses

    def _member(self, name: str) -> Member:
        member = self._members().get(self.prefix + name)
        if member is None:
            raise FileNotFoundError(2, "no such file in the archive", f"{self.address}/{name}")
        return member


def open_archive(key: str, place: Place) -> TarFolder:
    """The archive that `place`, a file, is.

    Raises:
        ConfigError: It is none, compressed, or not whole. Names `key`.
    """
    (name,) = place.files
    found = TarFolder(place.folder, name)
    try:
        found.files()
    except (TarError, OSError) as error:
        raise ConfigError(f"{key} = {place.address}: {error}; must be a folder or a tar archive") from error
    return found


@lru_cache(maxsize=4)
def _members_of(folder: Folder, archive: str) -> dict[str, Member]:
    with folder.open(archive) as file:
        members = list(walk(Window(file, _BUFFER_BYTES)))
    return {member.name.decode("utf-8", "surrogateescape").removeprefix("./"): member for member in members}
