"""`data convert`: what comes out is what went in, or nothing comes out."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.images import decode, load_image
from orchestrator.data.sources import open_source
from orchestrator.data.split import Source, Split
from orchestrator.data.tools.convert import Converted, ConvertOptions, convert, stored_order
from orchestrator.data.tools.encode import shrink
from orchestrator.data.tools.spool import Spool
from orchestrator.errors import RunFailed

ROOT = Path(__file__).resolve().parents[2]
SAME_ORDER = ConvertOptions(shuffle=None, threads=2)


def png(value: int, size: tuple[int, int] = (4, 3), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def to(dest: Path | str, source: Path | str, options: ConvertOptions = SAME_ORDER, **settings: Any) -> Converted:
    config = DataConfig(source=str(source), **settings)
    return convert(open_source(config), str(dest), config, options)


def opened(path: Path | str) -> Source:
    return open_source(DataConfig(source=str(path)))


def content(split: Split) -> list[tuple[Any, int | None]]:
    labels: list[int | None] = [None] * len(split) if split.labels is None else split.labels.tolist()
    return [(split.read(index), label) for index, label in zip(range(len(split)), labels, strict=True)]


def hashes(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of three classes."""
    files = {f"train/{name}/{n}.png": png(10 * c + n) for c, name in enumerate(("cat", "dog", "emu")) for n in range(9)}
    return folder(
        tmp_path_factory.mktemp("photos"),
        files | {f"test/{c}/{n}.png": png(90 + n) for n, c in enumerate(("dog", "dog", "emu"))},
    )


# Round trips


def test_a_folder_with_classes_and_splits_comes_back(photos: Path, tmp_path: Path) -> None:
    done = to(tmp_path / "out", photos)
    before, after = opened(photos), opened(tmp_path / "out")
    assert after.test is not None and before.test is not None
    assert content(after.train) == content(before.train)
    assert content(after.test) == content(before.test)
    assert (done.images, done.files, done.left_out, done.shrunk) == ({"train": 27, "test": 3}, 2, (), 0)
    assert not os.path.exists(tmp_path / ".out.partial")
    table = pads.dataset(tmp_path / "out", format="parquet", exclude_invalid_files=True).to_table()
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("label").type == pa.int64()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"},
    }
    train = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert train["image"][10].as_py() == {"bytes": before.train.read(10), "path": "dog/1.png"}
    assert pq.read_table(tmp_path / "out" / "test-00000-of-00001.parquet")["label"].to_pylist() == [1, 1, 2]


def test_digits_become_png(tmp_path: Path) -> None:
    to(tmp_path / "out", "digits")
    before, after = opened("digits"), opened(tmp_path / "out")
    assert before.test is not None and after.test is not None
    assert after.classes == before.classes
    for old, new in ((before.train, after.train), (before.test, after.test)):
        assert len(old) == len(new)
        assert np.array_equal(old.labels, new.labels)
        for index in range(0, len(old), 50):
            data = new.read(index)
            assert isinstance(data, bytes) and data.startswith(b"\x89PNG")
            assert np.array_equal(load_image(old, index, 100), load_image(new, index, 100))


