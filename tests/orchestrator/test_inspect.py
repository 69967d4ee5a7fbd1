"""`data inspect`: what it finds in images whose faults are known."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino_core.config import CropsConfig
from orchestrator.config import DataConfig
from orchestrator.data.sources import open_source
from orchestrator.data.tools import inspect_text
from orchestrator.data.tools.inspect import Inspection, Range, inspect, reason_kind
from orchestrator.data.tools.reading_speed import measure_speed, shorter_side_for
from orchestrator.data.tools.scan import evenly_spread, in_order, printable

CROPS = CropsConfig(num_local_crops=2, global_size=32, local_size=16)


def encoded(
    value: int, form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any
) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> DataConfig:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return DataConfig(source=str(root))


def look(config: DataConfig, **options: Any) -> Inspection:
    return inspect(open_source(config), config, CROPS, **options)


def text(found: Inspection, config: DataConfig) -> str:
    return inspect_text.as_text(found, config, CROPS)


@pytest.fixture(autouse=True, scope="module")
def _measured_for_a_moment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.data.tools.reading_speed._ENOUGH_S", 0.02)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A folder with one of everything."""
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(sixteen, "PNG")
    frames = io.BytesIO()
    Image.new("L", (40, 30), 1).save(frames, "GIF", save_all=True, append_images=[Image.new("L", (40, 30), 200)])
    jpeg = encoded(7, "JPEG")
    files = {
        "train/cat/0.png": encoded(0),
        "train/cat/1.jpg": encoded(1, "JPEG", "CMYK"),
        "train/cat/2.jpg": encoded(2, "JPEG", progressive=True),
        "train/cat/3.jpg": encoded(3, "JPEG", exif=exif),
        "train/cat/4.png": sixteen.getvalue(),
        "train/cat/5.gif": frames.getvalue(),
        "train/cat/6.png": encoded(0),
        "train/dog/0.jpg": jpeg[: len(jpeg) // 2],
        "train/dog/1.jpg": b"no image",
        "train/dog/2.jpg": b"",
        "train/dog/3.png": encoded(9, size=(200, 50)),
        "train/dog/4.png": encoded(10, size=(20, 8)),
        "test/dog/0.png": encoded(0),
        "test/cat/0.png": encoded(11),
    }
    return write(tmp_path_factory.mktemp("everything"), files)


@pytest.fixture(scope="module")
def found(config: DataConfig) -> Inspection:
    return look(config)


def test_sizes_formats_and_flags(found: Inspection) -> None:
    train, test = found.splits["train"], found.splits["test"]
    assert (train.images, train.looked_at, test.images) == (12, 12, 2)
    assert (train.num_classes, train.class_sizes, train.stored_by_class) == (2, Range(5, 6.0, 7), True)
    assert train.formats == {"PNG": 5, "JPEG": 4, "GIF": 1}  # the header of one that is cut short can be read
    assert train.modes == {"RGB": 7, "CMYK": 1, "I;16": 1, "P": 1}
    assert (train.rotated, train.animated, train.progressive) == (1, 1, 1)
    assert train.width == Range(20, 40.0, 200)
    assert train.height == Range(8, 30.0, 50)  # one stands upright: 30 x 40
    assert (train.elongated, train.below_global_size, train.below_local_size) == (1, 8, 1)
    assert train.largest_unit_bytes is None
    assert train.image_bytes is not None and train.image_bytes.smallest == 0


def test_broken_images_are_listed_with_reasons(found: Inspection, config: DataConfig) -> None:
    broken = found.splits["train"].broken
    assert [image.id for image in broken] == [7, 8, 9]
    assert [image.name for image in broken] == ["dog/0.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert set(found.splits["train"].reasons.values()) == {1}
    assert {"empty file"} < set(found.splits["train"].reasons)
    told = text(found, config)
    assert "train 9  dog/2.jpg: empty file" in told
    assert "3 unusable training images: more than data.max_bad_fraction = 0.01 allows" in told


def test_duplicates_and_leaks(found: Inspection, config: DataConfig) -> None:
    assert found.duplicates == ({"train": [0, 6], "test": [1]},)
    assert found.leaks == (("dog/0.png", "cat/0.png"),)
    assert (found.splits["train"].copies, found.splits["test"].copies) == (1, 0)
    assert "LEAK: 1 test image in the training split too\n  dog/0.png = cat/0.png" in text(found, config)


def test_speed_is_measured_and_extrapolated(found: Inspection, config: DataConfig) -> None:
    speed = found.speed
    assert speed is not None and speed.images == 9
    assert speed.decode is not None and speed.decode > speed.decode_and_crop > 0
    assert speed.cores_for(speed.decode_and_crop * 2.5) == 3
    assert speed.shrink_speedup is None
    assert "One core, measured on 9 training images" in text(found, config)


def test_json_has_everything(found: Inspection, config: DataConfig) -> None:
    content = json.loads(json.dumps(inspect_text.as_json(found, config, CROPS), allow_nan=False))
    assert content["splits"]["train"]["broken"][2] == {"id": 9, "name": "dog/2.jpg", "reason": "empty file"}
    assert content["splits"]["train"]["width"] == {"smallest": 20, "median": 40.0, "largest": 200}
    assert content["duplicates"] == [{"train": [0, 6], "test": [1]}]
    assert content["leaks"] == [{"test": "dog/0.png", "train": "cat/0.png"}]
    assert content["speed"]["cores_for_1000_per_s"] >= 1
    assert len(content["advice"]) == 2


def test_the_number_of_threads_changes_nothing(found: Inspection, config: DataConfig) -> None:
    other = look(config, threads=1)
    assert (other.splits, other.duplicates, other.digest) == (found.splits, found.duplicates, found.digest)


def test_a_limit_takes_evenly_spread_images(config: DataConfig) -> None:
    found = look(config, limit=4)
    assert [split.looked_at for split in found.splits.values()] == [4, 2]
    assert [image.id for image in found.splits["train"].broken] == [9]
    assert "looked at 6 of 14 images, evenly spread (--limit 4)" in text(found, config)
    assert evenly_spread(12, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spread(3, 64).tolist() == [0, 1, 2]
    assert evenly_spread(0, 64).tolist() == []


def test_an_interrupt_keeps_what_was_found(config: DataConfig) -> None:
    def stop_at_ninth(count: int, seen: list[int] = []) -> None:  # noqa: B006 - counts the calls
        seen.append(count)
        if len(seen) == 9:
            raise KeyboardInterrupt

    found = look(config, threads=2, advance=stop_at_ninth)
    assert found.interrupted and found.speed is None
    assert [split.looked_at for split in found.splits.values()] == [9, 0]
    assert [image.id for image in found.splits["train"].broken] == [7, 8]
    assert "INTERRUPTED after 9 of 14 images" in text(found, config)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_nothing_usable(tmp_path: Path) -> None:
    config = write(tmp_path, {"a.jpg": b"no", "b.jpg": b"image"})
    found = look(config)
    assert found.speed is None and found.splits["train"].width is None
    assert found.splits["train"].reasons == {"not an image in a format that is read": 2}
    assert "width" in text(found, config)
    json.dumps(inspect_text.as_json(found, config, CROPS), allow_nan=False)


def test_arrays_are_raw() -> None:
    config = DataConfig()
    found = look(config, limit=50)
    assert found.splits["train"].formats == {"raw": 50}
    assert found.speed is not None and found.speed.decode is None
    assert "decoding and 4 crops" in text(found, config)


def test_large_row_groups_are_slow_in_random_order(tmp_path: Path) -> None:
    big = [encoded(0) + bytes(9_000_000) for _ in range(5)]  # whatever follows a PNG is not looked at
    pq.write_table(pa.table({"image": big, "label": [0, 0, 0, 1, 1]}), tmp_path / "a.parquet", row_group_size=4)
    config = DataConfig(source=str(tmp_path))
    found = look(config)
    assert found.splits["train"].largest_unit_bytes == 4 * len(big[0])
    assert found.splits["train"].copies == 4
    assert "Row groups of up to 36 MB are slow in random order" in text(found, config)
    assert abs(look(config, limit=2).splits["train"].largest_unit_bytes / (4 * len(big[0])) - 1) < 1e-6
    windowed = DataConfig(source=str(tmp_path), shuffle="windowed", shuffle_window=4)
    told = inspect_text.advice(found, windowed, CROPS)
    assert len(told) == 1 and told[0].startswith("The images are stored class by class, and data.shuffle = windowed")


def test_shrinking_is_advised_only_where_it_was_measured_to_help() -> None:
    large = [encoded(value, "JPEG", size=(1600, 1200)) for value in range(3)]
    assert shorter_side_for(CropsConfig()) == 512
    side = shorter_side_for(CROPS)
    assert side == 128
    speed = measure_speed(large, CROPS, 10_000_000)
    assert speed.shrink_speedup is not None and speed.shrink_speedup > 1.5  # 150 times the pixels


def test_the_terminal_table_shows_odd_names(found: Inspection, config: DataConfig) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, highlight=False, markup=False)
    console.print(*inspect_text.as_rich(found, config, CROPS), sep="\n")
    assert isinstance(console.file, io.StringIO)
    assert "rotated by EXIF" in console.file.getvalue()
    assert printable("a\x1b[31m\udcff.jpg") == "a\\x1b[31m\\udcff.jpg"


def test_reasons_of_one_cause_are_one_kind() -> None:
    assert reason_kind("damaged: image file is truncated (17 bytes not processed)") == "cut short"
    assert reason_kind("too large: 9000x9000 is more than 50 pixels") == "too large"
    assert reason_kind("32-bit image with values from -1 to 7: expected 0 to 65535") == "values of unknown range"


def test_work_in_threads_keeps_its_order_and_raises() -> None:
    assert list(in_order(lambda n: n * n, range(103), 5)) == [n * n for n in range(103)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // (n - 50), range(103), 5))
    started: list[int] = []
    numbers = in_order(lambda n: started.append(n) or n, range(100_000), 2)
    assert next(numbers) == 0
    numbers.close()
    assert len(started) < 100  # what is ahead of the taker is bounded
