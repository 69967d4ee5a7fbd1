"""Lists of images: paths by line or by column, wherever the images are."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers.file_list import open_list
from orchestrator.data.split import Source
from orchestrator.data.storage import LocalFolder, locate


def make_files(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def open_at(path: Path, **settings: str) -> Source:
    return open_list(DataConfig(source=str(path), **settings), LocalFolder(str(path.parent)), path.name)


def write(root: Path, name: str, *lines: str | bytes) -> Path:
    path = root / name
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def names(source: Source) -> list[str]:
    return [source.train.name(index) for index in range(len(source.train))]


# Lines


def test_one_path_per_line(tmp_path: Path) -> None:
    make_files(tmp_path, "b.png", "cat/a b.jpg", "z.png", "up.png")
    listing = tmp_path / "lists"
    listing.mkdir()
    path = write(listing, "my.txt", "# mine", "../b.png\r", "", "../cat/a b.jpg", "  ", f"{tmp_path}/z.png", "../b.png")
    source = open_at(path)
    assert names(source) == ["../b.png", "../cat/a b.jpg", f"{tmp_path}/z.png", "../b.png"]  # twice is legal
    assert [source.train.read(index) for index in range(4)] == [b"b.png", b"cat/a b.jpg", b"z.png", b"b.png"]
    assert source.train.labels is None
    assert source.train.units() is None
    assert source.test is None
    assert source.describe() == f"list {path}: 4 training images without labels"
    clone = pickle.loads(pickle.dumps(source.train))  # noqa: S301 - its own
    assert clone.read(2) == b"z.png"


def test_names_are_of_any_bytes(tmp_path: Path) -> None:
    raw = b"caf\xe9.png"
    (tmp_path / "x.png").write_bytes(b"x")
    with open(bytes(tmp_path) + b"/" + raw, "wb") as file:
        file.write(b"latin")
    source = open_at(write(tmp_path, "list.txt", b"\xef\xbb\xbf" + raw, "x.png", "größe.png"))
    assert source.train.read(0) == b"latin"
    assert source.train.name(2) == "größe.png"
    with pytest.raises(FileNotFoundError):
        source.train.read(2)


def test_file_urls_are_paths(tmp_path: Path) -> None:
    make_files(tmp_path, "a b.png")
    assert open_at(write(tmp_path, "l.txt", f"file://{tmp_path}/a%20b.png", "a b.png")).train.read(0) == b"a b.png"


def test_the_digest_is_of_the_list_and_the_sizes(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "b.png")
    path = write(tmp_path, "l.txt", "a.png", "b.png")
    first = open_at(path).digest()
    assert first == open_at(path).digest()
    assert len(first) == 32
    assert open_at(write(tmp_path, "m.txt", "b.png", "a.png")).digest() != first
    (tmp_path / "b.png").write_bytes(b"longer than it was")
    assert open_at(path).digest() != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the list names no images"),
        (b"# nothing\n\n", r"the list names no images"),
        ("a.png\n".encode("utf-16"), r"not a text in UTF-8 \(is it UTF-16\?\)"),
        (b"\n\nno.png\nnor.png", r"^data.source = .*/list.txt: line 3: .*/no.png is not there, nor are the 1 after it"),
        (b"no.png", r"line 1: .*/no.png is not there, it is the only one"),
        (b"a.png\ns3://b/c.png", r"line 1 \(a.png\) is of this machine, line 2 \(s3://b/c.png\) of s3://b; a list"),
        (b"s3://b/c.png\ns3://d/c.png", r"line 1 .* is of s3://b, line 2 .* of s3://d; a list takes one storage"),
        (b"nope://b/c.png", r"data.source = nope://b: .*no such scheme as nope://"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    make_files(tmp_path, "a.png")
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_at(path)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"list.txt: cannot be read: .*No such file"):
        open_at(tmp_path / "list.txt")


def test_some_missing_images_are_no_error(tmp_path: Path) -> None:
    make_files(tmp_path, "there.png")
    source = open_at(write(tmp_path, "l.txt", *[f"gone{i}.png" for i in range(99)], "there.png"))
    assert len(source.train) == 100
    with pytest.raises(ConfigError, match=r"gone0.png is not there, nor are the 99 after it"):
        open_at(write(tmp_path, "l.txt", *[f"gone{i}.png" for i in range(100)], "there.png"))


def test_a_split_cannot_be_asked_of_lines(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=r"data.train_split = mine: no such split: the list has no column split"):
        open_at(write(tmp_path, "l.txt", "a.png"), train_split="mine")


# Columns


def test_columns_hold_paths_labels_and_splits(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{n}.png" for n in "abcde"))
    path = write(
        tmp_path,
        "list.csv",
        "file_name,label,split,note",
        "a.png,dog,train,",
        '"b.png",cat,test,"x,\ny"',
        "",
        "c.png,cat,train,",
        "d.png,emu,,",
        "e.png,,test,",
    )
    source = open_at(path)
    assert names(source) == ["a.png", "c.png"]
    assert source.classes == ("cat", "dog")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [1, 0]
    assert source.test is not None
    assert [source.test.name(index) for index in range(2)] == ["b.png", "e.png"]
    assert source.test.labels is None  # one lacks its label
    with pytest.raises(ConfigError, match=r"data.test_split = val: no such value in column split; there are test, tra"):
        open_at(path, test_split="val")
    with pytest.raises(ConfigError, match=r"data.label_column = not: no such column in .*; did you mean note\?"):
        open_at(path, label_column="not")
    with pytest.raises(ConfigError, match=r"data.split_column = splits: no such column in .*; did you mean split\?"):
        open_at(path, split_column="splits")


def test_whole_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    source = open_at(write(tmp_path, "l.tsv", "path\tlabel", *[f"a.png\t{n}" for n in (10, 9, 2, 10)]))
    assert source.classes == ("2", "9", "10")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [2, 1, 0, 2]
    assert open_at(write(tmp_path, "l.csv", "path,label", "a.png,1", "a.png,-1")).train.labels is None
    assert open_at(write(tmp_path, "l.csv", "path,label", "a.png,01", "a.png,1")).classes == ("01", "1")


def test_the_path_column(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "b.png")
    path = write(tmp_path, "l.csv", "photo,path,image", "a.png,no.png,b.png")
    assert names(open_at(path)) == ["b.png"]
    assert names(open_at(path, image_column="photo")) == ["a.png"]
    with pytest.raises(ConfigError, match=r"data.image_column = fotos: no such column .*did you mean photo\?"):
        open_at(path, image_column="fotos")
    with pytest.raises(ConfigError, match=r"data.image_column = image: no .* a.png, b.png; the first line must name"):
        open_at(write(tmp_path, "l.csv", "a.png,b.png"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("path,label", "a.png,1", "a.png"), "line 3: 1 cells where the header has 2"),
        (("path,label", ",1"), "line 2: no path"),
        (("path,label", 'a.png,"1'), "line 2: unexpected end of data"),
        (("path,label",), "the list names no images"),
        ((), "data.image_column = image: no such column"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    make_files(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=message):
        open_at(write(tmp_path, "l.csv", *lines))


# Remote


def open_remote(url: str) -> Source:
    folder, name = locate("data.source", url)
    assert name is not None
    return open_list(DataConfig(source=url), folder, name)


def test_a_list_of_a_storage_service(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("a.png", "deep/b.png", "lists/c.png"):
        memory.pipe(f"/bucket/x/{name}", name.encode())
    memory.pipe("/bucket/x/lists/l.txt", b"c.png\n../a.png\n./../deep/b.png\nmemory://bucket/x/a.png")
    source = open_remote("memory://bucket/x/lists/l.txt")
    assert names(source) == ["lists/c.png", "a.png", "deep/b.png", "a.png"]
    assert [source.train.read(index) for index in range(3)] == [b"lists/c.png", b"a.png", b"deep/b.png"]
    assert source.location == "memory://bucket/x/lists/l.txt"
    assert len(source.digest()) == 32
    memory.pipe("/bucket/x/lists/l.txt", b"x.png\nc.png\n./y/../c.png")
    source = open_remote("memory://bucket/x/lists/l.txt")
    assert names(source) == ["x.png", "c.png", "c.png"]
    assert source.train.read(2) == b"lists/c.png"


def test_a_local_list_of_urls(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/bucket/x/a.png", b"a")
    memory.pipe("/bucket/b.png", b"b")
    source = open_at(write(tmp_path, "l.csv", "path,label", "memory://bucket/x/a.png,u", "memory://bucket/b.png,v"))
    assert names(source) == ["x/a.png", "b.png"]
    assert source.train.read(1) == b"b"
    assert source.classes == ("u", "v")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("../../a.png", r"some paths lead out of memory://bucket \(..\)"),
        ("gone.png\nalso.png", r"line 1: memory://bucket/gone.png is not there, nor are the 1 after it"),
        ("gone.png\n/abs.png", r"line 1 \(gone.png\) is of memory://bucket, line 2 \(/abs.png\) of this machine"),
        ("memory://elsewhere/a.png", r"data.source = memory://elsewhere: no such file or folder"),
    ],
)
def test_remote_lists_that_are_refused(memory: fsspec.AbstractFileSystem, content: str, message: str) -> None:
    memory.pipe("/bucket/l.txt", content.encode())
    with pytest.raises(ConfigError, match=message):
        open_remote("memory://bucket/l.txt")


# Scale


def test_many_lines_open_at_once(tmp_path: Path) -> None:
    make_files(tmp_path, "train/n0/0.jpg")
    lines = [f"train/n{i % 1000}/{i}.jpg,n{i % 1000},{'train' if i % 10 else 'test'}" for i in range(100_000)]
    path = write(tmp_path, "l.csv", "path,label,split", *lines)
    started = time.process_time()
    source = open_at(path)
    assert time.process_time() - started < 5  # a million in some seconds
    assert len(source.train) == 90_000
    assert source.train.labels is not None
    assert np.unique(source.train.labels).size == 900
    started = time.process_time()
    size = len(pickle.dumps(source.train))
    assert time.process_time() - started < 0.5
    assert size < 5_000_000
