"""Sources: what is found in folders and Parquet files, and what is said when nothing is."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.images import decode, load_image
from orchestrator.data.readers import table
from orchestrator.data.sources import Source, open_source


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def value(data: bytes | np.ndarray) -> int:
    assert isinstance(data, bytes)
    red, green, _ = decode(data, 100)[0, 0].tolist()
    return int(red + 256 * green)


def make_files(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def open_at(path: Path | str, **settings: str) -> Source:
    return open_source(DataConfig(source=str(path), **settings))


def names(source: Source) -> list[str]:
    return [source.train.name(index) for index in range(len(source.train))]


# Digits


def test_digits_are_those_of_scikit_learn() -> None:
    source = open_source(DataConfig())
    assert source.test is not None
    theirs = load_digits()
    assert (len(source.train), len(source.test)) == (1438, 359)
    assert source.num_samples == 1438
    assert source.classes == tuple("0123456789")
    seen = []
    for split in (source.train, source.test):
        assert split.labels is not None
        for index in range(len(split)):
            row = int(split.name(index).split()[1])
            image = split.read(index)
            assert isinstance(image, np.ndarray)
            assert image.shape == (8, 8, 3)
            assert image.dtype == np.uint8
            assert np.array_equal(image[..., 1], np.rint(theirs.images[row] * 255 / 16))
            assert split.labels[index] == theirs.target[row]
            seen.append(row)
    assert sorted(seen) == list(range(1797))
    shares = np.bincount(source.test.labels) / np.bincount(theirs.target)
    assert np.abs(shares - 0.2).max() < 0.01
    assert source.digest() == open_source(DataConfig()).digest()
    assert source.describe() == "digits (embedded): 1438 training and 359 test images in 10 classes"


def test_digits_have_two_splits() -> None:
    swapped = open_source(DataConfig(train_split="test", test_split="train"))
    assert len(swapped.train) == 359
    with pytest.raises(ConfigError, match=r"data.train_split = tran: no such split.*test, train; did you mean train\?"):
        open_source(DataConfig(train_split="tran"))
    with pytest.raises(ConfigError, match=r"data.test_split = train: must differ"):
        open_source(DataConfig(test_split="train"))


# Folders


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path, "b.png", "a.JPG", "c.webp"))
    (tmp_path / "notes.txt").write_text("no image")
    assert names(source) == ["a.JPG", "b.png", "c.webp"]
    assert value(source.train.read(1)) == 0
    assert source.train.labels is None
    assert source.test is None
    assert source.classes == ()
    assert source.describe() == f"folder {tmp_path}: 3 training images without labels"


def test_class_folders_are_labels(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path, "dog/1.png", "cat/deep/2.png", "dog/3.png"))
    assert names(source) == ["cat/deep/2.png", "dog/1.png", "dog/3.png"]
    assert source.classes == ("cat", "dog")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0, 1, 1]
    assert source.train.labels.dtype == np.int64


@pytest.mark.parametrize("files", [("dog/1.png", "cat/2.png", "3.png"), ("all/1.png", "all/2.png")])
def test_folders_that_are_no_classes(tmp_path: Path, files: tuple[str, ...]) -> None:
    assert open_at(make_files(tmp_path, *files)).train.labels is None


def test_split_folders(tmp_path: Path) -> None:
    make_files(tmp_path, "train/dog/1.png", "train/cat/2.png", "test/dog/3.png", "test/elk/4.png", "val/x/5.png")
    source = open_at(tmp_path)
    assert source.classes == ("cat", "dog", "elk")
    assert names(source) == ["cat/2.png", "dog/1.png"]
    assert source.test is not None
    assert source.train.labels is not None
    assert source.test.labels is not None
    assert source.train.labels.tolist() == [0, 1]
    assert source.test.labels.tolist() == [1, 2]
    assert value(source.test.read(1)) == 3
    other = open_at(tmp_path, train_split="test", test_split="val")
    assert other.test is not None
    assert (len(other.train), len(other.test)) == (2, 1)
    assert other.test.labels is not None
    assert other.classes == ("dog", "elk", "x")
    assert other.test.labels.tolist() == [2]
    assert other.describe().endswith("; 2 images of other splits unused (train 2)")


def test_a_training_folder_alone(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path, "train/1.png", "train/2.png"))
    assert names(source) == ["1.png", "2.png"]
    assert source.test is None


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = open_at(make_files(tmp_path, "car/1.png", "train/2.png"))
    assert source.classes == ("car", "train")
    assert len(source.train) == 2


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    make_files(tmp_path, "training/1.png", "test/2.png")
    with pytest.raises(ConfigError, match=r"data.train_split = train: no such sub-folder.*did you mean training\?"):
        open_at(tmp_path)
    with pytest.raises(ConfigError, match=r"data.test_split = tests: .* did you mean test\?"):
        open_at(tmp_path, train_split="training", test_split="tests")


def test_splits_asked_of_a_flat_folder(tmp_path: Path) -> None:
    make_files(tmp_path, "1.png", "2.png")
    with pytest.raises(
        ConfigError, match=r"has no sub-folder, but .*data.test_split = val.* takes .*data.test_split=test"
    ):
        open_at(tmp_path, test_split="val")


def test_images_beside_split_folders_are_not_passed_over(tmp_path: Path) -> None:
    make_files(tmp_path, "train/1.png", "test/2.png", "3.png")
    with pytest.raises(ConfigError, match=r"3.png lies beside the split folders"):
        open_at(tmp_path)
    assert len(open_at(make_files(tmp_path / "flat", "1.png", "extra/2.png")).train) == 2


def test_hidden_files_are_skipped_and_links_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = make_files(tmp_path / "elsewhere", "3.png")
    root = make_files(tmp_path / "root", "1.png", ".hidden.png", ".cache/2.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    assert names(open_at(root)) == ["1.png", "linked/3.png"]


def test_a_relative_path_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path / "images", "1.png")
    write(tmp_path / "a.parquet", {"image": encoded(1)})
    monkeypatch.chdir(tmp_path)
    sources = [open_at("images"), open_at("a.parquet")]
    monkeypatch.chdir("/")
    assert [value(source.train.read(0)) for source in sources] == [0, 0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir(mode=0)
    with pytest.raises(ConfigError, match="cannot be listed"):
        open_at(tmp_path)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \xff.png")
    source = open_at(make_files(tmp_path, odd, "日本.png"))
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert odd in names(copy)
    assert value(copy.train.read(names(copy).index(odd))) == 0


def test_nothing_there(tmp_path: Path) -> None:
    make_files(tmp_path / "photos", "a.png")
    key = "data.source = "
    with pytest.raises(ConfigError, match=f"{key}.*photo: no such file or folder.*did you mean {tmp_path}/photos"):
        open_at(tmp_path / "photo")
    with pytest.raises(ConfigError, match=f"did you mean {tmp_path}/photos"):
        open_at(tmp_path / "photoz" / "train")
    with pytest.raises(ConfigError, match=r"must be digits, torchvision:NAME, or .*did you mean digits\?"):
        open_at("digit")
    with pytest.raises(ConfigError, match=r"a file must be one of .*\.parquet .*; of images, name the folder"):
        open_at(tmp_path / "photos" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no images in this folder or below; looked for .*.jpg"):
        open_at(tmp_path / "empty")


def test_digest_changes_with_names_and_sizes(tmp_path: Path) -> None:
    make_files(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    digests = [open_at(tmp_path).digest()]
    shutil.copytree(tmp_path, copy := tmp_path.parent / f"{tmp_path.name}-copy")
    assert open_at(copy).digest() == digests[0]
    with (tmp_path / "test/1.png").open("ab") as file:
        file.write(b"x")
    digests.append(open_at(tmp_path).digest())
    (tmp_path / "train/2.png").rename(tmp_path / "train/3.png")
    digests.append(open_at(tmp_path).digest())
    assert len(set(digests)) == 3
    assert all(len(digest) <= 36 for digest in digests)


# Parquet


def write(path: Path, columns: dict[str, object], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def encoded(n: int, start: int = 0) -> list[bytes]:
    return [png(number) for number in range(start, start + n)]


def test_parquet_with_splits_and_text_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        {"image": encoded(10), "label": list("bbaaccbbad"), "split": ["train", "test"] * 5},
    )
    source = open_at(path)
    assert source.test is not None
    assert source.train.labels is not None
    assert source.test.labels is not None
    assert source.classes == tuple("abcd")
    assert [value(source.train.read(index)) for index in range(5)] == [0, 2, 4, 6, 8]
    assert [value(source.test.read(index)) for index in (4, 0, 2)] == [9, 1, 5]
    assert source.train.labels.tolist() == [1, 0, 2, 1, 0]
    assert source.test.labels.tolist() == [1, 0, 2, 1, 3]
    assert source.train.name(2) == "a.parquet, row 0 of row group 1"
    with pytest.raises(IndexError):
        source.train.read(5)


def test_a_folder_of_parquet_is_one_table(tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path / "sub" / f"{part}.parquet", {"image": encoded(5, 5 * part), "label": [part] * 5}, group=2)
    source = open_at(tmp_path)
    assert [value(source.train.read(index)) for index in range(15)] == list(range(15))
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert source.test is None


def test_splits_by_file_name(tmp_path: Path) -> None:
    for name, start in (("train-00000-of-00002", 0), ("train-00001-of-00002", 3), ("test-00000-of-00001", 6)):
        write(tmp_path / f"{name}.parquet", {"image": encoded(3, start)})
    source = open_at(tmp_path)
    assert source.test is not None
    assert [value(source.train.read(index)) for index in range(6)] == list(range(6))
    assert value(source.test.read(0)) == 6


@pytest.mark.parametrize("kind", ["large_binary", "struct", "dictionary labels"])
def test_column_types(tmp_path: Path, kind: str) -> None:
    images: object = encoded(3)
    labels: object = [5, 3, 5]
    if kind == "large_binary":
        images = pa.array(encoded(3), pa.large_binary())
    if kind == "struct":
        images = pa.array([{"bytes": data, "path": "x"} for data in encoded(3)])
    if kind == "dictionary labels":
        labels = pa.array(["v", "u", "v"]).dictionary_encode()
    source = open_at(write(tmp_path / "a.parquet", {"image": images, "label": labels}))
    assert [value(source.train.read(index)) for index in range(3)] == [0, 1, 2]
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [[1, None, 2], [-1, -1, -1], None])
def test_missing_labels_are_no_labels(tmp_path: Path, labels: list[int | None] | None) -> None:
    columns = {"image": encoded(3)} | ({} if labels is None else {"label": labels})
    assert open_at(write(tmp_path / "a.parquet", columns)).train.labels is None


def test_a_null_image_is_an_empty_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([png(1), None], pa.binary())})
    assert open_at(path).train.read(1) == b""


def test_wrong_columns_and_splits(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        {"images": encoded(2), "text": ["a", "b"], "labels": [0.5, 1.5], "split": ["train", "dev"]},
    )
    for settings, message in (
        ({"image_column": "imags"}, r"data.image_column = imags: no such column in a.parquet.*did you mean images\?"),
        ({"image_column": "text"}, "data.image_column = text: must hold encoded images .* not string"),
        ({"image_column": "images", "label_column": "lables"}, r"data.label_column = lables: .*did you mean labels\?"),
        ({"image_column": "images", "label_column": "labels"}, "must hold whole numbers or text, not double"),
        ({"image_column": "images", "split_column": "spilt"}, r"data.split_column = spilt: .*did you mean split\?"),
        ({"image_column": "images", "train_split": "training"}, r"data.train_split = training: .*did you mean train\?"),
        ({"image_column": "images", "test_split": "test2"}, "data.test_split = test2: no such value in column split"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_at(path, **settings)
    ok = open_at(path, image_column="images")
    assert len(ok.train) == 1
    assert ok.test is None


def test_damaged_parquet_empty_parquet_and_a_mixed_folder(tmp_path: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"bad.parquet is not readable as Parquet"):
        open_at(bad)
    with pytest.raises(ConfigError, match="no rows"):
        open_at(write(tmp_path / "none.parquet", {"image": pa.array([], pa.binary())}))
    make_files(tmp_path, "1.png")
    with pytest.raises(ConfigError, match=r"holds image files .1.png. and Parquet files .bad.parquet."):
        open_at(tmp_path)


def test_files_of_different_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": encoded(2), "label": [0, 1]})
    write(tmp_path / "b.parquet", {"image": encoded(2)})
    with pytest.raises(ConfigError, match=r"b.parquet lacks columns that a.parquet has"):
        open_at(tmp_path)


def test_row_groups_are_kept_up_to_a_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": [bytes([number]) * 1000 for number in range(40)]})
    source = open_at(path)
    reads = []
    original = table._read_group
    monkeypatch.setattr(table, "_read_group", lambda *key: reads.append(key[2]) or original(*key))
    monkeypatch.setattr(table, "_cache", table.GroupCache())
    monkeypatch.setattr(table, "_CACHE_BYTES", 9_000)  # two groups of four rows
    for index in (0, 1, 4, 0, 8, 3, 4):
        assert source.train.read(index) == bytes([index]) * 1000
    assert reads == [0, 1, 2, 1]
    monkeypatch.setattr(table, "_CACHE_BYTES", 10)
    assert source.train.read(39) == bytes([39]) * 1000


def test_a_table_that_vanished_is_an_os_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": encoded(2)})
    source = open_at(path)
    path.unlink()
    with pytest.raises(OSError, match="parquet"):
        source.train.read(0)


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": encoded(4)})
    assert value(open_at(path).train.read(2)) == 2
    write(path, {"image": encoded(9, 30)}, group=3)
    assert value(open_at(path).train.read(8)) == 38


def test_parquet_digest(tmp_path: Path) -> None:
    first = open_at(write(tmp_path / "a.parquet", {"image": encoded(4)})).digest()
    assert first == open_at(tmp_path / "a.parquet").digest()
    assert first != open_at(write(tmp_path / "a.parquet", {"image": encoded(4, 9), "label": [1] * 4})).digest()


def test_cifar10(shared_data: Path) -> None:
    source = open_at(shared_data / "cifar10.parquet")
    assert source.test is not None
    assert (len(source.train), len(source.test), len(source.classes)) == (50_000, 10_000, 10)
    assert load_image(source.train, 49_999, 10_000).shape == (32, 32, 3)
    assert source.train.labels is not None
    assert np.bincount(source.train.labels).tolist() == [5000] * 10
    assert len(pickle.dumps(source)) < 2_000_000


# All


def test_checking_a_source_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    make_files(tmp_path / "images", "1.png")
    write(tmp_path / "table.parquet", {"image": encoded(2)})
    code = f"""
import sys
from orchestrator.config import DataConfig
from orchestrator.data.sources import open_source
for source in ("digits", {str(tmp_path / "images")!r}, {str(tmp_path / "table.parquet")!r}):
    open_source(DataConfig(source=source)).describe()
loaded = {{"torch", "ray", "sklearn", "mlflow"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2])
