"""`Source` and `Split`: images by number, whatever they are stored in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.storage import is_url

DIGEST_LENGTH = 32
_REMOTE_READS = 16
_LISTED = 10
_FOR_TESTS = ("test", "testing", "validation", "val", "valid", "dev")
"""Names of splits that can be tested on, the likeliest first."""


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
    unused: Mapping[str, int | None] = field(default_factory=dict)
    """Other splits that are there, and their images (None: not counted, since that would mean reading them); under ""
    images of no split."""
    remarks: tuple[str, ...] = ()
    """What else was found or chosen and is not what one may expect, for people."""

    @property
    def num_samples(self) -> int:
        """Images to train on."""
        return len(self.train)

    @property
    def has_test_labels(self) -> bool:
        """Whether k-NN can be measured: labels on both sides, and images to test on."""
        return self.test is not None and self.test.labels is not None and self.train.labels is not None

    def digest(self) -> str:
        """A fingerprint of the content, 32 characters: of the pixels (digits), of names and sizes (folder), or of
        names, sizes and what the files themselves say of the places and sizes of their parts (Parquet, Arrow)."""
        return self.compute_digest()

    def describe(self) -> str:
        """One line for people."""
        tests = f" and {len(self.test)} test" if self.test is not None else ""
        classes = f" in {len(self.classes)} classes" if self.classes else " without labels"
        line = f"{self.kind} {self.location}: {len(self.train)} training{tests} images{classes}"
        return "; ".join((line, *self.notes()))

    def notes(self) -> list[str]:
        """What people should know beside that, a clause each: what is not used, and what was chosen unasked."""
        notes = list(self.remarks)
        if self.unused:
            counts = [count for count in self.unused.values() if count is not None]
            total = f"{sum(counts)} image{'' if sum(counts) == 1 else 's'}" if counts else "images"
            names = [
                f"{name if name.isprintable() and name else repr(name)}{'' if count is None else f' {count}'}"
                for name, count in self.unused.items()
            ]
            notes.append(f"{total} of other splits unused ({enumerate_names(names)})")
        if self.test is None:
            likely = {name.casefold(): name for name in self.unused}
            instead = next((likely[name] for name in _FOR_TESTS if name in likely), None)
            if instead is not None:
                notes.append(f"no split {DataConfig.test_split}; there is {instead}: data.test_split={instead}")
        return notes


Labels = Sequence[str | None] | Sequence[int | None] | None
"""One label per image, None for one that has none; or None for all."""


def build_source(
    kind: str,
    location: str,
    parts: Sequence[tuple[Reader, Labels] | None],
    compute_digest: Callable[[], str],
    class_names: Sequence[str] = (),
    is_remote: bool | None = None,
    unused: Mapping[str, int | None] | None = None,
    remarks: Sequence[str] = (),
) -> Source:
    """A `Source` of readers and labels as they are stored (train, then test), the labels numbered over both.

    `class_names` says what labels that are numbers stand for; those beyond it, and all without it, are called by the
    number. `is_remote`: whether a service holds the images; None: if it holds what `location` names. A split of which
    an image has no label has none at all, and the source remarks on it. `unused` and `remarks`: see `Source`.
    """
    reads_at_once = _REMOTE_READS if (is_url(location) if is_remote is None else is_remote) else 1
    missing = [0 if part is None or part[1] is None else part[1].count(None) for part in parts]
    used = [None if part is None or lacking else part[1] for part, lacking in zip(parts, missing, strict=True)]
    found = {label for labels in used if labels is not None for label in labels if label is not None}
    names = sorted(found, key=lambda label: (0, label, "") if isinstance(label, int) else (1, 0, label))
    place: dict[str | int | None, int] = {name: index for index, name in enumerate(names)}
    splits: list[Split | None] = []
    for part, labels in zip(parts, used, strict=True):
        if part is None:
            splits.append(None)
            continue
        reader = part[0]
        numbers = None if labels is None else np.fromiter((place[label] for label in labels), np.int64, len(reader))
        splits.append(Split(reader, numbers, reads_at_once))
    train, test = splits
    assert train is not None
    called = (class_names[name] if isinstance(name, int) and name < len(class_names) else str(name) for name in names)
    told = (*remarks, *_lacking_labels(splits, missing))
    return Source(kind, location, train, test, tuple(called), compute_digest, dict(unused or {}), told)


def _lacking_labels(splits: Sequence[Split | None], missing: Sequence[int]) -> list[str]:
    """That images lack a label, where others have one: `missing` of each split."""
    told = []
    for name, split, lacking in zip(("training", "test"), splits, missing, strict=True):
        if split is None or not lacking:
            continue
        if lacking < len(split):
            verb = "has" if lacking == 1 else "have"
            told.append(f"{lacking} of {len(split)} {name} images {verb} no label, so their labels are ignored")
        elif any(other is not None and other.labels is not None for other in splits):
            told.append(f"the {name} images have no labels")
    return told


class SplitRows(NamedTuple):
    """The rows of a list or a table by split."""

    train: NDArray[np.int64]
    test: NDArray[np.int64] | None
    """None if there is none."""
    unused: dict[str, int]
    """Rows of each other split; of those in none under \"\"."""


def split_by_code(config: DataConfig, codes: NDArray[np.int64], names: Sequence[str], what: str) -> SplitRows:
    """The rows by split. `codes` [num_rows]: the place of each one's split in `names`, -1 for a row of none.

    Raises:
        ConfigError: As `choose_splits`.
    """
    train, test = choose_splits(config, [name for name in names if name], what)
    counts = dict(zip(("", *names), np.bincount(codes + 1, minlength=len(names) + 1).tolist(), strict=False))
    if "" in names:  # it is one with no name at all
        counts[""] = int(np.count_nonzero((codes < 0) | (codes == names.index(""))))
    unused = {name: counts[name] for name in sorted(counts) if counts[name] and name not in (train, test)}
    train_rows = np.flatnonzero(codes == names.index(train))
    return SplitRows(train_rows, None if test is None else np.flatnonzero(codes == names.index(test)), unused)


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
    verb = "is" if len(names) == 1 else "are"
    return ConfigError(f"{key} = {value}: no such {what}; there {verb} {enumerate_names(names) or 'none'}{hint}")


def enumerate_names(names: Sequence[str]) -> str:
    """With commas; of many the first ten."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
