"""Encoded images into Parquet files that stream fast: small row groups, images neither compressed nor indexed.

The layout is that of Hugging Face `datasets`: `image` is a struct of `bytes` and `path`, `label` a ClassLabel whose
names are in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa


class Row(NamedTuple):
    """One image."""

    data: bytes
    """Encoded."""
    path: str
    """Its name in the source."""
    label: int | None


class Written(NamedTuple):
    """One file."""

    rows: int
    size: int
    """Bytes."""


def schema_of(classes: Sequence[str]) -> pa.Schema:
    """The columns, `label` only if there are classes, with the metadata by which `datasets` knows them."""
    import pyarrow as pa

    features: dict[str, object] = {"image": {"_type": "Image"}}
    fields = [pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))]
    if classes:
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
        fields.append(pa.field("label", pa.int64()))
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write_shard(file: IO[bytes], schema: pa.Schema, rows: Iterable[Row], row_group_bytes: int) -> Written:
    """Write one Parquet file, in row groups of at most `row_group_bytes` of images (but at least one image each).

    The same rows give the same bytes. Raises OSError; the file is then unfinished.
    """
    import pyarrow.parquet as pq

    labelled = "label" in schema.names
    small = ["image.path", *(["label"] if labelled else [])]
    writer = pq.ParquetWriter(
        file,
        schema,
        compression={"image.bytes": "none", **dict.fromkeys(small, "zstd")},
        use_dictionary=["label"] if labelled else False,
        write_statistics=["label"] if labelled else False,
    )
    count, group, size = 0, list[Row](), 0
    try:
        for row in rows:
            if group and size + len(row.data) > row_group_bytes:
                writer.write_batch(_batch(group, schema))
                group, size = [], 0
            group.append(row)
            size += len(row.data)
            count += 1
        if group:
            writer.write_batch(_batch(group, schema))
        writer.close()
    finally:
        writer.is_open = False  # else, if writing failed, it would try to end the file when it is collected
    return Written(count, file.tell())


def _batch(rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    kind = schema.field("image").type
    images = pa.StructArray.from_arrays(
        [pa.array([r.data for r in rows], pa.binary()), pa.array([r.path for r in rows], pa.string())],
        fields=[kind.field(0), kind.field(1)],
    )
    columns = [images]
    if "label" in schema.names:
        columns.append(pa.array([r.label for r in rows], pa.int64()))
    return pa.record_batch(columns, schema=schema)
