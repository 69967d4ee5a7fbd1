"""Where the images come from: an embedded set, one of torchvision's, or files at a path or URL. Imports neither torch
nor ray.

`open_source` looks at names, sizes, footers and columns of labels only; images are read one at a time, in whatever
process asks. A `Split` pickles as a few numpy arrays, which Ray shares between the processes of a machine.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from dino_core.counter_rng import absorb, root
from orchestrator.config import DataConfig
from orchestrator.data.patterns import is_pattern
from orchestrator.data.readers.arrow import open_arrow
from orchestrator.data.readers.folder import IMAGE_SUFFIXES, open_folder
from orchestrator.data.readers.parquet import open_parquet
from orchestrator.data.readers.saved_dataset import is_saved, open_saved
from orchestrator.data.split import DIGEST_LENGTH, build_source, choose_splits
from orchestrator.data.split import Source as Source
from orchestrator.data.split import Split as Split
from orchestrator.data.storage import Listing, Place, find, is_url

DIGITS = "digits"
TORCHVISION = "torchvision:"

_KINDS = dict.fromkeys(IMAGE_SUFFIXES, "image") | {
    ".parquet": "Parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "Arrow"),
    ".tar": "tar",
    **dict.fromkeys((".txt", ".csv", ".tsv"), "list"),
}
"""What files are, by their suffix. A list of files counts only where it is named itself."""


def open_source(config: DataConfig) -> Source:
    """The images that `data.source` names.

    Raises:
        ConfigError: Nothing there, no images there, or no such column or split; names the key, the value and what is.
    """
    if not config.source:  # which as a path would be the working directory
        raise ConfigError(f"data.source: is empty; must be {DIGITS}, {TORCHVISION}NAME, or a path or URL")
    if config.source == DIGITS:
        return _open_digits(config)
    if config.source.startswith(TORCHVISION):
        from orchestrator.data.readers.torchvision_sets import open_torchvision

        return open_torchvision(config)
    return _open_files(config, _find(config.source))


def absolute_source(source: str) -> str:
    """The same `data.source`, whatever the working directory: a path from here, anything else as it is."""
    if source == DIGITS or source.startswith(TORCHVISION) or is_url(source):
        return source
    path = os.path.expanduser(source)
    parent, name = os.path.split(path)
    if os.path.lexists(path) or not is_pattern(name):
        return os.path.realpath(path) if os.path.exists(path) else source
    return os.path.join(os.path.realpath(parent), name)


def _find(source: str) -> Place:
    try:
        return find("data.source", source)
    except ConfigError:
        near = difflib.get_close_matches(source, [DIGITS], n=1)
        if near and not os.path.exists(source):
            message = (
                f"no such file or folder; must be {DIGITS}, {TORCHVISION}NAME, or a path or URL; did you mean {DIGITS}?"
            )
            raise ConfigError(f"data.source = {source}: {message}") from None
        raise


def _open_files(config: DataConfig, place: Place) -> Source:
    if place.is_file or not is_saved(place):
        kind, place = _one_kind(config, place)
    else:
        kind = "saved"
    if kind == "image":
        return open_folder(config, place)
    if kind == "Parquet":
        return open_parquet(config, place)
    if kind == "tar":
        from orchestrator.data.readers.webdataset import open_tars

        return open_tars(config, place.folder, list(place.files))
    if kind == "list":
        from orchestrator.data.readers.file_list import open_list

        return open_list(config, place.folder, next(iter(place.files)))
    return (open_arrow if kind == "Arrow" else open_saved)(config, place)


def _one_kind(config: DataConfig, place: Place) -> tuple[str, Place]:
    """What the files are, and those of them that are that.

    Raises:
        ConfigError: None can be read, or there are several kinds.
    """
    kinds: dict[str, Listing] = {}
    for name, stat in place.files.items():
        kind = _KINDS.get(os.path.splitext(name)[1].lower())
        if kind is not None and (kind != "list" or place.is_file):
            kinds.setdefault(kind, {})[name] = stat
    if place.is_file and kinds.keys() <= {"image"}:
        known = " ".join(sorted(suffix for suffix, kind in _KINDS.items() if kind != "image"))
        raise ConfigError(f"data.source = {config.source}: a file must be one of {known}; of images, name the folder")
    if not kinds:
        known = " ".join(sorted(suffix for suffix, kind in _KINDS.items() if kind != "list"))
        raise ConfigError(f"data.source = {config.source}: no images in this folder or below; looked for {known}")
    if len(kinds) > 1:
        found = [f"{kind} files ({next(iter(files))})" for kind, files in kinds.items()]
        raise ConfigError(
            f"data.source = {config.source}: holds {', '.join(found[:-1])} and {found[-1]}; name a folder with one "
            "kind, or a pattern such as *.parquet"
        )
    ((kind, files),) = kinds.items()
    return kind, place._replace(files=files)


class _Digits:
    """A `Reader` of the embedded set: 8x8 grey images, as RGB."""

    def __init__(self, split: str, pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self._split, self._pixels, self._rows = split, pixels[rows], rows

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        return np.repeat(self._pixels[index][:, :, None], 3, axis=2)

    def name(self, index: int) -> str:
        return f"{DIGITS} {self._rows[index]}"

    def units(self) -> None:
        return None


def _open_digits(config: DataConfig) -> Source:
    """scikit-learn's 1,797 handwritten digits, a fixed fifth of each class for testing."""
    table = _digits_table()
    pixels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, 64].astype(np.int64)
    keys = absorb(root(0), np.arange(len(labels)))
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        is_test[rows[np.argsort(keys[rows], kind="stable")[: round(len(rows) / 5)]]] = True
    rows_of = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
    parts = [
        None if split is None else (_Digits(split, pixels, rows_of[split]), labels[rows_of[split]].tolist())
        for split in choose_splits(config, rows_of, f"split of {DIGITS}")
    ]
    content = hashlib.sha256(pixels.tobytes() + labels.tobytes() + is_test.tobytes()).hexdigest()
    return build_source(DIGITS, "(embedded)", parts, partial(str, content[:DIGEST_LENGTH]))


def _digits_table() -> NDArray[np.float64]:
    """[1797, 65]: 64 grey levels from 0 to 16, and the digit."""
    # Read where scikit-learn keeps it: importing scikit-learn takes seconds.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    return np.loadtxt(path, delimiter=",")
