"""Arrow files and streams, Hugging Face's descriptions of columns, and its saved data sets."""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.images import BadImage, decode, load_image
from orchestrator.data.readers import arrow, table
from orchestrator.data.sources import Source, open_source
from orchestrator.data.split import Split


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def images(start: int, stop: int) -> pa.Array:
    return pa.array([png(value) for value in range(start, stop)], pa.binary())


def structs(start: int, stop: int) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": png(value), "path": None} for value in range(start, stop)], kind)


def write(path: Path, columns: dict[str, Any], batch: int = 3, kind: str = "file", **options: Any) -> Path:
    content = pa.table(columns).replace_schema_metadata(options.pop("metadata", None))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=batch)
    return path


def open_at(path: Path | str, **settings: str) -> Source:
    return open_source(DataConfig(source=str(path), **settings))


def reds(split: Split | None) -> list[int]:
    assert split is not None
    return [int(load_image(split, index, 100)[0, 0, 0]) for index in range(len(split))]


def labels(split: Split | None) -> list[int]:
    assert split is not None
    assert split.labels is not None
    return split.labels.tolist()


# Arrow


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("suffix", ["arrow", "feather", "ipc"])
def test_splits_labels_and_units(tmp_path: Path, kind: str, suffix: str) -> None:
    split = ["train"] * 4 + ["test"] + ["train"] * 2
    columns = {"label": list("abcabca"), "image": images(0, 7), "split": split}
    source = open_at(write(tmp_path / f"a.{suffix}", columns, kind=kind))
    assert source.describe() == f"arrow {tmp_path}/a.{suffix}: 6 training and 1 test images in 3 classes"
    assert reds(source.train) == [0, 1, 2, 3, 5, 6]
    assert labels(source.train) == [0, 1, 2, 0, 2, 0]
    assert reds(source.test) == [4]
    units = source.train.units()
    assert units is not None
    assert units.tolist() == [0, 3, 5]  # batches of 3: rows 0-2, 3-5 and 6
    assert source.train.name(4) == f"a.{suffix}, row 2 of record batch 1"
    assert reds(pickle.loads(pickle.dumps(source.train))) == reds(source.train)  # noqa: S301


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_files_are_read_and_compressed_streams_refused(tmp_path: Path, compression: str) -> None:
    columns = {"image": structs(0, 7), "label": range(7)}
    source = open_at(write(tmp_path / "a.arrow", columns, compression=compression))
    assert reds(source.train) == list(range(7))
    with pytest.raises(ConfigError, match=r"b.arrow is not readable as Arrow: a compressed stream"):
        open_at(write(tmp_path / "b.arrow", columns, kind="stream", compression=compression))


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_dictionaries(tmp_path: Path, kind: str) -> None:
    columns = {"label": pa.array(["v", "u", "v", "w"]).dictionary_encode(), "image": images(0, 4)}
    source = open_at(write(tmp_path / "a.arrow", columns, batch=2, kind=kind))
    assert reds(source.train) == [0, 1, 2, 3]
    assert [source.classes[label] for label in labels(source.train)] == ["v", "u", "v", "w"]


def test_a_folder_of_both_kinds_of_files(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.arrow", {"image": images(0, 4)})
    write(tmp_path / "train-00001-of-00002.arrow", {"image": images(4, 8)}, kind="stream")
    write(tmp_path / "test-00000-of-00001.arrow", {"image": images(8, 9)})
    source = open_at(tmp_path)
    assert reds(source.train) == list(range(8))
    assert reds(source.test) == [8]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_the_digest_follows_the_sizes_of_images(tmp_path: Path, kind: str) -> None:
    digests = set()
    for first in (b"12", b"12", b"123"):
        path = write(tmp_path / "a.arrow", {"image": pa.array([first, b"4", b"5"], pa.binary())}, kind=kind)
        digests.add(open_at(path).digest())
    assert len(digests) == 2


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / "a.arrow", {"image": images(0, 7)}, kind=kind).read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 3, 8, 40, len(whole) // 2, len(whole) - 12):
        (tmp_path / "b.arrow").write_bytes(whole[:cut])
        try:
            source = open_at(tmp_path / "b.arrow")
        except ConfigError as error:
            assert "b.arrow is not readable as Arrow" in str(error) or "no rows" in str(error)  # noqa: PT017
        else:
            assert kind == "stream"  # its end is only a mark
            assert reds(source.train) == list(range(7))[: len(source.train)]
    for place in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        (tmp_path / "b.arrow").write_bytes(damaged)
        try:
            source = open_at(tmp_path / "b.arrow")
            for index in range(len(source.train)):
                source.train.read(index)
        except (ConfigError, OSError):
            pass


