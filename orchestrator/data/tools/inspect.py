"""`data inspect`: what a source holds, found by reading and decoding every image of it.

Headers say what is stored; only decoding in full finds what is broken. `inspect_text.py` prints the result.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dino_core.config import CropsConfig
from orchestrator.config import DataConfig
from orchestrator.data.images import BadImage, decode
from orchestrator.data.split import Source, Split
from orchestrator.data.tools.reading_speed import Speed, measure_speed
from orchestrator.data.tools.scan import available_cores, evenly_spread, in_order, printable, read_stored

SPEED_SAMPLE = 64
"""Images by which the speed is measured."""
ELONGATED = 3
"""Images whose longer side is more than this times the shorter are counted."""

_DIGEST_BYTES = 16
_HEADER_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError)


class Range(NamedTuple):
    """Of some numbers."""

    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Range | None:
        """None of none."""
        return cls(*(f(values).item() for f in (np.min, np.median, np.max))) if len(values) else None


class Broken(NamedTuple):
    """An image that cannot be used."""

    id: int
    name: str
    reason: str


@dataclass(frozen=True)
class SplitReport:
    """What a split holds. Everything but `images` and the classes is of the images that were looked at."""

    images: int
    looked_at: int
    num_classes: int | None
    """None: without labels."""
    class_sizes: Range | None
    """Images per class."""
    stored_by_class: bool
    """Those of a class stand together, as in a folder of class folders."""
    total_bytes: int
    """Encoded, as stored."""
    image_bytes: Range | None
    width: Range | None
    """Pixels, upright, of the usable images; the same for what follows."""
    height: Range | None
    megapixels: Range | None
    elongated: int
    """Longer than `ELONGATED` times their shorter side."""
    below_global_size: int
    """Whose shorter side is less than the side of a global crop."""
    below_local_size: int
    formats: dict[str, int]
    """Pillow's names; `raw` for arrays."""
    modes: dict[str, int]
    """Pillow's names, such as RGB, L, CMYK, I;16."""
    rotated: int
    """By their EXIF orientation."""
    animated: int
    """Of several frames or pages, of which the first is used."""
    progressive: int
    """JPEG in several scans, interlaced PNG."""
    copies: int
    """Images whose bytes are those of an earlier one in the split."""
    largest_unit_bytes: int | None
    """Images of the largest row group (or whatever is read as a whole); None where each is read by itself."""
    reasons: dict[str, int]
    """Broken images by kind of reason."""
    broken: tuple[Broken, ...]


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    kind: str
    location: str
    digest: str
    notes: tuple[str, ...]
    """What is not used, and what was chosen unasked."""
    splits: dict[str, SplitReport]
    """`train` and, where there is one, `test`."""
    duplicates: tuple[dict[str, list[int]], ...]
    """Sets of images of the same bytes: their ids by split."""
    leaks: tuple[tuple[str, str], ...]
    """Test images that are training images too: the names of both."""
    speed: Speed | None
    """None if interrupted, or without a usable image."""
    limit: int | None
    interrupted: bool


@dataclass(frozen=True)
class _Look:
    """What one image shows."""

    size: int
    digest: bytes
    form: str = ""
    mode: str = ""
    flags: frozenset[str] = frozenset()
    """Of rotated, animated, progressive."""
    shape: tuple[int, int] = (0, 0)
    """Height and width; zeros if broken."""
    reason: str = ""
    data: bytes | NDArray[np.uint8] | None = None
    """As stored, of the images by which the speed is measured."""


