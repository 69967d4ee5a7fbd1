"""A tar archive as a folder: the same names and bytes as the folder that was packed."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import pytest

from dino_core.config import ConfigError
from orchestrator.data.storage import LocalFolder, find
from orchestrator.data.tar_folder import TarFolder, open_archive

FILES = {"a.txt": b"first", "inner/b.txt": b"second", "inner/deep/c.txt": b"", ".hidden/d.txt": b"no"}


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, TarFolder]:
    root = tmp_path / "root"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add(root, ".")
    return root, open_archive("key", find("key", str(tmp_path / "root.tar")))


def test_an_archive_is_like_the_folder(packed: tuple[Path, TarFolder]) -> None:
    root, archive = packed
    folder = LocalFolder(str(root))
    archive = pickle.loads(pickle.dumps(archive))  # noqa: S301 - as it goes to other processes
    assert archive.files() == folder.files() == ["a.txt", "inner/b.txt", "inner/deep/c.txt"]
    assert list(archive.listing(recursive=False)) == list(folder.listing(recursive=False)) == ["a.txt"]
    for name in folder.files():
        with archive.open(name) as file:
            assert archive.read(name) == file.read() == folder.read(name)
        assert archive.stat(name).size == folder.stat(name).size
    below = archive.below("inner")
    assert below.files() == folder.below("inner").files()
    assert below.read("b.txt") == b"second"
    assert below.address == f"{root}.tar/inner"
    with pytest.raises(FileNotFoundError, match="no such file in the archive"):
        below.read("a.txt")


def test_what_is_no_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as archive:
        archive.add(__file__, "file.py")
    (tmp_path / "other").write_bytes(b"x" * 2000)
    for name, reason in (("packed.tgz", "compressed"), ("other", "not a tar archive")):
        with pytest.raises(ConfigError, match=f"key = .*{name}: {reason}.*must be a folder or a tar archive"):
            open_archive("key", find("key", str(tmp_path / name)))
