"""`data convert`: any source as Parquet files that stream fast, in an order that makes sequential reads random.

The images are copied byte for byte unless they are to be shrunk. The same source and options give the same bytes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from dino_core.counter_rng import absorb, root
from orchestrator.config import DataConfig
from orchestrator.data.images import BadImage, decode
from orchestrator.data.split import Source, Split
from orchestrator.data.tools.destination import Destination, local_path, new_folder
from orchestrator.data.tools.encode import shrink, to_png
from orchestrator.data.tools.parquet_writer import Row, schema_of, write_shard
from orchestrator.data.tools.scan import available_cores, evenly_spread, in_order, printable, read_stored, show_bytes
from orchestrator.data.tools.spool import Spool
from orchestrator.errors import RunFailed

MANIFEST_FILE = "manifest.json"
LEFT_OUT_FILE = "left_out.jsonl"
MB = 1_000_000

_ORDER = 2  # keeps this order's random numbers apart from those of the training order, which has 1
_SAMPLED_IMAGES, _SAMPLED_UNITS = 256, 16
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to write."""

    row_group_mb: float = 8.0
    """Largest row group, MB of encoded images: what is read for one image in random order."""
    shard_mb: float = 256.0
    """About the size of a file, MB."""
    shuffle: int | None = 0
    """Seed of the order in which images are stored; None: that of the source."""
    shorter_side: int | None = None
    """Shrink images whose shorter side is longer, pixels; None: every image is copied byte for byte."""
    check: bool = True
    """Decode every image and leave out those that cannot be."""
    threads: int = field(default_factory=available_cores)


@dataclass(frozen=True)
class LeftOut:
    """An image that was not converted."""

    split: str
    id: int
    name: str
    reason: str


@dataclass(frozen=True)
class Converted:
    """What was written."""

    address: str
    """The new folder."""
    images: dict[str, int]
    """Per split."""
    files: int
    size: int
    """Bytes of all Parquet files."""
    shrunk: int
    """Images that were made smaller."""
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    """Of the source: what is not used, and so not written, and what was chosen unasked."""


def convert(
    source: Source,
    dest: str,
    config: DataConfig,
    options: ConvertOptions,
    advance: Callable[[int], None] = lambda count: None,
) -> Converted:
    """Write the images of a source to `dest`, a path or URL.

    The training split becomes `train`, the test split `test`, whatever they are called in the source.

    Args:
        source: What `config` names.
        dest: A folder that is not there yet, or empty.
        config: Its `max_pixels` and `max_bad_fraction` say which images are left out, and how many may be.
        options: How to write.
        advance: Told how many images have been read since it was told last.

    Raises:
        ConfigError: `dest` is taken, lies in the source, cannot be made, or has not enough room.
        RunFailed: More images than allowed are unusable, or writing fails. Nothing is left behind.
    """
    _refuse_inside(source, dest)
    conversion = _Conversion(source, config, options, advance)
    with new_folder(dest) as folder:
        return conversion.run(folder)


def _refuse_inside(source: Source, dest: str) -> None:
    """What lies in the source would become a part of it."""
    old, new = Path(source.location), local_path(dest)
    if new is not None and old.is_dir() and new.resolve().is_relative_to(old.resolve()):
        raise ConfigError(f"DEST = {dest}: lies in the source {source.location}; name a folder elsewhere")


