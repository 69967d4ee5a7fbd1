"""Data sets as Hugging Face `datasets` saves them (`save_to_disk`), read without that package.

A folder with `dataset_dict.json` holds a sub-folder for each split; one with `state.json` is a single data set: Arrow
streams, named there in their order, perhaps with a selection of their rows, and `dataset_info.json`, which says what
the columns are.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers import arrow
from orchestrator.data.readers.columns import split_rows
from orchestrator.data.readers.table import File, StoredTable, Table, digest
from orchestrator.data.split import Labels, Source, build_source, choose_splits
from orchestrator.data.storage import Folder, Place

if TYPE_CHECKING:
    pass

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def is_saved(place: Place) -> bool:
    """Whether a folder is one of these."""
    return _DICT in place.files or (_STATE in place.files and _INFO in place.files)


def open_saved(config: DataConfig, place: Place) -> Source:
    """The source of a saved data set: its splits, or of a single one, those of `data.split_column`.

    Raises:
        ConfigError: A split, file or column that is not there, or JSON that is damaged.
    """
    if _DICT in place.files:
        available = _json(config, place.folder, _DICT).get("splits", [])
        splits = choose_splits(config, available, f"split in {_DICT}")
        opened = [_Saved(config, place.folder.below(split)) for split in splits if split is not None]
        parts: list[tuple[Table, Labels] | None] = [*(part.whole() for part in opened), None][:2]
        unused: dict[str, int | None] = dict.fromkeys(sorted(set(available) - set(splits)))
    else:
        opened = [_Saved(config, place.folder)]
        parts, unused = opened[0].splits()
    columns = opened[0].table.columns
    for part in opened[1:]:
        if part.table.columns.class_names != columns.class_names:
            raise ConfigError(f"data.source = {config.source}: the classes of its splits are not the same")
    found = digest(*(part.fingerprint() for part in opened))
    return build_source(
        "saved data set",
        place.address,
        parts,
        partial(str, found),
        columns.class_names,
        unused=unused,
        remarks=columns.remarks,
    )


class _Saved:
    """One saved data set."""

    def __init__(self, config: DataConfig, folder: Folder) -> None:
        self._config, self._folder = config, folder
        self._state = _json(config, folder, _STATE)
        features = _json(config, folder, _INFO).get("features")
        files = self._names("_data_files")
        if not files:
            raise ConfigError(f"data.source = {config.source}: {folder.address}/{_STATE} names no files")
        place = Place(folder, dict.fromkeys(files), folder.address, False)
        self.table = StoredTable.open(config, arrow.FORMAT, place, features if isinstance(features, dict) else None)
        read = self.table.read((self.table.columns.label, self.table.columns.split))
        self._labels = read.get(self.table.columns.label or "")
        self._splits = read.get(self.table.columns.split or "")
        self._rows = self._selection()

    def whole(self) -> tuple[Table, Labels]:
        """All of it."""
        return self.table.part(self._rows, self._labels)

    def splits(self) -> tuple[list[tuple[Table, Labels] | None], dict[str, int | None]]:
        """Its training and its test rows, and the number of those of each other split."""
        column = None if self._splits is None else partial(self._splits.take, self._rows)
        rows = split_rows(self._config, column, [_STATE], [len(self._rows)])
        parts = (rows.train, rows.test)
        found = [None if part is None else self.table.part(self._rows[part], self._labels) for part in parts]
        return found, dict(rows.unused)

    def fingerprint(self) -> bytes:
        """Everything that says which rows there are."""
        return self.table.fingerprint() + self._rows.tobytes()

    def _names(self, key: str) -> list[str]:
        try:
            return [str(file["filename"]) for file in self._state.get(key) or ()]
        except (TypeError, LookupError) as error:
            where = f"{self._folder.address}/{_STATE}"
            raise ConfigError(f"data.source = {self._config.source}: {where}: {key} is no list of files") from error

    def _selection(self) -> NDArray[np.int64]:
        """The rows of the files that belong to the data set, in its order: it may be a selection, or shuffled."""
        import pyarrow as pa

        total = sum(self.table.file_rows)
        names = self._names("_indices_data_files") or self._names("_indices_files")
        if not names:
            return np.arange(total, dtype=np.int64)
        try:
            files = [File(self._folder, name, *self._folder.stat(name)) for name in names]
            columns = [arrow.read_columns(file, ["indices"]).column(0).to_numpy() for file in files]
        except (OSError, LookupError, pa.ArrowException) as error:
            message = f"the selection in {', '.join(names)} cannot be read: {error}"
            raise ConfigError(f"data.source = {self._config.source}: {message}") from error
        rows = np.concatenate(columns).astype(np.int64)
        if rows.size == 0 or rows.min() < 0 or rows.max() >= total:
            raise ConfigError(f"data.source = {self._config.source}: {names[0]} selects no rows, or some not there")
        return rows


def _json(config: DataConfig, folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.source = {config.source}: {folder.address}/{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"data.source = {config.source}: {folder.address}/{name} is not a JSON object")
    return content
