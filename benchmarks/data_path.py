"""From JPEG bytes to ten crops: torchvision and Pillow as in DINO's official recipe, and this project, in one process.

    python -m benchmarks.data_path --images FOLDER_OR_TAR [--json]

takes turns between the two on the same photos, one thread each, and prints images per second of CPU time and the ratio:
with everything on the CPU (up to normalised float crops), and with colour left to the model's device (packed uint8
crops). Under --json the last line is an object of the medians. README.md has figures.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop
from orchestrator.data.images import decode

_SUFFIXES = (".jpg", ".jpeg")
_MAX_PIXELS = 100_000_000
_BATCH = 16
_CONFIG = CropsConfig()
"""The paper's: two crops of 224 pixels from 40 to 100 % of the image, eight of 96 from 5 to 40 %."""


class Stages:
    """CPU milliseconds of this thread by stage, added up until `take`."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self._seconds[name] += time.thread_time() - start

    def take(self, images: int) -> dict[str, float]:
        """Milliseconds per image of each stage."""
        taken = {name: 1e3 * seconds / images for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


class OfficialTransform:
    """The augmentation of DINO's main_dino.py: torchvision's transforms on Pillow images, crop after crop."""

    def __init__(self) -> None:
        config = _CONFIG
        bicubic = transforms.InterpolationMode.BICUBIC
        global_crop = transforms.RandomResizedCrop(config.global_size, config.global_scale, interpolation=bicubic)
        local_crop = transforms.RandomResizedCrop(config.local_size, config.local_scale, interpolation=bicubic)
        self._crops = [global_crop] * 2 + [local_crop] * config.num_local_crops
        jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        self._colour = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(config.flip_prob),
                transforms.RandomApply([jitter], config.jitter_prob),
                transforms.RandomGrayscale(config.grayscale_prob),
            ]
        )
        self._normalise = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(config.mean, config.std)],
        )

    def __call__(self, data: bytes, stages: Stages) -> list[Tensor]:
        """JPEG bytes -> ten float32 tensors [3, H, W]."""
        with stages("decode"):
            image = Image.open(io.BytesIO(data)).convert("RGB")
        crops = []
        for index, crop in enumerate(self._crops):
            with stages("crop"):
                view = crop(image)
            with stages("colour"):
                view = self._colour(view)
                if random.random() < _CONFIG.blur_prob[min(index, 2)]:
                    view = view.filter(ImageFilter.GaussianBlur(random.uniform(*_CONFIG.blur_sigma)))
                if index == 1 and random.random() < _CONFIG.solarize_prob:
                    view = ImageOps.solarize(view)
            with stages("normalise"):
                crops.append(self._normalise(view))
        return crops


def official(photos: Sequence[bytes], stages: Stages) -> None:
    """What a data worker of the official recipe does, except for collating the batch."""
    transform = OfficialTransform()
    for data in photos:
        transform(data, stages)


def ours_on_cpu(photos: Sequence[bytes], stages: Stages) -> None:
    """The same up to normalised float32 batches, with `crops.device = cpu`."""
    crops = MultiCrop(_CONFIG, seed=0)
    for images, ids in _decoded(photos, stages):
        with stages("crop and colour"):
            arrays = crops.make(images, np.zeros_like(ids), ids)
        with stages("normalise"):
            crops.finish(arrays, "cpu")


def ours_for_device(photos: Sequence[bytes], stages: Stages) -> None:
    """What is left to the CPU with `crops.device = accelerator`: decode, cut, resize, pack as uint8."""
    crops = MultiCrop(replace(_CONFIG, device="accelerator"), seed=0)
    for images, ids in _decoded(photos, stages):
        with stages("crop"):
            crops.make(images, np.zeros_like(ids), ids)


def _decoded(photos: Sequence[bytes], stages: Stages) -> Iterator[tuple[list[NDArray[np.uint8]], NDArray[np.int64]]]:
    for start in range(0, len(photos), _BATCH):
        with stages("decode"):
            images = [decode(data, _MAX_PIXELS) for data in photos[start : start + _BATCH]]
        yield images, np.arange(start, start + len(images))


def batched_tail_ms(photos: Sequence[bytes], device: torch.device) -> float:
    """Milliseconds per image that `finish` takes on `device`, copying included; on a CPU, of one core's time."""
    crops = MultiCrop(replace(_CONFIG, device="accelerator"), seed=0)
    images = [decode(data, _MAX_PIXELS) for data in photos]
    ids = np.arange(len(images))
    arrays = crops.make(images, np.zeros_like(ids), ids)
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(4):  # the first one warms up
        start = clock()
        batch = crops.finish(arrays, device)
        batch.global_crops[0, 0, 0, 0].item()  # waits
        seconds.append(clock() - start)
    return 1e3 * min(seconds[1:]) / len(images)


def read_photos(path: Path, most: int) -> list[bytes]:
    """The first `most` JPEG files of a folder (with its subfolders) or tar archive, in order of their names."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        return [file.read_bytes() for file in files[:most]]
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile() and member.name.lower().endswith(_SUFFIXES)]
        members = sorted(members, key=lambda member: member.name)[:most]
        return [data.read() for member in members if (data := archive.extractfile(member)) is not None]


Rounds = dict[str, list[dict[str, float]]]
"""By path, milliseconds per image of each stage in each round."""

PATHS: dict[str, Callable[[Sequence[bytes], Stages], None]] = {
    "official": official,
    "cpu": ours_on_cpu,
    "device": ours_for_device,
}


def measure(photos: Sequence[bytes], rounds: int) -> Rounds:
    """All paths in turn, `rounds` times, after one turn that does not count."""
    measured: Rounds = {name: [] for name in PATHS}
    stages = Stages()
    for turn in range(rounds + 1):
        for name, path in PATHS.items():
            random.seed(turn)
            torch.manual_seed(turn)
            path(photos, stages)
            taken = stages.take(len(photos))
            if turn:
                measured[name].append(taken)
    return measured


def report(measured: Rounds, tail_ms: float, device: torch.device) -> dict[str, float]:
    """Print medians and spreads; return what --json prints."""
    totals = {name: [sum(stages.values()) for stages in rounds] for name, rounds in measured.items()}
    result = {}
    for name, milliseconds in totals.items():
        speeds = [1e3 / value for value in milliseconds]
        result[f"{name}_images_per_s"] = statistics.median(speeds)
        print(f"{name:<9} {_spread(speeds)} images/s of one core, {statistics.median(milliseconds):.2f} ms/image:")
        for stage in measured[name][0]:
            print(f"    {stage:<16} {statistics.median(stages[stage] for stages in measured[name]):6.2f} ms")
    for name in ("cpu", "device"):
        ratios = [theirs / ours for theirs, ours in zip(totals["official"], totals[name], strict=True)]
        result[f"ratio_{name}"] = statistics.median(ratios)
        print(f"official / {name:<6} {_spread(ratios)}")
    print(f"the batched tail, on {device}: {tail_ms:.3f} ms/image beside the model")
    return result | {"tail_ms_per_image": tail_ms}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder or .tar of JPEG photos")
    parser.add_argument("--num-images", type=int, default=64, help="how many of them (64)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each path (7)")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON on the last line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    photos = read_photos(options.images, options.num_images)
    if not photos:
        parser.error(f"--images {options.images}: no {' or '.join(_SUFFIXES)} file in it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = report(measure(photos, options.rounds), batched_tail_ms(photos, device), device)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
