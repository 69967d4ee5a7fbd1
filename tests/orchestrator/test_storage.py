"""Folders on this machine, and file names by pattern."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.patterns import expand_braces, is_pattern, select
from orchestrator.data.sources import absolute_source, open_source
from orchestrator.data.storage import LocalFolder, find, is_url, locate

KEY = "data.source"


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{x}{}", ["{x}{}"]),
        ("{,b}c", ["c", "bc"]),
        ("{x}-{08..10}", ["{x}-08", "{x}-09", "{x}-10"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..999999999}", "{0..999}{0..999}"])
def test_too_many_names_are_refused_before_they_are_made(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"at most 100,000|more than 100,000"):
        expand_braces(pattern)


def test_what_a_pattern_is() -> None:
    assert [is_pattern(name) for name in ("a.tar", "{a}", "a b", "*", "a?", "[ab]", "{a,b}", "{0..1}")] == [
        False
    ] * 3 + [True] * 5


def test_selecting() -> None:
    names = ["1.tar", "10.tar", "2.tar", "A.tar", "[1].tar"]
    assert select("*.tar", names) == names
    assert select("?.tar", names) == ["1.tar", "2.tar", "A.tar"]
    assert select("[!0-9].tar", names) == ["A.tar"]
    assert select("{2,1}*.tar", names) == ["1.tar", "10.tar", "2.tar"]
    with pytest.raises(ValueError, match=r"no file is called a.tar; there are 5 files; the nearest is A.tar"):
        select("{1,a}.tar", names)


def test_finding(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "[ab].png", "sub/c.png", ".hidden.png")
    place = find(KEY, str(tmp_path))
    assert (list(place.files), place.address, place.is_file) == (
        ["[ab].png", "a.png", "b.png", "sub/c.png"],
        str(tmp_path),
        False,
    )
    assert list(find(KEY, f"{tmp_path}/*.png").files) == ["[ab].png", "a.png", "b.png"]
    assert find(KEY, f"{tmp_path}/[ab].png").is_file  # a file of that very name comes first
    assert list(find(KEY, f"{tmp_path}/{{a,b}}.png").files) == ["a.png", "b.png"]
    file = find(KEY, f"{tmp_path}/a.png")
    assert (file.address, list(file.files), file.is_file) == (f"{tmp_path}/a.png", ["a.png"], True)
    for address, message in (
        (f"{tmp_path}/*.jpg", r"data.source = .*\*.jpg: no file is called \*.jpg; there are 3 files"),
        (f"{tmp_path}/x*/c.png", "only the last part of an address may be a pattern"),
        (f"{tmp_path}/x*/*.png", "only the last part of an address may be a pattern"),
        (f"{tmp_path}/a.png/*", "a.png is a file, not a folder"),
        (f"{tmp_path}/{'x' * 300}", "data.source = .*(no such|cannot be opened)"),
        (f"{tmp_path}/{{0..9999999}}.png", "more than 100,000 names"),
    ):
        with pytest.raises(ConfigError, match=message):
            find(KEY, address)


def test_a_local_folder(tmp_path: Path) -> None:
    folder, name = locate(KEY, str(fill(tmp_path, "a", "sub/b")))
    assert (folder, name) == (LocalFolder(str(tmp_path)), None)
    assert folder.listing() == {"a": None, "sub/b": None}
    assert folder.listing(recursive=False) == {"a": None}
    below = pickle.loads(pickle.dumps(folder)).below("sub")  # noqa: S301
    assert below.read("b") == b"sub/b"
    assert below.stat("b").size == 5
    assert below.stat("b").modified_ns == os.stat(tmp_path / "sub/b").st_mtime_ns
    with pytest.raises(FileNotFoundError):
        below.stat("c")


def test_a_link_to_itself_is_one_file_that_cannot_be_read(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    for name in ("cat/self", "dog/self.png"):
        (tmp_path / name).symlink_to(tmp_path / name)
    folder = LocalFolder(str(tmp_path))
    assert folder.files() == ["cat/a.png", "cat/self", "dog/b.png", "dog/self.png"]
    with pytest.raises(FileNotFoundError, match="leads to itself"):
        folder.stat("dog/self.png")
    with pytest.raises(OSError, match=r"self\.png"):
        folder.read("dog/self.png")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert (len(source.train), len(source.digest())) == (3, 32)


def test_a_sub_folder_that_goes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    scandir = os.scandir

    def gone(path: str) -> Any:
        if str(path).endswith("cat"):
            shutil.move(path, tmp_path / ".gone")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert LocalFolder(str(tmp_path)).files() == ["cat", "dog/b.png"]
    with pytest.raises(FileNotFoundError):
        LocalFolder(str(tmp_path / "cat")).files()  # the folder itself


def test_a_sub_folder_that_may_not_be_entered_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    scandir = os.scandir

    def forbidden(path: str) -> Any:  # as mode 000 does for all but root, who may run the tests
        if path.endswith("cat"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ConfigError, match=r"cannot be listed: .*Permission denied: .*cat"):
        find(KEY, str(tmp_path))


def test_what_is_neither_a_file_nor_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"data.source = /dev/null: is neither a file nor a folder"):
        locate(KEY, "/dev/null")


def test_an_empty_source_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path, "a.png"))
    with pytest.raises(ConfigError, match=r"data.source: is empty; must be digits"):
        open_source(DataConfig(source=""))


def test_absolute_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "images/a.png")
    monkeypatch.chdir(tmp_path)
    here = os.path.realpath(tmp_path)
    for source, absolute in (
        ("digits", "digits"),
        ("torchvision:STL10", "torchvision:STL10"),
        ("s3://bucket/*.png", "s3://bucket/*.png"),
        ("images", f"{here}/images"),
        ("images/*.png", f"{here}/images/*.png"),
        ("*.tar", f"{here}/*.tar"),
        ("digit", "digit"),
    ):
        assert absolute_source(source) == absolute
    assert is_url("s3://bucket")
    assert not is_url("/s3://bucket")
