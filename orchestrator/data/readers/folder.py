"""A folder of image files, with or without split and class sub-folders."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.split import DIGEST_LENGTH, Source, build_source, choose_splits, enumerate_names
from orchestrator.data.storage import Folder, Place

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jfif", "jp2", "png", "apng", "gif", "webp", "avif"),
        *("bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "tga"),
    )
)

_TRAIN_NAMES = frozenset(("train", "training"))
_SPLIT_NAMES = _TRAIN_NAMES | frozenset(
    ("test", "testing", "val", "valid", "validation", "dev", "unlabeled", "unlabelled", "extra")
)
"""Sub-folders of these names, in any case, are taken for splits, not classes."""


class Files:
    """A `Reader` of files of one folder. The names are one array, so that a million of them pickle at once."""

    def __init__(self, folder: Folder, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._folder = folder
        self._names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]].tobytes())

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        return self._folder.read(self.name(index))

    def units(self) -> None:
        return None

    def fingerprint(self, sizes: Sequence[int] | None = None) -> bytes:
        """A hash of the names and sizes, which are looked up if not given. A file that has gone counts as empty."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            name = self.name(index)
            size = self._size(name) if sizes is None else sizes[index]
            digest.update(b"%s\0%d\n" % (os.fsencode(name), size))
        return digest.digest()

    def _size(self, name: str) -> int:
        try:
            return self._folder.stat(name).size
        except FileNotFoundError:
            return 0


def open_folder(config: DataConfig, place: Place) -> Source:
    """The source of the files of `place` (not empty), all of them images.

    Sub-folders are splits if all are so by their names, or if `data.train_split` or `data.test_split` is not the
    default, so that splits are meant. Below a split, sub-folders are classes if one split, of those used, has two.

    Raises:
        ConfigError: A split that is not there; images beside the splits, or folders, where splits were not asked for.
    """
    tops = {name.split("/", 1)[0] for name in place.files if "/" in name}
    loose = next((name for name in place.files if "/" not in name), None)
    counts = Counter(name.split("/", 1)[0] for name in place.files if "/" in name)
    unused: dict[str, int | None] = {}
    if not _are_splits(config, tops, loose is not None):
        parts = [_Part.of(place, None)]
    else:
        if not tops:
            raise ConfigError(
                f"data.source = {config.source}: has no sub-folder, but data.train_split = {config.train_split} and "
                f"data.test_split = {config.test_split} ask for two; a folder without splits takes data.train_split="
                f"{DataConfig.train_split} data.test_split={DataConfig.test_split}"
            )
        splits = choose_splits(config, tops, "sub-folder with images")
        if loose is not None:
            raise ConfigError(
                f"data.source = {config.source}: {loose} lies beside the split folders; move it into one or away"
            )
        parts = [_Part.of(place, split) for split in splits if split is not None]
        unused = {top: counts[top] for top in sorted(tops.difference(splits))}
    labelled = any(len(set(part.folders) - {None}) > 1 for part in parts)
    opened = [(part.reader, part.folders if labelled else None) for part in parts]
    return build_source("folder", place.address, [*opened, None][:2], partial(_digest, parts), unused=unused)


def _are_splits(config: DataConfig, tops: set[str], loose: bool) -> bool:
    if config.train_split != DataConfig.train_split or config.test_split != DataConfig.test_split:
        return True  # they were asked for, so a missing one is an error
    strays = {top for top in tops if top.casefold() not in _SPLIT_NAMES}
    splits = sorted(tops - strays)
    if strays and len(splits) > 1 and any(split.casefold() in _TRAIN_NAMES for split in splits):
        # As classes they would make of the images to test on images to train on.
        raise ConfigError(
            f"data.source = {config.source}: holds the split folders {enumerate_names(splits)} beside "
            f"{enumerate_names(sorted(strays))}; {_remedy(splits)}"
        )
    return bool(tops) and not strays and (config.train_split in tops or not loose)


def _remedy(splits: Sequence[str]) -> str:
    """What to do about folders beside the splits; naming these helps where they are not called as by default."""
    train = next(split for split in splits if split.casefold() in _TRAIN_NAMES)
    test = next(split for split in splits if split != train) if DataConfig.test_split not in splits else "test"
    if (train, test) == (DataConfig.train_split, DataConfig.test_split):
        return "move the latter away"
    return f"move the latter away, or name the splits, such as data.train_split={train} data.test_split={test}"


class _Part(NamedTuple):
    """The files of one split."""

    reader: Files
    folders: Sequence[str | None]
    """Of each, the first folder below the split, which is its class; None for one that lies in none."""
    sizes: Sequence[int] | None
    """Bytes of each, if the listing told."""

    @classmethod
    def of(cls, place: Place, split: str | None) -> _Part:
        """Those in the sub-folder `split`, or all."""
        prefix = f"{split}/" if split else ""
        stats = {name[len(prefix) :]: stat for name, stat in place.files.items() if name.startswith(prefix)}
        folders = [name.split("/", 1)[0] if "/" in name else None for name in stats]
        reader = Files(place.folder.below(split) if split else place.folder, list(stats))
        sizes = [stat.size for stat in stats.values() if stat is not None]
        return cls(reader, folders, sizes if len(sizes) == len(stats) else None)


def _digest(parts: Sequence[_Part]) -> str:
    return hashlib.sha256(b"".join(part.reader.fingerprint(part.sizes) for part in parts)).hexdigest()[:DIGEST_LENGTH]
