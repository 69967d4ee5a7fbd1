"""The image data sets of torchvision. It is imported only where one is opened, which takes seconds."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import http.client
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers.file_list import hash_files
from orchestrator.data.readers.folder import Files
from orchestrator.data.split import DIGEST_LENGTH, DamagedRecord, Labels, Source, Split, build_source, choose_splits
from orchestrator.data.storage import LocalFolder

PREFIX = "torchvision:"

_Arguments = Mapping[str, Any]

_ADVICE = re.compile(r"\W*you can (use|set) download=True to download it\W*$", re.IGNORECASE)

# What the constructors raise on data that is missing or damaged, a package that is, or a network that fails.
_FAILURES = (
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ImportError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    http.client.HTTPException,
)


@dataclass(frozen=True)
class _Set:
    """How a data set of torchvision is opened."""

    splits: Mapping[str, _Arguments] | None = None
    """Arguments of the constructor, by split; None for a set that has none."""
    can_download: bool = True
    """Whether torchvision can fetch it."""
    files: Callable[[Any], list[tuple[str, int | None]]] | None = None
    """The image files and labels, where no attribute of the usual names holds them."""


def _by(key: str, *values: str) -> Mapping[str, _Arguments]:
    return {value: {key: value} for value in values}


def _caltech101(data: Any) -> list[tuple[str, int | None]]:
    folders = [os.path.join(data.root, "101_ObjectCategories", category) for category in data.categories]
    return [(f"{folders[y]}/image_{index:04d}.jpg", y) for index, y in zip(data.index, data.y, strict=True)]


def _caltech256(data: Any) -> list[tuple[str, int | None]]:
    folders = [os.path.join(data.root, "256_ObjectCategories", category) for category in data.categories]
    return [(f"{folders[y]}/{y + 1:03d}_{index:04d}.jpg", y) for index, y in zip(data.index, data.y, strict=True)]


def _celeba(data: Any) -> list[tuple[str, int | None]]:
    folder = os.path.join(data.root, data.base_folder, "img_align_celeba")
    return [(os.path.join(folder, name), None) for name in data.filename]


def _inaturalist(data: Any) -> list[tuple[str, int | None]]:
    folders = [os.path.join(data.root, category) for category in data.all_categories]
    return [(os.path.join(folders[category], name), category) for category, name in data.index]


def _omniglot(data: Any) -> list[tuple[str, int | None]]:
    folders = [os.path.join(data.target_folder, character) for character in data._characters]
    return [(os.path.join(folders[character], name), character) for name, character in data._flat_character_images]


def _sbu(data: Any) -> list[tuple[str, int | None]]:
    return [(os.path.join(data.root, "dataset", name), None) for name in data.photos]


_FLAG: Mapping[str, _Arguments] = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_VAL_TEST = _by("split", "train", "val", "test")

_SETS: Mapping[str, _Set] = {
    "CIFAR10": _Set(_FLAG),
    "CIFAR100": _Set(_FLAG),
    "CLEVRClassification": _Set(_TRAIN_VAL_TEST),
    "Caltech101": _Set(files=_caltech101),
    "Caltech256": _Set(files=_caltech256),
    "CelebA": _Set(_by("split", "train", "valid", "test", "all"), files=_celeba),
    "Country211": _Set(_by("split", "train", "valid", "test")),
    "DTD": _Set(_TRAIN_VAL_TEST),
    "EMNIST": _Set(
        {
            f"{letters}-{split}": {"split": letters, **flag}
            for letters in ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
            for split, flag in _FLAG.items()
        }
    ),
    "EuroSAT": _Set(),
    "FER2013": _Set(_by("split", "train", "test"), can_download=False),
    "FGVCAircraft": _Set(_by("split", "train", "val", "trainval", "test")),
    "FakeData": _Set(can_download=False),
    "FashionMNIST": _Set(_FLAG),
    "Flowers102": _Set(_TRAIN_VAL_TEST),
    "Food101": _Set(_by("split", "train", "test")),
    "GTSRB": _Set(_by("split", "train", "test")),
    "INaturalist": _Set(
        _by("version", "2017", "2018", "2019", "2021_train", "2021_train_mini", "2021_valid"), files=_inaturalist
    ),
    "ImageNet": _Set(_by("split", "train", "val"), can_download=False),
    "Imagenette": _Set(_by("split", "train", "val")),
    "KMNIST": _Set(_FLAG),
    "LFWPeople": _Set(_by("split", "train", "test", "10fold"), can_download=False),
    "MNIST": _Set(_FLAG),
    "Omniglot": _Set({"background": {"background": True}, "evaluation": {"background": False}}, files=_omniglot),
    "OxfordIIITPet": _Set(_by("split", "trainval", "test")),
    "PCAM": _Set(_TRAIN_VAL_TEST),
    "Places365": _Set(_by("split", "train-standard", "train-challenge", "val")),
    "QMNIST": _Set(_by("what", "train", "test", "test10k", "test50k", "nist")),
    "RenderedSST2": _Set(_TRAIN_VAL_TEST),
    "SBU": _Set(files=_sbu),
    "SEMEION": _Set(),
    "STL10": _Set(_by("split", "train", "test", "unlabeled", "train+unlabeled")),
    "SUN397": _Set(),
    "SVHN": _Set(_by("split", "train", "test", "extra")),
    "StanfordCars": _Set(_by("split", "train", "test"), can_download=False),
    "USPS": _Set(_FLAG),
}

_A_FOLDER = "is read as the folder that it is: give its path as data.source"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("ImageFolder", "DatasetFolder", "Flickr8k", "Flickr30k", "CocoCaptions", "CocoDetection"), _A_FOLDER
    ),
    **dict.fromkeys(("VOCDetection", "VOCSegmentation", "SBDataset", "Cityscapes", "Kitti", "WIDERFace"), _A_FOLDER),
    **dict.fromkeys(("LSUN", "LSUNClass"), "keeps its index as a pickle, and nothing is unpickled here"),
    **dict.fromkeys(("LFWPairs", "PhotoTour", "FlyingChairs", "FlyingThings3D", "HD1K", "KittiFlow"), "is of pairs"),
    **dict.fromkeys(("Sintel", "CarlaStereo", "CREStereo", "ETH3DStereo", "FallingThingsStereo"), "is of pairs"),
    **dict.fromkeys(("InStereo2k", "Kitti2012Stereo", "Kitti2015Stereo", "Middlebury2014Stereo"), "is of pairs"),
    **dict.fromkeys(("SceneFlowStereo", "SintelStereo"), "is of pairs"),
    **dict.fromkeys(("HMDB51", "Kinetics", "MovingMNIST", "UCF101"), "is of videos"),
}


def open_torchvision(config: DataConfig) -> Source:
    """The source that `data.source` = torchvision:NAME names, in the folder `data.root`.

    `data.train_split` and `data.test_split` are the values of the set's own `split` (INaturalist: `version`, QMNIST:
    `what`), or `train` and `test`; EMNIST's are `balanced-train` and the like. A set without splits is all training
    data. `val` is taken for testing only when it is asked for, as in a folder.

    Images that are files are read as such, in the order of their names; their data set is not opened again in other
    processes. Labels keep the numbers of the set. Files are downloaded, if `data.download` allows it, under a lock, so
    that processes that share the folder do it once.

    Raises:
        ConfigError: No such data set or split, data that is not there or damaged, or a download that failed.
    """
    name = config.source.removeprefix(PREFIX)
    kind = _SETS.get(name)
    if kind is None:
        raise _no_such_set(config, name)
    root = os.path.abspath(os.path.expanduser(config.root))
    asked = (config.train_split, config.test_split) != (DataConfig.train_split, DataConfig.test_split)
    what = f"split of {name}"
    if kind.splits is not None:
        chosen: tuple[str, str | None] = choose_splits(config, kind.splits, what)
    else:
        chosen = ("", None) if not asked else choose_splits(config, (), what)
    _refuse_nothing(config, name, root)
    opened = [None if split is None else _Opened.of(config, name, root, split) for split in chosen]
    found = [part for part in opened if part is not None]
    location = f"{name} in {root}"
    digest = partial(_digest, name, root, [part.reader for part in found], [part.labels for part in found])
    if any(part.classes != found[0].classes for part in found):  # so the same number may be of different classes
        parts = [None if part is None else (part.reader, part.names_of_labels()) for part in opened]
        return build_source("torchvision", location, parts, digest)
    train, test = [None if part is None else Split(part.reader, part.labels) for part in opened]
    assert train is not None
    return Source("torchvision", location, train, test, _class_names(found), digest)


def _refuse_nothing(config: DataConfig, name: str, root: str) -> None:
    """Raise ConfigError if nothing lies in the folder and nothing is fetched: torchvision need not be imported then."""
    fetched = config.download and _SETS[name].can_download
    if fetched or name == "FakeData":
        return
    try:
        with os.scandir(root) as entries:
            problem = "is empty" if next(entries, None) is None else None
    except OSError as error:
        problem = f"cannot be listed: {error.strerror}"
    if problem is not None:
        remedy = "or data.download=true fetches it" if _SETS[name].can_download else "which cannot be downloaded"
        raise ConfigError(f"data.source = {config.source}: data.root = {root} {problem}; it must hold {name}, {remedy}")


def _no_such_set(config: DataConfig, name: str) -> ConfigError:
    if name in _REFUSED:
        return ConfigError(f"data.source = {config.source}: {name} {_REFUSED[name]}")
    lower = {known.lower(): known for known in _SETS}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"; did you mean {PREFIX}{lower[near[0]]}?" if near else ""
    return ConfigError(f"data.source = {config.source}: no such data set; there are {', '.join(_SETS)}{hint}")


# Opening


_opening = threading.Lock()


def _dataset(name: str, root: str, split: str) -> tuple[Any, threading.Lock]:
    """The data set as torchvision opens what is there, and the lock for its items: not all may be had in threads."""
    with _opening:  # else each thread would open it
        return _opened(name, root, split)


@lru_cache(maxsize=4)
def _opened(name: str, root: str, split: str) -> tuple[Any, threading.Lock]:
    return _construct(name, root, split, download=False), threading.Lock()


def _construct(name: str, root: str, split: str, *, download: bool) -> Any:
    import torchvision.datasets

    arguments: dict[str, Any] = dict((_SETS[name].splits or {}).get(split, {}))
    if name != "FakeData":
        arguments["root"] = root
    if _SETS[name].can_download:
        arguments["download"] = download  # some download by default
    return getattr(torchvision.datasets, name)(**arguments)


def _open(config: DataConfig, name: str, root: str, split: str) -> Any:
    """The data set, downloaded before if it has to be and may be. Raises ConfigError."""
    where = f"data.source = {config.source}"
    try:
        return _dataset(name, root, split)[0]
    except _FAILURES as error:
        reason = _ADVICE.sub("", str(error)) or repr(error)
        if not _SETS[name].can_download:
            raise ConfigError(f"{where}: {reason} (data.root = {config.root}; it cannot be downloaded)") from error
        if not config.download:
            raise ConfigError(
                f"{where}: {reason}; data.root = {config.root} must hold it, or data.download=true fetches it"
            ) from error
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".download.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return _dataset(name, root, split)[0]  # another process may have fetched it meanwhile
            except _FAILURES:
                _construct(name, root, split, download=True)
        return _dataset(name, root, split)[0]
    except _FAILURES as error:
        raise ConfigError(f"{where}: the download to data.root = {config.root} failed: {error}") from error


@dataclass(frozen=True)
class _Opened:
    """One split of a data set."""

    reader: Files | _Items
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    """Names by number; empty where the set tells none."""

    @classmethod
    def of(cls, config: DataConfig, name: str, root: str, split: str) -> _Opened:
        """Open it. Raises ConfigError."""
        data = _open(config, name, root, split)
        if not len(data):
            raise ConfigError(f"data.source = {config.source}: no images in data.root = {config.root}")
        files = _files(name, data)
        if files is None:
            return cls(_Items(name, root, split, len(data)), _labels(data, len(data)), _names(data))
        labels = _labels(data, len(data))
        if labels is None and all(label is not None for _, label in files):
            labels = np.array([label for _, label in files], dtype=np.int64)
        prefix = f"{root}/"
        paths = [os.path.normpath(path).removeprefix(prefix) for path, _ in files]
        order = sorted(range(len(paths)), key=lambda place: os.fsencode(paths[place]))  # some list folders unsorted
        reader = Files(LocalFolder(root), [paths[place] for place in order])
        return cls(reader, None if labels is None else labels[order], _names(data))

    def names_of_labels(self) -> Labels:
        """The labels by name, for sets whose splits number differently."""
        if self.labels is None:
            return None
        return [self.classes[label] if label < len(self.classes) else str(label) for label in self.labels.tolist()]


def _files(name: str, data: Any) -> list[tuple[str, int | None]] | None:
    """The image files with what labels stand beside them; None if images are not files."""
    listed = _SETS[name].files
    if listed is not None:
        return listed(data)
    for attribute in ("_image_files", "_images", "_samples", "samples", "imgs", "data"):
        items = getattr(data, attribute, None)
        if not isinstance(items, list):
            continue
        if isinstance(items[0], str | os.PathLike):
            return [(os.fspath(item), None) for item in items]
        if isinstance(items[0], tuple) and isinstance(items[0][0], str | os.PathLike):
            return [(os.fspath(path), None if label is None else int(label)) for path, label, *_ in items]
    return None


def _labels(data: Any, count: int) -> NDArray[np.int64] | None:
    """Labels that can be had without reading images; None if there are none or some are missing."""
    samples = getattr(data, "_samples", None)  # FER2013: pixels and label
    candidates = [getattr(data, attribute, None) for attribute in ("targets", "_labels", "labels")]
    for found in (*candidates, samples and [label for _, label in samples]):
        if found is None or len(found) != count or (isinstance(found, list) and None in found):
            continue
        values = np.asarray(found)
        values = values[:, 0] if values.ndim == 2 else values  # QMNIST: the class comes first
        if values.ndim == 1 and values.dtype.kind in "iu":
            return values.astype(np.int64) if values.min() >= 0 else None
    return None


def _names(data: Any) -> tuple[str, ...]:
    """The names of the classes by number, each once; of several for a class, all."""
    for attribute in ("classes", "categories", "all_categories", "_characters"):
        found = getattr(data, attribute, None)
        if isinstance(found, Sequence) and found:
            names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in found]
            counts = Counter(names)
            return tuple(f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names))
    return ()


def _class_names(parts: Sequence[_Opened]) -> tuple[str, ...]:
    """The names of all classes; their numbers where the set tells no names. Empty without labels."""
    tops = [int(part.labels.max()) for part in parts if part.labels is not None]
    if not tops:
        return ()
    names = parts[0].classes
    return names if max(tops) < len(names) else tuple(map(str, range(max(tops) + 1)))


# Reading


class _Items:
    """A `Reader` of images that are no files: arrays, tables, or made up. Opens the data set once in each process."""

    def __init__(self, name: str, root: str, split: str, count: int) -> None:
        self._name, self._root, self._split, self._count = name, root, split, count

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        try:
            data, lock = _dataset(self._name, self._root, self._split)
            pixels = getattr(data, "data", None)
            if pixels is not None:
                return _to_rgb(np.asarray(pixels[index]))
            with lock:
                image = data[index][0]
            return np.array(image.convert("RGB"))
        except _FAILURES as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's
            raise DamagedRecord(f"{self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        return " ".join(filter(None, (self._name, self._split, str(index))))

    def units(self) -> None:
        return None

    def fingerprint(self) -> bytes:
        """A hash of the pixels, where they lie in memory; else of nothing but the name of the set and the split."""
        digest = hashlib.sha256(f"{self._name} {self._split} {self._count}".encode())
        pixels = getattr(_dataset(self._name, self._root, self._split)[0], "data", None)
        if pixels is not None:
            digest.update(np.ascontiguousarray(pixels).data)
        return digest.digest()


def _to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey [h, w], or colours first [3, h, w] or last -> a copy [h, w, 3]."""
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return np.array(pixels.transpose(1, 2, 0) if pixels.shape[2] != 3 else pixels, order="C")


def _digest(name: str, root: str, readers: Sequence[Files | _Items], labels: Sequence[NDArray[np.int64] | None]) -> str:
    digest = hashlib.sha256(name.encode())
    for reader, numbers in zip(readers, labels, strict=True):
        if isinstance(reader, _Items):
            digest.update(reader.fingerprint())
        else:
            digest.update(hash_files(LocalFolder(root), map(reader.name, range(len(reader)))))
        digest.update(b"" if numbers is None else numbers.tobytes())
    return digest.hexdigest()[:DIGEST_LENGTH]
