"""What of a source is not used: other splits, folders beside them, labels, columns, and shards that are missing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino_core.config import ConfigError, CropsConfig
from orchestrator.config import DataConfig
from orchestrator.data.readers.shard_names import check_complete
from orchestrator.data.sources import open_source
from orchestrator.data.split import Source, Split
from orchestrator.data.tools.convert import ConvertOptions, convert
from orchestrator.data.tools.inspect import inspect
from orchestrator.data.tools.inspect_text import as_json, as_text


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def make_files(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def make_list(root: Path, header: str, rows: Sequence[str]) -> Path:
    make_files(root, *(f"{number}.png" for number in range(len(rows))))
    path = root / "list.csv"
    path.write_text("\n".join([header, *(f"{number}.png,{row}" for number, row in enumerate(rows))]))
    return path


def make_parquet(path: Path, num_images: int, image: str = "image", **columns: Sequence[str | int | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: [png(number) for number in range(num_images)], **columns}), path)
    return path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def open_at(path: Path | str, **settings: str) -> Source:
    return open_source(DataConfig(source=str(path), **settings))


def labels(split: Split | None) -> list[int] | None:
    assert split is not None
    return None if split.labels is None else split.labels.tolist()


# Folders


@pytest.mark.parametrize(
    ("tops", "splits", "remedy"),
    [
        (("train", "test", "masks"), "test, train", "move the latter away"),
        (
            ("train", "val", "masks"),
            "train, val",
            "move the latter away, or name the splits, such as data.train_split=train data.test_split=val",
        ),
        (
            ("Train", "Test", "masks"),
            "Test, Train",
            "move the latter away, or name the splits, such as data.train_split=Train data.test_split=Test",
        ),
    ],
)
def test_a_folder_beside_the_splits_is_refused(tmp_path: Path, tops: tuple[str, ...], splits: str, remedy: str) -> None:
    make_files(tmp_path, *(f"{top}/a/1.png" for top in tops))
    with pytest.raises(ConfigError) as refused:
        open_at(tmp_path)
    assert str(refused.value) == (f"data.source = {tmp_path}: holds the split folders {splits} beside masks; {remedy}")


def test_what_the_remedy_names_is_read(tmp_path: Path) -> None:
    make_files(tmp_path, "train/a/1.png", "val/a/2.png", "val/b/3.png", "masks/4.png", "masks/5.png")
    source = open_at(tmp_path, train_split="train", test_split="val")
    assert source.unused == {"masks": 2}
    assert source.describe() == (
        f"folder {tmp_path}: 1 training and 2 test images in 2 classes; 2 images of other splits unused (masks 2)"
    )


def test_a_class_may_be_called_as_a_split(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path, "train/1.png", "bus/2.png", "boat/3.png"))
    assert source.classes == ("boat", "bus", "train")
    assert source.notes() == []


def test_splits_in_capitals_are_no_classes(tmp_path: Path) -> None:
    make_files(tmp_path, "Train/a/1.png", "Test/a/2.png")
    with pytest.raises(ConfigError, match=r"data.train_split = train: .* there are Test, Train; did you mean Train\?"):
        open_at(tmp_path)
    assert len(open_at(tmp_path, train_split="Train", test_split="Test").train) == 1


def test_a_split_to_test_on_is_proposed(tmp_path: Path) -> None:
    make_files(tmp_path, "train/1.png", "train/2.png", "extra/3.png", "validation/4.png")
    assert open_at(tmp_path).describe() == (
        f"folder {tmp_path}: 2 training images without labels; 2 images of other splits unused (extra 1, validation 1)"
        "; no split test; there is validation: data.test_split=validation"
    )
    assert open_at(tmp_path, test_split="validation").notes() == ["1 image of other splits unused (extra 1)"]


def test_classes_are_decided_over_both_splits(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path / "few", "train/cat/1.png", "train/dog/2.png", "test/dog/3.png"))
    assert source.classes == ("cat", "dog")
    assert (labels(source.train), labels(source.test)) == ([0, 1], [1])
    # One folder in each, as some archives unpack: it says where, not what.
    source = open_at(make_files(tmp_path / "one", "train/train/1.png", "test/test1/2.png"))
    assert (labels(source.train), labels(source.test), source.notes()) == (None, None, [])
    source = open_at(make_files(tmp_path / "flat", "train/cat/1.png", "train/dog/2.png", "test/3.png"))
    assert (labels(source.train), labels(source.test)) == ([0, 1], None)
    assert source.notes() == ["the test images have no labels"]


def test_an_image_beside_the_class_folders(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path, "a/1.png", "b/2.png", "3.png"))
    assert source.classes == ()
    assert source.notes() == ["1 of 3 training images has no label, so their labels are ignored"]


# Lists and tables


def test_a_list_with_other_splits(tmp_path: Path) -> None:
    path = make_list(tmp_path, "path,split", ["train"] * 3 + ["test"] + [""] * 2 + ["Train"])
    source = open_at(path)
    assert source.unused == {"": 2, "Train": 1}
    assert source.describe() == (
        f"list {path}: 3 training and 1 test images without labels; 3 images of other splits unused ('' 2, Train 1)"
    )


def test_a_list_with_missing_labels(tmp_path: Path) -> None:
    source = open_at(make_list(tmp_path, "path,label,split", ["a,train", ",train", "b,train", "a,test", "b,test"]))
    assert labels(source.train) is None
    assert labels(source.test) == [0, 1]
    assert source.notes() == ["1 of 3 training images has no label, so their labels are ignored"]
    everywhere = open_at(make_list(tmp_path / "none", "path,label", ["", ""]))
    assert everywhere.notes() == []


def test_a_table_with_other_splits_and_missing_labels(tmp_path: Path) -> None:
    split = ["train", "train", "", None, "val", "train"]
    path = make_parquet(tmp_path / "a.parquet", 6, split=split, label=[0, None, 1, 1, 1, -1])
    assert open_at(path).notes() == [
        "2 of 3 training images have no label, so their labels are ignored",
        "3 images of other splits unused ('' 2, val 1)",
        "no split test; there is val: data.test_split=val",
    ]


def test_splits_by_file_name(tmp_path: Path) -> None:
    make_parquet(tmp_path / "train-00000-of-00001.parquet", 3)
    make_parquet(tmp_path / "validation-00000-of-00001.parquet", 2)
    assert open_at(tmp_path).notes() == [
        "2 images of other splits unused (validation 2)",
        "no split test; there is validation: data.test_split=validation",
    ]


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "a.parquet", 2, image="jpg", cls=[0, 1], set=["train", "test"])
    assert open_at(path).describe() == (
        f"parquet {path}: 2 training images without labels; images from column jpg; columns not used: cls, set"
    )
    named = open_at(path, image_column="jpg", label_column="cls", split_column="set")
    assert named.describe() == f"parquet {path}: 1 training and 1 test images in 2 classes"


# Shards


def test_shards_with_other_splits_and_missing_labels(tmp_path: Path) -> None:
    make_tar(tmp_path / "train-00.tar", {"1.png": png(1), "1.cls": b"0", "2.png": png(2), "3.png": png(3)})
    make_tar(tmp_path / "val-00.tar", {"4.png": png(4), "4.cls": b"0"})
    source = open_at(tmp_path)
    assert source.unused == {"val": None}  # not opened
    assert source.notes() == [
        "2 of 3 training images have no label, so their labels are ignored",
        "images of other splits unused (val)",
        "no split test; there is val: data.test_split=val",
    ]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar"])
def test_a_missing_shard_is_noticed(tmp_path: Path, suffix: str) -> None:
    def make(name: str) -> Path:
        path = tmp_path / "set" / f"{name}.{suffix}"
        if suffix == "tar":
            return make_tar(path, {"1.png": png(1)})
        if suffix == "parquet":
            return make_parquet(path, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": [png(1)]})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        return path

    shard = make("train-00000-of-00002")
    with pytest.raises(ConfigError) as refused:
        open_at(tmp_path / "set")
    assert str(refused.value) == (
        f"data.source = {tmp_path}/set: train-00001-of-00002.{suffix} missing from numbered files; to use what is "
        f"there, name it by a pattern such as *.{suffix}"
    )
    assert len(open_at(shard).train) == 1
    assert len(open_at(tmp_path / "set" / f"*.{suffix}").train) == 1
    make("train-00001-of-00002")
    assert len(open_at(tmp_path / "set").train) == 2


def missing(*names: str) -> str:
    try:
        check_complete(DataConfig(source="s3://bucket/set?region=eu"), names)
    except ConfigError as error:
        return str(error).partition("eu: ")[2].partition(" missing")[0]
    return ""


def test_numbered_sets() -> None:
    assert missing("a-00001-of-00002.tar", "a-00002-of-00002.tar") == ""  # from 1
    assert missing("a-0-of-1.tar", "b/a-0-of-1.tar", "c-007.tar", "d.tar") == ""
    assert missing("a-0-of-2.tar", "b/a-1-of-2.tar") == "a-1-of-2.tar, b/a-0-of-2.tar"
    assert missing("a-00000-of-00002-0f9c.parquet", "a-00001-of-00002-77ab.parquet") == ""
    assert missing("a-00000-of-00002-0f9c.parquet") == "a-00001-of-00002-*.parquet"
    assert missing("a-3-of-999999999.tar") == (
        "a-0-of-999999999.tar, a-1-of-999999999.tar, a-2-of-999999999.tar, a-4-of-999999999.tar, "
        "a-5-of-999999999.tar and 999999993 more"
    )


# Tools


def test_inspect_and_convert_say_it(tmp_path: Path) -> None:
    path = make_list(tmp_path / "set", "path,split", ["train"] * 3 + ["Train"])
    config, crops = DataConfig(source=str(path)), CropsConfig()
    note = "1 image of other splits unused (Train 1)"
    found = inspect(open_source(config), config, crops, threads=1)
    assert found.notes == (note,)
    assert note in as_text(found, config, crops).splitlines()
    assert json.loads(json.dumps(as_json(found, config, crops)))["notes"] == [note]
    done = convert(open_source(config), str(tmp_path / "new"), config, ConvertOptions(threads=1))
    assert done.notes == (note,)
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["notes"] == [note]
    assert open_at(tmp_path / "new").notes() == []


def test_a_source_of_a_guessed_column_is_not_written_into(tmp_path: Path) -> None:
    make_parquet(tmp_path / "set" / "a.parquet", 2, image="jpg")
    config = DataConfig(source=str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="lies in the source"):
        convert(open_source(config), str(tmp_path / "set" / "new"), config, ConvertOptions(threads=1))
