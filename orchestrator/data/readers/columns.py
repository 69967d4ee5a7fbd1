"""Which columns of a table hold the images, their labels and their splits. Imports pyarrow inside functions only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.split import Labels, SplitRows, enumerate_names, split_by_code, unknown

if TYPE_CHECKING:
    import pyarrow as pa

Features = dict[str, Any]
"""Columns by name, as Hugging Face `datasets` describes them: {"img": {"_type": "Image"}, ...}. Empty if nobody did."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    image: str
    fields: tuple[str, ...]
    """Of a struct, `bytes` and, where it is there, `path`; empty if the column itself holds the bytes."""
    label: str | None
    split: str | None
    class_names: tuple[str, ...]
    """Of labels that are numbers, what each stands for; empty if nothing says so."""
    remarks: tuple[str, ...]
    """What was chosen though it was not named, and what was not, for people."""


def choose_columns(config: DataConfig, schema: pa.Schema, features: Features, name: str) -> Columns:
    """The columns that `config` names in a table of this schema; `name` is the file, for messages.

    Where `data.image_column` is the default and not there, the only column that can hold images is taken: those that
    are declared as images (by Hugging Face `datasets`), else those of bytes or of structs with bytes. Likewise the only
    declared class label stands in for the default `data.label_column`.

    Raises:
        ConfigError: A column that is not there or of another type.
    """
    image, notes = config.image_column, []
    if image not in schema.names:
        images = [column for column in schema.names if _feature(features, column) == "Image"]
        images = images or [field.name for field in schema if _holds_images(field.type)]
        if image != DataConfig.image_column or len(images) != 1:
            raise unknown("data.image_column", image, images or schema.names, f"column in {name}")
        (image,) = images
        notes.append(f"images from column {image}")
    kind = schema.field(image).type
    if not _holds_images(kind):
        raise ConfigError(
            f"data.image_column = {image}: must hold encoded images (bytes, or a struct with a field `bytes`), "
            f"not {kind}"
        )
    label = config.label_column if _has(config, "label_column", schema) else None
    if label is None:
        labels = [column for column in schema.names if _feature(features, column) == "ClassLabel"]
        if len(labels) == 1:
            (label,) = labels
            notes.append(f"labels from column {label}")
    split = config.split_column if _has(config, "split_column", schema) else None
    names = features.get(label, {}).get("names") if label and _feature(features, label) == "ClassLabel" else None
    fields = tuple(field for field in ("bytes", "path") if kind.get_field_index(field) >= 0) if kind.num_fields else ()
    others = [column for column in schema.names if column not in (image, label, split)]
    if others and (notes or label is None):
        notes.append(f"columns not used: {enumerate_names(others)}")
    return Columns(image, fields, label, split, tuple(map(str, names or ())), tuple(notes))


def schema_features(schema: pa.Schema) -> Features:
    """What Hugging Face `datasets` wrote into a schema about its columns."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _feature(features: Features, column: str) -> str | None:
    feature = features.get(column)
    return feature.get("_type") if isinstance(feature, dict) else None


def _has(config: DataConfig, key: str, schema: pa.Schema) -> bool:
    """Whether the column that `key` names is there. A name that is not the default must be."""
    column = getattr(config, key)
    if column in schema.names:
        return True
    if column != getattr(DataConfig, key):
        raise unknown(f"data.{key}", column, schema.names, f"column in {config.source}")
    return False


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def split_rows(
    config: DataConfig, column: Callable[[], pa.ChunkedArray] | None, names: Sequence[str], file_rows: Sequence[int]
) -> SplitRows:
    """The rows by split.

    Splits are the values of `column`; where that is None, the part of the file names before `-00000-of-` if all have
    one.

    Raises:
        ConfigError: A split that is not there.
    """
    if column is not None:
        codes = column().cast("string").combine_chunks().dictionary_encode()
        values = [str(value) for value in codes.dictionary.to_pylist()]
        of_row = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        what = f"value in column {config.split_column}"
    else:
        prefixes = [re.match(r"(.+?)-\d+-of-\d+", os.path.basename(name)) for name in names]
        asked = config.train_split != DataConfig.train_split or config.test_split != DataConfig.test_split
        if not asked and not all(prefixes):
            return SplitRows(np.arange(sum(file_rows), dtype=np.int64), None, {})
        file_splits = [match[1] if match else "" for match in prefixes]
        values = sorted(set(file_splits) - {""})
        of_row = np.repeat([values.index(split) if split else -1 for split in file_splits], file_rows)
        what = "split by file name, and no column " + config.split_column
    return split_by_code(config, of_row, values, what)


def labels_of(columns: Columns, column: pa.ChunkedArray | None, rows: NDArray[np.int64]) -> Labels:
    """The labels of some rows, None for one that has none (null, or a negative number); None without a column.

    Raises:
        ConfigError: The column holds neither whole numbers nor text.
    """
    import pyarrow as pa

    if column is None:
        return None
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind)):
        raise ConfigError(f"data.label_column = {columns.label}: must hold whole numbers or text, not {column.type}")
    labels = column.take(pa.array(rows)).to_pylist()
    return labels if is_text else [None if label is None or label < 0 else label for label in labels]
