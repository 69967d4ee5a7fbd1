"""An `Inspection` for people and for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dino_core.config import CropsConfig
from orchestrator.config import DataConfig
from orchestrator.data.tools.inspect import ELONGATED, Inspection, Range, SplitReport
from orchestrator.data.tools.scan import show_bytes, show_number

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 20
_WANTED_PER_S = 1000
_WORTH_SHRINKING = 1.5
_LARGE_UNIT_BYTES = 32_000_000


def as_json(found: Inspection, config: DataConfig, crops: CropsConfig) -> dict[str, Any]:
    """Everything, broken images and duplicates in full, as one JSON object."""
    content = asdict(found)
    for name, split in found.splits.items():
        for key, value in vars(split).items():
            if isinstance(value, Range):
                content["splits"][name][key] = value._asdict()
        content["splits"][name]["broken"] = [image._asdict() for image in split.broken]
    content["leaks"] = [{"test": test, "train": train} for test, train in found.leaks]
    if found.speed is not None:
        content["speed"][f"cores_for_{_WANTED_PER_S}_per_s"] = found.speed.cores_for(_WANTED_PER_S)
    return content | {"advice": advice(found, config, crops)}


def as_text(found: Inspection, config: DataConfig, crops: CropsConfig) -> str:
    """All of it as plain text."""
    rows = [("", *found.splits), *_rows(found, crops)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_head(found), "", *lines, *_tail(found, config, crops)])


def as_rich(found: Inspection, config: DataConfig, crops: CropsConfig) -> list[Table | str]:
    """The same for a terminal: `Console(highlight=False).print(*..., sep="\\n", markup=False)`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for column in ("", *found.splits):
        table.add_column(column)
    for row in _rows(found, crops):
        table.add_row(*map(Text, row))
    return ["\n".join(_head(found)), table, "\n".join(_tail(found, config, crops)).lstrip("\n")]


def advice(found: Inspection, config: DataConfig, crops: CropsConfig) -> list[str]:
    """What to do about it, a sentence each."""
    train = found.splits["train"]
    told = []
    if len(train.broken) > config.max_bad_fraction * train.looked_at:
        told.append(
            f"{_count(len(train.broken), 'unusable training image')}: more than data.max_bad_fraction = "
            f"{config.max_bad_fraction:g} allows, so that a run would stop. Remove or replace them."
        )
    if found.leaks:
        told.append(
            f"{_count(len(found.leaks), 'test image')} in the training split too: evaluation finds the image itself "
            "as its nearest neighbour. Remove them from one of the two."
        )
    speed = found.speed
    if speed is not None and speed.shrink_speedup is not None and speed.shrink_speedup >= _WORTH_SHRINKING:
        assert train.megapixels is not None
        told.append(
            f"The median image has {show_number(train.megapixels.median)} megapixels, more than the crops need: `data "
            f"convert --shorter-side {speed.shorter_side}` makes decoding and cropping {speed.shrink_speedup:.1f} "
            "times as fast (measured), but the images are no longer the same."
        )
    unit = train.largest_unit_bytes
    if unit is not None and unit > _LARGE_UNIT_BYTES and config.shuffle == "full":
        told.append(
            f"Row groups of up to {show_bytes(unit)} are slow in random order, as one is read for an image "
            "unless it is in the cache: data.shuffle=windowed, or `data convert`."
        )
    if train.stored_by_class and config.shuffle == "windowed" and train.images > config.shuffle_window:
        told.append(
            f"The images are stored class by class, and data.shuffle = windowed mixes {config.shuffle_window:,} at a "
            "time: `data convert` stores them in random order; or data.shuffle=full."
        )
    return told


def _head(found: Inspection) -> list[str]:
    lines = [f"{found.kind} {found.location}", f"digest {found.digest}", *found.notes]
    seen, there = (sum(vars(split)[key] for split in found.splits.values()) for key in ("looked_at", "images"))
    if found.interrupted:
        lines.append(f"INTERRUPTED after {seen:,} of {there:,} images; what follows is about these")
    elif seen < there:
        lines.append(f"looked at {seen:,} of {there:,} images, evenly spread (--limit {found.limit})")
    return lines


