"""torchvision's data sets, from files as they would be downloaded."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import http.server
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.images import decode
from orchestrator.data.readers import torchvision_sets
from orchestrator.data.readers.torchvision_sets import open_torchvision
from orchestrator.data.split import Source, Split


@pytest.fixture(autouse=True)
def nothing_is_open() -> Iterator[None]:
    torchvision_sets._opened.cache_clear()
    yield
    torchvision_sets._opened.cache_clear()


def open_set(name: str, root: Path, **settings: object) -> Source:
    return open_torchvision(DataConfig(source=f"torchvision:{name}", root=str(root), **settings))


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def make_idx(folder: Path, counts: dict[str, int], prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (part, count) in enumerate(counts.items()):
        images = np.random.default_rng(number).integers(0, 256, (count, 28, 28))
        (folder / f"{prefix}{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))


def make_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)


def same_as(split: Split, theirs: torchvision.datasets.VisionDataset) -> None:
    """Images and labels are those of torchvision, in whatever order."""

    def sorted_items(items: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        return sorted(items)

    ours = []
    for index in range(len(split)):
        data = split.read(index)
        pixels = decode(data, 10_000) if isinstance(data, bytes) else data
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        ours.append((pixels.tobytes(), -1 if split.labels is None else int(split.labels[index])))
    expected = [
        (np.asarray(image.convert("RGB")).tobytes(), -1 if split.labels is None else label) for image, label in theirs
    ]
    assert sorted_items(ours) == sorted_items(expected)


# Arrays


def test_arrays_with_a_train_flag(tmp_path: Path) -> None:
    make_idx(tmp_path / "FashionMNIST" / "raw", {"train": 30, "t10k": 20})
    source = open_set("FashionMNIST", tmp_path)
    assert source.describe() == (
        f"torchvision FashionMNIST in {tmp_path}: 30 training and 20 test images in 10 classes"
    )
    assert source.classes[:2] == ("T-shirt/top", "Trouser")
    same_as(source.train, torchvision.datasets.FashionMNIST(tmp_path))
    assert source.test is not None
    same_as(source.test, torchvision.datasets.FashionMNIST(tmp_path, train=False))
    assert source.train.name(3) == "FashionMNIST train 3"
    assert source.train.units() is None
    for index in (-1, 30):
        with pytest.raises(IndexError):
            source.train.read(index)
    first = source.digest()
    assert len(first) == 32
    torchvision_sets._opened.cache_clear()
    assert open_set("FashionMNIST", tmp_path).digest() == first
    torchvision_sets._opened.cache_clear()
    swapped = open_set("FashionMNIST", tmp_path, train_split="test", test_split="train")
    assert len(swapped.train) == 20
    assert swapped.digest() != first
    with pytest.raises(
        ConfigError, match=r"data.test_split = val: no such split of FashionMNIST; there are test, train"
    ):
        open_set("FashionMNIST", tmp_path, test_split="val")


def test_readers_are_small_and_open_the_set_where_they_read(tmp_path: Path) -> None:
    make_idx(tmp_path / "KMNIST" / "raw", {"train": 200, "t10k": 20})
    split = open_set("KMNIST", tmp_path).train
    data = pickle.dumps(split.reader)
    assert len(data) < 1000
    here = split.read(7)
    torchvision_sets._opened.cache_clear()
    assert np.array_equal(pickle.loads(data).read(7), here)  # noqa: S301 - its own


def test_splits_that_carry_two_arguments(tmp_path: Path) -> None:
    make_idx(tmp_path / "EMNIST" / "raw", {"train": 30, "test": 20}, prefix="emnist-letters-")
    with pytest.raises(
        ConfigError, match=r"data.train_split = train: no such split of EMNIST; there are balanced-test"
    ):
        open_set("EMNIST", tmp_path)
    source = open_set("EMNIST", tmp_path, train_split="letters-train", test_split="letters-test")
    assert (len(source.train), source.test and len(source.test)) == (30, 20)
    assert source.classes[:3] == ("N/A", "a", "b")


def test_colours_come_last() -> None:
    pixels = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)  # as SVHN and STL10 keep them
    assert torchvision_sets._to_rgb(pixels).shape == (5, 4, 3)
    assert torchvision_sets._to_rgb(pixels)[2, 1].tolist() == pixels[:, 2, 1].tolist()
    assert torchvision_sets._to_rgb(np.zeros((5, 4, 3), np.uint8)).shape == (5, 4, 3)


def test_tables_of_numbers(tmp_path: Path) -> None:
    for name, count in (("usps.bz2", 12), ("usps.t.bz2", 4)):
        lines = (f"{n % 3 + 1} " + " ".join(f"{i + 1}:{n / 12 - 0.5}" for i in range(256)) for n in range(count))
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    source = open_set("USPS", tmp_path)
    assert source.classes == ("0", "1", "2")
    same_as(source.train, torchvision.datasets.USPS(tmp_path))
    (tmp_path / "usps.bz2").write_bytes(b"BZh9 damaged")
    torchvision_sets._opened.cache_clear()
    with pytest.raises(ConfigError, match=r"data.source = torchvision:USPS: .*data.download=true"):
        open_set("USPS", tmp_path)
    with pytest.raises(OSError, match=r"USPS train 0: "):
        source.train.read(0)


def test_images_that_are_made_up(tmp_path: Path) -> None:
    source = open_set("FakeData", tmp_path)
    assert source.describe() == f"torchvision FakeData in {tmp_path}: 1000 training images without labels"
    theirs = torchvision.datasets.FakeData()
    expected = [np.asarray(theirs[index][0]) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for index, image in enumerate(pool.map(source.train.read, list(range(8)) * 4)):
            assert np.array_equal(image, expected[index % 8])
    with pytest.raises(ConfigError, match=r"data.train_split = mine: no such split of FakeData; there are none"):
        open_set("FakeData", tmp_path, train_split="mine")


# Files


def test_files_are_read_as_such(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 3)):
        for number in range(count):
            for wnid in ("n01440764", "n02102040"):
                make_image(tmp_path / "imagenette2" / split / wnid / f"{number}.JPEG", number)
    alone = open_set("Imagenette", tmp_path)
    assert alone.test is None  # val only when asked for
    source = open_set("Imagenette", tmp_path, test_split="val")
    assert (len(source.train), source.test and len(source.test)) == (10, 6)
    assert source.train.name(0) == "imagenette2/train/n01440764/0.JPEG"
    assert source.train.read(0) == (tmp_path / source.train.name(0)).read_bytes()
    assert source.classes == ("tench, Tinca tinca", "English springer, English springer spaniel")
    same_as(source.train, torchvision.datasets.Imagenette(tmp_path))
    assert source.digest() == open_set("Imagenette", tmp_path, test_split="val").digest()
    code = (
        "import pickle, sys; reader = pickle.load(sys.stdin.buffer); reader.read(0);"
        "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(source.train.reader), check=True)


def test_a_set_without_splits(tmp_path: Path) -> None:
    for number, kind in enumerate(("Forest", "River", "Highway")):
        make_image(tmp_path / "eurosat" / "2750" / kind / f"{kind}_1.jpg", number)
    source = open_set("EuroSAT", tmp_path)
    assert source.classes == ("Forest", "Highway", "River")
    assert source.test is None
    same_as(source.train, torchvision.datasets.EuroSAT(tmp_path))
    with pytest.raises(ConfigError, match=r"data.test_split = mine: must|no such split of EuroSAT; there are none"):
        open_set("EuroSAT", tmp_path, test_split="mine")


def test_lists_of_files(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split, numbers in (("train", (3, 1)), ("val", (2,)), ("test", (0,))):
        lines = [f"{kind}/{kind}_{number}.jpg" for kind in ("dotted", "banded") for number in numbers]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
        for number, line in enumerate(lines):
            make_image(base / "images" / line, 10 * number)
    source = open_set("DTD", tmp_path)
    assert [source.train.name(index) for index in range(4)] == [
        f"dtd/dtd/images/{kind}/{kind}_{number}.jpg" for kind in ("banded", "dotted") for number in (1, 3)
    ]
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    same_as(source.train, torchvision.datasets.DTD(tmp_path))
    assert source.test is not None
    same_as(source.test, torchvision.datasets.DTD(tmp_path, split="test"))


def test_lists_with_classes_of_their_own(tmp_path: Path) -> None:
    food = tmp_path / "food-101"
    (food / "meta").mkdir(parents=True)
    for split, kinds in (("train", ("pie", "soup")), ("test", ("rice", "soup"))):
        listing = {kind: [f"{kind}/{split}{number}" for number in range(2)] for kind in kinds}
        (food / "meta" / f"{split}.json").write_text(json.dumps(listing))
        for names in listing.values():
            for name in names:
                make_image(food / "images" / f"{name}.jpg", 9)
    source = open_set("Food101", tmp_path)
    assert source.classes == ("pie", "rice", "soup")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0, 0, 2, 2]
    assert source.test is not None
    assert source.test.labels is not None
    assert source.test.labels.tolist() == [1, 1, 2, 2]


def test_files_listed_by_parts(tmp_path: Path) -> None:
    for number, kind in enumerate(("Faces", "ant", "BACKGROUND_Google")):
        for index in (1, 2):
            make_image(
                tmp_path / "caltech101" / "101_ObjectCategories" / kind / f"image_{index:04d}.jpg", 20 * number + index
            )
    (tmp_path / "caltech101" / "Annotations").mkdir()
    source = open_set("Caltech101", tmp_path)
    assert source.classes == ("Faces", "ant")
    same_as(source.train, torchvision.datasets.Caltech101(tmp_path))
    for number, kind in enumerate(("001.ak47", "002.flag")):
        make_image(tmp_path / "caltech256" / "256_ObjectCategories" / kind / f"{kind[:3]}_0001.jpg", number)
    same_as(open_set("Caltech256", tmp_path).train, torchvision.datasets.Caltech256(tmp_path))
    for folder in ("00000_Animalia_A_B_C_D_E_f", "00001_Plantae_A_B_C_D_E_g"):
        make_image(tmp_path / "2021_valid" / folder / "x.jpg", int(folder[4]))
    plants = open_set("INaturalist", tmp_path, train_split="2021_valid")
    assert len(plants.classes) == 2
    same_as(plants.train, torchvision.datasets.INaturalist(tmp_path, version="2021_valid"))


def test_names_of_classes_are_distinct() -> None:
    class Cranes:
        classes = (("crane",), ("ox", "bull"), ("crane",))

    assert torchvision_sets._names(Cranes()) == ("crane (0)", "ox, bull", "crane (2)")


# What is not there


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"no such data set; there are CIFAR10, .*; did you mean torchvision:CIFAR10\?"),
        ("", r"no such data set; there are"),
        ("MNISTT", r"did you mean torchvision:MNIST\?"),
        ("ImageFolder", r"is read as the folder that it is: give its path as data.source"),
        ("VOCDetection", r"is read as the folder"),
        ("LSUN", r"keeps its index as a pickle"),
        ("LFWPairs", r"is of pairs"),
        ("Kinetics", r"is of videos"),
    ],
)
def test_sets_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.source = torchvision:{name}: .*{message}"):
        open_set(name, tmp_path)


def test_every_set_of_torchvision_is_known() -> None:
    theirs = set(torchvision.datasets.__all__) - {"VisionDataset", "wrap_dataset_for_transforms_v2"}
    assert theirs <= set(torchvision_sets._SETS) | set(torchvision_sets._REFUSED) | {"LSUNClass"}
    assert not set(torchvision_sets._SETS) & set(torchvision_sets._REFUSED)


@pytest.mark.parametrize("name", sorted(set(torchvision_sets._SETS) - {"FakeData"}))
def test_missing_data_is_named(tmp_path: Path, name: str) -> None:
    splits = torchvision_sets._SETS[name].splits or ("train",)
    settings = {} if "train" in splits else {"train_split": next(iter(splits))}
    with pytest.raises(ConfigError, match=rf"^data.source = torchvision:{name}: .*data.root = ") as caught:
        open_set(name, tmp_path, **settings)
    can_download = torchvision_sets._SETS[name].can_download
    assert ("data.download=true fetches it" in str(caught.value)) == can_download
    assert "download=True" not in str(caught.value)


def test_damaged_data_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cposix\nsystem\n(S'exit 3'\ntR.")  # a pickle that would run
    with pytest.raises(ConfigError, match=r"torchvision:CIFAR10: Dataset not found or corrupted; data.root = .* must"):
        open_set("CIFAR10", tmp_path)
    make_idx(tmp_path / "MNIST" / "raw", {"train": 3, "t10k": 2})
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"data.source = torchvision:MNIST: "):
        open_set("MNIST", tmp_path)


# Downloads


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(
        ConfigError, match=rf"torchvision:FashionMNIST: the download to data.root = {tmp_path} failed: "
    ):
        open_set("FashionMNIST", tmp_path, download=True)


def test_a_download_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_idx(tmp_path / "server", {"train": 30, "t10k": 20})
    resources = []
    for path in sorted((tmp_path / "server").iterdir()):
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            if self.headers["Method"] != "HEAD":  # torchvision looks for redirections first
                asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
        with ThreadPoolExecutor(3) as pool:
            sources = list(pool.map(lambda _: open_set("FashionMNIST", tmp_path / "new", download=True), range(3)))
        server.shutdown()
    assert [len(source.train) for source in sources] == [30] * 3
    assert sorted(asked) == [f"/{name}" for name, _ in resources]
    assert len(open_set("FashionMNIST", tmp_path / "new").train) == 30
