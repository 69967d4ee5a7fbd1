"""A folder of image files, with or without split and class sub-folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.split import DIGEST_LENGTH, Labels, Source, build_source, choose_splits
from orchestrator.data.storage import Folder

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jfif", "jp2", "png", "apng", "gif", "webp", "avif"),
        *("bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "tga"),
    )
)

_SPLIT_NAMES = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "unlabeled", "unlabelled", "extra")
)
"""Sub-folders of these names, and no others, are taken for splits, not classes."""


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

    def fingerprint(self) -> bytes:
        """A hash of the names and sizes. A file that has gone by now counts as empty."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            try:
                size = self._folder.stat(self.name(index)).size
            except FileNotFoundError:
                size = 0
            digest.update(b"%s\0%d\n" % (os.fsencode(self.name(index)), size))
        return digest.digest()


def open_folder(config: DataConfig, folder: Folder, images: Sequence[str]) -> Source:
    """The source of the `images` (not empty, of `folder`).

    Sub-folders are splits if one has the name of `data.train_split` and the others are splits by their names too (or
    `data.train_split` is not the default, so that it was meant). Within a split, sub-folders are classes if every image
    lies in one and there are at least two.

    Raises:
        ConfigError: A split that is not there, or images beside the splits.
    """
    tops = {name.split("/", 1)[0] for name in images if "/" in name}
    loose = [name for name in images if "/" not in name]
    if not _are_splits(config, tops, bool(loose)):
        parts: list[tuple[Files, Labels] | None] = [_part(folder, images), None]
    else:
        if not tops:
            raise ConfigError(
                f"data.source = {config.source}: has no sub-folder, but data.train_split = {config.train_split} and "
                f"data.test_split = {config.test_split} ask for two; a folder without splits takes data.train_split="
                f"{DataConfig.train_split} data.test_split={DataConfig.test_split}"
            )
        splits = choose_splits(config, tops, "sub-folder with images")
        if loose:
            raise ConfigError(
                f"data.source = {config.source}: {loose[0]} lies beside the split folders; move it into one or away"
            )
        parts = [None if split is None else _part(folder.below(split), _below(split, images)) for split in splits]
    return build_source("folder", folder.address, parts, partial(_digest, [part[0] for part in parts if part]))


def _are_splits(config: DataConfig, tops: set[str], loose: bool) -> bool:
    if config.train_split != DataConfig.train_split or config.test_split != DataConfig.test_split:
        return True  # they were asked for, so a missing one is an error
    return bool(tops) and tops <= _SPLIT_NAMES and (config.train_split in tops or not loose)


def _below(split: str, names: Sequence[str]) -> list[str]:
    return [name[len(split) + 1 :] for name in names if name.startswith(f"{split}/")]


def _part(folder: Folder, names: Sequence[str]) -> tuple[Files, Labels]:
    classes = [name.split("/", 1)[0] if "/" in name else None for name in names]
    labelled = None not in classes and len(set(classes)) > 1
    return Files(folder, names), [str(label) for label in classes] if labelled else None


def _digest(files: Sequence[Files]) -> str:
    return hashlib.sha256(b"".join(part.fingerprint() for part in files)).hexdigest()[:DIGEST_LENGTH]


def check_some_images(source: str, images: Sequence[str]) -> None:
    """Raise ConfigError if there are none."""
    if not images:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ConfigError(f"data.source = {source}: no images in this folder or below; looked for {known} and .parquet")