def _rows(found: Inspection, crops: CropsConfig) -> list[tuple[str, ...]]:
    """Name of each line and its cell for each split, without the lines that say nothing."""
    parts: dict[str, Callable[[SplitReport], str]] = {
        "images": lambda s: f"{s.images:,}",
        "classes": _classes,
        "bytes": lambda s: f"{_range(s.image_bytes, show_bytes)}; {_total_bytes(s)} in all",
        "width": lambda s: _range(s.width, show_number),
        "height": lambda s: _range(s.height, show_number),
        "megapixels": lambda s: (
            _range(s.megapixels, show_number) if s.megapixels and s.megapixels.largest >= 0.1 else ""
        ),
        "format": lambda s: _counts(s.formats),
        "mode": lambda s: _counts(s.modes),
        "largest row group": lambda s: show_bytes(s.largest_unit_bytes) if s.largest_unit_bytes else "",
        f"longer than {ELONGATED}:1": lambda s: _some(s.elongated),
        f"shorter side < {crops.global_size}": lambda s: _some(s.below_global_size),
        f"shorter side < {crops.local_size}": lambda s: _some(s.below_local_size),
        "rotated by EXIF": lambda s: _some(s.rotated),
        "animated": lambda s: _some(s.animated),
        "progressive": lambda s: _some(s.progressive),
        "copies of another": lambda s: _some(s.copies),
        "unusable": lambda s: f"{len(s.broken):,}: {_counts(s.reasons)}" if s.broken else "0",
    }
    rows = [(label, *(cell(split) for split in found.splits.values())) for label, cell in parts.items()]
    return [row for row in rows if any(row[1:])]


def _tail(found: Inspection, config: DataConfig, crops: CropsConfig) -> list[str]:
    lines = []
    broken = [(name, image) for name, split in found.splits.items() for image in split.broken]
    if broken:
        lines += ["", "Unusable" + _first(len(broken))]
        lines += [f"  {name} {image.id}  {image.name}: {image.reason}" for name, image in broken[:_SHOWN]]
    if found.leaks:
        lines += [
            "",
            f"LEAK: {_count(len(found.leaks), 'test image')} in the training split too{_first(len(found.leaks))}",
        ]
        lines += [f"  {test} = {train}" for test, train in found.leaks[:_SHOWN]]
    if found.speed is not None:
        speed = found.speed
        decoding = "" if speed.decode is None else f"decoding {speed.decode:,.0f} images/s, "
        num_crops = 2 + crops.num_local_crops
        cores = speed.cores_for(_WANTED_PER_S)
        lines += [
            "",
            f"One core, measured on {speed.images} training images: {decoding}decoding and {num_crops} crops "
            f"{show_number(speed.decode_and_crop)} images/s",
            f"{_WANTED_PER_S:,} images/s need {_count(cores, 'such core')}",
        ]
    told = advice(found, config, crops)
    if told:
        lines += ["", "What to do", *(f"- {sentence}" for sentence in told)]
    return lines


def _first(count: int) -> str:
    return f", the first {_SHOWN} of {count:,} (--json has all)" if count > _SHOWN else ""


def _classes(split: SplitReport) -> str:
    if split.num_classes is None or split.class_sizes is None:
        return "without labels"
    return f"{split.num_classes:,}, of {_range(split.class_sizes, show_number)} images"


def _total_bytes(split: SplitReport) -> str:
    if 0 < split.looked_at < split.images:
        return f"about {show_bytes(split.total_bytes / split.looked_at * split.images)}"
    return show_bytes(split.total_bytes)


def _range(values: Range | None, show: Callable[[float], str]) -> str:
    if values is None:
        return "none"
    if values.smallest == values.largest:
        return show(values.median)
    return f"{show(values.smallest)} to {show(values.largest)}, median {show(values.median)}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _some(count: int) -> str:
    return f"{count:,}" if count else ""


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