@dataclass
class _Tally:
    """What has been seen of a split: some bytes per image, however large the images."""

    ids: NDArray[np.int64]
    """Of the images to look at."""
    count: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)
    sample: list[bytes | NDArray[np.uint8]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sizes = np.zeros(len(self.ids), dtype=np.int64)
        self._digests = np.zeros((len(self.ids), _DIGEST_BYTES), dtype=np.uint8)
        self._shapes = np.zeros((len(self.ids), 2), dtype=np.int64)

    def add(self, look: _Look, split: Split) -> None:
        place = self.count
        self._sizes[place], self._shapes[place] = look.size, look.shape
        self._digests[place] = np.frombuffer(look.digest, dtype=np.uint8)
        if look.form:
            self.formats[look.form] += 1
            self.modes[look.mode] += 1
            self.flags.update(look.flags)
        if look.reason:
            index = int(self.ids[place])
            self.broken.append(Broken(index, printable(split.name(index)), look.reason))
        elif look.data is not None:
            self.sample.append(look.data)
        self.count += 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[count]"""
        return self._sizes[: self.count]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """[count]"""
        return self._shapes[: self.count, 0] > 0

    @property
    def shapes(self) -> NDArray[np.int64]:
        """[usable, 2] height and width"""
        return self._shapes[: self.count][self.usable]

    @property
    def keys(self) -> NDArray[np.uint64]:
        """[usable, 2] hashes of the bytes"""
        return self._digests[: self.count][self.usable].view(np.uint64)


def inspect(
    source: Source,
    config: DataConfig,
    crops: CropsConfig,
    *,
    limit: int | None = None,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Inspection:
    """Look at every image of a source, or at `limit` evenly spread ones of each split.

    Ctrl-C ends the look: what has been found by then is returned, as `interrupted`.

    Args:
        source: What `config` names.
        config: Its `max_pixels` says which images are too large.
        crops: What is made of the images, for the speed and to say which are too small.
        limit: None: all.
        threads: That read and decode; None: as many as there are cores.
        advance: Told how many images have been looked at since it was told last.
    """
    splits = {"train": source.train} | ({"test": source.test} if source.test is not None else {})
    tallies = {name: _Tally(evenly_spread(len(split), limit or len(split))) for name, split in splits.items()}
    interrupted, speed = False, None
    try:
        for name, split in splits.items():
            _look_at_all(split, tallies[name], config.max_pixels, threads or available_cores(), advance)
        if tallies["train"].sample:
            speed = measure_speed(tallies["train"].sample, crops, config.max_pixels)
    except KeyboardInterrupt:
        interrupted = True
    duplicates = _duplicates(tallies)
    return Inspection(
        kind=source.kind,
        location=source.location,
        digest=source.digest(),
        notes=tuple(map(printable, source.notes())),
        splits={name: _report(split, tallies[name], duplicates, name, crops) for name, split in splits.items()},
        duplicates=tuple(duplicates),
        leaks=tuple(
            (printable(splits["test"].name(index)), printable(source.train.name(ids["train"][0])))
            for ids in duplicates
            if "train" in ids
            for index in ids.get("test", [])
        ),
        speed=speed,
        limit=limit,
        interrupted=interrupted,
    )


def reason_kind(reason: str) -> str:
    """A few words for the many reasons that have the same cause."""
    if any(word in reason.casefold() for word in ("truncated", "premature", "cut short")):
        return "cut short"
    if reason.startswith(("floating-point image", "32-bit image")):
        return "values of unknown range"
    return reason.partition(":")[0]


def _look_at_all(split: Split, tally: _Tally, max_pixels: int, threads: int, advance: Callable[[int], None]) -> None:
    sampled = frozenset(tally.ids[evenly_spread(len(tally.ids), SPEED_SAMPLE)].tolist())

    def look(index: int) -> _Look:
        return _look(split, index, max_pixels, keep=index in sampled)

    with closing(in_order(look, tally.ids.tolist(), threads)) as looks:
        for found in looks:
            tally.add(found, split)
            advance(1)


def _look(split: Split, index: int, max_pixels: int, keep: bool) -> _Look:
    try:
        data = read_stored(split, index)
    except BadImage as error:
        return _Look(0, bytes(_DIGEST_BYTES), reason=str(error))
    kept = data if keep else None
    if isinstance(data, np.ndarray):
        digest = hashlib.blake2b(repr(data.shape).encode() + data.tobytes(), digest_size=_DIGEST_BYTES).digest()
        return _Look(data.nbytes, digest, "raw", "RGB", shape=data.shape[:2], data=kept)
    digest = hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
    form, mode, flags = _header(data)
    try:
        height, width, _ = decode(data, max_pixels).shape
    except BadImage as error:
        return _Look(len(data), digest, form, mode, flags, reason=str(error))
    return _Look(len(data), digest, form, mode, flags, (height, width), data=kept)


def _header(data: bytes) -> tuple[str, str, frozenset[str]]:
    """Format, mode and flags, without decoding; empty if not even that can be read."""
    try:
        image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning, *_HEADER_ERRORS):
        return "", "", frozenset()
    flags = set()
    if image.info.get("progressive") or image.info.get("interlace"):
        flags.add("progressive")
    try:
        # The base class's: that of PNG decodes the image to look behind it.
        if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in range(2, 9):
            flags.add("rotated")
        if getattr(image, "is_animated", False):
            flags.add("animated")
    except _HEADER_ERRORS:
        pass  # the description is damaged; whether the pixels are is for the decoder to say
    return image.format or "unknown", image.mode, frozenset(flags)


def _duplicates(tallies: Mapping[str, _Tally]) -> list[dict[str, list[int]]]:
    """Sets of usable images with the same hash: ids by split, each ascending; ordered by their first image."""
    names = list(tallies)
    ids = np.concatenate([tally.ids[: tally.count][tally.usable] for tally in tallies.values()])
    of = np.repeat(np.arange(len(names)), [len(tally.keys) for tally in tallies.values()])
    keys = np.concatenate([tally.keys for tally in tallies.values()])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable, so that equal images stay in their order
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    begins = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)) == 1)
    ends = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)) == -1) + 1
    groups = sorted((order[begin:end] for begin, end in zip(begins, ends, strict=True)), key=lambda group: group[0])
    return [{names[s]: ids[group[of[group] == s]].tolist() for s in np.unique(of[group]).tolist()} for group in groups]


def _report(
    split: Split, tally: _Tally, duplicates: Sequence[Mapping[str, list[int]]], name: str, crops: CropsConfig
) -> SplitReport:
    shapes = tally.shapes
    shorter, longer = shapes.min(axis=1), shapes.max(axis=1)
    classes = None if split.labels is None else np.bincount(split.labels)
    return SplitReport(
        images=len(split),
        looked_at=tally.count,
        num_classes=None if classes is None else int(np.count_nonzero(classes)),
        class_sizes=None if classes is None else Range.of(classes[classes > 0]),
        stored_by_class=split.labels is not None and _by_class(split.labels),
        total_bytes=int(tally.sizes.sum()),
        image_bytes=Range.of(tally.sizes),
        width=Range.of(shapes[:, 1]),
        height=Range.of(shapes[:, 0]),
        megapixels=Range.of(shapes.prod(axis=1) / 1e6),
        elongated=int(np.count_nonzero(longer > ELONGATED * shorter)),
        below_global_size=int(np.count_nonzero(shorter < crops.global_size)),
        below_local_size=int(np.count_nonzero(shorter < crops.local_size)) if crops.num_local_crops else 0,
        formats=dict(tally.formats.most_common()),
        modes=dict(tally.modes.most_common()),
        rotated=tally.flags["rotated"],
        animated=tally.flags["animated"],
        progressive=tally.flags["progressive"],
        copies=sum(len(ids[name]) - 1 for ids in duplicates if name in ids),
        largest_unit_bytes=_largest_unit(split, tally),
        reasons=dict(Counter(reason_kind(image.reason) for image in tally.broken).most_common()),
        broken=tuple(tally.broken),
    )


def _by_class(labels: NDArray[np.int64]) -> bool:
    classes = len(np.unique(labels))
    return 1 < classes < len(labels) and int(np.count_nonzero(np.diff(labels))) == classes - 1


def _largest_unit(split: Split, tally: _Tally) -> int | None:
    units = split.units()
    if units is None or not tally.count:
        return None
    if tally.count == len(split):
        return int(np.add.reduceat(tally.sizes, units).max())
    return int(np.diff(np.append(units, len(split))).max() * tally.sizes.mean())