def test_a_struct_without_bytes_names_a_file(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/9.png").write_bytes(png(9))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"bytes": png(1), "path": "more/9.png"},
        {"bytes": None, "path": "more/9.png"},
        {"bytes": None, "path": "x"},
    ]
    column = pa.array([*rows, {"bytes": None, "path": None}, None], kind)
    pq.write_table(pa.table({"image": column}), tmp_path / "b.parquet")
    for path in (write(tmp_path / "a.arrow", {"image": column}), tmp_path / "b.parquet"):
        train = open_at(path).train
        assert [load_image(train, index, 100)[0, 0, 0] for index in (0, 1)] == [1, 9]
        with pytest.raises(BadImage, match="cannot be read: No such file"):
            load_image(train, 2, 100)
        for index in (3, 4):
            with pytest.raises(BadImage, match="empty"):
                load_image(train, index, 100)


# Which column


def test_the_only_column_of_images_is_taken(tmp_path: Path) -> None:
    source = open_at(write(tmp_path / "a.arrow", {"img": images(0, 2), "id": ["x", "y"]}))
    assert source.describe() == (
        f"arrow {tmp_path}/a.arrow: 2 training images without labels; images from column img; columns not used: id"
    )
    two = write(tmp_path / "b.arrow", {"img": images(0, 2), "mask": structs(0, 2)})
    with pytest.raises(ConfigError, match=r"data.image_column = image: no such column in b.arrow; there are img, mask"):
        open_at(two)
    assert reds(open_at(two, image_column="mask").train) == [0, 1]


FEATURES = {
    "img": {"_type": "Image"},
    "blob": {"dtype": "binary", "_type": "Value"},
    "fine": {"names": ["cat", "dog", "elk"], "_type": "ClassLabel"},
}


def huggingface(features: dict[str, Any]) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_columns_that_hugging_face_describes(tmp_path: Path) -> None:
    columns = {"blob": [b"", b"", b""], "img": structs(0, 3), "fine": [2, 0, 2]}
    source = open_at(write(tmp_path / "a.arrow", columns, metadata=huggingface(FEATURES)))
    assert source.notes() == ["images from column img", "labels from column fine", "columns not used: blob"]
    assert source.location == f"{tmp_path}/a.arrow"
    assert (source.classes, labels(source.train)) == (("cat", "elk"), [1, 0, 1])
    pq.write_table(pa.table(columns).replace_schema_metadata(huggingface(FEATURES)), tmp_path / "a.parquet")
    assert open_at(tmp_path / "a.parquet").classes == ("cat", "elk")
    coarse = FEATURES | {"coarse": {"names": ["animal"], "_type": "ClassLabel"}}
    path = write(tmp_path / "b.arrow", columns | {"coarse": [0, 0, 0]}, metadata=huggingface(coarse))
    assert open_at(path).train.labels is None  # which of the two?
    assert open_at(path, label_column="fine").classes == ("cat", "elk")
    for odd in ("not JSON", "[]", '{"info": null}', '{"info": {"features": [1]}}'):
        path = write(tmp_path / "c.arrow", {"image": images(0, 1)}, metadata={"huggingface": odd})
        assert reds(open_at(path).train) == [0]


# Saved data sets


def save(folder: Path, parts: Sequence[dict[str, Any]], state: dict[str, Any] | None = None) -> None:
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, columns in zip(names, parts, strict=True):
        write(folder / name, columns, kind="stream", metadata=huggingface(FEATURES))
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", **(state or {})}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


