"""`Source` and `Split`: images by number, whatever they are stored in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.storage import is_url

DIGEST_LENGTH = 32
_REMOTE_READS = 16


class DamagedRecord(OSError):
    """What holds an image is there and can be read, but is damaged."""


class Reader(Protocol):
    """Random access to stored images. Cheap to pickle; opens files in the process that reads."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """An encoded image, or a decoded one uint8 [height, width, 3].

        Raises DamagedRecord, or another OSError if it cannot be read.
        """

    def name(self, index: int) -> str:
        """What to call an image in a message."""

    def units(self) -> NDArray[np.int64] | None:
        """[num_units] first image of each stretch that is read as a whole (a row group), ascending from 0; None if each
        image is read by itself."""


@dataclass(frozen=True, eq=False)
class Split:
    """A numbered set of images, with labels if it has them."""

    reader: Reader
    labels: NDArray[np.int64] | None
    """[len], places in the source's `classes`; None if any image lacks one."""
    reads_at_once: int = 1
    """Images to ask for at a time. More than one where an answer takes long and the processor waits for it."""

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        return self.reader.read(index)

    def name(self, index: int) -> str:
        return self.reader.name(index)

    def units(self) -> NDArray[np.int64] | None:
        return self.reader.units()


@dataclass(frozen=True, eq=False)
class Source:
    """Images to train on and, where there are some, images to test on."""

    kind: str
    """`digits`, `folder`, `parquet`, ...: how the images are stored."""
    location: str
    """Where, for people; holds no password."""
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    """Names of the labels, those of both splits; empty without labels."""
    compute_digest: Callable[[], str]

    @property
    def num_samples(self) -> int:
        """Images to train on."""
        return len(self.train)

    def digest(self) -> str:
        """A fingerprint of the content, 32 characters: of the pixels (digits), of names and sizes (folder), or of
        names, sizes and what the files themselves say of the places and sizes of their parts (Parquet, Arrow)."""
        return self.compute_digest()

    def describe(self) -> str:
        """One line for people."""
        tests = f" and {len(self.test)} test" if self.test is not None else ""
        classes = f" in {len(self.classes)} classes" if self.classes else " without labels"
        return f"{self.kind} {self.location}: {len(self.train)} training{tests} images{classes}"


Labels = Sequence[str] | Sequence[int] | None
"""One label per image, or None."""


def build_source(
    kind: str,
    location: str,
    parts: Sequence[tuple[Reader, Labels] | None],
    compute_digest: Callable[[], str],
    class_names: Sequence[str] = (),
    is_remote: bool | None = None,
) -> Source:
    """A `Source` of readers and labels as they are stored (train, then test), the labels numbered over both.

    `class_names` says what labels that are numbers stand for; those beyond it, and all without it, are called by the
    number. `is_remote`: whether a service holds the images; None: if it holds what `location` names.
    """
    reads_at_once = _REMOTE_READS if (is_url(location) if is_remote is None else is_remote) else 1
    found = [labels for part in parts if part is not None and (labels := part[1]) is not None]
    names = sorted({label for labels in found for label in labels})
    place = {name: index for index, name in enumerate(names)}
    splits: list[Split | None] = []
    for part in parts:
        if part is None:
            splits.append(None)
            continue
        reader, labels = part
        numbers = None if labels is None else np.fromiter((place[label] for label in labels), np.int64, len(reader))
        splits.append(Split(reader, numbers, reads_at_once))
    train, test = splits
    assert train is not None
    called = (class_names[name] if isinstance(name, int) and name < len(class_names) else str(name) for name in names)
    return Source(kind, location, train, test, tuple(called), compute_digest)


def choose_splits(config: DataConfig, available: Collection[str], what: str) -> tuple[str, str | None]:
    """The names of the training and the test split among those `available`; a default test split may be missing.

    Raises:
        ConfigError: A split that is not there, or the same one twice. `what` says what the splits are in this source.
    """
    if config.train_split not in available:
        raise unknown("data.train_split", config.train_split, available, what)
    if config.test_split == config.train_split:
        raise ConfigError(f"data.test_split = {config.test_split}: must differ from data.train_split")
    if config.test_split in available:
        return config.train_split, config.test_split
    if config.test_split != DataConfig.test_split:
        raise unknown("data.test_split", config.test_split, available, what)
    return config.train_split, None


def unknown(key: str, value: str, available: Collection[str], what: str) -> ConfigError:
    """The error for a name that is not among the `available` ones."""
    names = sorted(available)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    verb = "is" if len(names) == 1 else "are"
    return ConfigError(f"{key} = {value}: no such {what}; there {verb} {listed or 'none'}{hint}")