def test_without_labels_there_is_no_label(tmp_path: Path) -> None:
    to(tmp_path / "out", folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(5)}))
    assert content(opened(tmp_path / "out").train) == content(opened(tmp_path / "in").train)
    schema = pq.read_schema(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert schema.names == ["image"]
    assert json.loads(schema.metadata[b"huggingface"]) == {"info": {"features": {"image": {"_type": "Image"}}}}


def test_a_split_without_labels_beside_one_with(tmp_path: Path) -> None:
    files = {f"train/{name}/{n}.png": png(n) for name in ("a", "b") for n in range(3)} | {"test/0.png": png(7)}
    to(tmp_path / "out", folder(tmp_path / "in", files))
    after = opened(tmp_path / "out")
    assert after.train.labels is not None and after.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert after.test is not None and after.test.labels is None


def test_parquet_is_shuffled_by_way_of_a_spool(tmp_path: Path) -> None:
    images = [png(n) for n in range(50)]
    images[20] = b"broken"
    (tmp_path / "in").mkdir()
    table = pa.table({"image": images, "label": [n // 5 for n in range(50)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=7)
    options = ConvertOptions(shuffle=3, shard_mb=0.001, threads=2)
    done = to(tmp_path / "out", tmp_path / "in", options, max_bad_fraction=0.1)
    expected = [index for index in stored_order(50, 3).tolist() if index != 20]
    assert done.files > 2
    assert [image.id for image in done.left_out] == [20]
    assert content(opened(tmp_path / "out").train) == [(images[index], index // 5) for index in expected]
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir())[:-1] == [".json", ".jsonl"] + [".parquet"] * (
        done.files - 1
    )
    again = to(tmp_path / "again", tmp_path / "out", SAME_ORDER)
    assert content(opened(again.address).train) == content(opened(tmp_path / "out").train)


def test_the_order_is_a_seeded_permutation(photos: Path, tmp_path: Path) -> None:
    to(tmp_path / "out", photos, ConvertOptions(shuffle=5))
    before, after = content(opened(photos).train), content(opened(tmp_path / "out").train)
    assert after == [before[index] for index in stored_order(27, 5)]
    assert after != before
    assert stored_order(27, 5).tolist() != stored_order(27, 6).tolist()
    assert np.array_equal(stored_order(3, None), [0, 1, 2])


def test_the_same_input_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    to(tmp_path / "one", photos, ConvertOptions(threads=1, shard_mb=0.001))
    to(tmp_path / "two", photos, ConvertOptions(threads=7, shard_mb=0.001))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    to(tmp_path / "three", photos, ConvertOptions(shuffle=1, shard_mb=0.001))
    assert hashes(tmp_path / "one") != hashes(tmp_path / "three")


def test_files_and_row_groups_have_the_sizes_asked_for(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n:03}.png": png(n, (30, 20)) for n in range(200)})
    done = to(tmp_path / "out", source, ConvertOptions(shard_mb=0.1, row_group_mb=0.02))
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert done.files == len(files) == 4  # 200 images of 1.9 kB
    assert files[1].name == "train-00001-of-00004.parquet"
    assert done.size == sum(file.stat().st_size for file in files)
    for file in files:
        assert 80_000 < file.stat().st_size < 120_000
        footer = pq.read_metadata(file)
        assert footer.num_row_groups > 4
        for group in range(footer.num_row_groups):
            image = footer.row_group(group).column(0)
            assert image.path_in_schema == "image.bytes"
            assert image.compression == "UNCOMPRESSED"
            assert not image.has_dictionary_page and not image.is_stats_set
            assert image.total_uncompressed_size < 20_500
    whole = to(tmp_path / "whole", source, ConvertOptions(row_group_mb=0.000001))
    assert pq.read_metadata(tmp_path / "whole" / "train-00000-of-00001.parquet").num_row_groups == 200
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["source"]["digest"] == opened(source).digest()
    assert manifest["splits"]["train"]["files"] == [
        {"name": "train-00000-of-00001.parquet", "images": 200, "bytes": whole.size}
    ]


# What is changed and what is left out


def test_broken_images_are_left_out_and_listed(tmp_path: Path) -> None:
    files = {f"{n}.png": png(n) for n in range(9)} | {"3.png": b"no image", "5.png": png(5)[:60]}
    source = folder(tmp_path / "in", files)
    with pytest.raises(RunFailed, match=r"more of the 9 images are unusable than the 0 that data.max_bad_fraction"):
        to(tmp_path / "out", source)
    with pytest.raises(RunFailed, match=r"than the 1 that data.max_bad_fraction = 0.2 allows.*3.png: not an image"):
        to(tmp_path / "out", source, max_bad_fraction=0.2)
    assert os.listdir(tmp_path) == ["in"]
    done = to(tmp_path / "out", source, max_bad_fraction=0.3)
    assert done.images == {"train": 7}
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [(line["split"], line["id"], line["name"]) for line in lines] == [
        ("train", 3, "3.png"),
        ("train", 5, "5.png"),
    ]
    assert lines[0]["reason"].startswith("not an image")
    unchecked = to(tmp_path / "unchecked", source, ConvertOptions(check=False, shuffle=None))
    assert unchecked.images == {"train": 9}
    assert opened(tmp_path / "unchecked").train.read(3) == b"no image"


def test_large_images_are_shrunk_when_asked(tmp_path: Path) -> None:
    files = {
        "a.jpg": png(0, (120, 80), "JPEG"),
        "b.png": png(1, (90, 200)),
        "c.jpg": png(2, (500, 40), "JPEG"),
    }
    done = to(tmp_path / "out", folder(tmp_path / "in", files), ConvertOptions(shorter_side=40, shuffle=None))
    assert done.shrunk == 2
    images = [data for data, _ in content(opened(tmp_path / "out").train)]
    assert [Image.open(io.BytesIO(data)).size for data in images] == [(60, 40), (40, 89), (500, 40)]
    assert [Image.open(io.BytesIO(data)).format for data in images] == ["JPEG", "PNG", "JPEG"]
    assert images[2] == files["c.jpg"]
    reference = Image.open(io.BytesIO(files["b.png"])).resize((40, 89), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(images[1], 10_000), np.asarray(reference))
    smooth = np.tile(np.linspace(0, 255, 80).astype(np.uint8)[:, None, None], (1, 90, 3))
    small = np.asarray(Image.fromarray(smooth).resize((45, 40), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(shrink(smooth, 40, "JPEG"), 10_000).astype(int) - small).max() < 4


# Where it goes


def test_a_destination_that_is_taken_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / ".busy.partial").mkdir()
    for name, why in (("file", "not empty"), ("full", "not empty"), ("busy", "another conversion writes it")):
        with pytest.raises(ConfigError, match=f"DEST = .*{name}: .*{why}"):
            to(tmp_path / name, photos)
    with pytest.raises(ConfigError, match="lies in the source"):
        to(photos / "parquet", photos)
    with pytest.raises(ConfigError, match="file cannot be made: File exists"):
        to(tmp_path / "file" / "below", photos)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    to((tmp_path / "empty").as_uri(), photos)
    assert len(opened(tmp_path / "empty").train) == 27


def test_too_little_room_is_said_before_writing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match=r"needs about 3.* kB, and its disk has 1 kB free"):
        to(tmp_path / "out", photos)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {f"{n}.png": png(n, (200, 200)) for n in range(20)})
    code = f"""
import resource, sys
from orchestrator.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
sys.exit(main(["data", "convert", {str(source)!r}, {str(tmp_path / "out")!r}, "--row-group-mb", "0.3"]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False, env=environment
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'out'}: cannot be written: File too large; nothing was kept\n"
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["in"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("shuffle", [None, 0])
def test_an_interrupt_leaves_nothing(tmp_path: Path, shuffle: int | None) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [png(n) for n in range(90)]}), tmp_path / "in" / "a.parquet", row_group_size=9)
    config = DataConfig(source=str(tmp_path / "in"))
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 40:
            raise KeyboardInterrupt

    options = ConvertOptions(shuffle=shuffle, shard_mb=0.001)
    with pytest.raises(KeyboardInterrupt):
        convert(open_source(config), str(tmp_path / "out"), config, options, stop)
    assert os.listdir(tmp_path) == ["in"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_a_url_is_written_and_cleaned_up(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.chdir(photos)  # a URL is nowhere below it

    storage = fsspec.filesystem("memory")
    done = to("memory://bucket/photos", photos, ConvertOptions(shard_mb=0.001))
    assert done.address == "memory://bucket/photos"
    to(tmp_path / "local", photos, ConvertOptions(shard_mb=0.001))
    written = {name.rsplit("/", 1)[1]: storage.cat(name) for name in storage.find("/bucket/photos")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in written.items()} == hashes(tmp_path / "local")
    with pytest.raises(ConfigError, match="DEST = memory://bucket/photos: is there already and not empty"):
        to("memory://bucket/photos", photos)
    broken = folder(tmp_path / "in", {f"{n}.png": png(n) for n in range(99)} | {"98.png": b"", "99.png": b""})
    with pytest.raises(RunFailed, match="unusable"):
        to("memory://bucket/broken", broken, ConvertOptions(shard_mb=0.001, shuffle=None))
    assert storage.find("/bucket/broken") == []
    with pytest.raises(ConfigError, match=r"DEST = nosuch://bucket/x: cannot be written: no such scheme"):
        to("nosuch://bucket/x", photos)


def test_a_spool_gives_back_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.tools.spool._BUFFER_BYTES", 20)
    spool = Spool(tmp_path / "spool", np.array([0, 4, 5, 10]))
    for place in (9, 0, 3, 7, 1):
        spool.add(place, bytes([place]) * 6)
    spool.add(8, b"")
    expected = [bytes([place]) * 6 if place in (0, 1, 3, 7, 9) else None for place in range(10)]
    expected[8] = b""
    assert list(spool.in_order()) == expected
    assert os.listdir(tmp_path / "spool") == []
    spool.remove()
    assert os.listdir(tmp_path) == []