def part(start: int, stop: int) -> dict[str, Any]:
    return {"img": structs(start, stop), "fine": [value % 3 for value in range(start, stop)]}


def test_a_saved_data_set_of_splits(tmp_path: Path) -> None:
    save(tmp_path / "train", [part(0, 4), part(4, 7)])
    save(tmp_path / "test", [part(7, 9)])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    source = open_at(tmp_path)
    assert source.kind == "saved data set"
    assert (reds(source.train), reds(source.test)) == (list(range(7)), [7, 8])
    assert source.classes == ("cat", "dog", "elk")
    assert (labels(source.train), labels(source.test)) == ([0, 1, 2, 0, 1, 2, 0], [1, 2])
    assert reds(open_at(tmp_path, train_split="test", test_split="train").train) == [7, 8]
    with pytest.raises(ConfigError, match=r"data.train_split = trian: no such split in dataset_dict.json.*train\?"):
        open_at(tmp_path, train_split="trian")
    digest = source.digest()
    assert digest == open_at(tmp_path).digest()
    save(tmp_path / "test", [part(7, 10)])
    assert open_at(tmp_path).digest() != digest


@pytest.mark.parametrize("key", ["_indices_data_files", "_indices_files"])
def test_a_selection_is_honoured(tmp_path: Path, key: str) -> None:
    save(tmp_path, [part(0, 4), part(4, 7)], {key: [{"filename": "indices.arrow"}]})
    write(tmp_path / "indices.arrow", {"indices": pa.array([6, 0, 3, 3], pa.uint64())}, kind="stream")
    source = open_at(tmp_path)
    assert (reds(source.train), labels(source.train)) == ([6, 0, 3, 3], [0, 0, 0, 0])
    write(tmp_path / "indices.arrow", {"indices": pa.array([7], pa.uint64())}, kind="stream")
    with pytest.raises(ConfigError, match="selects no rows, or some not there"):
        open_at(tmp_path)
    (tmp_path / "indices.arrow").unlink()
    with pytest.raises(ConfigError, match=r"the selection in indices.arrow cannot be read"):
        open_at(tmp_path)


def test_a_saved_data_set_that_is_not_whole(tmp_path: Path) -> None:
    save(tmp_path, [part(0, 4), part(4, 7)])
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00002.arrow is not readable as Arrow: .*No such file"):
        open_at(tmp_path)
    for state in ('{"_data_files": []}', '{"_data_files": [1]}', "[]", "{"):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(ConfigError, match=r"state\.json"):
            open_at(tmp_path)


# Reading in threads


def test_who_reads_another_group_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_at(write(tmp_path / "a.arrow", {"image": images(0, 9)}))
    slow, go = threading.Event(), threading.Event()
    reads = []
    original = table._read_group

    def read_group(*key: Any) -> pa.Array:
        reads.append(key[2])
        if key[2] == 0:
            slow.set()
            assert go.wait(30)
        return original(*key)

    monkeypatch.setattr(table, "_read_group", read_group)
    monkeypatch.setattr(table, "_cache", table.GroupCache())
    waiting = [threading.Thread(target=source.train.read, args=(row,)) for row in (0, 1)]
    for thread in waiting:
        thread.start()
    assert slow.wait(30)
    assert decode(bytes(source.train.read(5)), 100)[0, 0, 0] == 5  # while group 0 is on its way
    go.set()
    for thread in waiting:
        thread.join(30)
    assert sorted(reads) == [0, 1]  # the two readers of group 0 shared one read


def test_a_failed_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_at(write(tmp_path / "a.arrow", {"image": images(0, 3)}))
    monkeypatch.setattr(table, "_cache", table.GroupCache())
    with monkeypatch.context() as patch:
        patch.setattr(arrow, "_open", lambda file: (_ for _ in ()).throw(TimeoutError("too slow")))
        with pytest.raises(OSError, match=r"a.arrow, record batch 0: too slow"):
            source.train.read(1)
    assert reds(source.train) == [0, 1, 2]