class _Conversion:
    def __init__(
        self, source: Source, config: DataConfig, options: ConvertOptions, advance: Callable[[int], None]
    ) -> None:
        self._source, self._config, self._options, self._advance = source, config, options, advance
        self._digest = source.digest()
        self._splits = {"train": source.train} | ({"test": source.test} if source.test is not None else {})
        self._left_out: list[LeftOut] = []
        self._shrunk = 0

    def run(self, folder: Destination) -> Converted:
        mean_bytes = {name: self._mean_bytes(split) for name, split in self._splits.items()}
        self._check_room(folder, sum(len(self._splits[name]) * mean for name, mean in mean_bytes.items()))
        schema = schema_of(self._source.classes)
        files: dict[str, list[dict[str, Any]]] = {}
        for name, split in self._splits.items():
            num_files = max(1, math.ceil(len(split) * mean_bytes[name] / (self._options.shard_mb * MB)))
            num_files = min(num_files, max(1, len(split)))
            bounds = np.arange(num_files + 1, dtype=np.int64) * len(split) // num_files
            files[name] = []
            with closing(self._rows(name, split, bounds, folder)) as rows:
                for number in range(num_files):
                    file_name = f"{name}-{number:05}-of-{num_files:05}.parquet"
                    part = islice(rows, int(bounds[number + 1] - bounds[number]))
                    with folder.open(file_name) as file:
                        kept = (row for row in part if row is not None)
                        written = write_shard(file, schema, kept, int(self._options.row_group_mb * MB))
                    files[name].append({"name": file_name, "images": written.rows, "bytes": written.size})
        self._write_records(folder, files)
        every = [entry for entries in files.values() for entry in entries]
        return Converted(
            address=folder.address,
            images={name: sum(entry["images"] for entry in entries) for name, entries in files.items()},
            files=len(every),
            size=sum(entry["bytes"] for entry in every),
            shrunk=self._shrunk,
            left_out=tuple(self._left_out),
            notes=tuple(map(printable, self._source.notes())),
        )

    def _mean_bytes(self, split: Split) -> float:
        """Of an image as it will be written, by a sample; units of storage that are read as a whole are few of it."""
        units = split.units()
        if units is None or len(units) <= _SAMPLED_UNITS:
            sample = evenly_spread(len(split), _SAMPLED_IMAGES)
        else:
            ends = np.append(units, len(split))
            chosen = evenly_spread(len(units), _SAMPLED_UNITS)
            each = _SAMPLED_IMAGES // _SAMPLED_UNITS
            sample = np.concatenate([ends[u] + evenly_spread(int(ends[u + 1] - ends[u]), each) for u in chosen])
        with closing(in_order(partial(self._prepare, split), sample.tolist(), self._options.threads)) as outcomes:
            sizes = [len(outcome[0]) for outcome in outcomes if not isinstance(outcome, BadImage)]
        return float(np.mean(sizes)) if sizes else 0.0

    def _check_room(self, folder: Destination, needed: float) -> None:
        spooled = self._options.shuffle is not None and any(s.units() is not None for s in self._splits.values())
        free = folder.free_bytes
        needed *= 2 if spooled else 1
        if free is not None and needed > free:
            twice = ", twice the data, as they are sorted into their new order on disk" if spooled else ""
            raise ConfigError(
                f"DEST = {folder.address}: needs about {show_bytes(needed)}{twice}, and its disk has "
                f"{show_bytes(free)} free"
            )

    def _prepare(self, split: Split, index: int) -> tuple[bytes, bool] | BadImage:
        """The bytes to write and whether they are those of a smaller image, or why there are none."""
        shorter = self._options.shorter_side
        try:
            data = read_stored(split, index)
            pixels = data if isinstance(data, np.ndarray) else None
            if pixels is None and (self._options.check or shorter is not None):
                assert isinstance(data, bytes)
                pixels = decode(data, self._config.max_pixels)
        except BadImage as error:
            return error
        if pixels is not None and shorter is not None and min(pixels.shape[:2]) > shorter:
            is_png = isinstance(data, np.ndarray) or data.startswith(_PNG_SIGNATURE)
            return shrink(pixels, shorter, "PNG" if is_png else "JPEG"), True
        return (data if isinstance(data, bytes) else to_png(data)), False

    def _rows(self, name: str, split: Split, bounds: NDArray[np.int64], folder: Destination) -> Generator[Row | None]:
        """The rows of all files of a split, one after the other; None for each image that is left out."""
        order = stored_order(len(split), self._options.shuffle)
        if self._options.shuffle is None or split.units() is None:
            outcomes: Iterator[bytes | None] = self._checked(name, split, order)
            yield from (self._row(split, index, data) for index, data in zip(order.tolist(), outcomes, strict=True))
            return
        # Images that are stored together are read together: first each to the file that it belongs to, then these.
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        spool = Spool(folder.scratch or Path(tempfile.mkdtemp(prefix="convert-")), bounds)
        try:
            in_source_order = self._checked(name, split, np.arange(len(order)))
            for place, data in zip(places.tolist(), in_source_order, strict=True):
                if data is not None:
                    spool.add(place, data)
            for index, data in zip(order.tolist(), spool.in_order(), strict=True):
                yield self._row(split, index, data)
        finally:
            spool.remove()

    def _row(self, split: Split, index: int, data: bytes | None) -> Row | None:
        if data is None:
            return None
        return Row(data, printable(split.name(index)), None if split.labels is None else int(split.labels[index]))

    def _checked(self, name: str, split: Split, indices: NDArray[np.int64]) -> Generator[bytes | None]:
        """The bytes of some images, None for those that are left out. Raises RunFailed when these are too many."""
        allowed = math.floor(self._config.max_bad_fraction * len(split))
        bad: list[LeftOut] = []
        numbers = indices.tolist()
        with closing(in_order(partial(self._prepare, split), numbers, self._options.threads)) as outcomes:
            for index, outcome in zip(numbers, outcomes, strict=True):
                self._advance(1)
                if not isinstance(outcome, BadImage):
                    data, smaller = outcome
                    self._shrunk += smaller
                    yield data
                    continue
                bad.append(LeftOut(name, index, printable(split.name(index)), str(outcome)))
                self._left_out.append(bad[-1])
                if len(bad) > allowed:
                    raise RunFailed(_too_many(bad, len(split), allowed, self._config))
                yield None

    def _write_records(self, folder: Destination, files: dict[str, list[dict[str, Any]]]) -> None:
        if self._left_out:
            lines = "".join(json.dumps(asdict(image)) + "\n" for image in self._left_out)
            _write(folder, LEFT_OUT_FILE, lines)
        options = asdict(self._options)
        del options["threads"]  # they change nothing
        source = {"kind": self._source.kind, "location": self._source.location, "digest": self._digest}
        manifest = {
            "format": 1,
            "source": source,
            "options": options,
            "classes": list(self._source.classes),
            "notes": list(map(printable, self._source.notes())),
            "left_out": len(self._left_out),
            "shrunk": self._shrunk,
            "splits": {
                name: {
                    "images": sum(entry["images"] for entry in files[name]),
                    "labelled": split.labels is not None,
                    "files": files[name],
                }
                for name, split in self._splits.items()
            },
        }
        _write(folder, MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def stored_order(num_images: int, seed: int | None) -> NDArray[np.int64]:
    """The images [num_images] of a split in the order in which they are stored; without a seed that of the source."""
    if seed is None:
        return np.arange(num_images, dtype=np.int64)
    keys = absorb(absorb(root(seed), _ORDER), np.arange(num_images))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _too_many(bad: Sequence[LeftOut], total: int, allowed: int, config: DataConfig) -> str:
    first = "; ".join(f"{image.name}: {image.reason}" for image in bad[:3])
    return (
        f"{bad[0].split}: more of the {total} images are unusable than the {allowed} that data.max_bad_fraction = "
        f"{config.max_bad_fraction:g} allows; nothing was written; `data inspect` lists them all. The first: {first}"
    )


def _write(folder: Destination, name: str, text: str) -> None:
    with folder.open(name) as file:
        file.write(text.encode())
