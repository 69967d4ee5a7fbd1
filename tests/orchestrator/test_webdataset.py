"""WebDataset shards: members, labels, splits, damage, and reading from a storage service."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers import tar_index, webdataset
from orchestrator.data.readers.tar_headers import TarError, Window, walk
from orchestrator.data.split import Source
from orchestrator.data.storage import LocalFolder, locate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(webdataset, "_cache", webdataset._Cache())
    return tmp_path / "cache" / "dino-orchestrator" / "webdataset"


def tar(members: dict[str, bytes | str], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def open_shards(root: Path, shards: dict[str, bytes], **settings: str) -> Source:
    for name, content in shards.items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(content)
    config = DataConfig(source=str(root / "set"), **settings)
    return webdataset.open_tars(config, LocalFolder(str(root / "set")), sorted(shards))


def contents(source: Source) -> dict[str, bytes]:
    found = {}
    for index in range(len(source.train)):
        data = source.train.read(index)
        assert isinstance(data, bytes)
        found[source.train.name(index)] = data
    return found


# Headers


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_as_tarfile_reads_them(tar_format: int) -> None:
    members: dict[str, bytes | str] = {
        "a.jpg": b"x",
        "empty.png": b"",
        "block.jpg": b"y" * 512,
        f"{'d' * 60}/{'e' * 60}.jpg": b"prefixed" * 100,
    }
    if tar_format != tarfile.USTAR_FORMAT:
        members |= {f"{'long/' * 40}{'n' * 120}.jpg": b"long", "größe.jpg": b"unicode"}
    data = tar(members, tar_format)
    for buffer_bytes in (0, 700, 1 << 20):
        found = list(walk(Window(io.BytesIO(data), buffer_bytes)))
        assert {member.name.decode(): data[member.offset : member.offset + member.size] for member in found} == members
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert [(m.name, m.offset_data, m.size) for m in archive] == [
                (name.decode(), offset, size) for name, offset, size in found
            ]


def test_only_regular_files_are_taken(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in (("dir.jpg", tarfile.DIRTYPE), ("fifo.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" + "x" * 150
            archive.addfile(info)
        for name in ("../../evil.jpg", "/abs.jpg", ".hidden.jpg", "nodot", "bad.pkl", "plain.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    source = open_shards(tmp_path, {"s.tar": buffer.getvalue()})
    assert contents(source) == {f"s.tar:{name}": b"abc" for name in ("../../evil.jpg", "/abs.jpg", "plain.jpg")}
    assert sorted(os.listdir(tmp_path)) == ["cache", "set"]


def test_archives_of_the_tar_program(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{'n' * 120}{number}.jpg").write_bytes(bytes([number]) * 1000)
    with open(folder / "hole.png", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    for tar_format in ("gnu", "posix"):
        plain = subprocess.run(["tar", "-cf", "-", "-C", tmp_path, f"--format={tar_format}", "in"], capture_output=True)
        found = list(walk(Window(io.BytesIO(plain.stdout), 4096)))
        assert sorted(member.size for member in found) == [1000, 1000, 1000, (1 << 20) + 3]
        sparse = subprocess.run(
            ["tar", "-cSf", "-", "-C", tmp_path, f"--format={tar_format}", "in"], capture_output=True
        )
        if len(sparse.stdout) < len(plain.stdout):  # not on a file system without holes
            with pytest.raises(TarError, match="a sparse file; write the archive without --sparse"):
                list(walk(Window(io.BytesIO(sparse.stdout), 4096)))


def test_sizes_past_eight_gigabytes() -> None:
    class Hollow(io.RawIOBase):
        """A tar whose second member is of 10 GB that are not there."""

        def __init__(self, tar_format: int) -> None:
            info = tarfile.TarInfo("big.bin")
            info.size = 10 << 30
            big = info.tobuf(tar_format)
            self._pieces = {0: big, len(big) + (10 << 30): tar({"a.jpg": b"abc"})}
            self._end = max(start + len(piece) for start, piece in self._pieces.items())
            self._at = 0

        def seek(self, offset: int, whence: int = 0) -> int:
            self._at = offset if whence == 0 else self._end
            return self._at

        def read(self, size: int = -1) -> bytes:
            data = bytearray(max(0, min(size, self._end - self._at)))
            for start, piece in self._pieces.items():
                low, high = max(start, self._at), min(start + len(piece), self._at + len(data))
                if low < high:
                    data[low - self._at : high - self._at] = piece[low - start : high - start]
            self._at += len(data)
            return bytes(data)

    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        big, small = walk(Window(Hollow(tar_format), 4096))  # type: ignore[arg-type]
        assert (big.size, small.name, small.size) == (10 << 30, b"a.jpg", 3)
        assert small.offset == big.offset + big.size + 512


# Damage


WHOLE = tar({"a.jpg": b"x" * 2000, "b.jpg": b"y" * 2000})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[:1000], r"cut short: the member at byte 0 reaches past the end at byte 1000 \(0 whole images before\)"),
        (WHOLE[:4000], r"cut short: the member at byte 2560 reaches past the end at byte 4000 \(1 whole images before"),
        (WHOLE[:5120], r"cut short: it ends at byte 5120 without an end mark \(2 whole images before\)"),
        (WHOLE[:2700], r"cut short: it ends at byte 2700 without an end mark"),
        (WHOLE[:2560] + b"\1" * 8000, r"damaged: no header at byte 2560"),
        (WHOLE + WHOLE, r"more than one archive in the file: data follows the end mark at byte 5120"),
        (b"", "not a tar archive: shorter than one header"),
        (b"no tar" * 1000, "not a tar archive"),
        (b"\x1f\x8b" + b"\7" * 1000, r"compressed \(gzip\): .* unpack it to a plain .tar"),
        (b"\x28\xb5\x2f\xfd" + b"\7" * 1000, r"compressed \(zstd\)"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^data.source: .*/set/s1.tar: " + message):
        open_shards(tmp_path, {"s0.tar": WHOLE, "s1.tar": data})


def test_one_zero_block_is_an_end(tmp_path: Path) -> None:
    assert len(open_shards(tmp_path, {"s.tar": WHOLE[: 5120 + 512]}).train) == 2


def test_random_damage_is_never_a_traceback() -> None:
    data = tar({f"{'long/' * 30}{n}.jpg": b"z" * 700 for n in range(3)}, tarfile.PAX_FORMAT)
    random = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 2):
            damaged[place] = random.integers(256)
        try:
            found = list(walk(Window(io.BytesIO(damaged), 4096)))
        except TarError:
            continue
        assert all(member.offset + member.size <= len(data) for member in found)


def test_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source = x: gone.tar cannot be read: .*No such file"):
        webdataset.open_tars(DataConfig(source="x"), LocalFolder(str(tmp_path)), ["gone.tar"])


def test_a_shard_that_changed_is_not_read(tmp_path: Path) -> None:
    source = open_shards(tmp_path, {"s.tar": WHOLE})
    path = tmp_path / "set" / "s.tar"
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="has changed since the run began"):
        source.train.read(0)


# Samples


def test_images_by_extension(tmp_path: Path) -> None:
    shard = tar({"d/1.jpg": b"1", "d/1.seg.png": b"mask", "d/2.JPEG": b"2", "d/2.txt": "words", "d/3.seg.png": b"m3"})
    source = open_shards(tmp_path, {"s.tar": shard})
    assert contents(source) == {"s.tar:d/1.jpg": b"1", "s.tar:d/2.JPEG": b"2"}
    assert source.describe() == f"webdataset {tmp_path}/set/s.tar: 2 training images without labels"
    for column in ("seg.png", ".SEG.png"):
        masks = open_shards(tmp_path, {"s.tar": shard}, image_column=column)
        assert contents(masks) == {"s.tar:d/1.seg.png": b"mask", "s.tar:d/3.seg.png": b"m3"}
    with pytest.raises(ConfigError, match=r"data.image_column = seg.pn: no such ext.*jpeg, .*did you mean seg.png\?"):
        open_shards(tmp_path, {"s.tar": shard}, image_column="seg.pn")


def test_samples_that_are_ambiguous(tmp_path: Path) -> None:
    shard = tar({"1.jpg": b"1", "1.png": b"2"})
    with pytest.raises(
        ConfigError, match=r"sample 1 of .*s.tar has images .jpg and .png; set data.image_column to one"
    ):
        open_shards(tmp_path, {"s.tar": shard})
    assert contents(open_shards(tmp_path, {"s.tar": shard}, image_column="png")) == {"s.tar:1.png": b"2"}
    with pytest.raises(ConfigError, match=r"sample 1 of .*/t.tar has two members .jpg"):
        open_shards(tmp_path, {"t.tar": tar({"1.jpg": b"1"})[:1024] + tar({"1.jpg": b"1"})})


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no images in the shards; their members are .cls, .left.jpg: set data.image"
    ):
        open_shards(tmp_path, {"s.tar": tar({"1.left.jpg": b"1", "1.cls": "1"})})
    with pytest.raises(ConfigError, match=r"no images in the shards$"):
        open_shards(tmp_path, {"s.tar": tar({})})


# Labels


def test_labels_of_cls_and_json(tmp_path: Path) -> None:
    first = tar({"1.cls": "10\n", "1.jpg": b"", "1.json": '{"label": 3, "kind": "dog"}', "2.jpg": b"", "2.cls": "9"})
    second = tar({"1.jpg": b"", "1.json": json.dumps({"label": 9, "kind": "emu"}), "2.json": "{}"})
    source = open_shards(tmp_path, {"a.tar": first, "b.tar": second})
    assert source.classes == ("9", "10")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [1, 0, 0]
    kinds = open_shards(tmp_path, {"a.tar": first, "b.tar": second}, label_column="kind")
    assert kinds.classes == ()
    assert kinds.train.labels is None  # the second has none
    with pytest.raises(ConfigError, match=r"data.label_column = kin: no .json in the shards has such a field"):
        open_shards(tmp_path, {"a.tar": first}, label_column="kin")
    with pytest.raises(
        ConfigError, match=r"data.label_column = label: must hold whole.* not float as in 1.json of c.tar"
    ):
        open_shards(tmp_path, {"c.tar": tar({"1.jpg": b"", "1.json": '{"label": 0.5}'})})


def test_text_and_missing_labels(tmp_path: Path) -> None:
    texts = {"1.jpg": b"", "1.json": '{"label": "größe \\ud800"}', "2.jpg": b"", "2.json": '{"label": "7"}'}
    assert len(open_shards(tmp_path, {"s.tar": tar(texts)}).classes) == 2
    for damaged in ("{", "[1]", '{"label": null}', '{"label": -1}', '{"label": ""}', "[" * 100_000):
        source = open_shards(tmp_path, {"s.tar": tar({"1.jpg": b"", "1.json": damaged, "2.jpg": b"", "2.cls": "1"})})
        assert source.train.labels is None


def test_folders_are_labels_where_nothing_else_is(tmp_path: Path) -> None:
    source = open_shards(
        tmp_path, {"a.tar": tar({"x/dog/1.jpg": b"", "x/cat/1.jpg": b""}), "b.tar": tar({"cat/2.jpg": b""})}
    )
    assert source.classes == ("cat", "dog")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [1, 0, 0]
    for names in (("dog/1.jpg", "cat/1.jpg", "2.jpg"), ("all/1.jpg", "all/2.jpg")):
        assert open_shards(tmp_path, {"a.tar": tar(dict.fromkeys(names, b""))}).train.labels is None


def test_the_photos(shared_data: Path) -> None:
    source = webdataset.open_tars(DataConfig(source="photos.tar"), LocalFolder(str(shared_data)), ["photos.tar"])
    with tarfile.open(shared_data / "photos.tar") as archive:
        theirs = [(m.name, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]
    assert contents(source) == {f"photos.tar:{name}": data for name, data in theirs}
    assert len(source.classes) == len({name.split("/")[1] for name, _ in theirs})


# Splits


ONE = tar({"1.jpg": b"1"})


@pytest.mark.parametrize(
    ("names", "settings", "counts"),
    [
        (("train-000.tar", "train-001.tar", "test-000.tar"), {}, (2, 1)),
        (("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), {"test_split": "validation"}, (1, 1)),
        (("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), {}, (1, None)),
        (("x_train_3.tar", "x_test_1.tar", "x_extra_2.tar"), {}, (1, 1)),
        (("train-00000-of-00002.tar", "train-00001-of-00002.tar", "test-00000-of-00001-f00.tar"), {}, (2, 1)),
        (("train/0.tar", "train/1.tar", "test/0.tar"), {}, (2, 1)),
        (("train.tar", "val.tar"), {"test_split": "val"}, (1, 1)),
        (("val-0.tar", "val-1.tar"), {}, (2, None)),  # one prefix: no splits
        (("train-0.tar", "1.tar"), {}, (2, None)),  # not all have one
        (("train-0.tar", "1.tar"), {"train_split": "train", "test_split": "train"}, None),
        (("cats-0.tar", "dogs-0.tar"), {}, (2, None)),
        (("cats-0.tar", "dogs-0.tar", "0.tar"), {"train_split": "cats"}, (1, None)),
        (("a-clean-0.tar", "b-clean-0.tar"), {"train_split": "a-clean", "test_split": "b-clean"}, (1, 1)),
        (("0.tar", "1.tar"), {}, (2, None)),
    ],
)
def test_splits(
    tmp_path: Path, names: tuple[str, ...], settings: dict[str, str], counts: tuple[int, int | None]
) -> None:
    if counts is None:
        with pytest.raises(ConfigError, match="must differ"):
            open_shards(tmp_path, dict.fromkeys(names, ONE), **settings)
        return
    source = open_shards(tmp_path, dict.fromkeys(names, ONE), **settings)
    assert (len(source.train), source.test and len(source.test)) == counts


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    shards = {"val-0.tar": ONE, "test-0.tar": ONE}
    with pytest.raises(
        ConfigError, match=r"data.train_split = train: no such split of the shards; there are test, val"
    ):
        open_shards(tmp_path, shards)
    with pytest.raises(ConfigError, match=r"data.train_split = vall: no such split.*; did you mean val\?"):
        open_shards(tmp_path, shards, train_split="vall")


# The index


def test_the_index_is_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(tmp_path, {"s.tar": tar({"a.jpg": b"1", "a.cls": "cat"})})
    (kept,) = cache.iterdir()
    shard = webdataset.Shard(
        LocalFolder(str(tmp_path / "set")), "s.tar", *LocalFolder(str(tmp_path / "set")).stat("s.tar")
    )
    choice = tar_index.Choice(None, "label")
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "walk", None)  # nothing is walked again
        again = tar_index.index_shard(shard, choice)
    assert again.label_names() == ["cat"]
    whole = kept.read_bytes()
    random = np.random.default_rng(0)
    for cut in (0, 1, 100, len(whole) - 1):
        kept.write_bytes(whole[:cut])
        assert tar_index.index_shard(shard, choice).offsets.tolist() == again.offsets.tolist()
        assert kept.read_bytes() == whole  # made anew
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        kept.write_bytes(damaged)
        index = tar_index.index_shard(shard, choice)
        assert (index.offsets.tolist(), index.sizes.tolist()) == (again.offsets.tolist(), again.sizes.tolist())


def test_a_new_shard_is_indexed_anew(tmp_path: Path, cache: Path) -> None:
    first = open_shards(tmp_path, {"s.tar": tar({"a.jpg": b"1"})})
    digest = first.digest()
    second = open_shards(tmp_path, {"s.tar": tar({"b.jpg": b"2"})})
    assert contents(second) == {"s.tar:b.jpg": b"2"}
    assert second.digest() != digest
    assert len(list(cache.iterdir())) == 2


def test_without_a_place_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_shards(tmp_path, {"s.tar": WHOLE}).train) == 2


# Reading


def test_the_reader_pickles_and_reads_in_threads(tmp_path: Path) -> None:
    shards = {f"{n}.tar": tar({f"{i}.jpg": f"{n} {i}" * 100 for i in range(200)}) for n in range(3)}
    source = open_shards(tmp_path, shards)
    reader = pickle.loads(pickle.dumps(source.train)).reader  # noqa: S301 - its own
    order = np.random.default_rng(0).permutation(600)
    wrong: list[int] = []

    def read(part: np.ndarray) -> None:
        for index in part.tolist():
            if reader.read(index) != f"{index // 200} {index % 200}".encode() * 100:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(part,)) for part in np.array_split(order, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    units = reader.units()
    assert units is not None
    assert units.tolist() == [start + step for start in (0, 200, 400) for step in (0, 64, 128, 192)]
    for index in (-1, 600):
        with pytest.raises(IndexError):
            reader.read(index)


def test_shards_of_a_storage_service(memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        members: dict[str, bytes | str] = {f"{i:03}.jpg": f"{number} {i}" * 50 for i in range(100)}
        memory.pipe(f"/bucket/set/{number}.tar", tar(members))
    folder, _ = locate("data.source", "memory://bucket/set")
    source = webdataset.open_tars(DataConfig(source="memory://bucket/set"), folder, ["0.tar", "1.tar"])
    assert source.location == "memory://bucket/set"
    reads: list[tuple[int, int]] = []
    inner = webdataset._OpenShard.read

    def counted(self: webdataset._OpenShard, offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return inner(self, offset, size)

    monkeypatch.setattr(webdataset._OpenShard, "read", counted)
    for index in range(200):
        assert source.train.read(index) == f"{index // 100} {index % 100}".encode() * 50
    units = source.train.units()
    assert units is not None
    assert units.tolist() == [0, 64, 100, 164]
    assert len(reads) == 8  # of each stretch one image, then the whole
    memory.pipe("/bucket/set/0.tar", WHOLE)
    webdataset._open_shard.cache_clear()
    webdataset._cache = webdataset._Cache()
    with pytest.raises(OSError, match="has changed since the run began"):
        source.train.read(0)


def test_the_cache_keeps_to_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_CACHE_BYTES", 250)
    cache = webdataset._Cache()
    shard = webdataset.Shard(LocalFolder("/"), "s.tar", 1, 1)
    fetched: list[int] = []

    def get(offset: int) -> bytes | None:
        return cache.get(shard, offset, lambda: fetched.append(offset) or bytes(100))

    for offset in (1, 2, 3):
        assert get(offset) is None  # the first touch
        assert get(offset) == bytes(100)
    assert get(3) == bytes(100)
    assert get(1) == bytes(100)
    assert fetched == [1, 2, 3, 1]

    def fail() -> bytes:
        raise OSError("gone")

    cache.get(shard, 9, fail)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            cache.get(shard, 9, fail)
    assert get(9) == bytes(100)
