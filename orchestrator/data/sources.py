"""Where the images come from: an embedded set, a folder of files, or Parquet. Imports neither torch nor ray.

`open_source` looks at names, sizes and Parquet footers only; images are read one at a time, in whatever process asks. A
`Split` pickles as a few numpy arrays, which Ray shares between the processes of a machine.
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
from orchestrator.data.folder import IMAGE_SUFFIXES, check_some_images, open_folder
from orchestrator.data.parquet import open_parquet
from orchestrator.data.split import DIGEST_LENGTH, build_source, choose_splits
from orchestrator.data.split import Source as Source
from orchestrator.data.split import Split as Split
from orchestrator.data.storage import LocalFolder

DIGITS = "digits"


def open_source(config: DataConfig) -> Source:
    """The images that `data.source` names.

    Raises:
        ConfigError: Nothing there, no images there, or no such column or split; names the key, the value and what is.
    """
    if config.source == DIGITS:
        return _open_digits(config)
    path = Path(config.source).expanduser()
    if not path.exists():
        raise ConfigError(f"data.source = {config.source}: {_missing(path)}")
    path = path.absolute()  # whatever the working directory of the process that will read
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ConfigError(f"data.source = {config.source}: a file must be .parquet; of images, name the folder")
        return open_parquet(config, path.parent, [path.name])
    folder = LocalFolder(os.fspath(path))
    try:
        names = folder.files()
    except OSError as error:
        raise ConfigError(f"data.source = {config.source}: cannot be listed: {error}") from error
    images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    tables = [name for name in names if os.path.splitext(name)[1].lower() == ".parquet"]
    if images and tables:
        raise ConfigError(
            f"data.source = {config.source}: holds both image files ({images[0]}) and Parquet files ({tables[0]}); "
            "name a folder with one kind"
        )
    if tables:
        return open_parquet(config, path, tables)
    check_some_images(config.source, images)
    return open_folder(config, folder, images)


def _missing(path: Path) -> str:
    if "://" in os.fspath(path) or ":/" in os.fspath(path):
        return "addresses are not read; mount or copy the data and give its path"
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    near = difflib.get_close_matches(path.name, [*os.listdir(parent), DIGITS], n=1)
    hint = ""
    if near:
        hint = f"; did you mean {near[0] if near[0] == DIGITS else parent / near[0]}?"
    return f"no such file or folder; must be {DIGITS}, a folder of images, or a Parquet file or folder{hint}"


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
